"""Where the members of tars begin: made once by reading every header, kept as arrays that are mapped, not read."""

import dataclasses
import itertools
import json
import pathlib
import tarfile
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from clip_jax.files import filesystem, is_local

BLOCK = tarfile.BLOCKSIZE
LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE)
ARRAYS = ("starts", "key_ends", "keys", "shards", "offsets", "sizes", "member_endings")


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """S samples and their M members, in the order of the shards."""

    key_ends: Int64[np.ndarray, "S"]
    starts: Int64[np.ndarray, "S+1"]  # the first member of each sample, and M
    keys: UInt8[np.ndarray, "K"]  # all keys, in UTF-8, one after the other
    shards: Int32[np.ndarray, "M"]
    offsets: Int64[np.ndarray, "M"]  # bytes from the start of the shard
    sizes: Int64[np.ndarray, "M"]  # bytes
    member_endings: Int32[np.ndarray, "M"]  # which of `endings`
    endings: tuple[str, ...]
    broken: tuple[tuple[int, str, str, str], ...]  # shard, key, reason, message
    folder: pathlib.Path | None = None  # where it is kept

    def __reduce__(self):
        """Another process maps the same files."""
        if self.folder is not None:
            return load_index, (self.folder,)
        return ShardIndex, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def key(self, sample: int) -> str:
        start = self.key_ends[sample - 1] if sample else 0
        return self.keys[start : self.key_ends[sample]].tobytes().decode(errors="replace")

    def save(self, folder: pathlib.Path, shards: list[tuple[str, int, str]]) -> None:
        for name in ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name))
        (folder / "index.json").write_text(json.dumps({"endings": self.endings, "broken": self.broken, "shards": shards}))


def load_index(folder: pathlib.Path) -> ShardIndex:
    """The index that was saved in a folder."""
    rest = json.loads((folder / "index.json").read_text())
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
    return ShardIndex(**arrays, endings=tuple(rest["endings"]), broken=tuple(map(tuple, rest["broken"])), folder=folder)


def load_shards(folder: pathlib.Path) -> list[tuple[str, int, str]]:
    """Path, size and version of the shards of an index that was saved."""
    return [tuple(shard) for shard in json.loads((folder / "index.json").read_text())["shards"]]


def join(parts: list[ShardIndex]) -> ShardIndex:
    """One index of all shards, from one of each."""
    endings = sorted({ending for part in parts for ending in part.endings})
    number = {ending: i for i, ending in enumerate(endings)}
    members = np.cumsum([0] + [len(part.offsets) for part in parts])
    keys = np.cumsum([0] + [len(part.keys) for part in parts])
    renumbered = [np.array([number[e] for e in part.endings], np.int32)[part.member_endings] for part in parts]
    return ShardIndex(
        starts=np.concatenate([*(part.starts[:-1] + first for part, first in zip(parts, members)), members[-1:]]),
        key_ends=np.concatenate([part.key_ends + first for part, first in zip(parts, keys)]),
        keys=np.concatenate([part.keys for part in parts]),
        shards=np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.offsets) for part in parts]),
        offsets=np.concatenate([part.offsets for part in parts]),
        sizes=np.concatenate([part.sizes for part in parts]),
        member_endings=np.concatenate(renumbered),
        endings=tuple(endings),
        broken=tuple((i, *found[1:]) for i, part in enumerate(parts) for found in part.broken),
    )


def split(index: ShardIndex) -> list[ShardIndex]:
    """An index of each shard, from one of all."""
    count = len(load_shards(index.folder))
    members = np.searchsorted(index.shards, np.arange(count + 1))
    samples = np.searchsorted(index.starts[:-1], members)
    keys = np.concatenate([[0], index.key_ends])[samples]
    broken: dict[int, list] = {}
    for shard, *found in index.broken:
        broken.setdefault(shard, []).append((0, *found))
    parts = []
    for i, (m, s, k) in enumerate(zip(*(itertools.pairwise(bounds.tolist()) for bounds in (members, samples, keys)))):
        parts.append(
            ShardIndex(
                starts=np.append(index.starts[slice(*s)], m[1]) - m[0],
                key_ends=index.key_ends[slice(*s)] - k[0],
                keys=np.array(index.keys[slice(*k)]),
                shards=np.zeros(m[1] - m[0], np.int32),
                offsets=np.array(index.offsets[slice(*m)]),
                sizes=np.array(index.sizes[slice(*m)]),
                member_endings=np.array(index.member_endings[slice(*m)]),
                endings=index.endings,
                broken=tuple(broken.get(i, ())),
            )
        )
    return parts


