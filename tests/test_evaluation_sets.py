import importlib.util
import io
import json
import pathlib
import shutil

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from sets import jpeg, picture, tar

from clip_jax.errors import UserError
from clip_jax.evaluation import names
from clip_jax.evaluation.sets import CaptionedSet, LabelledSet, open_set

GIVEN = ("itap of a {}.", "a {}")


def refused(*arguments, **options) -> str:
    """The one line with which a set is refused."""
    with pytest.raises(UserError) as caught:
        open_set(*map(str, arguments), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def prepare(place: pathlib.Path, name: str, label, examples: list[dict], split: str = "test", **features) -> pathlib.Path:
    """Prepares a set under a name of TFDS's; returns its folder."""

    class Labelled(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            known = {"image": tfds.features.Image()} | ({"label": label} if label else {}) | features
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(known))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples()}

        def _generate_examples(self):
            for i, example in enumerate(examples):
                yield i, {"image": io.BytesIO(jpeg(i))} | example

    builder_name, _, config = name.partition("/")
    Labelled.name = builder_name
    builder = Labelled(data_dir=place, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    folder = pathlib.Path(builder.data_path)
    if config:
        shutil.move(folder, folder.parent / config / folder.name)
        folder = folder.parent / config / folder.name
    return folder


def classes(*found: str) -> tfds.features.ClassLabel:
    return tfds.features.ClassLabel(names=list(found))


def labels_of(*labels: int) -> list[dict]:
    return [{"label": label} for label in labels]


def class_folders(place: pathlib.Path, *folders: str, count: int = 2) -> pathlib.Path:
    for number, name in enumerate(folders):
        (place / name).mkdir(parents=True)
        for i in range(count):
            (place / name / f"{i}.jpg").write_bytes(jpeg(10 * number + i))
    return place


def webdataset(place: pathlib.Path, split: str = "test", shards: int = 2, captions: bool = False, ends: str = "jpg") -> pathlib.Path:
    """Three samples a shard, as clip_benchmark_export_wds writes them."""
    (place / split).mkdir(parents=True)
    for shard in range(shards):
        members = []
        for i in range(3 * shard, 3 * shard + 3):
            members.append((f"s{i:07}.{ends}", jpeg(i, {"jpg": "JPEG", "webp": "WEBP"}[ends])))
            label = ("txt", f"number {i}\nthe {i}th of them") if captions else ("cls", str(i % 4))
            members.append((f"s{i:07}.{label[0]}", label[1].encode()))
        tar(place / split / f"{shard}.tar", members)
    (place / split / "nshards.txt").write_text(f"{shards}\n")
    if captions:
        (place / "dataset_type.txt").write_text("retrieval\n")
    else:
        (place / "classnames.txt").write_text("dog\ncat\nred apple\nguitar\n")
        (place / "zeroshot_classification_templates.txt").write_text("itap of a {c}.\na {c}\n")
    return place


def test_a_prepared_set_has_our_names_and_its_labels_and_pictures(tmp_path):
    prepare(tmp_path, "cifar10", classes(*names.class_names("cifar10")), labels_of(3, 0, 9, 3, *range(10)))
    found = open_set("cifar10", str(tmp_path))
    assert isinstance(found, LabelledSet)
    assert sorted(found.labels.tolist()) == sorted([3, 0, 9, 3, *range(10)])
    assert found.class_names == names.class_names("cifar10") and len(found.templates) == 18
    originals = {jpeg(i): label for i, label in enumerate([3, 0, 9, 3, *range(10)])}  # TFDS shuffles
    assert [originals[encoded] for encoded in found.read(range(14))] == found.labels.tolist()
    assert found.read([5, 2]) == [found.read(range(14))[i] for i in (5, 2)]
    again = open_set(str(tmp_path / "cifar10" / "1.0.0"))
    assert (again.class_names, again.labels.tolist()) == (found.class_names, found.labels.tolist())


def test_the_newest_version_is_taken(tmp_path):
    folder = prepare(tmp_path, "mnist", tfds.features.ClassLabel(num_classes=10), labels_of(*range(10)))
    shutil.copytree(folder, folder.parent / "10.0.0")
    shutil.copytree(folder, folder.parent / "9.0.0")
    assert "10.0.0" in open_set("mnist", str(tmp_path)).where


@pytest.mark.parametrize("name, split", [("imagenet2012", "validation"), ("eurosat/rgb", "train"), ("svhn_cropped", "test")])
def test_the_split_that_is_measured_and_the_own_names_of_a_set(tmp_path, capsys, name, split):
    task = name.partition("/")[0]
    label = classes(*names.own_names(task)) if task != "svhn_cropped" else tfds.features.ClassLabel(num_classes=10)
    prepare(tmp_path, name, label, labels_of(2, 7), split)
    found = open_set(task, str(tmp_path))
    assert sorted(found.labels.tolist()) == [2, 7] and found.class_names == names.class_names(task)
    assert f"{len(found.class_names) - 2} of the {len(found.class_names)} classes have no picture" in capsys.readouterr().err


def test_a_mask_is_no_picture(tmp_path):
    examples = [{"label": i, "a_mask": io.BytesIO(picture(i))} for i in range(37)]
    prepare(tmp_path, "oxford_iiit_pet", classes(*names.own_names("oxford_iiit_pet")), examples, a_mask=tfds.features.Image())
    found = open_set("oxford_iiit_pet", str(tmp_path))
    assert [found.read([i])[0] == jpeg(label) for i, label in enumerate(found.labels)] == [True] * 37


def test_another_number_or_order_of_classes_is_refused(tmp_path):
    mine = names.class_names("cifar10")
    prepare(tmp_path / "a", "cifar10", classes(*mine[:4], *mine[5:]), labels_of(0))
    message = refused("cifar10", str(tmp_path / "a"))
    assert "expected 10 classes, found 9" in message and "number 4, 'dog' instead of 'deer'" in message
    prepare(tmp_path / "b", "cifar10", classes(*mine[:8], mine[9], mine[8]), labels_of(0))
    assert "expected 10 classes, found 10; the first name that differs is number 8, 'truck' instead of 'ship'" in refused(
        "cifar10", str(tmp_path / "b")
    )
    prepare(tmp_path / "c", "mnist", tfds.features.ClassLabel(num_classes=11), labels_of(0))
    assert "expected 10 classes, found 11" in refused("mnist", str(tmp_path / "c"))


def test_labels_of_imagenet_a_become_those_of_its_200(tmp_path):
    thousand = names.subset("imagenet_a")
    prepare(tmp_path / "a", "imagenet_a", classes(*names.wnids()), labels_of(int(thousand[0]), int(thousand[7]), int(thousand[199])))
    found = open_set("imagenet_a", str(tmp_path / "a"))
    assert len(found.class_names) == 200 and sorted(found.labels.tolist()) == [0, 7, 199]
    prepare(tmp_path / "b", "imagenet_a", classes(*names.wnids()), labels_of(0))  # a tench, which is not among them
    assert "is of n01440764, none of the 200 classes of imagenet_a" in refused("imagenet_a", str(tmp_path / "b"))


def test_objects_are_counted(tmp_path):
    scenes = [{"objects": [{"shape": "cube"}] * count} for count in (3, 10, 4)]
    objects = tfds.features.Sequence({"shape": classes("cube", "sphere")})
    prepare(tmp_path / "a", "clevr", None, scenes, "validation", objects=objects)
    found = open_set("clevr_count_all", str(tmp_path / "a"))
    assert sorted(found.class_names[label] for label in found.labels) == ["four", "ten", "three"]
    prepare(tmp_path / "b", "clevr", None, [{"objects": []}], "validation", objects=objects)  # as where scenes are not published
    assert "has label -3, expected 0 to 7" in refused("clevr_count_all", str(tmp_path / "b"))


def test_captions_of_a_prepared_set(tmp_path):
    captions = tfds.features.Sequence({"text": np.str_, "id": np.int64})
    written = [[{"text": f"picture {i}", "id": i}, {"text": f"the {i}th", "id": 9}] for i in range(3)]
    prepare(tmp_path / "a", "coco_captions/2014", None, [{"captions": own} for own in written], captions=captions)
    found = open_set("coco_captions", str(tmp_path / "a"))
    assert isinstance(found, CaptionedSet)
    originals = {jpeg(i): [f"picture {i}", f"the {i}th"] for i in range(3)}
    assert [originals[encoded] for encoded in found.read(range(3))] == found.captions
    prepare(tmp_path / "b", "coco_captions/2014", None, [{"captions": []}], captions=captions)
    assert "picture 0 has no caption" in refused("coco_captions", str(tmp_path / "b"))
    prepare(tmp_path / "c", "coco_captions/2014", classes("a", "b"), labels_of(0))
    assert "expected a field 'captions', found image, label" in refused("coco_captions", str(tmp_path / "c"))


def test_a_prepared_set_of_ones_own(tmp_path):
    folder = prepare(tmp_path, "fruit", classes("red_apple", "pear"), labels_of(1, 0))
    found = open_set(str(folder))
    assert (found.name, found.class_names, sorted(found.labels.tolist())) == ("fruit", ["red apple", "pear"], [0, 1])
    numbers = prepare(tmp_path, "digits", tfds.features.ClassLabel(num_classes=3), labels_of(1, 0))
    assert "expected names of its classes, found numbers" in refused(numbers)
    text = prepare(tmp_path, "words", tfds.features.Text(), [{"label": "dog"}])
    assert "expected a label of type ClassLabel, found Text" in refused(text)


def test_a_set_that_lost_records_is_refused(tmp_path):
    folder = prepare(tmp_path, "mnist", tfds.features.ClassLabel(num_classes=10), labels_of(*range(10)))
    for shard in folder.glob("*array_record*"):
        shard.write_bytes(shard.read_bytes()[:-1000])
    assert "cannot be read" in refused("mnist", str(tmp_path))


def test_a_folder_of_classes(tmp_path):
    root = class_folders(tmp_path / "fruit", "red_apple", "banana", "Pear")
    (root / "notes.md").write_text("not a class")
    found = open_set(str(root))
    assert (found.name, found.class_names) == ("fruit", ["Pear", "banana", "red apple"])
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2] and found.templates == names.templates("imagenet2012")
    assert found.read([5, 0]) == [jpeg(1), jpeg(20)]
    (root / "templates.txt").write_text("itap of a {}.\na {c}\n")
    assert open_set(str(root)).templates == GIVEN
    (root / "classnames.txt").write_text("a pear\n a banana\nan apple\n\n")
    assert open_set(str(root)).class_names == ["a pear", "a banana", "an apple"]


