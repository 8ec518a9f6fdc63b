"""The sets of zero-shot evaluation that are known by name: what their classes are called, how prompts name them, how to get them.

data/README.md says where each comes from.  Classes are known by their index, never by their name: of ImageNet's 1,000
names 998 differ ("missile" and "sunglasses" stand for two classes each).
"""

import dataclasses
import functools
import gzip
import importlib.resources
import json
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from clip_jax.config import did_you_mean
from clip_jax.errors import UserError

IMAGENET = ("imagenet2012", "imagenet_v2", "imagenet_sketch")  # all 1,000 classes
SUBSETS = ("imagenet_a", "imagenet_r")  # 200 of them each
SEVEN = "imagenet_7"  # no set, but the seven of ImageNet's 80 templates that do as well together
REPEATED = frozenset({"missile", "sunglasses"})  # in ImageNet's names


@dataclasses.dataclass(frozen=True)
class Task:
    """A set that is known by name."""

    kind: str  # "classification" or "retrieval"
    prepared: str = ""  # its name in TFDS, with its configuration if it has several
    exported: str = ""  # its name in CLIP_benchmark, with - for /
    test: str = "test"  # the split in TFDS that is measured
    how: str = ""  # to get it


def _task(prepared: str, exported: str, test: str = "test", kind: str = "classification") -> Task:
    export = f"clip_benchmark_export_wds --dataset {exported.replace('vtab-', 'vtab/')}" + " --retrieval" * (kind == "retrieval")
    ways = [f"as a folder wds_{exported}, which {export} makes"]
    if prepared:
        command = f"import tensorflow_datasets as tfds; tfds.builder('{prepared}', file_format='array_record').download_and_prepare()"
        ways.insert(0, f'with TensorFlow: python -c "{command}"')
    return Task(kind, prepared, exported, test, "; or ".join(ways))


TASKS = {
    # The labels of ImageNet's own test split are secret.
    "imagenet2012": _task("imagenet2012", "imagenet1k", "validation"),
    "imagenet_v2": _task("imagenet_v2/matched-frequency", "imagenetv2"),
    "imagenet_a": _task("imagenet_a", "imagenet-a"),
    "imagenet_r": _task("imagenet_r", "imagenet-r"),
    "imagenet_sketch": _task("imagenet_sketch", "imagenet_sketch"),
    "objectnet": _task("", "objectnet"),
    "caltech101": _task("caltech101", "vtab-caltech101"),
    "cars196": _task("cars196", "cars"),
    "cifar10": _task("cifar10", "vtab-cifar10"),
    "cifar100": _task("cifar100", "vtab-cifar100"),
    # Scenes of its test split are not published either.
    "clevr_count_all": _task("clevr", "vtab-clevr_count_all", "validation"),
    "clevr_closest_object_distance": _task("", "vtab-clevr_closest_object_distance"),
    "country211": _task("", "country211"),
    "diabetic_retinopathy": _task("", "vtab-diabetic_retinopathy"),
    "dmlab": _task("", "vtab-dmlab"),
    "dsprites_label_orientation": _task("", "vtab-dsprites_label_orientation"),
    "dsprites_label_x_position": _task("", "vtab-dsprites_label_x_position"),
    "dtd": _task("dtd", "vtab-dtd"),
    # Of this set and resisc45 TFDS has one split, all of it.
    "eurosat": _task("eurosat/rgb", "vtab-eurosat", "train"),
    "fer2013": _task("", "fer2013"),
    "fgvc_aircraft": _task("", "fgvc_aircraft"),
    "food101": _task("food101", "food101", "validation"),
    "gtsrb": _task("", "gtsrb"),
    "kitti_closest_vehicle_distance": _task("", "vtab-kitti_closest_vehicle_distance"),
    "mnist": _task("mnist", "mnist"),
    "oxford_flowers102": _task("oxford_flowers102", "vtab-flowers"),
    "oxford_iiit_pet": _task("oxford_iiit_pet", "vtab-pets"),
    "patch_camelyon": _task("patch_camelyon", "vtab-pcam"),
    "renderedsst2": _task("", "renderedsst2"),
    "resisc45": _task("resisc45", "vtab-resisc45", "train"),
    "smallnorb_label_azimuth": _task("", "vtab-smallnorb_label_azimuth"),
    "smallnorb_label_elevation": _task("", "vtab-smallnorb_label_elevation"),
    "stl10": _task("stl10", "stl10"),
    "sun397": _task("sun397/tfds", "sun397"),
    "svhn_cropped": _task("svhn_cropped", "vtab-svhn"),
    "voc2007": _task("", "voc2007"),
    "coco_captions": _task("coco_captions/2014", "mscoco_captions", kind="retrieval"),
    "flickr8k": _task("", "flickr8k", kind="retrieval"),
    "flickr30k": _task("", "flickr30k", kind="retrieval"),
    "photographs": Task("classification", how="pip install scikit-image"),
    "photographs_retrieval": Task("retrieval", how="pip install scikit-image"),
}


