"""Measures a CLIP: zero-shot classification and retrieval, linear probe, k-NN, few shots.

    python eval.py --checkpoint=runs/emoji                                        # the embedded emoji
    python eval.py --checkpoint=ViT-B/32 --tasks=imagenet2012,cifar100 --output=results.json --report=report.html
    python eval.py --checkpoint=ViT-B/32 --suite=imagenet-robustness --output=results.json   # goes on where it stopped

A checkpoint is what clip_jax.load takes.  docs/evaluation.md lists tasks, suites and options.
"""

import math
import pathlib
import sys
from collections.abc import Collection

import jax

import clip_jax
from clip_jax.compilation import keep_compiled
from clip_jax.config import did_you_mean, parse_command_line
from clip_jax.distributed import errors_on_all, first_says, is_first, join
from clip_jax.errors import UserError, run_program
from clip_jax.evaluation.encoder import BATCH, Encoder
from clip_jax.evaluation.names import TASKS
from clip_jax.evaluation.published import published
from clip_jax.evaluation.report import write_report
from clip_jax.evaluation.results import check_name, format_table, main_metric, read_results, write_results
from clip_jax.evaluation.sets import check_here, is_here
from clip_jax.evaluation.tasks import KINDS, PROBES, SUITES, Measurement, Unsuitable

TOLERANCE = 0.1  # percent, unless told otherwise
FEATURES = ("projected", "pooled")  # what probes see: after the projection, or before it
OPTIONS = {"checkpoint": "", "tasks": "", "suite": "", "data_dir": "", "output": "", "report": "", "probes": "", "cache": ""}
OPTIONS |= {"probe_features": "", "batch_size": str(BATCH), "expect": "", "tolerance": "", "distributed": "auto"}


def main(arguments: list[str]) -> None:
    keep_compiled()
    options, _ = parse_command_line(arguments, OPTIONS)
    if not options["checkpoint"]:
        raise UserError("--checkpoint is missing, expected the workdir of a run, such as --checkpoint=runs/emoji, a file or a name")
    tasks, output = tasks_of(options), pathlib.Path(options["output"]).expanduser() if options["output"] else None
    if output:
        check_name(output)
    batch_size, probes, features = int_of("batch_size", options), probes_of(options), features_of(options)
    expected, tolerance = expected_of(arguments, options)
    cache = folder_of("cache", options)
    join(options["distributed"])
    with errors_on_all():
        for task in tasks:
            if task != "emoji":
                check_here(task, options["data_dir"] or None)

    model, preprocess = clip_jax.load(options["checkpoint"])
    if preprocess is None:
        raise UserError(f"--checkpoint={options['checkpoint']}: a text encoder alone, expected a CLIP, with images and texts in one space")
    encoder = Encoder(model, batch_size, clip_jax.get_tokenizer(options["checkpoint"]))
    measurement = Measurement(
        encoder, model.config.name, options["checkpoint"], options["data_dir"] or None, probes, cache, features == "pooled"
    )
    with errors_on_all():
        before = read_results(output) if output and options["suite"] else []
    records, parts, failed = [], [], False
    # An error of one process alone, such as of reading a picture, leaves the others waiting: it ends the program.
    passed_over = UserError if jax.process_count() == 1 else Unsuitable
    for task in tasks:
        kept = done_before(before, task, measurement.weights, features)
        if kept and is_first():
            print(f"{task}: {', '.join(record['task'] for record in kept)} measured before, taken from {output}", file=sys.stderr)
        records += kept
        found = {record["task"] for record in kept}
        done = {kind for kind in KINDS if first_says(kind in found)}  # its file is the one that is written
        try:
            for record, part in measurement.of(task, done):
                records.append(record)
                if options["report"] and part:
                    parts.append(part)
                if output and is_first():
                    # After each, so that a long suite goes on where it stopped; what the file has of others stays.
                    write_results(output, [record for record in before if record not in records] + records)
        except passed_over as error:
            failed = True
            if is_first():
                print(f"error: {error}", file=sys.stderr)
    if is_first() and records:
        print(format_table(records))
        for record in records:
            for metric, value in published(record).items():
                difference = record["metrics"][metric] - value
                print(f"{record['dataset']} {metric}: published {value:.2%}, here {100 * difference:+.2f} points")
        if options["report"]:
            write_report(pathlib.Path(options["report"]).expanduser(), f"{model.config.name} · {options['checkpoint']}", records, parts)
    if failed:
        sys.exit(2)  # as for all bad input, after what could be measured
    if is_first() and expected is not None:
        check_expected(records, expected, tolerance)


def tasks_of(options: dict[str, str]) -> list[str]:
    """The tasks that are asked for; of a suite those that are here, and what is not is named."""
    if options["tasks"] and options["suite"]:
        raise UserError("--tasks and --suite, expected one of the two")
    if not options["suite"]:
        tasks = list(dict.fromkeys(task for task in (options["tasks"] or "emoji").split(",") if task))
        if not tasks:
            raise UserError(f"--tasks={options['tasks']}: expected the name of a set or a folder, found none")
        return tasks
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


def features_of(options: dict[str, str]) -> str:
    if options["probe_features"] and not options["probes"]:
        raise UserError(f"--probe_features={options['probe_features']} without --probes, which are what sees them; add --probes=linear")
    check_choice("probe_features", found := options["probe_features"] or FEATURES[0], FEATURES)
    return found


def expected_of(arguments: list[str], options: dict[str, str]) -> tuple[float | None, float]:
    """What the first result should be, and how far off it may be, in percent."""
    given = [name for name in ("expect", "tolerance") if any(argument.startswith(f"--{name}=") for argument in arguments)]
    if given == ["tolerance"]:
        raise UserError(f"--tolerance={options['tolerance']} without --expect, from which it is; add --expect")
    expected = number_of("expect", options) if given else None
    tolerance = number_of("tolerance", options) if "tolerance" in given else TOLERANCE
    if tolerance < 0:
        raise UserError(f"--tolerance={options['tolerance']}, expected 0 or more, in percent")
    return expected, tolerance


def folder_of(name: str, options: dict[str, str]) -> pathlib.Path | None:
    if not options[name]:
        return None
    folder = pathlib.Path(options[name]).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--{name}={options[name]}: expected a folder, which cannot be made ({error.strerror}); take another") from error
    return folder


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise UserError(f"--{name}={value}, expected {', '.join(choices)}{did_you_mean(value, choices)}")


def int_of(name: str, options: dict[str, str]) -> int:
    if not options[name].isdecimal() or not int(options[name]):
        raise UserError(f"--{name}={options[name]}, expected a whole number from 1")
    return int(options[name])


def number_of(name: str, options: dict[str, str]) -> float:
    try:
        number = float(options[name])
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"--{name}={options[name]}, expected a number, in percent")
    return number


def done_before(records: list[dict], task: str, weights: str, features: str) -> list[dict]:
    """What a run of the same suite that was stopped has written of a task, by these weights, of probes that saw these features."""
    same = [record for record in records if (record.get("asked"), record.get("weights")) == (task, weights)]
    return [record for record in same if record.get("settings", {}).get("features", features) == features]


def check_expected(records: list[dict], expected: float, tolerance: float) -> None:
    """Ends with status 1 if the first result is not what it should be; in percent."""
    name = main_metric(records[0])
    found = 100 * records[0]["metrics"][name]
    if abs(found - expected) > tolerance:
        print(f"{records[0]['dataset']} {name}: expected {expected} ± {tolerance} %, found {found:.2f} %", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