def test_a_picture_beside_the_folders_and_hidden_ones_are_passed_over(tmp_path):
    root = class_folders(tmp_path / "a", "x", ".hidden", "y")
    (root / "cover.jpg").write_bytes(jpeg(99))
    found = open_set(str(root))
    assert found.labels.tolist() == [0, 0, 1, 1] and found.read(range(4)) == [jpeg(0), jpeg(1), jpeg(20), jpeg(21)]


def test_a_folder_with_splits(tmp_path):
    class_folders(tmp_path / "a" / "val", "x", "y")
    class_folders(tmp_path / "a" / "train", "x", "y", count=3)
    (tmp_path / "a" / "labels.txt").write_text("ex\nwhy\n")
    assert len(open_set(str(tmp_path / "a"), split="train").labels) == 6
    assert open_set(str(tmp_path / "a"), split="val").class_names == ["ex", "why"]
    assert "no folder of split 'test'; the splits are train, val" in refused(tmp_path / "a")


def test_folders_of_wnids_are_imagenets_classes(tmp_path):
    found = open_set(str(class_folders(tmp_path / "a", "n15075141", "n01440764", "n04355933", "n04356056")))
    # Two classes of the same name, known by their identifiers.
    assert found.class_names == ["tench", "sunglasses", "sunglasses", "toilet paper"] and len(found.templates) == 80
    assert "n99999999: none of ImageNet's 1,000 classes" in refused(class_folders(tmp_path / "b", "n99999999", "n01440764"))


