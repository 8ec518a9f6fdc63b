"""The whole train step, forward, backward and AdamW, beside open_clip's on the same machine.

    python benchmarks/train_step.py [--model=emoji-vit] [--batch=64] [--dtype=float32] [--captions=both] [--rounds=5]

--model is ViT-B/32, ViT-B/16, ViT-L/14, emoji-vit or toy.  --batch=2048,1024 tries the second where the first does not fit.
Both sides have the same weights, pictures, captions and hyper-parameters, and their losses are compared before anything is timed.

open_clip, eager and under torch.compile, is run as it trains: 77 padded tokens whatever the captions, in bfloat16 under autocast,
TF32, fused AdamW, gradient clipping.  Its pictures are float32, normalised, and on the device before the clock starts; ours
travel as uint8 and are normalised inside it.
"""

import argparse
import math
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from measure import OutOfMemory, Side, serve, take_turns
from records import Record, new_record, say, write
from work import (
    CAPTIONS,
    about_captions,
    architecture,
    caption_lengths,
    captions,
    open_clips,
    our_params,
    pictures,
    prepare_weights,
    ready_pictures,
)

LEARNING_RATE, WEIGHT_DECAY, BETAS, EPSILON, CLIP = 5e-4, 0.2, (0.9, 0.98), 1e-6, 1.0
CHECKED = 3  # first steps whose losses are compared
# Relative, of these losses.  Measured in float32, after two updates: toy 3.8e-7, ViT-B/32 3.8e-6.  In bfloat16,
# whose unit is 3.9e-3, both sides round on their own.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def our_config(options: dict):
    """A run's configuration with the hyper-parameters of this benchmark."""
    from ml_collections import ConfigDict

    from clip_jax.config import default_config

    config = default_config()
    config.batch_size, config.total_steps = options["batch"], 10**9
    config.model = ConfigDict(architecture(options["model"], options["dtype"]).to_dict(), type_safe=True)
    config.optimizer.learning_rate, config.optimizer.warmup_steps = LEARNING_RATE, 0
    config.optimizer.weight_decay, config.optimizer.eps, config.optimizer.gradient_clip = WEIGHT_DECAY, EPSILON, CLIP
    config.optimizer.b1, config.optimizer.b2 = BETAS
    return config


def our_batch(config, mesh, kind: str) -> dict:
    """A batch on the host as data.py makes it: sorted by length, and texts cut."""
    from clip_jax.lengths import by_length, cut, needed, rows_together

    images = pictures(config.batch_size, config.model.vision.image_size)
    tokens = captions(config.batch_size, kind, config.model.text.context_length)
    together = rows_together(config, mesh)
    order = by_length(tokens, together)
    images, tokens = images[order], tokens[order]
    return {"image": images, "tokens": cut(tokens, together, needed(tokens, together))}


def ours(options: dict) -> Side:
    import jax

    from clip_jax.config import model_config
    from clip_jax.flops import loss_flops, pair_flops
    from clip_jax.memory import keep_freed_memory
    from clip_jax.sharding import make_mesh, put_batch
    from clip_jax.step import make_train_step

    keep_freed_memory()  # as train.py does
    config, kinds = our_config(options), options["captions"]
    model, context = model_config(config), config.model.text.context_length
    mesh = make_mesh(config, jax.devices()[:1])
    init, step, abstract = make_train_step(config, mesh)
    params = our_params(model, pathlib.Path(options["folder"]))
    params = params and jax.tree.map(jax.device_get, params)  # on the host: a second copy takes no room on the device
    batches = {kind: our_batch(config, mesh, kind) for kind in kinds}

    def first():
        state = init()
        return state if params is None else state._replace(params=jax.tree.map(jax.device_put, params, place))

    place = jax.tree.map(lambda x: x.sharding, abstract.params)
    compiled = {kind: step.lower(abstract, put_batch(batches[kind], mesh)).compile() for kind in kinds}
    losses, held = {}, {}
    for kind in kinds:
        held.clear()
        state, losses[kind] = first(), []
        for _ in range(CHECKED):
            state, metrics = compiled[kind](state, put_batch(batches[kind], mesh))
            losses[kind].append(float(metrics["loss"]))
        held["state"] = state
        del state

    def lane(kind: str):
        def once() -> None:
            held["state"], held["metrics"] = compiled[kind](held["state"], put_batch(batches[kind], mesh))

        return once

    flops = {}
    for kind in kinds:
        lengths = caption_lengths(config.batch_size, kind, context).tolist()
        flops[kind] = sum(pair_flops(model, n) for n in lengths) + loss_flops(len(lengths), model.embedding)
    tokens = {kind: [list(part.shape) for part in batches[kind]["tokens"]] for kind in kinds}
    facts = {"losses": losses, "flops": flops, "tokens": tokens, "captions": about_captions(config.batch_size, context)}
    return Side({kind: lane(kind) for kind in kinds}, lambda: jax.block_until_ready(held), "jax", options["dtype"], facts)


