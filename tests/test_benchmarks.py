"""The benchmarks at toy size: that they run to the end and record what they say, and not how fast anything is."""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import classifier
import encode
import jax
import jax.numpy as jnp
import kernels
import measure
import records
import report
import train_step
import work
from flax import nnx

from clip_jax.models import CLIP

FIELDS = {"benchmark", "variant", "date", "commit", "dirty", "command", "machine", "versions", "dtype", "batch", "rounds", "count"}
FIELDS |= {"sides", "lanes", "missing", "pairs", "ratios", "items", "flops", "agreement", "unit", "notes"}

# Sides without a framework, so that the measuring itself is tested in moments: A sleeps, B computes, C is not installed.
SCRIPT = """
import json, os, sys, time
sys.path.insert(0, {benchmarks!r})
from measure import Side, serve
def sleeps(options):
    return Side({{"x": lambda: time.sleep(0.01), "y": lambda: {{"seconds": 2.0}}}}, lambda: None, "", facts=options)
def computes(options):
    print("libraries print")
    return Side({{"x": lambda: sum(range(300_000)) and None}}, lambda: None, "")
def absent(options):
    import a_library_that_nobody_has
def full(options):
    raise MemoryError("out of memory")
def breaks(options):
    raise ValueError("of its own")
def says(options):
    return Side({{"": lambda: time.sleep(0.01)}}, lambda: None, "", facts=json.loads(os.environ["FACTS"])[sys.argv[2]])
serve(dict(sleeps=sleeps, computes=computes, absent=absent, full=full, breaks=breaks, ours=says, torch=says))
"""


@pytest.fixture
def script(tmp_path) -> str:
    (tmp_path / "sides.py").write_text(SCRIPT.format(benchmarks=str(ROOT / "benchmarks")))
    return str(tmp_path / "sides.py")


def is_consistent(record: dict) -> None:
    """Medians, rates and ratios follow from the raw seconds."""
    for lane in record["lanes"].values():
        assert len(lane["seconds"]) == record["rounds"] and min(lane["seconds"]) > 0
        assert lane["median"] == statistics.median(lane["seconds"])
        assert (lane["least"], lane["most"]) == (min(lane["seconds"]), max(lane["seconds"]))
        items, flops = (record.get(what, {}).get(lane["lane"]) for what in ("items", "flops"))
        if items:
            assert math.isclose(lane["items_per_second"] * lane["median"], items)
        if flops:
            assert math.isclose(lane["flops_per_second"] * lane["median"], flops)
            assert math.isclose(lane["share_of_product"] * record["sides"][lane["side"]]["product_rate"], lane["flops_per_second"])
    for pair in record["pairs"]:
        if all(name in record["lanes"] for name in pair):
            first, second = (statistics.median(record["lanes"][name]["seconds"]) for name in pair)
            assert math.isclose(record["ratios"][" : ".join(pair)]["ratio"], second / first)


def test_sides_take_turns_and_are_recorded(script, tmp_path):
    record = records.new_record("train_step", "made/up", dtype="float32", batch=3, unit="samples", notes=[], pairs=[["sleeps, x", "computes, x"]])
    record |= {"items": {"x": 3}, "flops": {}, "agreement": {}}
    written = []
    measure.take_turns(
        script, ["sleeps", "computes", "absent", "breaks"], {"a": 1}, record, rounds=3, turn_seconds=0.02, product=-1,
        after=lambda record: written.append(json.loads(records.write(record, tmp_path).read_text())["rounds"]),
    )  # fmt: skip
    assert written == [1, 2, 3]
    found = json.loads((tmp_path / "train_step-madeup.json").read_text())
    assert found.keys() >= FIELDS
    assert list(found["lanes"]) == ["sleeps, x", "sleeps, y", "computes, x"]
    assert found["missing"] == {"absent": "a_library_that_nobody_has: not installed", "breaks": "ValueError: of its own"}
    assert found["sides"]["sleeps"]["facts"] == {"a": 1}
    assert found["lanes"]["sleeps, y"]["seconds"] == [2.0] * 3  # what the lane itself says
    assert min(found["lanes"]["sleeps, x"]["seconds"]) >= 0.01
    assert found["machine"]["cores"] >= 1 and found["versions"]["jax"]
    assert min(found["lanes"]["computes, x"]["memory"]) > 2**20
    is_consistent(found)


