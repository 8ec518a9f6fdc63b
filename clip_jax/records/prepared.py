"""A prepared TFDS set in ArrayRecord files, read without TensorFlow."""

import pathlib
from collections.abc import Sequence

import tensorflow_datasets as tfds

from clip_jax.errors import BadSample, UserError
from clip_jax.records import Place, Record, unreadable


class Prepared:
    """One split of a set, pictures still encoded."""

    def __init__(self, folder: str, split: str):
        path = pathlib.Path(folder).expanduser()
        if not (path / "dataset_info.json").is_file():
            found = "no such folder" if not path.is_dir() else "neither a dataset_info.json nor a picture in it"
            raise UserError(
                f"data set {folder}: expected the folder of a prepared TFDS set, or of pictures; found {found}; see config.data.sets"
            )
        builder = tfds.builder_from_directory(path)
        if split not in builder.info.splits:
            known = ", ".join(builder.info.splits) or "none"
            raise UserError(f"data set {folder}: no split {split!r}; the splits are {known}; see config.data.split")
        if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            raise UserError(
                f"data set {folder}: expected ArrayRecord files, found {builder.info.file_format.value}; "
                "prepare it again with file_format='array_record'"
            )
        if not builder.info.splits[split].num_examples:
            raise UserError(f"data set {folder}: split {split!r} is empty, expected at least one record")
        pictures = [name for name, feature in builder.info.features.items() if isinstance(feature, tfds.features.Image)]
        self.source = builder.as_data_source(split, decoders={name: tfds.decode.SkipDecoding() for name in pictures})
        self.shard, self.broken = f"{folder} split {split}", []

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: Sequence[int]) -> list[Record | BadSample]:
        try:
            return list(self.source.__getitems__([int(i) for i in indices]))
        except Exception as error:  # of ArrayRecord, TFDS or a protocol buffer, of no common kind
            if len(indices) == 1:
                return [unreadable(self.place(indices[0]), error)]
            return [record for i in indices for record in self.read([i])]

    def place(self, index: int) -> Place:
        return Place(self.shard, f"record {index}")
