"""Zero-shot classification and retrieval.

Protocol of openai/CLIP (`Prompt_Engineering_for_ImageNet.ipynb`): every template of a class is encoded
and normalised, their mean is normalised again, and a picture belongs to the class of highest cosine.
"""

import dataclasses
import functools
import importlib.resources
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from flax import nnx
from jaxtyping import Float, Int, UInt8

from clip_jax import images
from clip_jax.data import texts
from clip_jax.errors import UserError
from clip_jax.models import CLIP
from clip_jax.models.clip import l2_normalize
from clip_jax.records.prepared import Prepared
from clip_jax.tokenizer import Tokenizer, tokenize

BATCH = 256  # pictures or texts encoded at once, unless told otherwise

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


class Encoder:
    """A model's encoders over any number of pictures or texts, in batches of one size, compiled once."""

    def __init__(self, model: CLIP, batch_size: int = BATCH, tokenizer: Tokenizer | None = None):
        """`tokenizer` is what `clip_jax.get_tokenizer` gives for the model; texts for a SigLIP need it."""
        self.config, self.batch_size = model.config, batch_size
        if tokenizer is None and self.config.tokenizer == "openai":
            tokenizer = functools.partial(tokenize, context_length=self.config.text.context_length)
        self.tokenizer = tokenizer
        graphdef, self.variables = nnx.split(model)

        @jax.jit
        def encode_images(variables, pixels: UInt8[jax.Array, "B H W 3"]):
            model = nnx.merge(graphdef, variables)
            model.eval()
            x = images.normalize(pixels, model.config.image_mean, model.config.image_std)
            return model.encode_image(x, normalize=True)

        @jax.jit
        def encode_texts(variables, tokens: Int[jax.Array, "B T"]):
            return nnx.merge(graphdef, variables).encode_text(tokens, normalize=True)

        self._encode_images, self._encode_texts = encode_images, encode_texts

    def images(self, pictures: list[PIL.Image.Image]) -> Float[np.ndarray, "N E"]:
        """Normalised features of pictures, preprocessed as evaluation does."""
        preprocess = images.Preprocess.of(self.config)
        return self.pixels(np.stack([preprocess.pixels(picture) for picture in pictures]))

    def pixels(self, pixels: UInt8[np.ndarray, "N S S 3"]) -> Float[np.ndarray, "N E"]:
        """Normalised features of what `Preprocess.pixels` made."""
        return self._batched(self._encode_images, pixels)

    def texts(self, texts: list[str], truncate: bool = True) -> Float[np.ndarray, "N E"]:
        """Normalised features of texts; one that is too long loses its end, or is an error."""
        if self.tokenizer is None:
            raise UserError(f"{self.config.name}: its vocabulary comes with its weights; pass tokenizer=clip_jax.get_tokenizer(...)")
        return self._batched(self._encode_texts, self.tokenizer(texts, truncate=truncate))

    def _batched(self, encode: Any, rows: np.ndarray) -> Float[np.ndarray, "N E"]:
        size = self.batch_size
        padded = np.concatenate([rows, np.zeros((-len(rows) % size, *rows.shape[1:]), rows.dtype)])
        features = [np.asarray(encode(self.variables, padded[i : i + size])) for i in range(0, len(padded), size)]
        return np.concatenate(features)[: len(rows)]


def zero_shot_classifier(encoder: Encoder, names: list[str], templates: tuple[str, ...]) -> Float[np.ndarray, "C E"]:
    """One normalised text feature a class: the mean over its prompts."""
    prompts = [template.format(name) for name in names for template in templates]
    features = encoder.texts(prompts).reshape(len(names), len(templates), -1)
    return np.asarray(l2_normalize(jnp.asarray(features.mean(axis=1))))


def ranks(similarity: Float[np.ndarray, "N C"], targets: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
    """How many others score at least as high as the target; a tie counts against it."""
    own = similarity[np.arange(len(similarity)), targets]
    return (similarity >= own[:, None]).sum(axis=1) - 1


def classification_metrics(
    image_features: Float[np.ndarray, "N E"], classifier: Float[np.ndarray, "C E"], labels: Int[np.ndarray, "N"]
) -> dict[str, float]:
    """`acc1` and `acc5`, shares of the pictures, and what chance would give."""
    rank = ranks(image_features @ classifier.T, labels)
    metrics = {}
    for k in (1, 5):
        metrics |= {f"acc{k}": float((rank < k).mean()), f"acc{k}_chance": min(1.0, k / len(classifier))}
    return metrics


def retrieval_metrics(
    image_features: Float[np.ndarray, "N E"], text_features: Float[np.ndarray, "N E"]
) -> dict[str, float]:
    """Recall at 1, 5 and 10 for pairs.  `image_retrieval` finds the picture of a text, `text_retrieval` the text."""
    similarity, pairs = image_features @ text_features.T, np.arange(len(image_features))
    metrics = {}
    for direction, rank in (("image", ranks(similarity.T, pairs)), ("text", ranks(similarity, pairs))):
        for k in (1, 5, 10):
            name = f"{direction}_retrieval_recall@{k}"
            metrics |= {name: float((rank < k).mean()), f"{name}_chance": min(1.0, k / len(pairs))}
    return metrics


def evaluate_emoji(model: CLIP, pretrained: str, emoji: Emoji | None = None) -> list[dict]:
    """The embedded tasks, as CLIP_benchmark records.

    Args:
      pretrained: where the weights come from, for the records.
      emoji: other pictures than the test vendor's.
    """
    emoji = emoji or load_emoji()
    encoder = Encoder(model)
    image_features = encoder.images(emoji.pictures)
    classifier = zero_shot_classifier(encoder, emoji.class_names, EMOJI_TEMPLATES)
    held_out_names = encoder.texts([emoji.names[i] for i in emoji.held_out])
    tasks = {
        ("emoji_fluent", "zeroshot_classification"): classification_metrics(image_features, classifier, emoji.labels),
        ("emoji_held_out", "zeroshot_retrieval"): retrieval_metrics(image_features[emoji.held_out], held_out_names),
    }
    return [
        {
            "dataset": dataset,
            "model": model.config.name,
            "pretrained": pretrained,
            "task": task,
            "metrics": metrics,
            "language": "en",
        }
        for (dataset, task), metrics in tasks.items()
    ]


def format_table(records: list[dict]) -> str:
    """The records for people: a line a number, with chance beside it."""
    lines = [f"{'data set':<16}{'measure':<28}{'result':>9}{'chance':>9}"]
    for record in records:
        metrics = record["metrics"]
        for name in (name for name in metrics if not name.endswith("_chance")):
            result, chance = f"{metrics[name]:.2%}", f"{metrics[name + '_chance']:.2%}"
            lines.append(f"{record['dataset']:<16}{name:<28}{result:>9}{chance:>9}")
    return "\n".join(lines)


def write_results(file: pathlib.Path, records: list[dict]) -> None:
    """Writes the records as JSON."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(records, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--output={file}: cannot be written ({error.strerror}); take another path") from error