def theirs(options: dict, compiled: bool) -> Side:
    import torch

    model, document, device = open_clips(pathlib.Path(options["folder"]))
    import open_clip.loss

    batch, context = options["batch"], document["model_cfg"]["text_cfg"]["context_length"]
    images = ready_pictures(batch, document, device)
    tokens = {kind: torch.from_numpy(captions(batch, kind, context)).long().to(device) for kind in CAPTIONS}
    model.train()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": WEIGHT_DECAY}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True)
    run, loss_of = torch.compile(model) if compiled else model, open_clip.loss.ClipLoss()
    held, parameters = {}, list(model.parameters())

    def loss(module, kind: str):
        with torch.autocast(device, torch.bfloat16, enabled=options["dtype"] == "bfloat16"):
            return loss_of(*module(images, tokens[kind]))

    def once() -> None:
        optimizer.zero_grad(set_to_none=True)
        held["loss"] = loss(run, "full")
        held["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))

    finish = torch.cuda.synchronize if device == "cuda" else lambda: None

    def rest() -> None:  # the pages of its allocator, for the others on the same device
        held.clear()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.empty_cache()

    losses = {"full": []}
    if "real" in options["captions"] and not compiled:
        with torch.no_grad():
            losses["real"] = [float(loss(model, "real"))]
    for _ in range(CHECKED):
        once()
        losses["full"].append(float(held["loss"]))
    rest()
    return Side({"full": once}, finish, "torch", options["dtype"], {"losses": losses}, rest)


SIDES = {"ours": ours, "torch": lambda options: theirs(options, False), "torch.compile": lambda options: theirs(options, True)}


def agreement(sides: Record, dtype: str) -> Record:
    """The largest relative difference of the losses of the first steps between ours and each other side."""
    found: Record = {"tolerance": TOLERANCE[dtype]}
    mine = sides.get("ours", {}).get("facts", {}).get("losses", {})
    for name, side in sides.items():
        theirs = side.get("facts", {}).get("losses", {})
        if name != "ours" and mine:
            found[name] = {
                kind: [abs(a - b) / abs(b) for a, b in zip(mine[kind], theirs[kind])] for kind in theirs if kind in mine
            }
    return found


def complete(record: Record) -> None:
    """What the sides know together: items, FLOPs and whether they agree; nothing is timed, or written, where they do not."""
    flops = record["sides"].get("ours", {}).get("facts", {}).get("flops", {})
    record["flops"], record["items"] = flops, {kind: record["batch"] for kind in CAPTIONS}
    record["agreement"] = agreement(record["sides"], record["dtype"])
    check(record)


def check(record: Record) -> None:
    """Stops where the sides do not compute the same thing: their speed would mean nothing then."""
    for name, kinds in record["agreement"].items():
        for kind, errors in kinds.items() if isinstance(kinds, dict) else ():
            shown = ", ".join(f"{error:.1e}" for error in errors)
            print(f"  losses of the first {len(errors)} step(s), {kind} captions, ours from {name}'s: {shown} relative")
            if not max(errors) <= record["agreement"]["tolerance"]:
                sys.exit(f"error: {name}: losses differ by {max(errors):.1e}, expected at most {record['agreement']['tolerance']:.0e}")


def measured(options: argparse.Namespace, batch: int, folder: pathlib.Path, kinds: list[str]) -> Record:
    about = {"model": options.model, "batch": batch, "dtype": options.dtype, "unit": "samples"}
    record = new_record("train_step", options.variant or f"{options.model}-{options.dtype}", **about)
    record["pairs"] = [
        *(["ours, full", f"{peer}, full"] for peer in ("torch", "torch.compile")),
        *(["ours, real", f"{peer}, full"] for peer in ("torch", "torch.compile")),
    ]
    record["notes"] = [
        # As flops.pair_flops and flops.loss_flops count.
        (
            "FLOPs are model FLOPs: of the towers three times forward, of the image tower's first layer, whose pixels have no gradient, "
            "twice, at the captions' own lengths and with the last block at one position; and three products of the loss's matrix"
        ),
        "open_clip computes all its context whatever the captions; its pictures are on the device, normalised, before the clock starts",
    ]
    given = {"model": options.model, "dtype": options.dtype, "batch": batch, "captions": kinds, "folder": str(folder)}
    sides, missing = list(options.sides), {}
    if options.weights:  # why open_clip's could not be made
        missing = {name: options.weights for name in sides if name != "ours"}
        sides = [name for name in sides if name not in missing]
    share = 0.9 if sides == ["ours"] else 0.4  # two others prepare beside each other
    environments = {"ours": {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(share)}}

    def after(record: Record) -> None:
        record["missing"] |= missing
        write(record, options.output)

    return take_turns(
        __file__, sides, given, record, options.rounds, options.turn, options.product, environments, after, complete
    )


def main(options: argparse.Namespace) -> None:
    kinds = list(CAPTIONS) if options.captions == "both" else [options.captions]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        peers = [side for side in options.sides if side != "ours"]
        options.weights = prepare_weights(options.model, folder) if peers else ""
        for batch in options.batch:
            try:
                record = measured(options, batch, folder, kinds)
            except OutOfMemory as error:
                print(f"  a batch of {batch:,} does not fit: {error}", flush=True)
                continue
            say(record)
            return
    sys.exit("error: no batch fits; give a smaller one with --batch")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="emoji-vit")
    parser.add_argument("--batch", default=[64], type=lambda text: [int(n) for n in text.split(",")], help="one, or several to try in turn")
    parser.add_argument("--dtype", default="float32", choices=list(TOLERANCE))
    parser.add_argument("--captions", default="both", choices=("both", *CAPTIONS))
    parser.add_argument("--sides", default=list(SIDES), type=lambda text: text.split(","))
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--turn", default=2.0, type=float, help="seconds of the fastest lane's turn; 0: one step")
    parser.add_argument("--product", default=0, type=int, help="rows of the plain product")
    parser.add_argument("--variant", default="", help="part of the result's file name")
    parser.add_argument("--output", default="", help="folder of the result")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    serve(SIDES)
    main(parse(sys.argv[1:]))
