"""Batches by processes: the same ones, the same errors, and nothing left behind."""

import contextlib
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from sets import config_of, good, jpeg, prepare, records, tar

from clip_jax.data import training_batches
from clip_jax.errors import UserError
from clip_jax.health import Health, read_ledger

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory) -> tuple[str, ...]:
    """A set of every kind; one sample of the tar is no picture."""
    place = tmp_path_factory.mktemp("kinds")
    tar(place / "a.tar", [*good([f"tar {i}" for i in range(9)]), ("bad.jpg", b"no picture"), ("bad.txt", b"bad")])
    (place / "pictures").mkdir()
    for i in range(5):
        (place / "pictures" / f"{i}.jpg").write_bytes(jpeg(i))
        (place / "pictures" / f"{i}.txt").write_text(f"folder {i}")
    rows = [(f"pictures/{i}.jpg", f"row {i}") for i in range(5)]
    (place / "a.csv").write_text("image,caption\n" + "".join(f"{path},{caption}\n" for path, caption in rows))
    (place / "a.jsonl").write_text("".join(f'{{"image": "{path}", "caption": "{caption}"}}\n' for path, caption in rows))
    columns = {"image": [jpeg(i) for i in range(5)], "caption": [f"parquet {i}" for i in range(5)]}
    pyarrow.parquet.write_table(pyarrow.table(columns), place / "a.parquet")
    files = [str(place / name) for name in ("a.tar", "pictures", "a.csv", "a.jsonl", "a.parquet")]
    return (*files, prepare(place, records(5)), "synthetic:5:40x40")


def taken(config, count: int, ledger: pathlib.Path | None = None, position: dict | None = None) -> tuple[list[dict], dict]:
    with contextlib.closing(training_batches(config, health=Health(ledger, config.data.max_bad))) as batches:
        if position is not None:
            batches.set_state(position)
        found = [{name: value.copy() for name, value in next(batches).items()} for _ in range(count)]
        return found, batches.get_state()


def equal(some: list[dict], others: list[dict]) -> bool:
    return all(np.array_equal(a[name], b[name]) for a, b in zip(some, others, strict=True) for name in ("image", "tokens"))


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_workers_do_not_change_the_order_nor_what_is_skipped(workers, every_kind, tmp_path):
    by_threads, by_workers = (config_of(*every_kind, workers=n, threads=2, max_bad=1.0) for n in (0, workers))
    expected, position = taken(by_threads, 20, tmp_path / "threads.jsonl")
    found, reached = taken(by_workers, 20, tmp_path / "workers.jsonl")
    assert equal(found, expected) and reached == position
    ledger = read_ledger(tmp_path / "workers.jsonl")
    assert ledger == read_ledger(tmp_path / "threads.jsonl") and [row["key"] for row in ledger] == ["sample bad"]
    assert multiprocessing.active_children() == []
    if workers == 2:
        later, _ = taken(by_workers, 3, position=position)
        assert equal(later, taken(by_threads, 23)[0][20:])


def test_an_error_of_a_worker_is_for_people(tmp_path):
    bad = [member for i in range(80) for member in ((f"{i}.jpg", b"no picture"), (f"{i}.txt", b"a text"))]
    path = tar(tmp_path / "a.tar", bad)
    batches = training_batches(config_of(path, batch=64, workers=1))
    with pytest.raises(UserError, match=f"no good sample in 64 that were tried \\(64 undecodable\\); the first: {path}"):
        next(batches)
    batches.close()
    assert multiprocessing.active_children() == []


RUN = """
import sys
sys.path.insert(0, "tests")
from sets import config_of
from clip_jax.data import training_batches

if __name__ == "__main__":
    batches = training_batches(config_of("synthetic:64:40x40", workers=2))
    for batch in batches:
        print("a batch", flush=True)
"""


def test_workers_go_with_a_run_that_is_killed_and_leave_signals_to_it(tmp_path):
    file = tmp_path / "run.py"
    file.write_text(RUN)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, file], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=env) as process:
        for _ in range(2):  # one of each worker: both have begun
            assert process.stdout.readline() == "a batch\n"
        workers = children(process.pid)
        assert len(workers) == 2
        for number in (signal.SIGINT, signal.SIGTERM):
            for worker in workers:
                os.kill(worker, number)
        for _ in range(50):
            assert process.stdout.readline() == "a batch\n"
        assert children(process.pid) == workers
        process.kill()
    deadline = time.monotonic() + 20  # of seconds, where one is enough
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))


def children(parent: int) -> list[int]:
    """The workers among the processes that a process has begun."""
    listed = subprocess.run(["ps", "-wweo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    return [int(pid) for pid, ppid, args in rows if int(ppid) == parent and "spawn_main" in args]


def alive(pid: int) -> bool:
    """Whether a process is there, and no mere entry that nobody has read the status of."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout.strip()
    return bool(state) and not state.startswith("Z")