def test_a_side_without_memory_says_so(script):
    with pytest.raises(measure.OutOfMemory, match="full: out of memory"):
        measure.take_turns(script, ["full"], {}, {}, rounds=1)


@pytest.mark.parametrize("far", (False, True))
@pytest.mark.parametrize("module", (train_step, encode, classifier, kernels), ids=lambda module: module.__name__)
def test_sides_that_disagree_leave_no_record(module, far, script, tmp_path, monkeypatch):
    near = {"losses": {"full": [2.0]} if module is train_step else {"softmax": 2.0}, "features": [[1.0, 0.0]], "classifier": [[1.0, 0.0]]}
    away = {"losses": {"full": [2.1]} if module is train_step else {"softmax": 2.1}, "features": [[0.0, 1.0]], "classifier": [[0.0, 1.0]]}
    monkeypatch.setenv("FACTS", json.dumps({"ours": near, "torch": away if far else near}))
    monkeypatch.setattr(module, "__file__", script)  # whose sides take the place of its own
    monkeypatch.setattr(module, "prepare_weights", lambda *_: "", raising=False)
    separator = ";" if module is kernels else ","
    turn = [] if module is classifier else ["--turn=0"]
    what = ["--what=loss"] if module is kernels else []
    options = module.parse([*what, *turn, f"--sides=ours{separator}torch", "--rounds=1", "--product=-1", f"--output={tmp_path}"])
    if far:
        with pytest.raises(SystemExit, match="torch: .* differ"):
            module.main(options)
    else:
        module.main(options)
    assert len([*tmp_path.glob("*.json")]) == (not far)


def test_a_command_names_the_python_of_our_side(script, monkeypatch):
    monkeypatch.setenv("FACTS", json.dumps({"ours": {}}))
    command = lambda record: measure.take_turns(script, ["ours"], {}, record, rounds=0, product=-1)["command"]
    new = lambda: records.new_record("encode", "a")
    assert command(new()) == new()["command"]
    monkeypatch.setenv("OUR_PYTHON", sys.executable)
    assert command(new()) == f"OUR_PYTHON=python{sys.version_info.major}.{sys.version_info.minor} {new()['command']}"


def test_libraries_that_are_checkouts_are_taken(tmp_path, monkeypatch):
    there = {"torch", "open_clip"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in there else None)
    monkeypatch.setattr(records, "version", lambda library: None)  # there is no such distribution
    monkeypatch.setattr(work.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, "", ""))
    assert work.prepare_weights("toy", tmp_path) == ""
    there.remove("open_clip")
    assert work.prepare_weights("toy", tmp_path) == "open_clip: not installed"


def test_a_run_without_a_side_is_an_error(script):
    with pytest.raises(SystemExit, match="no side can be measured: .*a_library_that_nobody_has: not installed"):
        measure.take_turns(script, ["absent"], {}, {}, rounds=1)


def test_real_captions_are_as_long_as_they_are_said_to_be():
    lengths = work.caption_lengths(10_000, "real", 77)
    assert abs(statistics.median(lengths.tolist()) - work.MEDIAN) <= 1
    assert 0.7 < ((10 <= lengths) & (lengths <= 20)).mean() and lengths.min() >= work.SHORTEST and 30 < lengths.max() <= 77
    tokens = work.captions(64, "real", 77)
    assert (tokens.argmax(axis=1) + 1 == work.caption_lengths(64, "real", 77)).all()
    assert (tokens[:, 0] == work.SOT).all() and (work.captions(4, "full", 77)[:, -1] == work.EOT).all()


