"""The embedded tasks: emoji of an illustrator whom training never saw."""

import dataclasses
import functools
import importlib.resources

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from jaxtyping import Int

from clip_jax import images
from clip_jax.data import texts
from clip_jax.records.prepared import Prepared

EMOJI_TEMPLATES = (
    "{}",
    "a picture of {}",
    "an icon of {}",
    "{} emoji",
    "an emoji of {}",
    "a drawing of {}",
    "the {} symbol",
)


@dataclasses.dataclass(frozen=True)
class Emoji:
    """The pictures of a vendor that training never saw, each with its name."""

    pictures: list[PIL.Image.Image]
    labels: Int[np.ndarray, "N"]  # into `class_names`
    held_out: Int[np.ndarray, "M"]  # the pictures whose emoji no vendor showed in training, flags aside
    class_names: list[str]  # of all emoji, 1,911

    @property
    def names(self) -> list[str]:
        """The name of each picture."""
        return [self.class_names[label] for label in self.labels]


@functools.cache
def load_emoji(vendor: str = "fluent", split: str = "test") -> Emoji:
    """The embedded test set, or another vendor's pictures.

    To tune a recipe, leave a vendor out of `config.data.sets` and measure on it:
    `load_emoji("noto_v1", "train")`.  Fluent is for the end.
    """
    folder = str(importlib.resources.files("clip_jax") / "emoji" / vendor / "1.0.0")
    seen, unseen = (records.read(range(len(records))) for records in (Prepared(folder, split), Prepared(folder, "held_out")))
    rows = seen + unseen
    pictures = [images.on_background(images.decode(row["image"], folder)) for row in rows]
    # The name of a country cannot be inferred from a flag that was never shown.
    held_out = [
        i for i, row in enumerate(rows) if i >= len(seen) and texts(row["subgroup"]) != ["country-flag"]
    ]
    names = tfds.builder_from_directory(folder).info.features["label"].names
    return Emoji(pictures, np.array([row["label"] for row in rows]), np.array(held_out), names)
