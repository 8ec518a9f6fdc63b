"""From prepared TFDS sets to batches: which pair comes when, and what is drawn for it.

A batch is a pure function of (seed, step).  One pass draws every example once, in a new order each
time; what is left over at the end of a pass, less than a batch, is dropped, so that a batch never
holds an example twice.  Grain makes the batches ahead of time, in threads, and keeps the position.
"""

import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from clip_jax import images
from clip_jax.errors import UserError
from clip_jax.tokenizer import tokenize


class Records:
    """Random access to the records of prepared TFDS sets, one set after the other, pictures still encoded."""

    def __init__(self, folders: tuple[str, ...], split: str):
        self.folders = folders
        self.split = split
        self.parts = [_open_set(folder, split) for folder in folders]
        self.starts = np.cumsum([0] + [len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, place = self._locate(index)
        return self.parts[part][place]

    def where(self, index: int) -> str:
        """Names a record, for errors."""
        part, place = self._locate(index)
        return f"{self.folders[part]} split {self.split} record {place}"

    def _locate(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return part, int(index - self.starts[part])


def texts(value: Any) -> list[str]:
    """The texts of a record's field, which holds one or several; stripped, the empty ones left out."""
    values = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
    stripped = [(v.decode() if isinstance(v, bytes) else str(v)).strip() for v in values]
    return [text for text in stripped if text]


def _open_set(folder: str, split: str):
    path = pathlib.Path(folder).expanduser()
    if not (path / "dataset_info.json").is_file():
        found = "no such folder" if not path.is_dir() else "no dataset_info.json in it"
        raise UserError(f"data set {folder}: expected the folder of a prepared TFDS set, found {found}; see config.data.sets")
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
    return builder.as_data_source(split, decoders={name: tfds.decode.SkipDecoding() for name in pictures})


class TrainingBatches:
    """Random access to the endless batches of a run, by step; or to some rows of each, on one of several hosts."""

    def __init__(self, config: ConfigDict, rows: Sequence[int] | None = None):
        data = config.data
        self.records = Records(data.sets, data.split)
        self.data = data
        self.seed = config.seed
        self.batch_size = config.batch_size
        self.rows = range(self.batch_size) if rows is None else rows
        self.augmentation = images.Augmentation(**data.augment)
        self.image_size = config.model.vision.image_size
        self.context_length = config.model.text.context_length
        for field in filter(None, (data.image, data.caption, data.group, data.keywords)):
            if field not in self.records[0]:
                raise UserError(
                    f"{self.records.where(0)}: no field {field!r}; the fields are {', '.join(self.records[0])}; "
                    "see config.data.image, caption, group and keywords"
                )
        # An example is a record, or a group of records that show the same thing.
        groups = {}
        for index in range(len(self.records)):
            key = texts(self.records[index][data.group])[0] if data.group else index
            groups.setdefault(key, []).append(index)
        self.examples = list(groups.values())
        if len(self.examples) < self.batch_size:
            raise UserError(
                f"config.batch_size is {self.batch_size}, but {', '.join(data.sets)} split {data.split} has "
                f"{len(self.examples)} examples, expected at least one batch; lower config.batch_size"
            )
        self._order = functools.lru_cache(maxsize=2)(self._order)
        if data.cache:
            self._read = functools.cache(self._read)

    def __len__(self) -> int:
        return 2**62  # Grain wants to know; a run ends by its number of steps.

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step, from 0: `image` uint8 [B, S, S, 3] and `tokens` int32 [B, T].

        Every host draws for the whole batch, so that it is the same batch on any number of hosts.
        """
        batches_a_pass = len(self.examples) // self.batch_size
        past, place = divmod(int(step), batches_a_pass)
        drawn = self._order(past)[place * self.batch_size : (place + 1) * self.batch_size]
        rng = np.random.default_rng((self.seed, 1, step))
        members = rng.random(self.batch_size)
        pictures, captions, own = [], [], set(self.rows)
        for row, (example, member) in enumerate(zip(drawn, members, strict=True)):
            group = self.examples[example]
            index = group[int(member * len(group))]
            if row not in own:
                self._caption([""], self._keywords(self.records[index]) if self.data.keywords else [], rng)
                continue
            picture, captions_of_it, keywords = self._read(index)
            pictures.append(picture)
            captions.append(self._caption(captions_of_it, keywords, rng))
        draws = images.augmentation_draws(self.batch_size, rng)[list(self.rows)]
        pixels = images.augment(pictures, self.image_size, self.augmentation, draws)
        # As OpenAI trained: a caption that is too long loses its end, and keeps its EOT.
        return {"image": pixels, "tokens": tokenize(captions, self.context_length, truncate=True)}

    def _order(self, past: int) -> np.ndarray:
        """The order of the examples in the pass after `past` others."""
        return np.random.default_rng((self.seed, 0, past)).permutation(len(self.examples))

    def _read(self, index: int) -> tuple[PIL.Image.Image, list[str], list[str]]:
        """The picture, the captions and the keywords of a record."""
        record, where = self.records[index], self.records.where(index)
        captions = texts(record[self.data.caption])
        if not captions:
            raise UserError(
                f"{where} field {self.data.caption!r}: expected a caption, found an empty one; mend or remove this record"
            )
        image = images.decode(record[self.data.image], f"{where} field {self.data.image!r}")
        if self.data.cache:  # In memory no pixel is kept that training would not see.
            image = images.premultiplied(image) if images.has_alpha(image) else image.convert("RGB")
            image = image.resize((self.image_size, self.image_size), PIL.Image.BICUBIC)
        return image, captions, self._keywords(record)

    def _keywords(self, record: dict[str, Any]) -> list[str]:
        return texts(record[self.data.keywords]) if self.data.keywords else []

    def _caption(self, captions: list[str], keywords: list[str], rng: np.random.Generator) -> str:
        which, kind, both, whether, template = rng.random(5).tolist()
        caption = captions[int(which * len(captions))]
        data = self.data
        if keywords and kind < data.keyword_rate:
            drawn = list(rng.permutation(keywords)[: rng.integers(1, 4)])
            return ", ".join([caption, *drawn] if both < 0.5 else drawn)
        if whether < data.template_rate:
            return data.templates[int(template * len(data.templates))].format(caption)
        return caption


def training_batches(config: ConfigDict, rows: Sequence[int] | None = None) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches, or these `rows` of each: `image` uint8 [B, S, S, 3] and `tokens` int32 [B, T].

    The iterator has `get_state()` and `set_state()`: the position, a small dictionary, whose
    restoring costs the same at any step.
    """
    options = grain.ReadOptions(num_threads=config.data.threads, prefetch_buffer_size=config.data.prefetch)
    return iter(grain.MapDataset.source(TrainingBatches(config, rows)).to_iter_dataset(options))