@functools.cache
def _load(file: str) -> dict:
    path = importlib.resources.files("clip_jax") / "evaluation" / "data" / file
    return json.loads(gzip.decompress(path.read_bytes()))


def known_names() -> list[str]:
    """The sets whose class names and templates are here."""
    return sorted([*IMAGENET, *SUBSETS, *_load("sets.json.gz")])


def class_names(name: str) -> list[str]:
    """The class names of a set, in the order of its labels; those of ImageNet and its subsets are in that of WNIDs.

    Raises:
      UserError: the set is not among `known_names`.
    """
    if name in IMAGENET:
        return list(_load("imagenet.json.gz")["classes"])
    if name in SUBSETS:
        return [_load("imagenet.json.gz")["classes"][i] for i in subset(name)]
    return list(_entry(name)["classes"])


def templates(name: str) -> tuple[str, ...]:
    """The prompts of a set, with {} where the class name goes: 80 for ImageNet and its kin, and 7 for "imagenet_7".

    Raises:
      UserError: the set is not among `known_names`.
    """
    if name in (*IMAGENET, *SUBSETS, SEVEN):
        return tuple(_load("imagenet.json.gz")["seven" if name == SEVEN else "templates"])
    return tuple(_entry(name)["templates"])


def wnids() -> list[str]:
    """WordNet's identifiers of ImageNet's 1,000 classes, sorted, as its labels are."""
    return list(_load("imagenet.json.gz")["wnids"])


def subset(name: str) -> Int[np.ndarray, "C"]:
    """Which of ImageNet's 1,000 classes are those of imagenet_a or imagenet_r, ascending."""
    if name not in SUBSETS:
        raise UserError(f"{name}: no subset of ImageNet{did_you_mean(name, SUBSETS)}; there are {', '.join(SUBSETS)}")
    return np.array(_load("imagenet.json.gz")[name])


def own_names(name: str) -> list[str]:
    """The class names that a prepared TFDS set carries itself, by which its order is known."""
    if name in (*IMAGENET, *SUBSETS):
        return wnids()
    return list(_entry(name).get("own", _entry(name)["classes"]))


def with_braces(lines: Sequence[str], where: str) -> tuple[str, ...]:
    """Templates with {} for the class name; CLIP_benchmark writes {c}, which is the same.

    Raises:
      UserError: there is none, or one has no such place, or another brace.
    """
    found = tuple(line.replace("{c}", "{}") for line in lines)
    if not found:
        raise UserError(f"{where}: expected at least one template, such as 'a photo of a {{}}.', found none")
    for number, template in enumerate(found, 1):
        if "{}" not in template or "{" in template.replace("{}", "") or "}" in template.replace("{}", ""):
            raise UserError(
                f"{where}: expected {{}} (or {{c}}) where the class name goes and no other brace, found {template!r} "
                f"as template {number}; write it as 'a photo of a {{}}.'"
            )
    return found


def _entry(name: str) -> dict:
    entries = _load("sets.json.gz")
    if name not in entries:
        near = did_you_mean(name, known_names())
        raise UserError(f"{name}: no class names of such a set{near}; there are those of {', '.join(known_names())}")
    return entries[name]
