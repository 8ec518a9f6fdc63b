"""Results for people and for programs: a table, CLIP_benchmark's JSON, DataComp's JSON lines, CSV."""

import csv
import hashlib
import io
import json
import pathlib
import re
from typing import Any

from clip_jax.errors import UserError
from clip_jax.files import whole_or_not

BESIDE = ("_chance", "_interval")  # of a metric, beside it
MAIN = {"zeroshot_classification": "acc1", "zeroshot_retrieval": "image_retrieval_recall@1", "linear_probe": "lp_acc1"}
KINDS = (".json", ".jsonl", ".csv", "")  # of files; what has no ending is a folder
SETTINGS = ("C", "iterations", "k", "features")  # of a probe, among its metrics


def record_of(
    dataset: str, model: str, pretrained: str, task: str, metrics: dict[str, Any], asked: str = "", weights: str = ""
) -> dict[str, Any]:
    """A result as CLIP_benchmark writes it, and what tells it from others.

    Args:
      metrics: by name; settings of a probe among them are put apart.
      asked: the task as it was asked for, the name of a set or a place.
      weights: `Measurement.weights`.
    """
    settings = {name: value for name, value in metrics.items() if name.rpartition("shot_")[2] in SETTINGS}
    metrics = {name: value for name, value in metrics.items() if name not in settings}
    record = {"dataset": dataset, "model": model, "pretrained": pretrained, "task": task, "metrics": metrics, "language": "en"}
    return record | {"asked": asked, "weights": weights, "settings": settings}


def main_metric(record: dict[str, Any]) -> str:
    """The name of the metric that stands for a task."""
    return MAIN.get(record["task"]) or next(iter(record["metrics"]))


def format_table(records: list[dict[str, Any]]) -> str:
    """The records for people: a line a number, with its 95 % interval, and chance beside it."""
    width = max([16, *(len(record["dataset"]) + 2 for record in records)])
    lines = [f"{'data set':<{width}}{'measure':<28}{'result':>9}{'95 %':>9}{'chance':>9}"]
    for record in records:
        metrics = record["metrics"]
        for name in (name for name in metrics if not name.endswith(BESIDE)):
            if f"{name}_chance" not in metrics:
                lines.append(f"{record['dataset']:<{width}}{name:<28}{metrics[name]:>9,.6g}")
                continue
            interval = f"±{metrics[f'{name}_interval']:.2%}" if f"{name}_interval" in metrics else ""
            lines.append(
                f"{record['dataset']:<{width}}{name:<28}{metrics[name]:>9.2%}{interval:>9}{metrics[f'{name}_chance']:>9.2%}"
            )
    return "\n".join(lines)


def check_name(file: pathlib.Path) -> None:
    """Refuses a name whose ending does not say what is to be written."""
    if file.suffix not in KINDS:
        raise UserError(f"--output={file}: expected a name that ends in {', '.join(KINDS[:-1])}, or in nothing, for a folder")


def write_results(file: pathlib.Path, records: list[dict[str, Any]]) -> None:
    """Writes the records by the ending of the file: .json, .jsonl as DataComp, .csv with a line a metric, or a folder.

    JSON has CLIP_benchmark's records, in a folder one a file, as its `build` reads them.
    """
    check_name(file)
    texts = {file: kind(records) for ending, kind in ((".json", _json), (".jsonl", _lines), (".csv", _csv)) if file.suffix == ending}
    try:
        for path, text in (texts or {file / _name(record): _json(record) for record in records}).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_or_not(path) as beside:
                beside.write(text.encode())
    except OSError as error:
        raise UserError(f"--output={file}: cannot be written ({error.strerror}); take another path") from error


def read_results(file: pathlib.Path) -> list[dict[str, Any]]:
    """What `write_results` wrote as JSON, if anything."""
    found = []
    for path in sorted(file.glob("*.json")) if file.is_dir() else [file] if file.suffix == ".json" and file.is_file() else []:
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            found += [read] if isinstance(read, dict) else read
            if not all(isinstance(record["metrics"], dict) and {"dataset", "task", "pretrained"} <= record.keys() for record in found):
                raise ValueError("no such record")
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise UserError(f"--output={path}: expected results of this program, found others ({error}); take another path") from error
    return found


def _name(record: dict[str, Any]) -> str:
    """CLIP_benchmark's, and what tells apart results for which that is the same: of two places, weights, or kinds of features."""
    parts = [record[field] for field in ("dataset", "pretrained", "model", "language", "task")]
    other = json.dumps([parts, record["asked"], record["weights"], record["settings"].get("features")])
    return re.sub(r"[^\w.@+-]", "_", "_".join(parts)) + f"_{hashlib.sha256(other.encode()).hexdigest()[:8]}.json"


def _json(records: Any) -> str:
    return json.dumps(records, indent=2) + "\n"


def _lines(records: list[dict[str, Any]]) -> str:
    rows = []
    for record in records:
        metrics = {name: value for name, value in record["metrics"].items() if not name.endswith(BESIDE)}
        key = f"{record['dataset']}/{record['task']}"
        main = metrics[main_metric(record)]
        rows.append(json.dumps({"key": key, "dataset": record["dataset"], "metrics": metrics | {"main_metric": main}}) + "\n")
    return "".join(rows)


def _csv(records: list[dict[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["dataset", "model", "pretrained", "task", "metric", "value", "chance", "interval"])
    for record in records:
        metrics = record["metrics"]
        for name in (name for name in metrics if not name.endswith(BESIDE)):
            beside = [metrics.get(name + ending, "") for ending in BESIDE]
            writer.writerow([record[field] for field in ("dataset", "model", "pretrained", "task")] + [name, metrics[name], *beside])
    return file.getvalue()
