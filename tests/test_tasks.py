"""eval.py: tasks, probes, what is kept and resumed, what it writes, and what it refuses."""

import argparse
import ast
import csv
import dataclasses
import importlib.util
import json
import os
import pathlib

import jax
import numpy as np
import PIL.Image
import pytest
from flax import nnx

import eval as program
from clip_jax.checkpoint import save_model
from clip_jax.config import load_config, model_config
from clip_jax.errors import UserError
from clip_jax.evaluation import tasks
from clip_jax.evaluation.encoder import Encoder
from clip_jax.evaluation.published import published
from clip_jax.evaluation.results import format_table, read_results, record_of, write_results
from clip_jax.evaluation.sets import open_set
from clip_jax.evaluation.tasks import Measurement
from clip_jax.models import CLIP
from clip_jax.step import split_model

COLORS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    config = model_config(load_config("configs/emoji.py"))
    tiny = dataclasses.replace(config, text=dataclasses.replace(config.text, width=32, heads=1), embedding=32)
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, CLIP(tiny, rngs=nnx.Rngs(0)))
    return str(folder)


@pytest.fixture(scope="module")
def colors(tmp_path_factory) -> pathlib.Path:
    """Noise around three colours, for training and for test."""
    folder, rng = tmp_path_factory.mktemp("colors"), np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 7)):
        for name, color in COLORS.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(color, 25, (40, 40, 3)), 0, 255).astype(np.uint8)
                PIL.Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


def run(capsys, *arguments: object) -> tuple[str, str]:
    program.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return printed.out, printed.err


def test_a_folder_of_classes_with_probes_in_every_format(checkpoint, colors, tmp_path, capsys):
    files = [tmp_path / f"r{ending}" for ending in (".json", ".jsonl", ".csv")]
    for file in files:
        options = (f"--checkpoint={checkpoint}", f"--tasks={colors}", "--probes=linear,knn,few_shot", f"--output={file}")
        table, _ = run(capsys, *options, f"--report={tmp_path / 'r.html'}")
    records = json.loads(files[0].read_text())
    assert [record["task"] for record in records] == ["zeroshot_classification", "linear_probe", "knn", "few_shot"]
    theirs = {"dataset", "model", "pretrained", "task", "metrics", "language"}
    assert all(set(record) == theirs | {"asked", "weights", "settings"} and record["asked"] == str(colors) for record in records)
    assert records[1]["settings"].keys() == {"C", "iterations", "features"} and records[2]["settings"]["k"] == 20
    metrics = records[0]["metrics"] | records[1]["metrics"] | records[2]["metrics"] | records[3]["metrics"]
    assert metrics["acc5"] == 1 and metrics["acc1_chance"] == pytest.approx(1 / 3) and 0 <= metrics["acc1"] <= 1
    # The towers are random, but colours are apart in them.
    assert metrics["lp_acc1"] == metrics["knn_acc1"] == metrics["4_shot_acc1"] == 1
    assert "lp_acc1" in table and f"{metrics['acc1']:.2%}" in table
    lines = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert [line["metrics"]["main_metric"] for line in lines][:2] == [metrics["acc1"], 1.0]
    rows = list(csv.DictReader(files[2].read_text().splitlines()))
    assert {row["metric"]: float(row["value"]) for row in rows if row["task"] == "knn"}["knn_acc1"] == 1
    assert (tmp_path / "r.html").read_text().count("<img") >= 20


def test_probes_see_what_they_are_asked_to(checkpoint, colors, tmp_path, capsys):
    import clip_jax

    model, _ = clip_jax.load(checkpoint)
    arguments = (f"--checkpoint={checkpoint}", f"--tasks={colors}", "--probes=knn", f"--cache={tmp_path}")
    run(capsys, *arguments)
    assert len(list(tmp_path.iterdir())) == 2
    table, _ = run(capsys, *arguments, "--probe_features=pooled")
    widths = sorted(np.load(file).shape[1] for file in tmp_path.iterdir())
    assert "knn_acc1" in table and widths == sorted(2 * [model.config.embedding] + 2 * [model.vision.projection.kernel.shape[0]])
    for file in tmp_path.iterdir():
        np.testing.assert_allclose(np.linalg.norm(np.load(file), axis=1), 1, atol=1.8e-7)  # measured 6e-8


