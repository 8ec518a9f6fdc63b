"""Measuring a model on one set after the other: features, zero-shot, and probes on the features."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import numpy as np
import PIL.Image
import tqdm
from flax import nnx
from jaxtyping import Float, Int

from clip_jax import images
from clip_jax.digest import digests
from clip_jax.distributed import all_agree, errors_on_all, is_first, wait_for_all
from clip_jax.errors import UserError, warn
from clip_jax.evaluation.classifier import class_ranks, zero_shot_classifier
from clip_jax.evaluation.emoji import EMOJI_TEMPLATES, Emoji, load_emoji
from clip_jax.evaluation.encoder import Encoder, picture_of
from clip_jax.evaluation.knn import knn
from clip_jax.evaluation.names import TASKS
from clip_jax.evaluation.probe import few_shot, linear_probe
from clip_jax.evaluation.report import Classified, Retrieved, some_of
from clip_jax.evaluation.results import record_of
from clip_jax.evaluation.scores import classification_metrics, retrieval_metrics
from clip_jax.evaluation.sets import CaptionedSet, LabelledSet, open_set
from clip_jax.files import whole_or_not

# Of CLIP_benchmark's vtab+ all but voc2007_multilabel, whose pictures have several labels, which is another measure.
NOT_IN_VTAB = ("photographs", "food101")
SUITES = {
    "emoji": ("emoji",),
    "vtab+": tuple(name for name, task in TASKS.items() if task.kind == "classification" and name not in NOT_IN_VTAB),
    "imagenet-robustness": ("imagenet2012", "imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", "objectnet"),
    "retrieval": tuple(name for name, task in TASKS.items() if task.kind == "retrieval"),
    "all": ("emoji", *TASKS),
}
PROBES = {"linear": "linear_probe", "knn": "knn", "few_shot": "few_shot"}  # and what their records call them
ZERO_SHOT = ("zeroshot_classification", "zeroshot_retrieval")
KINDS = (*ZERO_SHOT, *PROBES.values())
NEIGHBOURS = 20  # of k-NN, where there are as many training pictures
SHOTS = (1, 2, 4, 8, 16)  # samples a class, as far as a set has them
NEAREST = 5  # pictures or texts that a report shows
SHOWN = 32  # pictures of a similarity map

Part = Classified | Retrieved
Results = Iterator[tuple[dict[str, Any], Part | None]]  # records, each with what a report shows of it


class Unsuitable(UserError):
    """A set that cannot be measured, as all processes know: another one can be."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What is measured, and how."""

    encoder: Encoder
    model: str
    pretrained: str
    data_dir: str | None = None
    probes: tuple[str, ...] = ()  # of PROBES, which take a training split
    cache: pathlib.Path | None = None  # where features are kept
    pooled: bool = False  # probes see features before the projection

    @functools.cached_property
    def weights(self) -> str:
        """By what results and features are known to be of this model: a SHA-256 of its configuration and its weights' digests."""
        known = [self.encoder.config.to_dict(), digests(nnx.to_pure_dict(self.encoder.variables))]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]

    def of(self, task: str, done: Set[str] = frozenset()) -> Results:
        """The results of a task, one after the other: zero-shot, then the probes.

        Args:
          done: the KINDS of results that are not wanted.

        Raises:
          Unsuitable: the set, or its training split, is not there or not sound.  What came before holds.
        """
        if task == "emoji":
            yield from self.emoji(load_emoji(), done)
            return
        probes = [probe for probe in self.probes if PROBES[probe] not in done]
        if not probes and not done.isdisjoint(ZERO_SHOT):
            return
        with _on_all():
            found = open_set(task, self.data_dir)
        captioned = isinstance(found, CaptionedSet)
        features = functools.cache(lambda: self.features(found))
        if captioned and "zeroshot_retrieval" not in done:
            yield self._retrieved(task, found.name, found.captions, found.read, features())
        if not captioned and "zeroshot_classification" not in done:
            yield self._classified(task, found, features())
        if probes and captioned:
            _say(f"{task}: no probes, for its pictures have captions and no classes")
        elif probes:
            with _on_all():
                train = self._train(task, found)
            seen, learnt_from = self.features(found, pooled=True) if self.pooled else features(), self.features(train, self.pooled)
            for probe in probes:
                yield self._probed(task, probe, found, seen, train, learnt_from), None

    def _train(self, task: str, test: LabelledSet) -> LabelledSet:
        train = open_set(task, self.data_dir, "train")
        if train.where == test.where:
            raise UserError(f"{test.where}: all of it is measured, so none is left to train probes on; leave out --probes, or split it")
        if train.class_names != test.class_names:
            raise UserError(f"{train.where}: expected the classes of {test.where}, found others; prepare both again")
        return train

    def features(self, of: LabelledSet | CaptionedSet, pooled: bool = False) -> Float[np.ndarray, "N E"]:
        """The features of a set's pictures, from the cache if they are there: of these pictures, by these weights."""
        count = len(of.labels if isinstance(of, LabelledSet) else of.captions)
        if not self.cache:
            return self._encoded(of, count, pooled)
        kept = self.cache / f"{self._key(of, count)}{'-pooled' * pooled}.npy"
        found = _kept(kept, count)
        if all_agree(found is not None):
            return found
        features = self._encoded(of, count, pooled)
        if is_first():
            _keep(kept, features)
        wait_for_all("features are kept")
        if not kept.is_file():  # hosts share no folder
            _keep(kept, features)
        return features

    def _encoded(self, of: LabelledSet | CaptionedSet, count: int, pooled: bool) -> Float[np.ndarray, "N E"]:
        with tqdm.tqdm(desc=of.name, total=count, unit="picture", disable=not is_first() or not sys.stderr.isatty()) as bar:
            return self.encoder.read(count, of.read, bar.update, of.where, pooled)

    def _key(self, of: LabelledSet | CaptionedSet, count: int) -> str:
        """A SHA-256 of every picture's bytes, of how they are prepared, and of the weights."""
        digest = hashlib.sha256()
        preprocess = dataclasses.asdict(images.Preprocess.of(self.encoder.config))
        digest.update(json.dumps([preprocess, self.weights], sort_keys=True).encode())
        for start in range(0, count, 256):
            for picture in of.read(range(start, min(start + 256, count))):
                digest.update(hashlib.sha256(_bytes(picture)).digest())
        return digest.hexdigest()[:32]

    def _record(self, task: str, dataset: str, kind: str, metrics: dict[str, Any]) -> dict[str, Any]:
        return record_of(dataset, self.model, self.pretrained, kind, metrics, task, self.weights)

    def emoji(self, emoji: Emoji, done: Set[str] = frozenset()) -> Results:
        """The embedded task, or that with the pictures of another vendor."""
        read = lambda numbers: [emoji.pictures[i] for i in numbers]
        every = LabelledSet("emoji_fluent", "emoji", emoji.class_names, EMOJI_TEMPLATES, emoji.labels, read)
        features = functools.cache(lambda: self.features(every))
        if "zeroshot_classification" not in done:
            yield self._classified("emoji", every, features())
        if "zeroshot_retrieval" not in done:
            names, held_out = emoji.names, emoji.held_out
            of_held_out = lambda numbers: [emoji.pictures[held_out[i]] for i in numbers]
            yield self._retrieved("emoji", "emoji_held_out", [[names[i]] for i in held_out], of_held_out, features()[held_out])
        if any(PROBES[probe] not in done for probe in self.probes):
            _say("emoji: no probes, for it has no training split of the same classes")

    def _classified(self, task: str, of: LabelledSet, features: Float[np.ndarray, "N E"]) -> tuple[dict[str, Any], Part]:
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
        return self._record(task, of.name, "zeroshot_classification", metrics), part

    def _retrieved(
        self, task: str, name: str, captions: list[list[str]], read: Callable, features: Float[np.ndarray, "N E"]
    ) -> tuple[dict[str, Any], Part]:
        texts = [text for several in captions for text in several]
        owners = np.repeat(np.arange(len(captions)), [len(several) for several in captions])
        text_features = self.encoder.texts(texts)
        metrics = retrieval_metrics(features, text_features, owners, self.encoder.mesh)
        first = np.searchsorted(owners, np.arange(min(SHOWN, len(captions))))
        part = Retrieved(
            name,
            len(captions),
            texts,
            owners,
            _nearest(text_features, features),
            _nearest(features, text_features),
            _shown(read),
            features[: len(first)] @ text_features[first].T,
        )
        return self._record(task, name, "zeroshot_retrieval", metrics), part

    def _probed(
        self,
        task: str,
        probe: str,
        test: LabelledSet,
        features: Float[np.ndarray, "N E"],
        train: LabelledSet,
        train_features: Float[np.ndarray, "M E"],
    ) -> dict[str, Any]:
        given = train_features, train.labels, features, test.labels, len(test.class_names)
        metrics, mesh = {"features": "pooled" if self.pooled else "projected"}, self.encoder.mesh
        with _on_all():
            if probe == "linear":
                metrics |= linear_probe(*given, mesh=mesh)
            if probe == "knn":
                metrics |= knn(*given, k=min(NEIGHBOURS, len(train.labels)), mesh=mesh)
            if probe == "few_shot":
                fewest = int(np.bincount(train.labels, minlength=len(train.class_names)).min())
                shots = tuple(n for n in SHOTS if n <= max(1, fewest))
                for n, found in few_shot(*given, shots=shots, mesh=mesh).items():
                    metrics |= {f"{n}_shot_{name.removeprefix('lp_')}": value for name, value in found.items()}
        return self._record(task, test.name, PROBES[probe], metrics)


