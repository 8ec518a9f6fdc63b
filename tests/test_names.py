"""Class names and prompts: as many as there should be, in the order of the labels, and CLIP_benchmark's own."""

import json
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from clip_jax.errors import UserError
from clip_jax.evaluation import names


def test_imagenet_has_1000_names_of_which_998_differ():
    found, identifiers = names.class_names("imagenet2012"), names.wnids()
    assert len(found) == len(identifiers) == 1000 and len(set(found)) == 998
    assert {name for name in found if found.count(name) > 1} == names.REPEATED
    assert (found[0], found[1], found[2], found[999]) == ("tench", "goldfish", "great white shark", "toilet paper")
    assert identifiers[0] == "n01440764" and identifiers == sorted(set(identifiers))
    for name, wnid in (("Golden Retriever", "n02099601"), ("crane bird", "n02012849"), ("construction crane", "n03126707")):
        assert identifiers[found.index(name)] == wnid


def test_imagenet_has_80_templates_and_7():
    eighty, seven = names.templates("imagenet2012"), names.templates("imagenet_7")
    assert (len(eighty), len(set(eighty)), len(seven)) == (80, 80, 7) and set(seven) <= set(eighty)
    assert eighty[0] == "a bad photo of a {}." and "a {} in a video game." in seven
    assert names.templates("imagenet_a") == eighty


@pytest.mark.parametrize("name, first, last", [("imagenet_a", "stingray", "acorn"), ("imagenet_r", "goldfish", "bell pepper")])
def test_subsets_of_imagenet_have_200_classes(name, first, last):
    indices, every = names.subset(name), names.class_names("imagenet2012")
    assert len(indices) == 200 and (np.diff(indices) > 0).all() and 0 <= indices[0] and indices[-1] < 1000
    found = names.class_names(name)
    assert found == [every[i] for i in indices] and found[0] == first and last in found
    assert len(set(found)) == 200


def test_every_set_has_names_and_templates_that_can_be_filled():
    counts = {name: len(names.class_names(name)) for name in names.known_names()}
    published = {"cifar10": 10, "cifar100": 100, "food101": 101, "oxford_flowers102": 102, "oxford_iiit_pet": 37, "cars196": 196}
    published |= {"dtd": 47, "eurosat": 10, "caltech101": 102, "stl10": 10, "sun397": 397, "mnist": 10, "svhn_cropped": 10}
    published |= {"resisc45": 45, "gtsrb": 43, "country211": 211, "fer2013": 7, "patch_camelyon": 2, "clevr_count_all": 8}
    published |= {"fgvc_aircraft": 100, "voc2007": 20, "hateful_memes": 2}
    assert {name: counts[name] for name in published} == published
    for name in names.known_names():
        found = names.class_names(name)
        assert len(names.own_names(name)) == (1000 if name in names.SUBSETS else len(found))
        # Of CLEVR's distances one has no word: "very nearby", "nearby", "near", "", "distant", "very distant".
        assert all(found) or name == "clevr_closest_object_distance"
        assert len(set(found)) == len(found) or len(found) == 1000
        assert names.with_braces(names.templates(name), name) == names.templates(name)
        assert all("a b" in template.format("a b") for template in names.templates(name))


def test_own_names_are_those_of_tfds():
    package = pathlib.Path(tfds.__file__).parent
    files = {"imagenet_r": "datasets/imagenet2012/labels.txt", "caltech101": "image_classification/caltech101_labels.txt"}
    files |= {"sun397": "image_classification/sun397_labels.txt"}
    assert all(names.own_names(name) == (package / file).read_text().split() for name, file in files.items())
    assert names.own_names("eurosat")[:3] == ["AnnualCrop", "Forest", "HerbaceousVegetation"]
    spaced = [name.replace("_", " ") for name in (package / "image_classification/food-101_classes.txt").read_text().split()]
    assert names.own_names("food101") == names.class_names("food101") == spaced


def test_an_unknown_name_is_refused_with_a_near_one():
    with pytest.raises(UserError, match="did you mean cifar10 or cifar100"):
        names.class_names("cifar1OO")
    with pytest.raises(UserError, match="no subset of ImageNet; did you mean imagenet_a"):
        names.subset("imagenet-a")


def test_data_files_are_small_and_their_sources_named():
    folder = pathlib.Path(names.__file__).parent / "data"
    files = {file.name: file.stat().st_size for file in folder.iterdir()}
    assert sum(files.values()) < 100_000
    readme = (folder / "README.md").read_text()
    assert all(file in readme for file in files if file != "README.md")


@pytest.mark.pytorch
def test_clip_benchmark_has_the_same_names_and_templates(builder):
    folder = pathlib.Path(builder.__file__).parent
    theirs = json.loads((folder / "en_classnames.json").read_text())
    prompts = json.loads((folder / "en_zeroshot_classification_templates.json").read_text())
    other = {"imagenet2012": "imagenet1k", "oxford_flowers102": "flowers", "oxford_iiit_pet": "pets", "svhn_cropped": "svhn"}
    other |= {"patch_camelyon": "pcam", "cars196": "cars"}
    compared = 0
    for name in names.known_names():
        known = other.get(name, name)
        if known in prompts:
            assert names.templates(name) == tuple(t.replace("{c}", "{}") for t in prompts[known]), name
        known = "caltech101_vtab" if name == "caltech101" else known
        if known in theirs:
            assert names.class_names(name) == theirs[known], name
            compared += 1
    assert compared == 16
