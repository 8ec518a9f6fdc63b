"""Several real processes on this machine, as docs/clusters.md has it."""

import dataclasses
import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from conftest import ROOT
from flax import nnx
from sets import good, tar

from clip_jax import distributed
from clip_jax.checkpoint import save_model
from clip_jax.config import load_config, model_config
from clip_jax.errors import UserError
from clip_jax.models import CLIP

STEPS = 12
SMALL = ["--config.batch_size=64", f"--config.total_steps={STEPS}", "--config.optimizer.warmup_steps=4"]
# At a low rate, or rounding errors would grow tenfold every other step.
SMALL += ["--config.model.text.width=32", "--config.model.text.heads=1", "--config.model.embedding=32"]
SMALL += ["--config.model.vision.channels=(8, 16)"]
# Captions of lengths about which the processes have to agree (lengths.py).
SMALL += ["--config.model.text.context_length=40", "--config.data.keyword_rate=0.5"]
SMALL += ["--config.log_every=1", "--config.checkpoint_every=6", "--config.optimizer.learning_rate=5e-5"]


def start(program: list[str], devices: int, **variables: str) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"  # half of the time
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | variables
    command = [sys.executable, str(ROOT / program[0]), *program[1:]]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def train(workdir: pathlib.Path, *arguments: str) -> list[str]:
    return ["train.py", f"--workdir={workdir}", *SMALL, *arguments]


