"""Measuring a model on one set after the other: features, zero-shot, and probes on the features."""

import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image
import tqdm
from flax import nnx
from jaxtyping import Float, Int

from clip_jax import images
from clip_jax.digest import digests
from clip_jax.distributed import is_first
from clip_jax.errors import UserError
from clip_jax.evaluation.classifier import class_ranks, zero_shot_classifier
from clip_jax.evaluation.emoji import EMOJI_TEMPLATES, Emoji, load_emoji
from clip_jax.evaluation.encoder import Encoder, picture_of
from clip_jax.evaluation.names import TASKS
from clip_jax.evaluation.probe import few_shot, knn, linear_probe
from clip_jax.evaluation.report import Classified, Retrieved
from clip_jax.evaluation.results import record_of
from clip_jax.evaluation.scores import classification_metrics, retrieval_metrics
from clip_jax.evaluation.sets import CaptionedSet, LabelledSet, open_set

SUITES = {
    "emoji": ("emoji",),
    "vtab+": tuple(name for name, task in TASKS.items() if task.kind == "classification" and name != "photographs"),
    "imagenet-robustness": ("imagenet2012", "imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch"),
    "retrieval": tuple(name for name, task in TASKS.items() if task.kind == "retrieval"),
    "all": ("emoji", *TASKS),
}
SHOTS = (1, 2, 4, 8, 16)  # samples a class, as far as a set has them
NEAREST = 5  # pictures or texts that a report shows
SHOWN = 32  # pictures of a similarity map

