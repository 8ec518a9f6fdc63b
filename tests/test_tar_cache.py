"""An index of tars is made once, and what is known is not read again."""

import os

import numpy as np
import pytest
from sets import FIELDS, every, good, tar

from clip_jax.records import open_records, tar_cache
from clip_jax.records.tar_index import ARRAYS, index_shard, load_shards, split


@pytest.fixture
def shards(tmp_path) -> list[str]:
    """Five tars; the second holds nothing but what is broken, the fourth a sample that is cut."""
    paths = [tar(tmp_path / f"{i}.tar", good([f"{i} {j}" for j in range(i + 1)])) for i in range(5)]
    (tmp_path / "1.tar").write_bytes(b"no tar at all" * 100)
    os.truncate(tmp_path / "3.tar", 1200)
    return paths


def hollow(path: str) -> None:
    """From now on nothing can be read in it, and it looks as before."""
    size, date = os.path.getsize(path), os.stat(path).st_mtime_ns
    with open(path, "wb") as file:
        file.truncate(size)
    os.utime(path, ns=(date, date))


def keys(index) -> list[str]:
    return [index.key(i) for i in range(len(index.starts) - 1)]


def test_the_parts_of_an_index_are_what_it_was_made_of(shards):
    index = tar_cache.open_index(shards)
    parts = split(index)
    for path, part in zip(shards, parts, strict=True):
        alone = index_shard(path, os.path.getsize(path))
        assert all(np.array_equal(getattr(part, name), getattr(alone, name)) for name in ARRAYS if name != "member_endings")
        endings = [[one.endings[e] for e in one.member_endings] for one in (part, alone)]
        assert endings[0] == endings[1] and part.broken == alone.broken
    assert keys(index) == sum(map(keys, parts), []) and len(index.broken) >= 2


def test_only_new_shards_are_read(shards, tmp_path):
    for first, last in ((0, 3), (1, 5), (0, 5), (2, 3)):
        tar_cache.open_index(shards[first:last])
        for path in shards[first:last]:
            hollow(path)
    assert keys(tar_cache.open_index(shards[::2])) == ["0 0", *(f"2 {i}" for i in range(3)), *(f"4 {i}" for i in range(5))]
    newer = tar(tmp_path / "2.tar", good(["newer"]))
    os.utime(newer, ns=(10**18, 10**18))
    assert keys(tar_cache.open_index(shards[::2])) == ["0 0", "newer", *(f"4 {i}" for i in range(5))]


def test_an_index_that_was_not_finished_goes_on(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(tar_cache, "PIECE", 2)
    read = []

    def until_the_fourth(path, size):
        if len(read) == 3:
            raise KeyboardInterrupt
        read.append(path)
        return index_shard(path, size)

    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(tar_cache, "index_shard", until_the_fourth)
        tar_cache.open_index(shards)
    kept = [path for folder in (tmp_path / ".clip_jax_index").iterdir() for path, _, _ in load_shards(folder)]
    assert len(kept) in (2, 3)  # one piece, or the one of a single shard too
    for path in kept:
        hollow(path)
    index = tar_cache.open_index(shards)
    assert keys(index) == [f"{i} {j}" for i in (0, 2, 4) for j in range(i + 1)]
    assert len(list((tmp_path / ".clip_jax_index").iterdir())) == 1  # the pieces are in it


def test_one_host_takes_what_another_one_made(shards, tmp_path, monkeypatch):
    """Both begin at once, at other pieces; what the second is about to make, the first has made."""
    monkeypatch.setattr(tar_cache, "PIECE", 1)
    expected = keys(tar_cache.open_index(shards[:1])) and [f"{i} {j}" for i in (0, 2, 4) for j in range(i + 1)]
    other = []

    def the_other_is_faster(path, size):
        if not other:
            other.append(True)
            assert keys(tar_cache.open_index(shards)) == expected
        return index_shard(path, size)

    monkeypatch.setattr(tar_cache, "index_shard", the_other_is_faster)
    assert keys(tar_cache.open_index(shards)) == expected
    records = open_records(f"{tmp_path}/{{0..4}}.tar", "train", FIELDS)
    assert [record["caption"].decode() for record in every(records)] == expected
