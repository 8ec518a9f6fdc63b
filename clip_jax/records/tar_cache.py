"""Where the indices of tars are kept: beside the first shard, or in the cache of the user.

    .clip_jax_index/{whole,piece}-DIGEST/{index.json,starts.npy,...}

The digest is of names, sizes and dates of the shards.  What an index of other shards knows of these ones is taken over, and
one that is being made is kept piece by piece: nobody reads a shard twice, and hosts that begin at once share the work.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import random
import shutil
import tempfile

import tqdm

from clip_jax.errors import warn
from clip_jax.files import describe, is_local
from clip_jax.records.tar_index import ShardIndex, index_shard, join, load_index, load_shards, split

CACHE = "~/.cache/clip_jax/indices"  # for shards whose own folder cannot be written to
PIECE = 256  # shards
UNREADABLE = (OSError, ValueError, KeyError, EOFError)

Shard = tuple[str, int, str]  # path, size in bytes, version


def open_index(paths: list[str]) -> ShardIndex:
    """The index of all shards, from where it was kept, or made and kept."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        shards = [(path, *state) for path, state in zip(paths, pool.map(describe, paths))]
    beside = pathlib.Path(paths[0]).parent / ".clip_jax_index" if is_local(paths[0]) else None
    places = [place for place in (beside, pathlib.Path(CACHE).expanduser()) if place is not None]
    whole = _load(places, shards, "whole")
    return whole if whole is not None else _make(places, shards)


def _make(places: list[pathlib.Path], shards: list[Shard]) -> ShardIndex:
    parts = _known(places, set(shards))
    missing = [shard for shard in shards if shard not in parts]
    pieces = [missing[first : first + PIECE] for first in range(0, len(missing), PIECE)]
    begin = random.randrange(len(pieces)) if pieces else 0  # so that hosts begin at different ones
    with tqdm.tqdm(desc="index of the shards", total=len(missing), unit="shard", disable=len(missing) < 2) as bar:
        for piece in pieces[begin:] + pieces[:begin]:
            kept = _load(places, piece, "piece")  # by a run before, or another host
            if kept is None:
                with concurrent.futures.ThreadPoolExecutor(8) as pool:
                    indices = []
                    for index in pool.map(index_shard, *zip(*((path, size) for path, size, _ in piece))):
                        indices.append(index)
                        bar.update()
                if len(pieces) > 1:
                    _keep(places, piece, "piece", join(indices))
            else:
                indices = split(kept)
                bar.update(len(piece))
            parts |= zip(piece, indices)
    index = _keep(places, shards, "whole", join([parts[shard] for shard in shards]))
    for folder in (folder for place in places for folder in place.glob("piece-*")):
        with contextlib.suppress(*UNREADABLE):
            if set(load_shards(folder)) <= set(shards):
                shutil.rmtree(folder, ignore_errors=True)
    return index


def _name(shards: list[Shard], kind: str) -> str:
    return f"{kind}-{hashlib.sha256(json.dumps([3, shards]).encode()).hexdigest()[:24]}"


def _load(places: list[pathlib.Path], shards: list[Shard], kind: str) -> ShardIndex | None:
    for place in places:
        folder = place / _name(shards, kind)
        try:
            return load_index(folder)
        except FileNotFoundError:
            pass
        except UNREADABLE as error:
            warn(f"index {folder}: made again, for it cannot be read ({type(error).__name__}: {error})")
            shutil.rmtree(folder, ignore_errors=True)
    return None


def _known(places: list[pathlib.Path], wanted: set[Shard]) -> dict[Shard, ShardIndex]:
    """What other indices hold of these shards."""
    found: dict[Shard, ShardIndex] = {}
    for folder in (folder for place in places if place.is_dir() for folder in sorted(place.iterdir())):
        try:
            shards = load_shards(folder)
            if not wanted.isdisjoint(set(shards) - set(found)):
                found |= {shard: part for shard, part in zip(shards, split(load_index(folder)), strict=True) if shard in wanted}
        except UNREADABLE:  # of another version, or half-written
            continue
    return found


def _keep(places: list[pathlib.Path], shards: list[Shard], kind: str, index: ShardIndex) -> ShardIndex:
    """Writes an index where that is allowed; it comes back mapped from there."""
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            unfinished = pathlib.Path(tempfile.mkdtemp(dir=place))
        except OSError:
            continue
        folder = place / _name(shards, kind)
        try:
            index.save(unfinished, shards)
            unfinished.chmod(0o755)
            os.replace(unfinished, folder)
            return load_index(folder)
        except OSError:  # a full disk, or another process was first
            shutil.rmtree(unfinished, ignore_errors=True)
        break
    return index