def run(script: str, output: pathlib.Path, *arguments: str, **environment: str) -> dict:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments, f"--output={output}"]
    one_device = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ | one_device | environment)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    (file,) = output.glob("*.json")
    return json.loads(file.read_text())


TOY = ("--model=toy", "--batch=8", "--rounds=2", "--turn=0", "--product=64")


@pytest.fixture(scope="module")
def without_libraries(tmp_path_factory) -> str:
    """For PYTHONPATH: a start of Python at which some libraries are as if they were not installed."""
    folder = tmp_path_factory.mktemp("without")
    names = ("ml_collections", "orbax", "grain", "cv2", "simplejpeg", "ftfy", "tensorboardX", "tensorflow_datasets", "torch")
    (folder / "sitecustomize.py").write_text(
        f"import sys, importlib.util as util\nfind, names = util.find_spec, {names!r}\n"
        "util.find_spec = lambda name, package=None: None if name.partition('.')[0] in names else find(name, package)\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in names and not any(type(f).__name__ == '_Finder' for f in sys.meta_path):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "        if name.partition('.')[0] in names:\n"
        "            return next(f for f in sys.meta_path if type(f).__name__ == '_Finder').find_spec(name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
    )
    return str(folder)


def test_the_train_step_with_nothing_but_jax_flax_and_optax(tmp_path, without_libraries):
    record = run("train_step.py", tmp_path, *TOY, "--sides=ours", "--captions=real", PYTHONPATH=without_libraries)
    assert record.keys() >= FIELDS and record["missing"] == {}
    assert {"ml_collections", "orbax", "cv2"} <= set(record["sides"]["ours"]["stand_ins"])
    assert list(record["lanes"]) == ["ours, real"]
    losses = record["sides"]["ours"]["facts"]["losses"]
    for kind in losses.values():  # learns the one batch that it has
        assert len(kind) == 3 and kind[2] < kind[0]
    is_consistent(record)


def test_embedding(tmp_path):
    record = run("encode.py", tmp_path, *TOY, "--batches=1", "--sides=ours")
    assert record.keys() >= FIELDS
    is_consistent(record)


LOSS = ("--what=loss", "--batch=64", "--width=32", *TOY[2:])


def test_the_losses(tmp_path):
    record = run("kernels.py", tmp_path, *LOSS, "--sides=ours, ring;ours, plain")  # ends with an error where they differ
    assert record.keys() >= FIELDS and record["agreement"]["ours, plain"].keys() == {"softmax loss", "sigmoid loss"}
    is_consistent(record)


def test_the_classifier(tmp_path):
    record = run("classifier.py", tmp_path, "--model=toy", "--classes=3", "--few=1", "--rounds=1", "--product=64", "--sides=ours")
    assert record.keys() >= FIELDS - {"batch"} and record["lanes"]["ours"]["share_of_product"] > 0
    is_consistent(record)


def test_what_the_gpu_is_for_begins_and_ends_at_toy_size(tmp_path):
    (tmp_path / "open_clip").mkdir()
    (tmp_path / "open_clip" / "__init__.py").touch()  # a checkout, of no installed distribution
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as metadata\nfound = metadata.version\n"
        "def version(name):\n"
        "    if name == 'open_clip_torch':\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "metadata.version = version\n"
    )
    toy = {"GPU_TOY": "1", "SIDES": "ours", "ONLY": "attention|text|checkpoint", "PYTHON": sys.executable, "BUDGET": "600"}
    there = {"OUT": str(tmp_path / "results"), "PYTHONPATH": str(tmp_path)}
    found = subprocess.run([str(ROOT / "benchmarks" / "gpu.sh")], capture_output=True, text=True, env=os.environ | toy | there)
    said = found.stdout + found.stderr
    assert found.returncode == 0 and "not whole" not in said, said[-2000:]
    assert "open_clip_torch version unknown" in said
    names = {file.name for file in (tmp_path / "results").glob("*.json")}
    assert names == {"attention-toy-gpu-attention.json", "encode-toy-gpu-B32-text.json", "checkpoint-toy-gpu-checkpoint.json"}
    for name in names:
        is_consistent(json.loads((tmp_path / "results" / name).read_text()))


