"""Where the pictures of zero-shot evaluation are, with their labels and class names, or with their captions.

- a set by name, such as `cifar10`: prepared by TFDS in ArrayRecord files, or exported by CLIP_benchmark, in a data folder
- a folder with a sub-folder of pictures for each class
- a WebDataset folder as CLIP_benchmark exports them, here or in a bucket
- `photographs` and `photographs_retrieval`: sixteen pictures that scikit-image ships
"""

import dataclasses
import importlib.resources
import importlib.util
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int

from clip_jax.config import did_you_mean
from clip_jax.data import texts
from clip_jax.errors import BadSample, UserError, warn
from clip_jax.evaluation import names
from clip_jax.evaluation.names import TASKS, Task
from clip_jax.files import is_local, read_ranges
from clip_jax.records import Record, Records
from clip_jax.records.folders import Folder
from clip_jax.records.prepared import Prepared
from clip_jax.records.tars import Tars

DATA_DIR = "~/tensorflow_datasets"  # where TFDS prepares sets, unless told otherwise
CHUNK = 256  # records read at once for their labels: their pictures pass through memory
SPLITS = ("train", "val", "valid", "validation", "test")

Read = Callable[[Sequence[int]], list[bytes | np.ndarray]]


@dataclasses.dataclass(frozen=True)
class LabelledSet:
    """N pictures, each of one of C classes."""

    name: str
    where: str  # for errors
    class_names: list[str]  # C
    templates: tuple[str, ...]  # with {} where the class name goes
    labels: Int[np.ndarray, "N"]  # into `class_names`
    read: Read  # pictures by number: the bytes of their files, or uint8 H W C where the set holds pixels


@dataclasses.dataclass(frozen=True)
class CaptionedSet:
    """N pictures, each with one or more captions."""

    name: str
    where: str  # for errors
    captions: list[list[str]]  # of each picture
    read: Read


def open_set(task: str, data_dir: str | None = None, split: str = "test") -> LabelledSet | CaptionedSet:
    """A set to measure on; its pictures are read when they are asked for, its labels or captions now.

    Args:
      task: one of `names.TASKS`, or a folder (of classes, a WebDataset of CLIP_benchmark, or a prepared TFDS set), or the
        address of such a WebDataset.
      data_dir: where sets that are known by name are looked for, `~/tensorflow_datasets` by default.
      split: "test" is, of a set that is known by name, the split that is commonly measured.

    Raises:
      UserError: there is no such set, or its labels, class names, templates and captions do not fit each other.
    """
    place = pathlib.Path(data_dir or DATA_DIR).expanduser()
    if task in ("photographs", "photographs_retrieval"):
        return _photographs(task)
    if task in TASKS:
        folder = _prepared_folder(place, TASKS[task].prepared)
        if folder is not None:
            return _prepared(task, folder, split)
        exported = place / f"wds_{TASKS[task].exported}"
        if exported.is_dir():
            return _webdataset(task, str(exported), split)
        sought = " nor ".join(filter(None, (TASKS[task].prepared, exported.name)))
        raise UserError(f"{task}: expected it in {place}, found no {sought}; get it {TASKS[task].how}")
    path = pathlib.Path(task).expanduser()
    if not is_local(task) or any(path.glob("*/nshards.txt")):
        return _webdataset(task.rstrip("/").rpartition("/")[2], task.rstrip("/"), split)
    if (path / "dataset_info.json").is_file():
        return _prepared(_known_as(path), path, split)
    if path.is_dir():
        return _class_folders(path, split)
    here = ", ".join(_on_disk(place)) or "none"
    raise UserError(
        f"{task}: expected a folder or the name of a set{did_you_mean(task, TASKS)}; in {place} there are {here}; "
        f"the names are {', '.join(TASKS)}"
    )


def is_here(name: str, data_dir: str | None = None) -> bool:
    """Whether there is a set that is known by name."""
    return name in _on_disk(pathlib.Path(data_dir or DATA_DIR).expanduser())


def check_here(task: str, data_dir: str | None = None) -> None:
    """Refuses a task of which nothing is here, as `open_set` does, and opens none that is."""
    if is_local(task) and not is_here(task, data_dir) and not pathlib.Path(task).expanduser().exists():
        open_set(task, data_dir)


def _on_disk(place: pathlib.Path) -> list[str]:
    found = [n for n, t in TASKS.items() if _prepared_folder(place, t.prepared) or t.exported and (place / f"wds_{t.exported}").is_dir()]
    return found + (["photographs", "photographs_retrieval"] if importlib.util.find_spec("skimage") else [])


def _prepared_folder(place: pathlib.Path, prepared: str) -> pathlib.Path | None:
    """The newest version of a set."""
    versions = [file.parent for file in (place / prepared).glob("*/dataset_info.json")] if prepared else []
    number = lambda folder: [int(part) if part.isdigit() else -1 for part in folder.name.split(".")]
    return max(versions, key=number, default=None)