def together(program: list[str], processes: int, devices: int, status: int = 0, **own: list[str]) -> list[str]:
    """What each of several processes printed; in errors if the status is not 0.  `own` are a variable's values, by process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    by_hand = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    variables = [{name: values[i] for name, values in own.items()} for i in range(processes)]
    running = [start(program, devices, JAX_PROCESS_ID=str(i), **by_hand, **variables[i]) for i in range(processes)]
    try:
        outputs = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, outputs):
        assert process.returncode == status, errors[-3000:]
    return [errors if status else printed for printed, errors in outputs]


def trace(workdir: pathlib.Path) -> np.ndarray:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return np.array([row["loss"] for row in rows])


def test_two_processes_give_the_run_of_one(tmp_path):
    alone = start(train(tmp_path / "one"), 4)
    printed, errors = alone.communicate(timeout=300)
    assert alone.returncode == 0, errors[-3000:]
    expected = trace(tmp_path / "one")
    assert len(expected) == STEPS and np.ptp(expected) > 0.05

    sharded = ["--config.mesh.data=2", "--config.mesh.fsdp=2"]
    first, second = together(train(tmp_path / "two", *sharded), 2, 2)
    # Measured: 1.1e-7 of losses around 4.
    np.testing.assert_allclose(trace(tmp_path / "two"), expected, rtol=3.4e-7)
    # Gloo, which connects CPUs, prints lines of its own in both, by several threads at once.
    ours = re.compile(r"loss|acc\d|going on")
    assert set(ours.findall(first)) == {"loss", "acc1", "acc5"} and not ours.search(second)
    one, two = (json.loads((tmp_path / run / "results.json").read_text()) for run in ("one", "two"))
    for alone, both in zip(one, two, strict=True):
        shares = [name.removesuffix("_chance") for name in alone["metrics"] if name.endswith("_chance")]
        # A few of 1,595 pictures may change places.
        assert len(shares) >= 3 and all(alone["metrics"][name] == pytest.approx(both["metrics"][name], abs=2e-3) for name in shares)

    # One process goes on from what both wrote, on another mesh.
    alone = start(train(tmp_path / "two", "--config.mesh.fsdp=4", "--config.mesh.data=1"), 4)
    printed, errors = alone.communicate(timeout=300)
    assert alone.returncode == 0 and f"going on after step {STEPS}" in printed, errors[-3000:]


def test_two_processes_measure_as_one(tmp_path):
    config = model_config(load_config("configs/emoji.py"))
    text = dataclasses.replace(config.text, width=32, heads=1)
    save_model(tmp_path / "model", CLIP(dataclasses.replace(config, text=text, embedding=32), rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    for split, count in (("train", 9), ("test", 7)):  # 21 pictures over four devices
        for name, color in {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}.items():
            (tmp_path / "colors" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(color, 90, (32, 32, 3)), 0, 255).astype(np.uint8)
                PIL.Image.fromarray(pixels).save(tmp_path / "colors" / split / name / f"{i}.png")
    measure = ["eval.py", f"--checkpoint={tmp_path / 'model'}", f"--tasks={tmp_path / 'colors'}"]
    measure += ["--probes=linear,knn,few_shot", "--batch_size=8", f"--output={tmp_path / 'r.json'}", "--cache=~/features"]
    results = []
    alone = start(measure, 1, HOME=str(tmp_path / "alone"))
    printed, errors = alone.communicate(timeout=300)
    assert alone.returncode == 0, errors[-3000:]
    results.append(json.loads((tmp_path / "r.json").read_text()))
    homes = [str(tmp_path / name) for name in "ab"]
    for _ in range(2):  # features are made, and then read, of each process its own
        first, second = together(measure, 2, 2, HOME=homes)
        assert "lp_acc1" in first and "lp_acc1" not in second
        results.append(json.loads((tmp_path / "r.json").read_text()))
    assert all(len(list(pathlib.Path(home, "features").iterdir())) == 2 for home in homes)
    for found in results[1:]:
        assert [record["metrics"] for record in found] == [record["metrics"] for record in results[0]]


def test_processes_that_see_other_data_are_refused(tmp_path):
    homes = [tmp_path / "a", tmp_path / "b"]
    for home, names in zip(homes, ("abcdefgh", "abcdefgx"), strict=True):
        home.mkdir()
        tar(home / "set.tar", good(list(names)))
    data = ["--config.data.sets=~/set.tar", "--config.data.caption=caption", "--config.data.group=", "--config.data.keywords="]
    run = train(tmp_path / "run", *data, "--config.batch_size=4")
    said = together(run, 2, 1, status=2, HOME=[str(home) for home in homes])
    other = "error: config.data.sets: process 1 sees 8 samples, and process 0 8, or others of that number; give all"
    assert all(other in errors and "Traceback" not in errors for errors in said)
    (homes[1] / "set.tar").unlink()
    first, second = together(run, 2, 1, status=2, HOME=[str(home) for home in homes])
    assert "error: another process found an error; its own output says which" in first
    assert f"error: {homes[1]}/set.tar: expected a file, which cannot be seen (FileNotFoundError" in second


def test_a_cluster_is_seen_and_a_laptop_is_none():
    several = distributed.several_processes
    assert not several({}) and not several({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    assert not several({"SLURM_NTASKS": "8"})  # an allocation, without srun
    assert several({"SLURM_NTASKS": "8", "SLURM_PROCID": "3"}) and several({"OMPI_COMM_WORLD_SIZE": "2"})
    assert several({"TPU_WORKER_HOSTNAMES": "a,b"}) and not several({"TPU_WORKER_HOSTNAMES": "localhost"})


@pytest.mark.parametrize(
    "choice, variables, message",
    [
        ("always", {}, "--distributed=always, expected one of auto, on, off"),
        ("auto", {"JAX_PROCESS_ID": "0"}, "JAX_PROCESS_ID set, expected JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES too"),
        (
            "auto",
            {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID is 2 of JAX_NUM_PROCESSES 2, expected numbers, the first from 0",
        ),
        ("on", {}, "--distributed=on: the processes did not find each other"),
    ],
)
def test_what_cannot_be_joined_is_named(choice, variables, message, tmp_path):
    result = start(train(tmp_path / "run", f"--distributed={choice}"), 1, **variables)
    _, errors = result.communicate(timeout=100)
    assert result.returncode == 2 and "Traceback" not in errors
    assert [line for line in errors.splitlines() if line.startswith("error: ")][0].startswith(f"error: {message}"), errors
    assert not (tmp_path / "run").exists()


def test_off_is_off(monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    distributed.join("off")
    with pytest.raises(UserError, match="JAX_PROCESS_ID set"):
        distributed.join("on")