def test_features_are_kept_and_are_of_these_pictures_and_weights(checkpoint, colors, tmp_path):
    import clip_jax

    model, _ = clip_jax.load(checkpoint)
    measure = lambda model: Measurement(Encoder(model, 8), "m", "p", cache=tmp_path).features(open_set(str(colors)))
    first = measure(model)
    (kept,) = tmp_path.iterdir()
    np.save(kept, first + 1)  # to see that it is read
    assert (measure(model) == first + 1).all()
    other = nnx.clone(model)
    other.vision.projection.kernel[...] *= np.linspace(1, 2, 32, dtype=np.float32)[None]
    assert not (measure(other) == first + 1).all() and len(list(tmp_path.iterdir())) == 2
    picture = colors / "test" / "red" / "0.png"
    before = picture.read_bytes()
    try:
        picture.write_bytes((colors / "test" / "blue" / "0.png").read_bytes())
        assert not (measure(model) == first + 1).all() and len(list(tmp_path.iterdir())) == 3
    finally:
        picture.write_bytes(before)


def test_damaged_features_are_made_anew(checkpoint, colors, tmp_path, capsys):
    arguments = (f"--checkpoint={checkpoint}", f"--tasks={colors}", f"--cache={tmp_path}")
    table, _ = run(capsys, *arguments)
    (kept,) = tmp_path.iterdir()
    assert kept.stat().st_mode & 0o777 == 0o644
    for damaged in (kept.read_bytes()[:-5], b"", b"nothing of the kind"):
        kept.write_bytes(damaged)
        again, said = run(capsys, *arguments)
        assert again == table and "expected the features of 21 pictures, found a damaged file" in said
        assert len(np.load(kept)) == 21


def test_a_suite_names_what_is_not_here_and_goes_on_where_it_stopped(checkpoint, colors, tmp_path, capsys, monkeypatch):
    import clip_jax

    monkeypatch.setitem(tasks.SUITES, "vtab+", (str(colors), "cifar10"))
    monkeypatch.setattr(program, "is_here", lambda task, place: task == str(colors))
    output = tmp_path / "r.json"
    arguments = (f"--checkpoint={checkpoint}", "--suite=vtab+", f"--data_dir={tmp_path}", f"--output={output}")
    table, said = run(capsys, *arguments)
    assert said.startswith("cifar10: left out, for it is not here; get it with TensorFlow") and colors.name in table
    first = json.loads(output.read_text())
    first[0]["metrics"]["acc1"] = 0.123456
    output.write_text(json.dumps(first))
    with monkeypatch.context() as patched:
        patched.setattr(tasks, "open_set", lambda *arguments: pytest.fail("opened again"))
        table, said = run(capsys, *arguments)
    assert "12.35%" in table and f"zeroshot_classification measured before, taken from {output}" in said
    # What else is wanted is measured.
    table, _ = run(capsys, *arguments, "--probes=knn")
    assert "12.35%" in table and "knn_acc1" in table
    # Other weights at the same place are measured, and what the file has of the first stays.
    model, _ = clip_jax.load(checkpoint)
    model.vision.projection.kernel[...] *= np.linspace(1, 2, 32, dtype=np.float32)[None]
    save_model(tmp_path / "other", model)
    table, said = run(capsys, f"--checkpoint={tmp_path / 'other'}", *arguments[1:])
    assert "12.35%" not in table and "measured before" not in said
    records = json.loads(output.read_text())
    assert [record["task"] for record in records] == ["zeroshot_classification", "knn", "zeroshot_classification"]
    assert records[0] == first[0] and records[0]["weights"] == records[1]["weights"] != records[2]["weights"]
    output.write_text('{"a": 1}')
    with pytest.raises(UserError, match="r.json: expected results of this program"):
        run(capsys, *arguments)