PEERS = {
    "train_step.py": (*TOY, "--sides=ours,torch"),
    "encode.py": (*TOY, "--sides=ours,torch"),
    "classifier.py": ("--model=toy", "--classes=4", "--few=2", "--rounds=1", "--product=64", "--sides=ours,torch"),
    "kernels.py": LOSS,
    "data.py": ("--sizes=64x48", "--count=64", "--rounds=1"),
}


@pytest.mark.pytorch
@pytest.mark.parametrize("script", PEERS)
def test_open_clip_does_the_same_work(script, tmp_path):
    if importlib.util.find_spec("open_clip") is None:  # importing it here would want torchvision's operators declared first
        pytest.skip("open_clip is not installed; tests/pytorch.txt lists what this test needs")
    record = run(script, tmp_path, *PEERS[script])  # ends with an error where they differ
    assert record["ratios"] and not record["missing"]
    is_consistent(record)


def test_the_page_is_made_of_the_results(script, tmp_path):
    assert not report.PAGE.exists() or report.PAGE.read_text() == report.made(), "run python benchmarks/report.py"
    record = records.new_record("encode", "a", dtype="float32", batch=3, unit="texts", notes=["a note"], pairs=[["sleeps, x", "computes, x"]])
    record |= {"items": {"x": 3}, "flops": {}, "agreement": {}}
    measure.take_turns(script, ["sleeps", "computes", "absent"], {}, record, rounds=1, turn_seconds=0, product=-1)
    text = report.page([record], "What was tried.")
    lane, ratio = record["lanes"]["sleeps, x"], record["ratios"]["sleeps, x : computes, x"]
    for said in ("## Embedding", "What was tried.", f"{lane['median'] * 1e3:,.2f}", f"{ratio['ratio']:.2f}", "A note", record["commit"][:9]):
        assert said in text
    assert "Left out: absent, a_library_that_nobody_has: not installed" in text


@pytest.mark.parametrize("backend, attention, dtype, kernel", [
    ("gpu", "cudnn", "bfloat16", "cudnn"),
    ("gpu", "cudnn", "float32", "xla"),
    ("gpu", "xla", "bfloat16", "xla"),
    ("cpu", "cudnn", "bfloat16", "xla"),
])  # fmt: skip
def test_cudnn_is_asked_where_it_can_answer(backend, attention, dtype, kernel, monkeypatch):
    """By the blocks of both towers; the last one's single query, under lengths of keys, goes to XLA."""
    asked, xla = [], jax.nn.dot_product_attention

    def spy(q, k, v, *, implementation=None, is_causal=False, **named):
        asked.append((q.shape[1], is_causal, implementation))
        return xla(q, k, v, is_causal=is_causal, **named)

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    config = work.architecture("toy", dtype)
    config = dataclasses.replace(config, attention=attention, text=dataclasses.replace(config.text, layers=2))

    def towers():
        model = CLIP(config, rngs=nnx.Rngs(0))
        return model.encode_image(jnp.zeros((2, 32, 32, 3))), model.encode_text(jnp.zeros((2, 16), jnp.int32))

    jax.eval_shape(towers)
    assert asked == [(5, False, kernel), (1, False, None), (16, True, kernel), (1, False, None)]


def test_idle_sides_use_no_processor_time(script):
    record = {}
    measure.take_turns(script, ["sleeps", "computes"], {}, record, rounds=1, turn_seconds=0.2, product=-1)
    assert max(side["idle_share"] for side in record["sides"].values()) < 0.2
