"""Trains a CLIP, then measures it zero-shot.

    python train.py                                          # the embedded emoji set, on any machine
    python train.py --config=configs/X.py --workdir=DIR --config.field=value

    python train.py ... --explain-step=1000                  # which samples that step saw

The same command again goes on where the last one stopped.  docs/clusters.md tells how to run it on many hosts.
"""

import contextlib
import pathlib
import sys

import jax

from clip_jax.checkpoint import Checkpoints
from clip_jax.compilation import keep_compiled
from clip_jax.config import parse_command_line, validate
from clip_jax.data import explain_step, training_batches
from clip_jax.distributed import check_same_data, errors_on_all, is_first, join, on_every_host, wait_for_all
from clip_jax.errors import Stopped, run_program
from clip_jax.evaluation.during import Evaluations
from clip_jax.evaluation.encoder import Encoder
from clip_jax.evaluation.results import format_table, write_results
from clip_jax.evaluation.tasks import Measurement
from clip_jax.flops import step_flops
from clip_jax.health import Health, ledger_of
from clip_jax.initial import trained_state
from clip_jax.interruption import Interruption
from clip_jax.lengths import TextsCut, rows_together
from clip_jax.memory import keep_freed_memory
from clip_jax.metrics import MetricsLog
from clip_jax.profile import Profile
from clip_jax.recovery import Recovery
from clip_jax.sharding import local_rows, make_mesh, put_batch
from clip_jax.state import samples_seen, steps_left
from clip_jax.step import loss_form, make_train_step, model_of

DEFAULT_CONFIG = pathlib.Path(__file__).parent / "configs" / "emoji.py"


def main(arguments: list[str]) -> None:
    keep_freed_memory()
    keep_compiled()

    # Configuration
    names = {"config": str(DEFAULT_CONFIG), "workdir": "", "distributed": "auto", "explain-step": ""}
    options, config = parse_command_line(arguments, names)
    workdir = pathlib.Path(options["workdir"] or f"runs/{pathlib.Path(options['config']).stem}").expanduser()
    validate(config)
    if options["explain-step"]:
        print(explain_step(config, options["explain-step"]))
        return

    # Devices: of this process, or of many
    join(options["distributed"])
    mesh = make_mesh(config, jax.devices())
    say = print if is_first() else lambda *_: None
    say(loss_form(config, mesh)[1])

    # Data
    health = Health(ledger_of(workdir), config.data.max_bad)
    with errors_on_all():
        samples = training_batches(config, local_rows(config.batch_size, mesh), health, rows_together(config, mesh))
    check_same_data(len(samples.source.records), samples.source.records.digest())
    batches = TextsCut(samples, rows_together(config, mesh))

    # Model, loss and step
    init, step, abstract_state = make_train_step(config, mesh)

    # Checkpoint: start, or go on
    checkpoints = Checkpoints(workdir, config)
    if checkpoints.any():
        state, data_position = checkpoints.restore(abstract_state)
        batches.set_state(data_position)
        say(f"{workdir}: going on after step {int(state.step)}")
    elif config.initialize:
        state = trained_state(config, abstract_state)
        say(f"{workdir}: beginning with the parameters of {config.initialize}")
    else:
        state = init()

    # Train
    recovery, evaluations = Recovery(checkpoints, abstract_state, state, config), Evaluations(config)
    start, seen = int(state.step), samples_seen(state.seen)
    total, stopped = start + steps_left(state.seen, config), False
    with (
        Interruption() as interruption,
        MetricsLog(workdir, start, seen, total, config.batch_size, config.log_every, is_first(), jax.devices()) as log,
        contextlib.closing(batches),
        Profile(config.profile, workdir, start, total) as profile,
    ):
        for number in profile.steps():
            with log.waiting("data"), profile.waiting("data"):
                batch = next(batches)
            with log.waiting("copy"), profile.waiting("copy"):
                batch = put_batch(batch, mesh)
            state, metrics = step(state, batch)
            log.record(number, metrics, health.seconds, step_flops(config, batch))
            state = recovery.after(state, metrics)
            stopped = interruption.reached(number)
            if stopped or number == total or checkpoints.due(number):
                state = recovery.save(state, batches.get_state(), log.mean_loss(), at_once=stopped or number == total)
            if stopped:
                break
            if evaluations.due(number):  # after the save: who asks a run to stop does not wait for this
                log.measured_now(evaluations.measure(state.params, state.batch_stats))
        checkpoints.close()
    if skipped := health.summary():
        print(skipped)
    if stopped:
        raise Stopped(f"{workdir}: stopped after step {number}, saved; the same command goes on")

    # Evaluate
    from clip_jax.figures import draw_figures  # matplotlib takes a second, which no start of training should

    model = model_of(on_every_host((state.params, state.batch_stats)), config)
    results = [record for record, _ in Measurement(Encoder(model), model.config.name, str(workdir)).of("emoji")]
    if is_first():
        write_results(workdir / "results.json", results)
        draw_figures(model, workdir)
        print(format_table(results))
        print(f"In {workdir}: results.json, metrics.jsonl, loss.png, similarity.png, retrieval.png")
    wait_for_all("end")


if __name__ == "__main__":
    run_program(main, sys.argv[1:], "interrupted; the same command goes on after the last checkpoint")