def test_what_cannot_be_measured_is_told_and_the_rest_is(checkpoint, colors, tmp_path, capsys):
    (tmp_path / "empty" / "one").mkdir(parents=True)
    with pytest.raises(SystemExit) as ended:
        run(capsys, f"--checkpoint={checkpoint}", f"--tasks={tmp_path / 'empty'},{colors}")
    table, said = capsys.readouterr()
    assert ended.value.code == 2 and colors.name in table and said.startswith("error: ") and "at least one picture" in said
    # Pictures that are measured are not learnt from.
    with pytest.raises(SystemExit) as ended:
        run(capsys, f"--checkpoint={checkpoint}", f"--tasks={colors / 'test'}", "--probes=knn")
    table, said = capsys.readouterr()
    assert ended.value.code == 2 and "mean_per_class_recall" in table and "knn" not in table
    assert "all of it is measured, so none is left to train probes on" in said


@pytest.mark.pytorch
@pytest.mark.filterwarnings("ignore")  # theirs closes no file
def test_clip_benchmark_reads_a_folder_of_results(checkpoint, colors, tmp_path, capsys):
    spec = importlib.util.find_spec("clip_benchmark")
    if spec is None:
        pytest.skip("needs clip_benchmark: pip install --no-deps clip_benchmark==1.6.2")
    run(capsys, f"--checkpoint={checkpoint}", f"--tasks={colors}", "--probes=knn", f"--output={tmp_path / 'results'}")
    # The function by itself: what else is in its file imports Java's scores of captions.
    module = ast.parse((pathlib.Path(spec.origin).parent / "cli.py").read_text())
    module.body = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "main_build"]
    exec(compile(module, "cli.py", "exec"), theirs := {"csv": csv, "json": json, "os": os})
    theirs["main_build"](argparse.Namespace(files=[str(tmp_path / "results")], output=str(tmp_path / "all.csv")))
    rows = {row["task"]: row for row in csv.DictReader((tmp_path / "all.csv").read_text().splitlines())}
    assert rows.keys() == {"zeroshot_classification", "knn"} and 0 <= float(rows["zeroshot_classification"]["acc1"]) <= 1
    assert float(rows["knn"]["knn_acc1"]) == 1


def test_an_expected_value_is_an_exit_status(checkpoint, colors, capsys):
    arguments = (f"--checkpoint={checkpoint}", f"--tasks={colors}")
    table, _ = run(capsys, *arguments)
    found = table.splitlines()[1].split()[2].rstrip("%")
    run(capsys, *arguments, f"--expect={found}")
    with pytest.raises(SystemExit) as ended:
        run(capsys, *arguments, f"--expect={float(found) + 1}", "--tolerance=0.5")
    assert ended.value.code == 1 and "found" in capsys.readouterr().err


