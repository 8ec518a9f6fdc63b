"""Results for people and for programs: a table, CLIP_benchmark's JSON, DataComp's JSON lines, CSV."""

import csv
import io
import json
import os
import pathlib
import tempfile
from typing import Any

from clip_jax.errors import UserError

BESIDE = ("_chance", "_interval")  # of a metric, beside it
MAIN = {"zeroshot_classification": "acc1", "zeroshot_retrieval": "image_retrieval_recall@1", "linear_probe": "lp_acc1"}
KINDS = (".json", ".jsonl", ".csv")


def record_of(dataset: str, model: str, pretrained: str, task: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """A result as CLIP_benchmark writes it."""
    return {"dataset": dataset, "model": model, "pretrained": pretrained, "task": task, "metrics": metrics, "language": "en"}


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
        raise UserError(f"--output={file}: expected a name that ends in {', '.join(KINDS)}")


def write_results(file: pathlib.Path, records: list[dict[str, Any]]) -> None:
    """Writes the records by the ending of the file: .json as CLIP_benchmark, .jsonl as DataComp, .csv with a line a metric."""
    kinds = {".json": lambda: json.dumps(records, indent=2) + "\n", ".jsonl": lambda: _lines(records), ".csv": lambda: _csv(records)}
    check_name(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: what was there is not lost to a full disk.
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as beside:
            beside.write(kinds[file.suffix]())
        os.chmod(beside.name, 0o644)
        os.replace(beside.name, file)
    except OSError as error:
        raise UserError(f"--output={file}: cannot be written ({error.strerror}); take another path") from error


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
