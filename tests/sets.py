"""Small prepared data sets, made for real by TFDS, without TensorFlow."""

import io
import pathlib

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds


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
