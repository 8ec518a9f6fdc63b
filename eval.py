"""Measures a CLIP: zero-shot classification and retrieval, linear probe, k-NN, few shots.

    python eval.py --checkpoint=runs/emoji                                        # the embedded emoji
    python eval.py --checkpoint=ViT-B/32 --tasks=imagenet2012,cifar100 --output=results.json --report=report.html
    python eval.py --checkpoint=ViT-B/32 --suite=imagenet-robustness --output=results.json   # goes on where it stopped

A checkpoint is what clip_jax.load takes.  docs/evaluation.md lists tasks, suites and options.
"""

import json
import pathlib
import sys
from collections.abc import Collection

import clip_jax
from clip_jax.compilation import keep_compiled
from clip_jax.config import did_you_mean, parse_command_line
from clip_jax.distributed import is_first, join
from clip_jax.errors import UserError, run_program
from clip_jax.evaluation.encoder import BATCH, Encoder
from clip_jax.evaluation.names import TASKS
from clip_jax.evaluation.published import published
from clip_jax.evaluation.report import write_report
from clip_jax.evaluation.results import check_name, format_table, main_metric, write_results
from clip_jax.evaluation.sets import is_here
from clip_jax.evaluation.tasks import SUITES, Measurement

PROBES = ("linear", "knn", "few_shot")
FEATURES = ("projected", "pooled")  # what probes see: after the projection, or before it
OPTIONS = {"checkpoint": "", "tasks": "", "suite": "", "data_dir": "", "output": "", "report": "", "probes": "", "cache": ""}
OPTIONS |= {"probe_features": "projected", "batch_size": str(BATCH), "expect": "", "tolerance": "0.1", "distributed": "auto"}


def main(arguments: list[str]) -> None:
    keep_compiled()
    options, _ = parse_command_line(arguments, OPTIONS)
    if not options["checkpoint"]:
        raise UserError("--checkpoint is missing, expected the workdir of a run, such as --checkpoint=runs/emoji, a file or a name")
    tasks, output = tasks_of(options), pathlib.Path(options["output"]) if options["output"] else None
    if output:
        check_name(output)
    batch_size, probes = int_of("batch_size", options), probes_of(options)
    expected = number_of("expect", options) if options["expect"] else None
    check_choice("probe_features", options["probe_features"], FEATURES)
    join(options["distributed"])

    model, _ = clip_jax.load(options["checkpoint"])
    encoder = Encoder(model, batch_size, clip_jax.get_tokenizer(options["checkpoint"]))
    measurement = Measurement(
        encoder,
        model.config.name,
        options["checkpoint"],
        options["data_dir"] or None,
        probes,
        pathlib.Path(options["cache"]) if options["cache"] else None,
        options["probe_features"] == "pooled",
    )
    records, parts = (done_before(output, options["checkpoint"]) if output and options["suite"] else []), []
    for task in tasks:
        if any(record["dataset"] in (task, f"{task}_fluent") for record in records):
            continue
        measured, shown = measurement.of(task)
        records += measured
        parts += shown
        if output and is_first():
            write_results(output, records)  # after each, so that a long suite goes on where it stopped
    if not is_first():
        return
    print(format_table(records))
    for record in records:
        for metric, value in published(record).items():
            difference = record["metrics"][metric] - value
            print(f"{record['dataset']} {metric}: published {value:.2%}, here {100 * difference:+.2f} points")
    if options["report"]:
        write_report(pathlib.Path(options["report"]), f"{model.config.name} · {options['checkpoint']}", records, parts)
    if expected is not None:
        check_expected(records, expected, number_of("tolerance", options))


def tasks_of(options: dict[str, str]) -> list[str]:
    """The tasks that are asked for; of a suite those that are here, and what is not is named."""
    if options["tasks"] and options["suite"]:
        raise UserError("--tasks and --suite, expected one of the two")
    if not options["suite"]:
        return [task for task in (options["tasks"] or "emoji").split(",") if task]
    check_choice("suite", options["suite"], SUITES)
    tasks = []
    for task in SUITES[options["suite"]]:
        if task == "emoji" or is_here(task, options["data_dir"] or None):
            tasks.append(task)
        else:
            print(f"{task}: left out, for it is not here; get it {TASKS[task].how}", file=sys.stderr)
    if not tasks:
        raise UserError(f"--suite={options['suite']}: none of its sets is here; get one as said above")
    return tasks


def probes_of(options: dict[str, str]) -> tuple[str, ...]:
    probes = tuple(filter(None, options["probes"].split(",")))
    for probe in probes:
        check_choice("probes", probe, PROBES)
    return probes


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise UserError(f"--{name}={value}, expected {', '.join(choices)}{did_you_mean(value, choices)}")


def int_of(name: str, options: dict[str, str]) -> int:
    if not options[name].isdigit() or not int(options[name]):
        raise UserError(f"--{name}={options[name]}, expected a whole number from 1")
    return int(options[name])


def number_of(name: str, options: dict[str, str]) -> float:
    try:
        return float(options[name])
    except ValueError as error:
        raise UserError(f"--{name}={options[name]}, expected a number, in percent") from error


def done_before(output: pathlib.Path, pretrained: str) -> list[dict]:
    """What a run of the same suite that was stopped has written."""
    if output.suffix != ".json" or not output.is_file():
        return []
    try:
        records = json.loads(output.read_text())
        return [record for record in records if record["pretrained"] == pretrained]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--output={output}: expected results of this program, found something else ({error}); take another path") from error


def check_expected(records: list[dict], expected: float, tolerance: float) -> None:
    """Ends with status 1 if the first result is not what it should be; in percent."""
    name = main_metric(records[0])
    found = 100 * records[0]["metrics"][name]
    if abs(found - expected) > tolerance:
        print(f"{records[0]['dataset']} {name}: expected {expected} ± {tolerance} %, found {found:.2f} %", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
