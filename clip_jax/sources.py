"""What `python -m clip_jax embed` reads: named pictures or texts, one after the other, in the same order every time.

- a folder: the pictures in it and below, by path; names that start with a dot are not looked at
- a .csv or .jsonl: pictures by path, relative to the table's folder, or else texts
- a WebDataset's .tar, or several: "shards-{000..003}.tar"
- a .txt: a text a line
"""

import contextlib
import csv
import dataclasses
import functools
import json
import os
import pathlib
import re
import tarfile
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

from clip_jax.errors import UserError

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
PICTURE_FIELDS, TEXT_FIELDS = ("image", "file", "filepath", "path"), ("caption", "text")


class Item(NamedTuple):
    """A picture, not yet read, or a text."""

    name: str  # the path in the source, the key, or the text itself
    where: str  # for errors
    read: Callable[[], bytes]  # the encoded picture; from a tar only before the next item is taken


@dataclasses.dataclass(frozen=True)
class Source:
    """Where items come from."""

    path: str  # absolute
    kind: str  # "image" or "text"
    items: Callable[[], Generator[Item, None, None]]  # to be closed, since a file may be open

    @classmethod
    def of(cls, path: str) -> "Source":
        """A folder, a table, a tar, a pattern of tars, or a file of texts."""
        path = os.path.abspath(os.path.expanduser(path))
        files = [pathlib.Path(name) for name in ([path] if os.path.exists(path) else _expand(path))]
        for file in files:
            if not file.exists():
                raise UserError(f"{file}: no such file or folder")
        first, suffix = files[0], files[0].suffix.lower()
        if first.is_dir():
            return cls(path, "image", lambda: _folder(path))
        if suffix == ".tar":
            return cls(path, "image", lambda: _tars(files))
        if suffix in (".csv", ".jsonl"):
            kind, field = _field(first)
            return cls(path, kind, lambda: _table(first, kind, field))
        if suffix == ".txt":
            return cls(path, "text", lambda: _lines(first))
        found = suffix or "no extension"
        raise UserError(f"{path}: expected a folder of pictures, .csv, .jsonl, .tar or .txt, found {found}")

    def count(self) -> int:
        """How many items there are.  No picture is read for it, but every row of a table is checked."""
        count = sum(1 for _ in self.items())
        if not count:
            wanted = "text" if self.kind == "text" else f"picture, by the endings {', '.join(PICTURES)}"
            raise UserError(f"{self.path}: expected at least one {wanted}; found none")
        return count


def read_file(file: pathlib.Path, where: str) -> bytes:
    """The bytes of a picture's file."""
    try:
        return file.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{where}: expected the file of a picture, which cannot be read ({reason})") from error


def _expand(pattern: str) -> list[str]:
    """`a-{08..10}.tar` as a-08.tar, a-09.tar and a-10.tar."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    (low, high), before, after = match.groups(), pattern[: match.start()], pattern[match.end() :]
    if int(low) > int(high):
        raise UserError(f"{pattern}: {match[0]} names nothing, expected the lower number first")
    return [name for n in range(int(low), int(high) + 1) for name in _expand(f"{before}{n:0{len(low)}}{after}")]


def _folder(folder: str) -> Generator[Item, None, None]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error

    found = {}
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = pathlib.Path(place, name)
            if path.suffix.lower() in PICTURES and not name.startswith("."):
                found[path.relative_to(folder).as_posix()] = path
    for name, path in sorted(found.items()):
        yield Item(name, str(path), functools.partial(read_file, path, str(path)))


def _tars(files: Sequence[pathlib.Path]) -> Generator[Item, None, None]:
    for file in files:
        yield from _tar(file)  # closed with this one, and its file with it


def _tar(file: pathlib.Path) -> Generator[Item, None, None]:
    """The pictures of a shard.  As in WebDataset, a member's key is its path up to the first dot of its name."""
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                folder, slash, name = member.name.removeprefix("./").rpartition("/")
                key, _, _ = name.partition(".")
                if member.isfile() and key and pathlib.Path(name).suffix.lower() in PICTURES:
                    where = f"{file} member {member.name}"
                    yield Item(folder + slash + key, where, functools.partial(_member, tar, member, where))
            # tarfile takes a damaged header for the end, where there should be zeros or nothing.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{file}: expected a whole tar, not compressed ({error}); copy or make it again") from error


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo, where: str) -> bytes:
    try:
        return tar.extractfile(member).read()
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{where}: cannot be read ({error}); copy or make the tar again") from error


def _field(table: pathlib.Path) -> tuple[str, str]:
    """What a table holds, and in which field."""
    _, row = next(_rows(table), ("", {}))
    for kind, fields in (("image", PICTURE_FIELDS), ("text", TEXT_FIELDS)):
        for field in fields:
            if field in row:
                return kind, field
    raise UserError(
        f"{table}: expected a field {', '.join(PICTURE_FIELDS)} with the paths of pictures, or one of texts, "
        f"{' or '.join(TEXT_FIELDS)}; found {', '.join(map(str, row)) or 'no row'}"
    )


def _table(table: pathlib.Path, kind: str, field: str) -> Generator[Item, None, None]:
    for where, row in _rows(table):
        value, where = row.get(field), f"{where} field {field!r}"
        if not isinstance(value, str) or not value.strip():
            wanted = "the path of a picture" if kind == "image" else "a text"
            raise UserError(f"{where}: expected {wanted}, found {value!r:.60}; mend or remove this row")
        if kind == "text":
            yield Item(value, where, value.encode)
            continue
        if "://" in value:
            raise UserError(f"{where}: expected the path of a picture, found the address {value}; download it first")
        path = table.parent / value
        where = f"{where}, {path}"
        yield Item(value, where, functools.partial(read_file, path, where))


def _rows(table: pathlib.Path) -> Iterator[tuple[str, dict[Any, Any]]]:
    """The rows of a table, each with its place."""
    with _open_text(table) as lines:
        if table.suffix.lower() == ".csv":
            reader = csv.DictReader(lines)
            for row in reader:
                yield f"{table} line {reader.line_num}", row
            return
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{table} line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: expected a JSON object ({error}); mend or remove this line") from error
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected a JSON object, found {line.strip():.60}; mend or remove this line")
            yield where, row


def _lines(file: pathlib.Path) -> Generator[Item, None, None]:
    with _open_text(file) as lines:
        for number, line in enumerate(lines, 1):
            if text := line.strip():
                yield Item(text, f"{file} line {number}", text.encode)


@contextlib.contextmanager
def _open_text(file: pathlib.Path) -> Iterator[Any]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            yield lines
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: expected a {file.suffix} in UTF-8, which cannot be read ({error})") from error