def test_folders_that_cannot_be_measured_are_refused(tmp_path):
    root = class_folders(tmp_path / "a", "x", "y", "z")
    (root / "labels.txt").write_text("x\nz\n")
    message = refused(root)
    assert "expected 3 names" in message and "found 2; the first name that differs is number 1, 'z' instead of 'y'" in message
    (root / "labels.txt").write_text("x\ny\nx\n")
    assert "classes 0 and 2 are both named 'x'" in refused(root)
    (root / "labels.txt").write_text("x\n\nz\n")
    assert "the name of class 1 is empty" in refused(root)
    (root / "labels.txt").unlink()
    (root / "templates.txt").write_text("a photo of a dog.\n")
    assert "expected {} (or {c})" in refused(root) and "'a photo of a dog.' as template 1" in refused(root)
    (root / "templates.txt").write_text("a {} and {name}\n")
    assert "no other brace" in refused(root)
    (root / "templates.txt").write_text("\n")
    assert "expected at least one template" in refused(root)
    (root / "templates.txt").write_bytes(b"caf\xe9 {}")
    assert "expected text in UTF-8" in refused(root)
    (root / "templates.txt").unlink()
    (root / "y" / "0.jpg").unlink()
    (root / "y" / "1.jpg").unlink()
    assert refused(root).startswith(f"{root / 'y'}: expected at least one picture of the class")
    assert "are both named 'hot dog'" in refused(class_folders(tmp_path / "b", "hot dog", "hot_dog"))
    (tmp_path / "c").mkdir()
    assert "expected a sub-folder of pictures for each class" in refused(tmp_path / "c")