Part = Classified | Retrieved


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What is measured, and how."""

    encoder: Encoder
    model: str
    pretrained: str
    data_dir: str | None = None
    probes: tuple[str, ...] = ()  # of "linear", "knn", "few_shot", which take a training split
    cache: pathlib.Path | None = None  # where features are kept
    pooled: bool = False  # probes see features before the projection

    def of(self, task: str) -> tuple[list[dict[str, Any]], list[Part]]:
        """The records of a task, and what a report shows of it."""
        if task == "emoji":
            return self.emoji(load_emoji())
        found = open_set(task, self.data_dir)
        features = self.features(found)
        if isinstance(found, CaptionedSet):
            return self._retrieved(found.name, found.captions, found.read, features)
        records, parts = self._classified(found, features)
        if self.probes:
            train = open_set(task, self.data_dir, "train")
            seen = self.features(found, pooled=True) if self.pooled else features
            records += self._probed(found, seen, train, self.features(train, self.pooled))
        return records, parts

    def features(self, of: LabelledSet | CaptionedSet, pooled: bool = False) -> Float[np.ndarray, "N E"]:
        """The features of a set's pictures, from the cache if they are there: of these pictures, by these weights."""
        count = len(of.labels if isinstance(of, LabelledSet) else of.captions)
        kept = self.cache / f"{self._key(of, count)}{'-pooled' * pooled}.npy" if self.cache else None
        if kept is not None and kept.is_file():
            return np.load(kept, allow_pickle=False)
        with tqdm.tqdm(desc=of.name, total=count, unit="picture", disable=not is_first() or not sys.stderr.isatty()) as bar:
            features = self.encoder.read(count, of.read, bar.update, of.where, pooled)
        if kept is not None and is_first():
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as beside:
                np.save(beside, features)
            os.replace(beside.name, kept)
        return features

    def _key(self, of: LabelledSet | CaptionedSet, count: int) -> str:
        """A SHA-256 of every picture's bytes, of how they are prepared, and of the weights' digests."""
        digest = hashlib.sha256()
        preprocess = dataclasses.asdict(images.Preprocess.of(self.encoder.config))
        weights = digests(nnx.to_pure_dict(self.encoder.variables))
        digest.update(json.dumps([preprocess, weights, self.encoder.config.to_dict()], sort_keys=True).encode())
        for start in range(0, count, 256):
            for picture in of.read(range(start, min(start + 256, count))):
                digest.update(hashlib.sha256(np.ascontiguousarray(picture) if isinstance(picture, np.ndarray) else picture).digest())
        return digest.hexdigest()[:32]

    def _record(self, dataset: str, task: str, metrics: dict[str, Any]) -> dict[str, Any]:
        return record_of(dataset, self.model, self.pretrained, task, metrics)

    def emoji(self, emoji: Emoji) -> tuple[list[dict[str, Any]], list[Part]]:
        """The embedded task, or that with the pictures of another vendor."""
        read = lambda numbers: [emoji.pictures[i] for i in numbers]
        every = LabelledSet("emoji_fluent", "emoji", emoji.class_names, EMOJI_TEMPLATES, emoji.labels, read)
        features = self.encoder.images(emoji.pictures)
        records, parts = self._classified(every, features)
        names, held_out = emoji.names, emoji.held_out
        of_held_out = lambda numbers: [emoji.pictures[held_out[i]] for i in numbers]
        found = self._retrieved("emoji_held_out", [[names[i]] for i in held_out], of_held_out, features[held_out])
        return records + found[0], parts + found[1]

    def _classified(self, of: LabelledSet, features: Float[np.ndarray, "N E"]) -> tuple[list[dict[str, Any]], list[Part]]:
        classifier = zero_shot_classifier(self.encoder, of.class_names, of.templates)
        ranks = class_ranks(self.encoder, features, classifier, of.labels)
        predictions, margins = np.empty(len(features), int), np.empty(len(features), np.float32)
        for start in range(0, len(features), 1024):
            rows = np.arange(start, min(start + 1024, len(features)))
            cosines = features[rows] @ classifier.T
            predictions[rows] = cosines.argmax(axis=1)
            own = cosines[rows - start, of.labels[rows]].copy()
            cosines[rows - start, of.labels[rows]] = -np.inf
            margins[rows] = own - cosines.max(axis=1)
        metrics = classification_metrics(ranks, of.labels, len(of.class_names))
        part = Classified(of.name, of.class_names, of.labels, predictions, margins, _shown(of.read))
        return [self._record(of.name, "zeroshot_classification", metrics)], [part]

    def _retrieved(
        self, name: str, captions: list[list[str]], read: Callable, features: Float[np.ndarray, "N E"]
    ) -> tuple[list[dict[str, Any]], list[Part]]:
        texts = [text for several in captions for text in several]
        owners = np.repeat(np.arange(len(captions)), [len(several) for several in captions])
        text_features = self.encoder.texts(texts)
        metrics = retrieval_metrics(features, text_features, owners, self.encoder.mesh)
        first = np.searchsorted(owners, np.arange(min(SHOWN, len(captions))))
        part = Retrieved(
            name,
            texts,
            owners,
            _nearest(text_features, features),
            _nearest(features, text_features),
            _shown(read),
            features[: len(first)] @ text_features[first].T,
        )
        return [self._record(name, "zeroshot_retrieval", metrics)], [part]

    def _probed(
        self, test: LabelledSet, features: Float[np.ndarray, "N E"], train: LabelledSet, train_features: Float[np.ndarray, "M E"]
    ) -> list[dict[str, Any]]:
        if train.class_names != test.class_names:
            raise UserError(f"{train.where}: expected the classes of {test.where}, found others; prepare both again")
        given = train_features, train.labels, features, test.labels, len(test.class_names)
        records = []
        if "linear" in self.probes:
            records.append(self._record(test.name, "linear_probe", linear_probe(*given)))
        if "knn" in self.probes:
            records.append(self._record(test.name, "knn", knn(*given)))
        if "few_shot" in self.probes:
            fewest = int(np.bincount(train.labels, minlength=len(train.class_names)).min())
            by_shots = few_shot(*given, shots=tuple(n for n in SHOTS if n <= max(1, fewest))).items()
            few = {f"{shots}_shot_{name.removeprefix('lp_')}": value for shots, metrics in by_shots for name, value in metrics.items()}
            records.append(self._record(test.name, "few_shot", few))
        return records


def _shown(read: Callable[[Sequence[int]], list]) -> Callable[[int], PIL.Image.Image]:
    def picture(number: int) -> PIL.Image.Image:
        (found,) = read([number])
        return images.on_background(picture_of(found, f"picture {number}"))

    return picture


def _nearest(queries: Float[np.ndarray, "N E"], keys: Float[np.ndarray, "M E"]) -> Int[np.ndarray, "N K"]:
    found = []
    for start in range(0, len(queries), 256):
        cosines = queries[start : start + 256] @ keys.T
        best = np.argpartition(-cosines, min(NEAREST, len(keys)) - 1, axis=1)[:, :NEAREST]
        order = np.argsort(-np.take_along_axis(cosines, best, 1), axis=1, kind="stable")
        found.append(np.take_along_axis(best, order, 1))
    return np.concatenate(found)
