"""The program, stopped in every way that a machine knows: what it then finds is to the bit what was not stopped."""

import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest
import servers
from conftest import ROOT

from clip_jax.config import load_config
from clip_jax.optimizer import make_schedule

STEPS = 24
TINY = ["--config.batch_size=16", "--config.optimizer.warmup_steps=4", "--config.log_every=1"]
TINY += ["--config.model.text.width=32", "--config.model.text.heads=1", "--config.model.embedding=32"]
TINY += ["--config.model.vision.channels=(8, 16)"]


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Starts train.py; what one process compiled the next one has."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled"))}
    cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu"}
    cache |= {"XLA_FLAGS": "--xla_backend_optimization_level=0"}

    def of(
        workdir: pathlib.Path, *arguments: str, steps: int = STEPS, every: int = 8, **variables: str
    ) -> subprocess.Popen:
        given = [f"--workdir={workdir}", f"--config.total_steps={steps}", f"--config.checkpoint_every={every}"]
        command = [sys.executable, str(ROOT / "train.py"), *given, *TINY, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | cache | variables, **pipes)

    return of


def ended(process: subprocess.Popen, status: int = 0) -> str:
    """What a process printed for people, after it ended as it should."""
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == status, (process.returncode, errors[-3000:])
    return printed + "\n".join(re.findall("^(?:error|warning|stopping|.*: stopped).*$", errors, re.MULTILINE))


def rows(workdir: pathlib.Path) -> list[dict]:
    file = workdir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []


def trace(workdir: pathlib.Path) -> list[tuple]:
    names = ("step", "samples_seen", "loss", "lr", "gradient_norm", "logit_scale", "skipped_steps")
    return [tuple(row[name] for name in names) for row in rows(workdir)]


def wait_until(true, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not true():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-3000:]
        time.sleep(0.002)


