"""How long saving a checkpoint blocks the training loop, beside `torch.save` of the same arrays to the same disk.

    python benchmarks/checkpoint.py [--model=ViT-B/32] [--rounds=5] [--folder=FOLDER]

The state is that of training with AdamW: parameters and two moments, 1.8 GB for ViT-B/32.  Ours returns when training may go on,
and is waited for before the other's turn.  `until_next_step` is when a step that is given the state's arrays to write into is done, which
waits for their copy, and `until_on_disk` the whole time.  `torch.save` returns when all is handed to the system, which writes it later.
"""

import argparse
import pathlib
import shutil
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from measure import Side, serve, take_turns
from records import Record, new_record, say, write
from work import architecture


def ours(options: dict) -> Side:
    import jax
    import jax.numpy as jnp
    from ml_collections import ConfigDict

    from clip_jax.checkpoint import Checkpoints
    from clip_jax.config import default_config
    from clip_jax.memory import keep_freed_memory
    from clip_jax.sharding import make_mesh
    from clip_jax.step import make_train_step

    keep_freed_memory()  # as train.py does
    config = default_config()
    config.model, config.checkpoints_kept, config.keep_best = ConfigDict(architecture(options["model"], "float32").to_dict()), 1, False
    init, _, _ = make_train_step(config, make_mesh(config, jax.devices()[:1]))
    held = {"state": jax.block_until_ready(init())}
    checkpoints = Checkpoints(pathlib.Path(options["folder"]) / "ours", config)
    until_next_step, until_on_disk = [], []
    halved = lambda tree: jax.tree.map(lambda x: x * 0.5 if x.dtype == jnp.float32 else x, tree)
    next_step = jax.jit(lambda state: halved(state)._replace(step=state.step + 1), donate_argnums=0)

    def once() -> dict:
        start = time.perf_counter()
        held["state"] = jax.block_until_ready(next_step(held["state"]))
        alone, start = time.perf_counter() - start, time.perf_counter()
        checkpoints.save(held["state"], {"position": 0})
        blocked = time.perf_counter() - start
        held["state"] = jax.block_until_ready(next_step(held["state"]))
        until_next_step.append(time.perf_counter() - start - alone)
        checkpoints.written.result()
        until_on_disk.append(time.perf_counter() - start)
        return {"seconds": blocked}

    arrays = [leaf for leaf in jax.tree.leaves(held["state"])]
    facts = {"bytes": sum(leaf.nbytes for leaf in arrays), "until_next_step": until_next_step, "until_on_disk": until_on_disk}
    return Side({"": once}, lambda: None, "jax", "float32", facts)


def theirs(options: dict) -> Side:
    import jax
    import torch

    from clip_jax.step import abstract_model

    shapes = [leaf.shape for leaf in jax.tree.leaves(abstract_model(architecture(options["model"], "float32")))]
    state = {what: [torch.randn(shape) for shape in shapes] for what in ("parameters", "first moments", "second moments")}
    file = pathlib.Path(options["folder"]) / "theirs.pt"

    def once() -> dict:
        file.unlink(missing_ok=True)  # not of the time
        start = time.perf_counter()
        torch.save(state, file)
        return {"seconds": time.perf_counter() - start}

    return Side({"": once}, lambda: None, "torch", "float32", {"bytes": sum(t.nbytes for part in state.values() for t in part)})


SIDES = {"ours": ours, "torch.save": theirs}
UNTIL = ("until_next_step", "until_on_disk")


def main(options: argparse.Namespace) -> None:
    folder = tempfile.mkdtemp(dir=options.folder or None)
    record = new_record("checkpoint", options.variant or options.model, model=options.model, unit="checkpoints", dtype="float32")
    record["pairs"], record["items"] = [["ours", "torch.save"]], {"": 1}
    record["notes"] = ["seconds are those for which the training loop is blocked"]

    def complete(record: Record) -> None:
        record["bytes"] = {name: side["facts"].get("bytes") for name, side in record["sides"].items()}

    try:
        take_turns(
            __file__, options.sides, {"model": options.model, "folder": folder}, record, options.rounds, 0, -1,
            {"torch.save": {"JAX_PLATFORMS": "cpu"}},  # which has JAX for the shapes alone
            lambda record: write(record, options.output), complete, last_facts=True,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for side in record["sides"].values():
        for fact in UNTIL:
            del side["facts"].get(fact, [])[: -options.rounds]  # those of the warm-up
    write(record, options.output)
    say(record)
    for name, side in record["sides"].items():
        until = [f", {fact.replace('_', ' ')} {statistics.median(side['facts'][fact]):.2f} s" for fact in UNTIL if fact in side["facts"]]
        print(f"  {name}: {side['facts']['bytes'] / 1e9:.3f} GB{''.join(until)}")


if __name__ == "__main__":
    serve(SIDES)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="ViT-B/32")
    parser.add_argument("--sides", default=list(SIDES), type=lambda text: text.split(","))
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--folder", default="", help="on the disk to be measured")
    parser.add_argument("--variant", default="", help="part of the result's file name")
    parser.add_argument("--output", default="", help="folder of the result")
    main(parser.parse_args())
