"""Small data sets, made for real: prepared by TFDS without TensorFlow, tars, and pictures."""

import io
import pathlib
import tarfile

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from clip_jax.config import default_config
from clip_jax.tokenizer import decode


def picture(seed: int, size: int = 24, mode: str = "RGB") -> bytes:
    """A PNG of random pixels."""
    channels = len(mode)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, channels), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class Pairs(tfds.core.GeneratorBasedBuilder):
    """Pictures with captions, as they are given."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, records: list[dict], **kwargs):
        self.records = records
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"image": tfds.features.Image(), "caption": tfds.features.Text(), "thing": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for key, record in enumerate(self.records):
            yield key, record | {"image": io.BytesIO(record["image"])}


def prepare(folder: pathlib.Path, records: list[dict]) -> str:
    """Prepares a set of records {image, caption, thing}; returns its folder."""
    builder = Pairs(records=records, data_dir=folder, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return str(builder.data_path)


def records(count: int) -> list[dict]:
    """Pairs that differ."""
    return [{"image": picture(i), "caption": f"picture {i}", "thing": f"thing {i}"} for i in range(count)]


FIELDS = ("image", "caption")
Members = list[tuple[str, bytes]]


def jpeg(seed: int, kind: str = "JPEG", size: int = 40) -> bytes:
    file = io.BytesIO()
    PIL.Image.open(io.BytesIO(picture(seed, size))).save(file, kind)
    return file.getvalue()


def tar(path: pathlib.Path, members: Members) -> str:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as file:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return str(path)


def good(names: list[str]) -> Members:
    return [(f"{name}.{end}", data) for i, name in enumerate(names) for end, data in (("jpg", jpeg(i)), ("txt", name.encode()))]


def config_of(*sets: str, batch: int = 4, **data):
    config = default_config()
    config.batch_size, config.model.vision.image_size = batch, 32
    config.model.vision.patch_size, config.model.text.context_length = 8, 32
    config.data.update({"sets": sets, "threads": 0, "prefetch": 0} | data)
    return config


def captions(tokens: np.ndarray) -> list[str]:
    return [decode([i for i in row[1:].tolist() if i not in (0, 49407)]).strip() for row in tokens]


def every(records) -> list:
    return records.read(range(len(records)))


def check_five(records) -> None:
    assert len(records) == 5
    assert [record["image"] for record in every(records)] == [jpeg(i) for i in range(5)]
    as_text = lambda caption: caption.decode() if isinstance(caption, bytes) else caption
    assert [as_text(record["caption"]) for record in every(records)] == [f"number {i}" for i in range(5)]
    assert records.broken == []
    assert [record["image"] for record in records.read([3, 1])] == [jpeg(3), jpeg(1)]
