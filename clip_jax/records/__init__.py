"""Where training's pairs come from: random access to records, by number, whatever holds them.

- a prepared TFDS set in ArrayRecord: its folder
- WebDataset's tars: `shards/{00000..01233}.tar`, also at gs://, s3:// or https://
- a table of paths and captions: .csv, .tsv, .jsonl or .parquet
- a folder of pictures
- `synthetic:COUNT`, for measuring
"""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from clip_jax.errors import BadSample, UserError
from clip_jax.files import is_local

Record = dict[str, Any]  # values by field; a picture is the bytes of its file

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jfif", "avif")
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")


class Place(NamedTuple):
    """Where a record is."""

    shard: str  # the file, or the set, that holds it
    key: str  # its name in there

    def __str__(self) -> str:
        return f"{self.shard} {self.key}"


@runtime_checkable
class Records(Protocol):
    """The records of a set, and what was found broken before any was read."""

    broken: list[tuple[Place, str, str]]  # place, reason, message

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> list[Record | BadSample]:
        """Some records at once, or for each what is wrong with it."""

    def place(self, index: int) -> Place: ...


def open_records(name: str, split: str, fields: Sequence[str]) -> Records:
    """The records of a set.

    Args:
      split: of a TFDS set; nothing else has any.
      fields: those that will be used.  What is costly to read and not among them may be left out.

    Raises:
      UserError: there is no such set, or nothing in it.
    """
    from clip_jax.records import folders, prepared, synthetic, tables, tars

    if name.startswith("synthetic:"):
        return synthetic.Synthetic(name)
    suffix = pathlib.PurePosixPath(name).suffix.lower()
    if suffix == ".tar":
        return tars.Tars(name, fields)
    if suffix in TABLES:
        return tables.open_table(name, fields)
    path = pathlib.Path(name).expanduser()
    if is_local(name) and path.is_dir() and not (path / "dataset_info.json").is_file() and folders.has_pictures(path):
        return folders.Folder(path)
    if not is_local(name):
        raise UserError(f"data set {name}: expected .tar, {', '.join(TABLES)} at an address, found {suffix or 'no extension'}")
    return prepared.Prepared(name, split)


def missing_field(place: Place, field: str, found: Sequence[str]) -> BadSample:
    """What is said of a record without a field that is wanted."""
    seen = ", ".join(found) or "none"
    return BadSample("missing field", f"{place}: no field {field!r}; the fields are {seen}; see config.data.image and caption")


def unreadable(place: Place, error: Exception) -> BadSample:
    """What is said of a record whose file cannot be read."""
    return BadSample("unreadable", f"{place}: cannot be read ({type(error).__name__}: {error})")