def test_published_values_stand_beside_those_of_the_same_weights():
    record = record_of("imagenet2012", "ViT-B/32", "ViT-B/32", "zeroshot_classification", {"acc1": 0.6}, "imagenet2012")
    assert published(record) == {"acc1": 0.6332}
    assert published(record | {"pretrained": "runs/mine"}) == published(record | {"asked": "mine/imagenet2012"}) == {}
    retrieval = record_of("flickr30k", "RN50", "RN50", "zeroshot_retrieval", {}, "flickr30k")
    assert published(retrieval) == {"image_retrieval_recall@1": 0.5736, "text_retrieval_recall@1": 0.8}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks=emoji"], "--checkpoint is missing"),
        (["--checkpoint=x", "--tasks=emoji", "--suite=all"], "--tasks and --suite, expected one of the two"),
        (["--checkpoint=x", "--suite=vtab"], "--suite=vtab, expected emoji, vtab.*did you mean vtab"),
        (["--checkpoint=x", "--probes=linaer"], "--probes=linaer, expected linear, knn, few_shot; did you mean linear"),
        (["--checkpoint=x", "--probes=knn", "--probe_features=poled"], "--probe_features=poled, expected projected, pooled; did you"),
        (["--checkpoint=x", "--probe_features=pooled"], "--probe_features=pooled without --probes"),
        (["--checkpoint=x", "--output=r.txt"], "--output=r.txt: expected a name that ends in .json, .jsonl, .csv, or in nothing"),
        (["--checkpoint=x", "--batch_size=0"], "--batch_size=0, expected a whole number from 1"),
        (["--checkpoint=x", "--batch_size=²"], "--batch_size=², expected a whole number from 1"),
        (["--checkpoint=x", "--expect=high"], "--expect=high, expected a number, in percent"),
        (["--checkpoint=x", "--expect="], "--expect=, expected a number, in percent"),
        (["--checkpoint=x", "--expect=nan"], "--expect=nan, expected a number, in percent"),
        (["--checkpoint=x", "--expect=50", "--tolerance=inf"], "--tolerance=inf, expected a number, in percent"),
        (["--checkpoint=x", "--expect=50", "--tolerance=-1"], "--tolerance=-1, expected 0 or more"),
        (["--checkpoint=x", "--tolerance=1"], "--tolerance=1 without --expect"),
        (["--checkpoint=x", "--tasks=,"], "--tasks=,: expected the name of a set or a folder, found none"),
        (["--checkpoint=x", "--tasks=emoji,cifar11"], "cifar11: expected a folder or the name of a set; did you mean cifar10"),
        (["--checkpoint=x", f"--cache={__file__}"], "--cache=.*: expected a folder, which cannot be made"),
        (["--checkpoint=x", "--task=emoji"], "unknown option --task; did you mean --tasks"),
        (["--checkpoint=nowhere"], "nowhere: no such file or folder, nor a known model"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        program.main(arguments)


def test_while_training(checkpoint, colors):
    import clip_jax
    from clip_jax.evaluation.during import Evaluations

    config = load_config("configs/emoji.py").unlock()
    assert not Evaluations(config).due(config.log_every)  # never, unless asked to
    config.evaluate.minutes, config.evaluate.tasks = 1e-9, (str(colors),)
    evaluations = Evaluations(config)
    assert evaluations.due(config.log_every) and not evaluations.due(config.log_every + 1)
    model, _ = clip_jax.load(checkpoint)
    config.model = model.config.to_dict()
    _, params, batch_stats = split_model(model)
    first = evaluations.measure(params, batch_stats)
    assert first.keys() == {f"{colors.name}/{name}" for name in ("acc1", "acc5", "mean_per_class_recall")}
    encoder, before = evaluations.encoder, evaluations.encoder.texts(["a text"])
    other = evaluations.measure(jax.tree.map(lambda x: x * 0 + 1e-3, params), batch_stats)
    assert evaluations.encoder is encoder and other.keys() == first.keys()  # compiled once, of other weights
    assert not np.allclose(encoder.texts(["a text"]), before)
    config.evaluate.tasks = ("cifar11",)
    with pytest.raises(UserError, match="cifar11: expected a folder or the name of a set; did you mean cifar10"):
        Evaluations(config)


def test_results_of_one_name_have_files_of_their_own(tmp_path):
    record = record_of("set", "m", "p", "knn", {"knn_acc1": 0.5, "features": "pooled"}, "a/set", "1")
    others = [record | {"asked": "b/set"}, record | {"weights": "2"}, record | {"settings": {"features": "projected"}}]
    write_results(tmp_path / "results", [record, *others])
    write_results(tmp_path / "results", [record | {"metrics": {"knn_acc1": 0.25}}])  # the same again
    found = read_results(tmp_path / "results")
    assert len(found) == 4 and sorted(r["metrics"]["knn_acc1"] for r in found) == [0.25, 0.5, 0.5, 0.5]


def test_an_impossible_path_is_named_and_a_full_file_is_kept(tmp_path):
    write_results(tmp_path / "a" / "r.json", [{"metrics": {}}])
    with pytest.raises(UserError, match="cannot be written"):
        write_results(tmp_path / "a" / "r.json" / "b.json", [])
    assert json.loads((tmp_path / "a" / "r.json").read_text()) == [{"metrics": {}}]
    assert "0.05%" in format_table([record_of("s", "m", "p", "t", {"acc1": 0.5, "acc1_chance": 0.0005})])