def _known_as(folder: pathlib.Path) -> str:
    """The name of ours of a prepared set, or its own."""
    info = tfds.builder_from_directory(folder).info
    return next((name for name, task in TASKS.items() if task.prepared.partition("/")[0] == info.name), info.name)


def _prepared(name: str, folder: pathlib.Path, split: str) -> LabelledSet | CaptionedSet:
    task = TASKS.get(name, Task("classification"))
    split = task.test if split == "test" else split
    records, info = Prepared(str(folder), split), tfds.builder_from_directory(folder).info
    where, features = f"{name} ({folder}, split {split})", info.features
    # Oxford's pets have masks too, and the order of features is not kept.
    pictures = sorted(field for field, feature in features.items() if isinstance(feature, tfds.features.Image))
    picture = "image" if "image" in features or not pictures else pictures[0]
    wanted = {"retrieval": "captions"}.get(task.kind, "objects" if name == "clevr_count_all" else "label")
    for field in (picture, wanted):
        if field not in features:
            raise UserError(f"{where}: expected a field {field!r}, found {', '.join(sorted(features))}; prepare it as TFDS describes it")
    if wanted == "label" and not isinstance(features["label"], tfds.features.ClassLabel):
        raise UserError(f"{where}: expected a label of type ClassLabel, found {type(features['label']).__name__}; prepare it with one")
    if wanted == "label" and name in TASKS:
        _check_order(where, features["label"], names.own_names(name))
    found = [_of_record(wanted, record) for record in _every(records)]
    expected = info.splits[split].num_examples
    if len(found) != expected:
        raise UserError(f"{where}: its dataset_info.json tells of {expected} pictures, found {len(found)}; prepare it again")
    read = _reader(records, picture)
    if task.kind == "retrieval":
        return _captioned(name, where, found, read)
    if name in TASKS:
        classes, prompts = names.class_names(name), names.templates(name)
    else:
        classes, prompts = [own.replace("_", " ") for own in features["label"].names], names.templates("imagenet2012")
        if all(own.isdigit() for own in classes):
            raise UserError(f"{where}: expected names of its classes, found numbers; prepare it with names, or make a folder of classes")
        _check_names(classes, where)
    labels = np.array(found)
    if name in names.SUBSETS:
        # TFDS labels them among ImageNet's thousand.
        position = np.full(1000, -1)
        position[names.subset(name)] = np.arange(len(classes))
        if len(strange := np.flatnonzero(position[labels] < 0)):
            wnid = names.wnids()[labels[strange[0]]]
            raise UserError(f"{where}: record {strange[0]} is of {wnid}, none of the {len(classes)} classes of {name}; prepare it again")
        labels = position[labels]
    return _labelled(name, where, classes, prompts, labels, read)


def _of_record(field: str, record: Record):
    """The label of a record, or its captions."""
    if field == "captions":
        return texts(record["captions"]["text"])
    # CLEVR's scenes have three objects to ten, and these are the classes.
    return len(record["objects"]["shape"]) - 3 if field == "objects" else int(record["label"])


def _check_order(where: str, label: tfds.features.ClassLabel, expected: list[str]) -> None:
    """Whether the labels of a set mean what ours do: by their number, and by their names where they have any."""
    found = label.names
    numbers = found == [str(i) for i in range(len(found))]
    if len(found) == len(expected) and (numbers or list(map(_letters, found)) == list(map(_letters, expected))):
        return
    differ = _first_difference(found, expected)
    raise UserError(f"{where}: expected {len(expected)} classes, found {len(found)}{differ}; prepare the version that TFDS has now")


def _first_difference(found: Sequence[str], expected: Sequence[str]) -> str:
    for number, (ours, theirs) in enumerate(itertools.zip_longest(expected, found)):
        if ours is None or theirs is None or _letters(ours) != _letters(theirs):
            said = [repr(name) if name is not None else "nothing" for name in (theirs, ours)]
            return f"; the first name that differs is number {number}, {said[0]} instead of {said[1]}"
    return ""


def _letters(name: str) -> str:
    """What is left of a name whatever its spelling."""
    return re.sub(r"[\W_]", "", name.lower())


