"""Files, wherever they are: on this machine, in gs:// or s3:// buckets, or at https:// addresses, by fsspec."""

import concurrent.futures
import contextlib
import functools
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any, BinaryIO

import fsspec

from clip_jax.errors import UserError

RETRIES = (0.5, 2.0, 8.0)  # seconds before what could not be read far away is asked for again
EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "http": "http", "https": "http"}  # what pip installs for a scheme


def is_local(path: str) -> bool:
    return "://" not in path


def filesystem(path: str) -> tuple[Any, str]:
    """The file system of a path, and its own name for it."""
    try:
        return fsspec.core.url_to_fs(os.path.expanduser(path))
    except (ImportError, ValueError) as error:
        scheme = path.partition("://")[0]
        extra = f"; pip install 'clip-from-paper-to-pod[{EXTRAS[scheme]}]' brings it" if scheme in EXTRAS else ""
        raise UserError(f"{path}: no library for {scheme}:// ({error}){extra}") from error


def expand(pattern: str) -> list[str]:
    """The names that a pattern means: {000..012} and {a,b} as a shell, * and ? as files are there; in order.

    Raises:
      UserError: nothing has such a name.
    """
    names = []
    for name in _braces(pattern):
        if not re.search(r"[*?\[]", name):
            names.append(os.path.expanduser(name))
            continue
        fs, own = filesystem(name)
        scheme = "" if is_local(name) else name.partition("://")[0] + "://"
        found = sorted(fs.glob(own))
        if not found:
            raise UserError(f"{name}: no file has such a name")
        names += [f if "://" in f else scheme + f for f in found]
    return names


def _braces(pattern: str) -> list[str]:
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    low, high, listed = match.groups()
    before, after = pattern[: match.start()], pattern[match.end() :]
    if listed is None and int(low) > int(high):
        raise UserError(f"{pattern}: {match[0]} names nothing, expected the lower number first")
    middles = listed.split(",") if listed is not None else [f"{n:0{len(low)}}" for n in range(int(low), int(high) + 1)]
    return list(dict.fromkeys(name for middle in middles for name in _braces(before + middle + after)))


def describe(path: str) -> tuple[int, str]:
    """The size of a file in bytes, and what changes when it is written anew.

    Raises:
      UserError: there is none, or it cannot be seen.
    """
    fs, own = filesystem(path)
    try:
        info = fs.info(own)
    except Exception as error:  # each file system has its own
        raise UserError(f"{path}: expected a file, which cannot be seen ({type(error).__name__}: {error})") from error
    if info["type"] != "file" or info["size"] is None:
        raise UserError(f"{path}: expected a file, found a {info['type']}" + (" of unknown size" if info["type"] == "file" else ""))
    version = next((str(info[name]) for name in ("ETag", "etag", "mtime", "LastModified", "Last-Modified") if info.get(name)), "")
    return info["size"], version


def read_ranges(parts: Sequence[tuple[str, int, int | None]]) -> list[bytes | Exception]:
    """Parts of files, (path, first byte, size), those of one bucket at the same time; (path, 0, None) is all of a file.

    Returns:
      For each its bytes, or why they cannot be read, after some attempts; fewer bytes than asked for are an error.
    """
    found = _read_once(parts)
    for wait in RETRIES:
        # A file that is not there stays away; what else is far away may only be busy.
        again = [i for i, data in enumerate(found) if _may_come_back(parts[i][0], data)]
        if not again:
            break
        time.sleep(wait)
        for i, data in zip(again, _read_once([parts[i] for i in again])):
            found[i] = data
    return found


def _may_come_back(path: str, data: bytes | Exception) -> bool:
    for_good = (FileNotFoundError, PermissionError, UserError)
    return isinstance(data, Exception) and not is_local(path) and not isinstance(data, for_good)


def _read_once(parts: Sequence[tuple[str, int, int | None]]) -> list[bytes | Exception]:
    found: list[bytes | Exception] = [OSError("not read")] * len(parts)
    local: dict[str, list[int]] = {}  # by file
    remote: dict[str, list[int]] = {}  # by scheme
    for i, (path, start, size) in enumerate(parts):
        (local if is_local(path) else remote).setdefault(path if is_local(path) else path.partition("://")[0], []).append(i)
    # Beside each other, since a disk far away answers many at once as fast as one.
    wanted = [[(start, size) for _, start, size in map(parts.__getitem__, members)] for members in local.values()]
    for members, read in zip(local.values(), _local_readers().map(_read_local, local, wanted)):
        for i, data in zip(members, read):
            found[i] = data
    for members in remote.values():
        paths, starts, sizes = zip(*(parts[i] for i in members))
        ends = [None if size is None else start + size for start, size in zip(starts, sizes)]
        try:
            fs, _ = filesystem(paths[0])
            own = [fs._strip_protocol(path) for path in paths]
            read = fs.cat_ranges(own, list(starts), ends, on_error="return")
        except Exception as error:  # a file system that knows no on_error
            read = [error] * len(members)
        for i, size, data in zip(members, sizes, read):
            short = not isinstance(data, Exception) and size is not None and len(data) != size
            found[i] = OSError(f"the file ends {size - len(data)} bytes early") if short else data
    return found


def _read_local(path: str, ranges: Sequence[tuple[int, int | None]]) -> list[bytes | Exception]:
    """Parts of one file, opened once."""
    try:
        with open(path, "rb") as file:
            return [_read_part(file, start, size) for start, size in ranges]
    except (OSError, ValueError) as error:
        return [error] * len(ranges)


def _read_part(file: BinaryIO, start: int, size: int | None) -> bytes | Exception:
    try:
        if size is None:
            return file.read()
        data = os.pread(file.fileno(), size, start)
        return data if len(data) == size else OSError(f"the file ends {size - len(data)} bytes early")
    except (OSError, ValueError) as error:
        return error


@functools.cache
def _local_readers() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(16, "read")


@contextlib.contextmanager
def whole_or_not(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when it is written: what was there is not lost to a full disk."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as beside:
        try:
            yield beside
            beside.flush()
        except BaseException:
            os.unlink(beside.name)
            raise
    os.chmod(beside.name, 0o644)
    os.replace(beside.name, path)