def index_shard(path: str, size: int) -> ShardIndex:
    """The index of one shard, in which every sample that is whole can be found.

    As in WebDataset, the members of a sample follow each other, and its key is their path up to the first dot of
    the name.
    """
    starts, keys, offsets, sizes, member_endings, endings, broken = [], [], [], [], [], {}, []
    seen: set[str] = set()
    for name, offset, length in _members(path, size, broken):
        folder, slash, last = name.removeprefix("./").rpartition("/")
        stem, dot, ending = last.partition(".")
        if not stem or not dot:
            continue
        key, ending = folder + slash + stem, ending.lower()
        if offset + length > size:
            message = f"its .{ending} ends {offset + length - size} bytes after the end of the file; copy or make it again"
            broken.append((0, key, "truncated", message))
            continue
        if not keys or keys[-1] != key:
            if key in seen:
                broken.append((0, key, "duplicate key", "another sample of this shard has the same key; the first is kept"))
                continue
            seen.add(key)
            starts.append(len(offsets))
            keys.append(key)
        elif endings.get(ending) in member_endings[starts[-1] :]:
            broken.append((0, key, "duplicate key", f"it has several .{ending}; the first is kept"))
            continue
        offsets.append(offset)
        sizes.append(length)
        member_endings.append(endings.setdefault(ending, len(endings)))
    encoded = [key.encode(errors="replace") for key in keys]
    return ShardIndex(
        starts=np.array([*starts, len(offsets)], np.int64),
        key_ends=np.cumsum([len(key) for key in encoded], dtype=np.int64),
        keys=np.frombuffer(b"".join(encoded), np.uint8),
        shards=np.zeros(len(offsets), np.int32),
        offsets=np.array(offsets, np.int64),
        sizes=np.array(sizes, np.int64),
        member_endings=np.array(member_endings, np.int32),
        endings=tuple(endings),
        broken=tuple(broken),
    )


def _members(path: str, size: int, broken: list) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and size of every file in a tar.  What is damaged is noted, and the next header looked for."""
    fs, own = filesystem(path)
    # Far away it is read from start to end, in large pieces: a request for every header would take longer.
    remote = {} if is_local(path) else {"block_size": 2**24, "cache_type": "readahead"}
    with fs.open(own, "rb", **remote) as file:
        offset, name, lost, ended = 0, "", False, False
        while offset + BLOCK <= size:
            file.seek(offset)
            header = file.read(BLOCK)
            try:
                member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            except tarfile.EOFHeaderError:  # zeros: the end, or more follows
                offset, ended = offset + BLOCK, True
                continue
            except tarfile.HeaderError as error:
                if not lost:
                    message = f"no header at byte {offset} ({error}); copy or make the tar again"
                    broken.append((0, f"at byte {offset}", "broken tar", message))
                offset, lost = offset + BLOCK, True
                continue
            lost, ended, data = False, False, offset + BLOCK
            if member.type in LONG_NAMES and member.size < 2**20:
                name = _long_name(member.type, file.read(member.size)) or name
            elif member.isfile():
                yield name or member.name, data, member.size
                name = ""
            else:
                name = ""  # it was that of a folder or a link
            offset = data + -(-member.size // BLOCK) * BLOCK
        if not ended and not lost and offset <= size:
            message = f"it ends at byte {size} without the zeros that end a tar; copy or make it again"
            broken.append((0, f"at byte {offset}", "broken tar", message))


def _long_name(kind: bytes, data: bytes) -> str:
    if kind == tarfile.GNUTYPE_LONGNAME:
        return data.rstrip(b"\0").decode("utf-8", "surrogateescape")
    while data.strip(b"\0"):  # of pax: "LENGTH path=VALUE\n"
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not int(length):
            return ""
        field, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if field == b"path":
            return value.decode("utf-8", "surrogateescape")
        data = data[int(length) :]
    return ""