def _class_folders(path: pathlib.Path, split: str) -> LabelledSet:
    """A sub-folder for each class, in the order of their names, perhaps below that of a split."""
    below, root = _folders(path), path
    if below and set(below) <= set(SPLITS):
        if split not in below:
            raise UserError(f"{path}: no folder of split {split!r}; the splits are {', '.join(below)}")
        root = path / split
    where, classes, folder = str(root), _folders(root), Folder(root)
    rows = [i for i, name in enumerate(folder.paths) if "/" in name]
    if not classes:
        raise UserError(f"{where}: expected a sub-folder of pictures for each class, found {len(folder)} pictures and no sub-folder")
    labels = np.array([classes.index(folder.paths[i].partition("/")[0]) for i in rows], int)
    if empty := sorted(set(range(len(classes))) - set(labels.tolist())):
        raise UserError(f"{root / classes[empty[0]]}: expected at least one picture of the class, found none; add one or remove it")
    by_wnid = all(re.fullmatch(r"n\d{8}", name) for name in classes)
    named = next((file for place in (root, path) for file in (place / "classnames.txt", place / "labels.txt") if file.is_file()), None)
    if named is not None:
        called = _lines(str(named))
        if len(called) != len(classes):
            raise UserError(
                f"{named}: expected {len(classes)} names, one for each folder of {root}, found {len(called)}"
                f"{_first_difference(called, classes)}; write a line for each folder, in the order of their names"
            )
    elif by_wnid:
        called = _by_wnid(classes, where)
    else:
        called = [folder_name.replace("_", " ") for folder_name in classes]
    if named is not None or not by_wnid:
        _check_names(called, str(named or where))
    prompts = next((place / "templates.txt" for place in (root, path) if (place / "templates.txt").is_file()), None)
    templates = names.templates("imagenet2012") if prompts is None else names.with_braces(_lines(str(prompts)), str(prompts))
    read = _reader(folder, "image")
    return _labelled(path.name, where, called, templates, labels, lambda indices: read([rows[i] for i in indices]))


