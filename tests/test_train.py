"""The programs, as processes: what a stranger would see."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import PIL.Image
import pytest
from sets import picture, prepare, records
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 24
# Small enough for a test: the architecture is the default one.
SMALL = ["--config.batch_size=32", f"--config.total_steps={STEPS}", "--config.optimizer.warmup_steps=4"]
SMALL += ["--config.log_every=1", "--config.checkpoint_every=8"]


def run(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    # One device, as on a laptop; conftest asks for eight in this process.
    env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, str(ROOT / program), *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def train(workdir: pathlib.Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return run("train.py", f"--workdir={workdir}", *SMALL, *arguments, **environment)


def trace(workdir: pathlib.Path) -> list[tuple]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["samples_seen"], r["loss"], r["lr"], r["gradient_norm"], r["logit_scale"]) for r in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[pathlib.Path, subprocess.CompletedProcess]:
    workdir = tmp_path_factory.mktemp("finished") / "run"
    result = train(workdir, JAX_LOG_COMPILES="1")
    assert result.returncode == 0, result.stderr[-3000:]
    return workdir, result


def test_a_run_reports_what_other_tools_rely_on(finished):
    workdir, result = finished
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all({"samples_seen", "loss", "lr", "samples_per_second", "data_wait"} <= row.keys() for row in rows)
    # One device, and a CPU, whose peak is not known.
    assert all(row["samples_per_second_per_device"] == row["samples_per_second"] for row in rows)
    assert all(row["tflops_per_device"] > 0 and "mfu" not in row for row in rows)
    assert rows[-1]["samples_seen"] == 32 * STEPS and all(0 <= row["data_wait"] <= 1 for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    results = json.loads((workdir / "results.json").read_text())
    assert [r["dataset"] for r in results] == ["emoji_fluent", "emoji_held_out"]
    for record in results:
        shares = [name.removesuffix("_chance") for name in record["metrics"] if name.endswith("_chance")]
        assert len(shares) in (3, 6)
        for name in shares:
            assert f"{name:<28}{record['metrics'][name]:>9.2%}" in result.stdout
    rows = (workdir / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(row)["bottleneck"] for row in rows} <= {"compute", "read", "decode", "host-to-device"}
    for name in ("loss.png", "similarity.png", "retrieval.png"):
        with PIL.Image.open(workdir / name) as figure:
            assert min(figure.size) > 300


def test_the_step_is_compiled_once(finished):
    _, result = finished
    compiled = [line for line in result.stderr.splitlines() if "Compiling jit(train_step)" in line]
    assert len(compiled) == 1, compiled


def test_tensorboard_reads_the_events(finished):
    workdir, _ = finished
    events = EventAccumulator(str(workdir / "tensorboard")).Reload()
    assert {"loss", "lr", "samples_per_second", "data_wait"} <= set(events.Tags()["scalars"])
    found = [(e.step, e.value) for e in events.Scalars("loss")]
    assert found == [(row[0], pytest.approx(row[2], rel=1e-6)) for row in trace(workdir)]


def test_the_same_seed_gives_the_same_trace(finished, tmp_path):
    result = train(tmp_path / "again")
    assert result.returncode == 0, result.stderr[-3000:]
    assert trace(tmp_path / "again") == trace(finished[0])


def test_a_killed_run_goes_on_to_the_bit(finished, tmp_path):
    workdir = tmp_path / "killed"
    env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "train.py"), f"--workdir={workdir}", *SMALL]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file, deadline = workdir / "metrics.jsonl", time.monotonic() + 200
    while not ((workdir / "checkpoints" / "8").exists() and file.exists() and file.read_text().count("\n") >= 13):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    steps_before = len(trace(workdir))
    assert 13 <= steps_before < STEPS
    result = train(workdir)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "going on after step 8" in result.stdout or "going on after step 16" in result.stdout
    assert trace(workdir) == trace(finished[0])


def test_a_finished_run_is_measured_again_and_not_trained(finished):
    workdir, first = finished
    before = trace(workdir)
    result = train(workdir)
    assert result.returncode == 0 and f"going on after step {STEPS}" in result.stdout
    said = result.stdout.splitlines()
    assert said[:1] + said[2:] == first.stdout.splitlines() and trace(workdir) == before
    assert said[0].startswith("softmax loss in its plain form; predicted a device: plain 0.0 MiB")


def test_eval_gives_the_numbers_of_the_run(finished, tmp_path):
    workdir, trained = finished
    result = run("eval.py", f"--checkpoint={workdir}", f"--output={tmp_path}/out/results.json")
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() in trained.stdout
    expected = json.loads((workdir / "results.json").read_text())
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == expected


def refused(result: subprocess.CompletedProcess) -> str:
    """The one line of an error that is for people."""
    assert result.returncode == 2, (result.returncode, result.stderr[-2000:])
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_mistakes_end_with_one_line_and_touch_nothing(finished, tmp_path):
    workdir, _ = finished
    new = tmp_path / "new"
    assert "did you mean batch_size" in refused(train(new, "--config.batch_sise=3"))
    assert "no such file" in refused(run("train.py", "--config=configs/none.py"))
    assert "does not divide" in refused(train(new, XLA_FLAGS="--xla_force_host_platform_device_count=5"))
    assert "no such folder" in refused(train(new, f"--config.data.sets={tmp_path}/nothing"))
    assert not new.exists()
    assert "--checkpoint is missing" in refused(run("eval.py"))
    assert "no such file or folder" in refused(run("eval.py", f"--checkpoint={new}"))
    before = sorted((p, p.stat().st_mtime_ns) for p in workdir.rglob("*"))
    assert "model.text.layers is 1 there and 2" in refused(train(workdir, "--config.model.text.layers=2"))
    assert sorted((p, p.stat().st_mtime_ns) for p in workdir.rglob("*")) == before


def test_bad_records_are_skipped_and_named(tmp_path):
    bad = records(34)
    bad[7]["image"], bad[9]["caption"] = picture(7)[:50], ""
    folder = prepare(tmp_path / "set", bad)
    own = [f"--config.data.sets={folder}", "--config.data.caption=caption", "--config.data.group=", "--config.data.keywords="]
    result = train(tmp_path / "run", *own, "--config.total_steps=6")
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(row["reason"] for row in rows) == ["empty caption", "undecodable"]
    assert all(row["shard"] == f"{folder} split train" and "mend or remove this record" in row["message"] for row in rows)
    assert re.search(r"skipped \d+ samples of 192 \(.*\); .*skipped.jsonl names them", result.stdout)

    none = prepare(tmp_path / "none", [record | {"caption": ""} for record in records(64)])
    message = refused(train(tmp_path / "other", f"--config.data.sets={none}", *own[1:]))
    assert "no good sample in 64 that were tried (64 empty caption); the first: " in message
    explained = train(tmp_path / "other", *own, "--explain-step=2")
    assert explained.returncode == 0 and len(explained.stdout.splitlines()) == 32
    assert all(line.split("\t")[:2] == [str(i), f"{folder} split train"] for i, line in enumerate(explained.stdout.splitlines()))
    assert "expected the number of a step" in refused(train(tmp_path / "other", "--explain-step=now"))