@pytest.fixture(scope="session")
def whole(start, tmp_path_factory) -> pathlib.Path:
    """The workdir of a run that nothing stopped."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    ended(start(workdir))
    assert len(trace(workdir)) == STEPS
    return workdir


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_a_save_ends_with_75_and_the_run_goes_on(number, start, whole, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir)
    wait_until(lambda: list(workdir.glob("checkpoints/*.orbax-checkpoint-tmp*")), process)
    process.send_signal(number)
    said = ended(process, os.EX_TEMPFAIL)
    step = len(trace(workdir))
    assert f"{workdir}: stopped after step {step}, saved; the same command goes on" in said and 8 <= step < STEPS
    assert f"going on after step {step}" in ended(start(workdir))
    assert trace(workdir) == trace(whole)


def test_a_second_interrupt_ends_at_once_and_loses_nothing_older(start, whole, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir)
    wait_until(lambda: (workdir / "checkpoints" / "8").exists(), process)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)
    assert process.returncode == -signal.SIGINT
    process.communicate()
    assert "going on after step" in ended(start(workdir))
    assert trace(workdir) == trace(whole)


def test_a_full_disk_is_told_and_the_checkpoint_before_it_goes_on(start, whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount a tmpfs")
    try:
        (disk / "other").write_bytes(bytes(13 * 2**20))  # of others, or a checkpoint more would fit
        said = ended(start(disk / "run"), 2)
        assert f"error: checkpoints in {disk}/run/checkpoints: writing one failed (No space left on device)" in said
        assert [path.name for path in (disk / "run" / "checkpoints").iterdir() if path.name.isdigit()] == ["8"]
        (disk / "other").unlink()
        said = ended(start(disk / "run"))
        assert "going on after step 8" in said and "16.orbax-checkpoint-tmp: half-written, removed" in said
        assert trace(disk / "run") == trace(whole)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_rate_that_overflows_is_skipped_rolled_back_and_ends(start, tmp_path):
    workdir = tmp_path / "run"
    fields = [
        "--config.nonfinite.in_a_row=3",
        "--config.nonfinite.rollbacks=2",
        "--config.optimizer.learning_rate=1e32",
    ]
    said = ended(start(workdir, *fields, steps=100, every=1), 2)
    # What came back from step 1 is saved at once, and comes back the second time.
    back = re.findall(r"warning: step (\d+): 3 steps .*; model and optimizer are those of step (\d+) again", said)
    assert back == [("5", "1"), ("9", "5")]
    assert "error: step 13: 3 steps in a row had a loss or a gradient that is not finite, and config.nonfinite" in said
    assert "rollbacks 2 are used up; lower config.optimizer.learning_rate" in said
    found = rows(workdir)
    # The first step is finite, and makes parameters of 1e31, with which no other one is.
    assert found[0]["loss"] > 0 and all(row["loss"] is None for row in found[1:])
    assert [row["skipped_steps"] for row in found] == list(range(len(found)))
    assert [row["skipped_in_a_row"] for row in found[:6]] == [0, 1, 2, 3, 4, 1]  # the fourth was under way
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["1", "5", "9"]


def test_with_another_batch_size_the_rate_is_the_same_function_of_samples(start, whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    for step in ("16", "24"):
        shutil.rmtree(workdir / "checkpoints" / step)
    ended(start(workdir, "--config.batch_size=8"))
    found = rows(workdir)
    assert [row["samples_seen"] for row in found] == [*range(16, 129, 16), *range(136, 385, 8)]
    assert found[-1]["samples_seen"] == rows(whole)[-1]["samples_seen"]
    config = load_config(str(ROOT / "configs" / "emoji.py"))
    config.total_steps, config.optimizer.warmup_steps = STEPS, 4
    schedule = make_schedule(config)
    for row, before in zip(found[8:], found[7:]):
        # Measured: at most 1.2e-10 of 2e-3, the rounding of the compiled cosine.
        assert row["lr"] == pytest.approx(float(schedule(jnp.float32(before["samples_seen"] / 16))), rel=0, abs=4e-10)
    at = {row["samples_seen"] - 16: row["lr"] for row in rows(whole)}
    here = {row["samples_seen"] - 8: row["lr"] for row in found[8:]}
    assert here.items() >= {seen: rate for seen, rate in at.items() if seen >= 128}.items()


@pytest.mark.endurance
def test_twenty_kills_at_random_moments_change_no_bit(start, tmp_path):
    ended(start(tmp_path / "whole", steps=500, every=5))
    workdir, kills, chance, beginnings = tmp_path / "run", 0, random.Random(0), []
    while kills < 20:
        process, before = start(workdir, steps=500, every=5), len(rows(workdir))
        if kills % 4:  # in a step, or in a save
            wait_until(lambda before=before: len(rows(workdir)) not in (0, before), process)
            time.sleep(chance.uniform(0, 2.5))
        else:  # wherever it is
            time.sleep(chance.uniform(0, 9))
        assert process.poll() is None, "it ended before it was killed often enough"
        process.kill()
        process.communicate()
        kills += 1
        beginnings.append(len(rows(workdir)))
    ended(start(workdir, steps=500, every=5))
    print(f"\n{kills} kills, after so many logged steps: {beginnings}")
    assert len(set(beginnings)) > 10 and beginnings[-1] < 500
    assert trace(workdir) == trace(tmp_path / "whole")


@pytest.mark.endurance
def test_a_run_with_its_checkpoints_in_a_bucket_goes_on_from_there(start, whole, tmp_path):
    bucket = f"--config.bucket=gs://{servers.BUCKET}/run"
    with servers.gcs(tmp_path):
        process = start(tmp_path / "one", bucket)
        wait_until(lambda: len(rows(tmp_path / "one")) >= 10, process)
        process.send_signal(signal.SIGTERM)
        ended(process, os.EX_TEMPFAIL)
        step = len(rows(tmp_path / "one"))
        process = start(tmp_path / "two", bucket)  # the disk of the first machine is gone
        wait_until(lambda: len(rows(tmp_path / "two")) >= 2, process)
        process.kill()
        process.communicate()
        assert f"going on after step {step}" in ended(start(tmp_path / "two", bucket))
    assert trace(tmp_path / "one") + trace(tmp_path / "two") == trace(whole)
    assert not (tmp_path / "two" / "checkpoints").exists()


def two(start, workdir: pathlib.Path, **options) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    by_hand = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    sharded = ("--config.mesh.data=1", "--config.mesh.fsdp=2")
    return [start(workdir, *sharded, JAX_PROCESS_ID=str(i), **by_hand, **options) for i in range(2)]


@pytest.mark.endurance
def test_two_processes_stop_together_and_pass_over_what_one_cannot_read(start, tmp_path):
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    for process in two(start, whole):
        ended(process)
    first, second = two(start, workdir)
    wait_until(lambda: len(rows(workdir)) >= 10, first)
    second.send_signal(signal.SIGTERM)  # to one of them
    ended(second, os.EX_TEMPFAIL)
    ended(first, os.EX_TEMPFAIL)
    step = len(rows(workdir))
    assert 10 < step < STEPS and (workdir / "checkpoints" / str(step)).is_dir()
    # What the second wrote, and reads again, is cut short.
    part = workdir / "checkpoints" / str(step) / "state" / "ocdbt.process_1"
    largest = max((file for file in part.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    first, second = two(start, workdir)
    said = ended(first)
    ended(second)
    assert f"checkpoints/{step}: passed over" in said and "going on after step 8" in said
    assert trace(workdir) == trace(whole)
