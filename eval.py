"""Measures a trained CLIP zero-shot.

    python eval.py --checkpoint=runs/emoji [--output=results.json]
"""

import pathlib
import sys

from clip_jax.checkpoint import load_model
from clip_jax.config import parse_command_line
from clip_jax.errors import UserError, run_program
from clip_jax.evaluate import evaluate_emoji, format_table, write_results


def main(arguments: list[str]) -> None:
    options, _ = parse_command_line(arguments, {"checkpoint": "", "output": ""})
    if not options["checkpoint"]:
        raise UserError("--checkpoint is missing, expected the workdir of a run, such as --checkpoint=runs/emoji")
    model, _ = load_model(options["checkpoint"])
    results = evaluate_emoji(model, pretrained=options["checkpoint"])
    print(format_table(results))
    if options["output"]:
        write_results(pathlib.Path(options["output"]), results)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