def _folders(path: pathlib.Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _by_wnid(folders: list[str], where: str) -> list[str]:
    """ImageNet's names of the classes that are there, which may be some of the thousand."""
    number, classes = {wnid: i for i, wnid in enumerate(names.wnids())}, names.class_names("imagenet2012")
    for wnid in folders:
        if wnid not in number:
            raise UserError(f"{where}/{wnid}: none of ImageNet's 1,000 classes; name all folders in a classnames.txt, or remove it")
    return [classes[number[wnid]] for wnid in folders]


def _check_names(classes: list[str], where: str) -> None:
    """Refuses an empty name, and one that stands for two classes, but for those of ImageNet."""
    if "" in classes:
        raise UserError(f"{where}: the name of class {classes.index('')} is empty; write a line for each class")
    first: dict[str, int] = {}
    for number, name in enumerate(classes):
        if name in first and not (len(classes) == 1000 and name in names.REPEATED):
            raise UserError(f"{where}: classes {first[name]} and {number} are both named {name!r}; no text tells them apart, name one anew")
        first.setdefault(name, number)


def _webdataset(name: str, place: str, split: str) -> LabelledSet | CaptionedSet:
    """Shards SPLIT/0.tar and so on, as many as SPLIT/nshards.txt says, of a picture and a .cls, or a .txt with captions."""
    where, shards = f"{place}/{split}", _text(f"{place}/{split}/nshards.txt")
    if shards is None:
        raise UserError(f"{where}/nshards.txt: expected the number of shards, found no such file; take another split, or export it")
    if not shards.strip().isdigit() or not int(shards):
        raise UserError(f"{where}/nshards.txt: expected the number of shards, found {shards.strip()!r}")
    if is_local(place):
        found, expected = {f.name for f in pathlib.Path(where).expanduser().glob("*.tar")}, {f"{i}.tar" for i in range(int(shards))}
        if found != expected:
            odd = sorted(found ^ expected, key=lambda file: (len(file), file))[0]
            raise UserError(
                f"{where}: nshards.txt tells of {len(expected)} shards, found {len(found)}, "
                f"{'with' if odd in found else 'without'} {odd}; export or copy it again"
            )
    pattern = f"{where}/{{0..{int(shards) - 1}}}.tar"
    kind = (_text(f"{place}/dataset_type.txt") or TASKS.get(name, Task("classification")).kind).strip().lower()
    if kind not in ("classification", "retrieval"):
        raise UserError(f"{place}/dataset_type.txt: expected retrieval or no such file, found {kind!r}, which cannot be measured here")
    pictures, rest = Tars(pattern, ("image",)), Tars(pattern, ("caption" if kind == "retrieval" else "cls",))
    if pictures.broken:
        raise UserError(f"{pictures.broken[0][2]}; {len(pictures.broken)} such in {where}")
    for file, expected in _lengths(where):
        if expected != len(pictures):
            raise UserError(f"{file}: tells of {expected} pictures, found {len(pictures)}; export or copy it again")
    read = _reader(pictures, "image")
    if kind == "retrieval":
        written = [_decoded(record["caption"], str(rest.place(i))) for i, record in enumerate(_every(rest))]
        captions = [[line for line in text.splitlines() if line.strip()] for text in written]
        return _captioned(name, where, captions, read)
    classes = _required_lines(f"{place}/classnames.txt", "a class name")
    prompts = f"{place}/zeroshot_classification_templates.txt"
    templates = names.with_braces(_required_lines(prompts, "a template"), prompts)
    ours = names.class_names(name) if name in names.known_names() else classes
    if len(classes) != len(ours):
        differ = _first_difference(classes, ours)
        raise UserError(f"{place}/classnames.txt: expected {len(ours)} names, found {len(classes)}{differ}; export it again")
    if name not in names.known_names() or classes != ours:  # one of CLEVR's distances is called nothing
        _check_names(classes, f"{place}/classnames.txt")
    labels = [_number(record["cls"], str(rest.place(i))) for i, record in enumerate(_every(rest))]
    return _labelled(name, where, classes, templates, np.array(labels), read)


def _number(label: bytes, where: str) -> int:
    if not re.fullmatch(rb"\s*\d+\s*", label):
        raise UserError(f"{where}: expected the number of a class in its .cls, found {label[:20]!r}")
    return int(label)


def _lengths(where: str) -> Iterable[tuple[str, int]]:
    """How many samples open_clip's files say that there are, if there are any."""
    for file in (f"{where}/sizes.json", f"{where}/__len__"):
        text = _text(file)
        if text is not None:
            try:
                said = json.loads(text)
                yield file, sum(said.values()) if isinstance(said, dict) else int(said)
            except (ValueError, TypeError) as error:
                raise UserError(f"{file}: expected a number of samples, or one for each shard, found {text[:40]!r}") from error


def _text(path: str) -> str | None:
    """What a text file holds, if there is one."""
    data = read_ranges([(str(pathlib.Path(path).expanduser()) if is_local(path) else path, 0, None)])[0]
    if isinstance(data, FileNotFoundError):
        return None
    if isinstance(data, Exception):
        raise UserError(f"{path}: cannot be read ({type(data).__name__}: {data})")
    return _decoded(data, path)


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: expected text in UTF-8, found another encoding ({error.reason}); save it as UTF-8") from error


def _lines(path: str) -> list[str]:
    return [line.strip() for line in (_text(path) or "").rstrip().splitlines()]


def _required_lines(path: str, what: str) -> list[str]:
    if _text(path) is None:
        raise UserError(f"{path}: expected {what} a line, found no such file; export the set again, or write it")
    return _lines(path)


def _photographs(name: str) -> LabelledSet | CaptionedSet:
    """One picture a class, and two captions a picture, for a first look: sixteen are too few to compare models by."""
    if (spec := importlib.util.find_spec("skimage")) is None:
        raise UserError(f"{name}: the pictures come with scikit-image, which is not installed; {TASKS[name].how}")
    folder = pathlib.Path(spec.origin).parent / "data"
    known = json.loads((importlib.resources.files("clip_jax") / "evaluation" / "data" / "photographs.json").read_text())
    rows = known["photographs"]
    for row in rows:
        if not (folder / row["file"]).is_file():
            raise UserError(f"{name}: expected {row['file']} in {folder}, found no such file; {TASKS[name].how} --upgrade")
    read = lambda numbers: [(folder / rows[i]["file"]).read_bytes() for i in numbers]
    if name == "photographs_retrieval":
        return _captioned(name, str(folder), [row["captions"] for row in rows], read)
    return _labelled(name, str(folder), [row["class"] for row in rows], tuple(known["templates"]), np.arange(len(rows)), read)


def _every(records: Records) -> Iterable[Record]:
    """All records, in order; evaluation skips none."""
    for first in range(0, len(records), CHUNK):
        yield from map(_whole, records.read(range(first, min(first + CHUNK, len(records)))))


def _whole(record: Record | BadSample) -> Record:
    if isinstance(record, BadSample):
        raise record
    return record


def _reader(records: Records, field: str) -> Read:
    def read(indices: Sequence[int]) -> list[bytes | np.ndarray]:
        return [_whole(record)[field] for record in records.read(indices)]

    return read


def _labelled(name: str, where: str, classes: list[str], templates: tuple[str, ...], labels: np.ndarray, read: Read) -> LabelledSet:
    for i in np.flatnonzero((labels < 0) | (labels >= len(classes))):
        raise UserError(f"{where}: picture {i} has label {labels[i]}, expected 0 to {len(classes) - 1}, for {len(classes)} class names")
    absent = len(classes) - len(np.unique(labels))
    if absent:
        warn(f"{where}: {absent} of the {len(classes)} classes have no picture")
    return LabelledSet(name, where, classes, templates, labels, read)


def _captioned(name: str, where: str, captions: list[list[str]], read: Read) -> CaptionedSet:
    for i, own in enumerate(captions):
        if not own:
            raise UserError(f"{where}: picture {i} has no caption, expected at least one; add it, or remove the picture")
    return CaptionedSet(name, where, captions, read)