@contextlib.contextmanager
def _on_all() -> Iterator[None]:
    """Inside, what is an error for people on one process is one on all, of this set."""
    try:
        with errors_on_all():
            yield
    except UserError as error:
        raise Unsuitable(str(error)) from error


def _say(line: str) -> None:
    if is_first():
        print(line, file=sys.stderr)


def _bytes(picture: bytes | np.ndarray | PIL.Image.Image) -> bytes | np.ndarray:
    """By what a picture is known."""
    pixels = np.asarray(picture) if isinstance(picture, PIL.Image.Image) else picture
    return np.ascontiguousarray(pixels) if isinstance(pixels, np.ndarray) else pixels


def _kept(file: pathlib.Path, count: int) -> Float[np.ndarray, "N E"] | None:
    if not file.is_file():
        return None
    try:
        features = np.load(file, allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        features = error
    if not isinstance(features, np.ndarray) or features.ndim != 2 or len(features) != count:
        warn(f"{file}: expected the features of {count} pictures, found a damaged file; they are made anew")
        return None
    return features


def _keep(file: pathlib.Path, features: Float[np.ndarray, "N E"]) -> None:
    try:
        with whole_or_not(file) as beside:
            np.save(beside, features)
    except OSError as error:
        warn(f"{file}: the features cannot be kept ({error.strerror})")


def _shown(read: Callable[[Sequence[int]], list]) -> Callable[[int], PIL.Image.Image]:
    def picture(number: int) -> PIL.Image.Image:
        (found,) = read([number])
        return images.on_background(picture_of(found, f"picture {number}"))

    return picture


def _nearest(queries: Float[np.ndarray, "N E"], keys: Float[np.ndarray, "M E"]) -> dict[int, Int[np.ndarray, "K"]]:
    """The nearest keys of the queries that a report shows."""
    asked = some_of(len(queries))
    return dict(zip(asked, np.argsort(-(queries[asked] @ keys.T), axis=1, kind="stable")[:, :NEAREST]))