@pytest.mark.parametrize("ends", ["jpg", "webp"])
def test_a_webdataset_folder(tmp_path, ends):
    place = webdataset(tmp_path / "wds_mine", ends=ends)
    found = open_set(str(place))
    assert isinstance(found, LabelledSet) and found.labels.tolist() == [0, 1, 2, 3, 0, 1]
    assert found.class_names == ["dog", "cat", "red apple", "guitar"] and found.templates == GIVEN
    assert found.read([4, 0]) == [jpeg(i, {"jpg": "JPEG", "webp": "WEBP"}[ends]) for i in (4, 0)]
    (place / "test" / "sizes.json").write_text(json.dumps({"0.tar": 3, "1.tar": 3}))
    (place / "test" / "__len__").write_text("6")
    assert len(open_set(str(place)).labels) == 6


def test_a_webdataset_folder_with_captions_is_found_by_name(tmp_path):
    webdataset(tmp_path / "wds_flickr30k", captions=True)
    found = open_set("flickr30k", str(tmp_path))
    assert isinstance(found, CaptionedSet) and found.captions[4] == ["number 4", "the 4th of them"]
    assert len(found.captions) == 6 and found.read([4]) == [jpeg(4)]


def test_webdataset_folders_that_cannot_be_measured_are_refused(tmp_path):
    place = webdataset(tmp_path / "a")
    assert "a/train/nshards.txt: expected the number of shards, found no such file" in refused(place, split="train")
    (place / "test" / "__len__").write_text("7")
    assert "__len__: tells of 7 pictures, found 6" in refused(place)
    (place / "test" / "__len__").write_text("many")
    assert "expected a number of samples" in refused(place)
    (place / "test" / "__len__").unlink()
    (place / "test" / "nshards.txt").write_text("3")
    assert "nshards.txt tells of 3 shards, found 2, without 2.tar" in refused(place)
    (place / "test" / "nshards.txt").write_text("1")
    assert "nshards.txt tells of 1 shards, found 2, with 1.tar" in refused(place)
    (place / "test" / "nshards.txt").write_text("two")
    assert "expected the number of shards, found 'two'" in refused(place)
    (place / "test" / "nshards.txt").write_text("2")
    (place / "classnames.txt").write_text("dog\ncat\ndog\nguitar\n")
    assert "classes 0 and 2 are both named 'dog'" in refused(place)
    (place / "classnames.txt").write_text("dog\ncat\nred apple\n")
    assert "picture 3 has label 3, expected 0 to 2, for 3 class names" in refused(place)
    (place / "classnames.txt").unlink()
    assert "classnames.txt: expected a class name a line, found no such file" in refused(place)
    (place / "classnames.txt").write_text("dog\ncat\nred apple\nguitar\n")
    (place / "zeroshot_classification_templates.txt").write_text("a {c}\na dog\n")
    assert "'a dog' as template 2" in refused(place)
    (place / "dataset_type.txt").write_text("multilabel\n")
    assert "found 'multilabel', which cannot be measured here" in refused(place)


def test_a_webdataset_of_another_number_of_classes_than_the_set_of_its_name(tmp_path):
    webdataset(tmp_path / "wds_vtab-cifar10")
    message = refused("cifar10", str(tmp_path))
    assert "expected 10 names, found 4; the first name that differs is number 0, 'dog' instead of 'airplane'" in message


def test_samples_of_a_webdataset_that_are_broken_end_the_measurement(tmp_path):
    place = webdataset(tmp_path / "a", shards=1)
    tar(place / "test" / "0.tar", [("a.jpg", jpeg(0)), ("a.cls", b"dog")])
    assert "0.tar sample a: expected the number of a class in its .cls, found b'dog'" in refused(place)
    tar(place / "test" / "0.tar", [("a.jpg", jpeg(0)), ("b.jpg", jpeg(1)), ("b.cls", b"1")])
    assert "0.tar sample a: no field 'cls'" in refused(place)
    whole = pathlib.Path(tar(place / "test" / "0.tar", [("a.cls", b"0"), ("a.jpg", jpeg(0))])).read_bytes()
    (place / "test" / "0.tar").write_bytes(whole[:2048])
    assert "0.tar sample a: its .jpg ends" in refused(place)
    webdataset(tmp_path / "wds_flickr8k")
    assert "0.tar sample s0000000: no field 'caption'" in refused("flickr8k", str(tmp_path))
    captions = webdataset(tmp_path / "b", shards=1, captions=True)
    tar(captions / "test" / "0.tar", [("a.jpg", jpeg(0)), ("a.txt", b" \n")])
    assert "picture 0 has no caption" in refused(captions)


def test_a_webdataset_in_a_bucket(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setattr("clip_jax.records.tar_cache.CACHE", str(tmp_path / "indices"))
    place, memory = webdataset(tmp_path / "a"), fsspec.filesystem("memory")
    memory.put(str(place), "/evaluated", recursive=True)
    found = open_set("memory://evaluated")
    assert (found.name, found.labels.tolist(), found.read([3])) == ("evaluated", [0, 1, 2, 3, 0, 1], [jpeg(3)])
    assert "nshards.txt: expected the number of shards, found no such file" in refused("memory://evaluated", split="val")


@pytest.mark.pytorch
@pytest.mark.filterwarnings("ignore")  # their warnings are not ours
def test_clip_benchmark_reads_the_same(tmp_path, builder):
    pytest.importorskip("webdataset", reason="needs webdataset, by which CLIP_benchmark reads")
    pixels = lambda image: np.asarray(image.convert("RGB"))
    place, paired = webdataset(tmp_path / "a", ends="webp"), webdataset(tmp_path / "b", captions=True)
    theirs, ours = builder.build_dataset("wds/a", root=str(place), transform=pixels, task="zeroshot_classification"), open_set(str(place))
    rows = list(theirs)
    assert [label for _, label in rows] == ours.labels.tolist() and theirs.classes == ours.class_names
    assert tuple(t.format(c="dog") for t in theirs.templates) == tuple(t.format("dog") for t in ours.templates)
    opened = [PIL.Image.open(io.BytesIO(encoded)) for encoded in ours.read(range(len(rows)))]
    assert all(np.array_equal(pixels(mine), image) for mine, (image, _) in zip(opened, rows, strict=True))
    theirs = list(builder.build_dataset("wds/b", root=str(paired), transform=pixels, task="zeroshot_retrieval"))
    assert [captions for _, captions in theirs] == open_set(str(paired)).captions


def test_the_photographs(tmp_path):
    pytest.importorskip("skimage", reason="needs scikit-image, which ships the pictures")
    found, paired = open_set("photographs"), open_set("photographs_retrieval")
    assert len(found.labels) == len(found.class_names) == len(set(found.class_names)) == len(paired.captions) == 16
    assert all(len(own) == 2 for own in paired.captions) and len({c for own in paired.captions for c in own}) == 32
    assert found.read(range(16)) == paired.read(range(16))
    sizes = [PIL.Image.open(io.BytesIO(encoded)).size for encoded in found.read(range(16))]
    assert len(sizes) == 16 and min(map(min, sizes)) >= 172


def test_photographs_need_scikit_image(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "scikit-image, which is not installed; pip install scikit-image" in refused("photographs")
    spec = importlib.util.spec_from_file_location("skimage", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert "expected astronaut.png" in refused("photographs_retrieval")


def test_photographs_are_read_from_where_scikit_image_is(monkeypatch, tmp_path):
    written = json.loads((pathlib.Path(names.__file__).parent / "data" / "photographs.json").read_text())["photographs"]
    (tmp_path / "data").mkdir()
    for i, row in enumerate(written):
        (tmp_path / "data" / row["file"]).write_bytes(picture(i))
    spec = importlib.util.spec_from_file_location("skimage", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    found = open_set("photographs")
    assert found.labels.tolist() == list(range(16)) and found.read([3, 1]) == [picture(3), picture(1)]
    assert found.class_names[3] == "a cat" and "a photo of {}." in found.templates
    assert open_set("photographs_retrieval").captions[3][0] == "the face of a tabby cat with green eyes"


def test_a_set_that_is_not_there_says_how_to_get_it(tmp_path):
    message = refused("eurosat", str(tmp_path))
    assert f"expected it in {tmp_path}, found no eurosat/rgb nor wds_vtab-eurosat" in message
    assert "tfds.builder('eurosat/rgb', file_format='array_record')" in message and "--dataset vtab/eurosat makes" in message
    assert "clip_benchmark_export_wds --dataset flickr30k --retrieval" in refused("flickr30k", str(tmp_path))
    assert all(task.how and task.kind in ("classification", "retrieval") for task in names.TASKS.values())


def test_an_unknown_task_is_refused_with_what_is_near_and_what_is_there(tmp_path, monkeypatch):
    prepare(tmp_path, "mnist", tfds.features.ClassLabel(num_classes=10), labels_of(0))
    webdataset(tmp_path / "wds_vtab-svhn")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = refused("cifar-100", str(tmp_path))
    assert "did you mean cifar100" in message and f"in {tmp_path} there are mnist, svhn_cropped" in message
    assert "there are none" in refused("no/such/folder", str(tmp_path / "nothing"))
