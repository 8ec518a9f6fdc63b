"""Parts of the step alone: XLA's attention and cuDNN's in bfloat16, and the losses of a large batch.

    python benchmarks/kernels.py --what=attention [--batch=512] [--heads=12] [--rounds=5]
    python benchmarks/kernels.py --what=loss [--batch=32768] [--width=512] [--losses=softmax,sigmoid]

Forward and backward.  Attention is that of the towers: [B, 50, 197 or 257, H, 64] without a mask, [B, 77, H, 64] causal.  The losses are
those of float32 features on one device: ours in their plain and their ring form, and open_clip's.
"""

import argparse
import functools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from measure import OutOfMemory, Side, serve, take_turns
from records import new_record, say, write
from work import import_open_clip

SHAPES = ((50, False), (197, False), (257, False), (77, True))  # tokens, causal
HEAD = 64  # width
SCALES = {"softmax": (14.3,), "sigmoid": (14.3, -10.0)}  # the scale, and the sigmoid loss's bias
TOLERANCE = 1e-5  # relative, of a loss.  Measured 4e-7 at most


def attention(options: dict, implementation: str) -> Side:
    import jax
    import jax.numpy as jnp

    heads, held, lanes, flops = options["heads"], {}, {}, {}
    for tokens, causal in SHAPES:
        shape = (options["batch"], tokens, heads, HEAD)
        q, k, v = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(3))

        def value(q, k, v, causal=causal):
            y = jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation=implementation)
            return y.astype(jnp.float32).sum()

        run = jax.jit(jax.grad(value, argnums=(0, 1, 2))).lower(q, k, v).compile()
        lanes[f"{tokens} tokens"] = lambda run=run, qkv=(q, k, v): held.update(y=run(*qkv))
        flops[f"{tokens} tokens"] = 3 * 4.0 * options["batch"] * heads * tokens**2 * HEAD
    return Side(lanes, lambda: jax.block_until_ready(held), "jax", "bfloat16", {"flops": flops})


def features(batch: int, width: int):
    import numpy as np

    for seed in (0, 1):
        x = np.random.default_rng(seed).standard_normal((batch, width), np.float32)
        yield x / np.linalg.norm(x, axis=1, keepdims=True)


def our_loss(options: dict, form: str) -> Side:
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType

    from clip_jax import losses
    from clip_jax.flops import loss_flops

    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    around = {"ring": {"mesh": mesh, "axis": "data"}, "plain": {}}[form]
    of = {
        "softmax": losses.clip_loss if form == "plain" else losses.ring_clip_loss,
        "sigmoid": losses.siglip_loss if form == "plain" else losses.ring_siglip_loss,
    }
    pair, held, lanes, found = [*map(jnp.asarray, features(options["batch"], options["width"]))], {}, {}, {}
    for name in options["losses"]:
        given = pair + [jnp.float32(value) for value in SCALES[name]]
        value = functools.partial(of[name], **around)
        run = jax.jit(jax.value_and_grad(value, argnums=tuple(range(len(given))))).lower(*given).compile()
        lanes[name] = lambda run=run, given=given: held.update(y=run(*given))
        found[name] = float(run(*given)[0])
    facts = {"flops": dict.fromkeys(found, loss_flops(options["batch"], options["width"])), "losses": found}
    return Side(lanes, lambda: jax.block_until_ready(held), "jax", "float32", facts, held.clear)


def their_loss(options: dict) -> Side:
    import torch

    import_open_clip()
    from open_clip.loss import ClipLoss, SigLipLoss

    device, of = "cuda" if torch.cuda.is_available() else "cpu", {"softmax": ClipLoss(), "sigmoid": SigLipLoss()}
    torch.backends.cuda.matmul.allow_tf32 = True
    pair = [torch.from_numpy(x).to(device).requires_grad_() for x in features(options["batch"], options["width"])]
    lanes, found = {}, {}
    for name in options["losses"]:
        given = pair + [torch.tensor(value, device=device, requires_grad=True) for value in SCALES[name]]
        lanes[name] = lambda loss=of[name], given=given: void(torch.autograd.grad(loss(*given), given))
        with torch.no_grad():
            found[name] = float(of[name](*given))
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    return Side(lanes, finish, "torch", "float32", {"losses": found}, torch.cuda.empty_cache if device == "cuda" else lambda: None)


def void(_) -> None:
    """What is computed is not kept."""


SIDES = {
    "xla": lambda options: attention(options, "xla"),
    "cudnn": lambda options: attention(options, "cudnn"),
    "ours, ring": lambda options: our_loss(options, "ring"),
    "ours, plain": lambda options: our_loss(options, "plain"),
    "open_clip": their_loss,
}
OF = {"attention": ["xla", "cudnn"], "loss": ["ours, ring", "ours, plain", "open_clip"]}


def complete(record: dict) -> None:
    facts = {name: side["facts"] for name, side in record["sides"].items()}
    record["flops"] = next((its["flops"] for its in facts.values() if "flops" in its), {})
    losses = {name: its["losses"] for name, its in facts.items() if "losses" in its}
    first = next(iter(losses.values()), {})
    record["agreement"] = {
        name: {f"{loss} loss": abs(value / first[loss] - 1) for loss, value in its.items()} for name, its in list(losses.items())[1:]
    }
    for side, found in record["agreement"].items():
        if not max(found.values()) <= TOLERANCE:
            sys.exit(f"error: {side}: losses differ, {found}, expected at most {TOLERANCE:.0e}")


def main(options: argparse.Namespace) -> None:
    given = {name: getattr(options, name) for name in ("batch", "heads", "width", "losses")}
    size = f"heads{options.heads}" if options.what == "attention" else f"width{options.width}"
    record = new_record(options.what, options.variant or f"batch{options.batch}-{size}", unit="samples", **given)
    record["dtype"] = "bfloat16" if options.what == "attention" else "float32"
    record["notes"] = ["FLOPs of a loss are those of its plain form, three products"] if options.what == "loss" else []
    record["items"] = {lane: options.batch for lane in [*SCALES, *(f"{n} tokens" for n, _ in SHAPES)]}
    forms = [(f"ours, {form}, {loss}", f"open_clip, {loss}") for loss in options.losses for form in ("ring", "plain")]
    record["pairs"] = [list(pair) for pair in forms]
    record["pairs"] += [[f"ours, ring, {loss}", f"ours, plain, {loss}"] for loss in options.losses]
    record["pairs"] += [[f"cudnn, {n} tokens", f"xla, {n} tokens"] for n, _ in SHAPES]
    sides = options.sides or OF[options.what]
    environments = {name: {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / len(sides):.2f}"} for name in sides}
    try:
        take_turns(
            __file__, sides, given, record, options.rounds, options.turn, options.product, environments,
            lambda record: write(record, options.output), complete,
        )  # fmt: skip
    except OutOfMemory as error:
        sys.exit(f"error: {error}; give a smaller --batch, or fewer --sides")
    write(record, options.output)
    say(record)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--what", default="attention", choices=list(OF))
    parser.add_argument("--batch", default=512, type=int)
    parser.add_argument("--heads", default=12, type=int)
    parser.add_argument("--width", default=512, type=int)
    parser.add_argument("--losses", default=list(SCALES), type=lambda text: text.split(","))
    parser.add_argument("--sides", default=[], type=lambda text: text.split(";"))
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--turn", default=0.5, type=float)
    parser.add_argument("--product", default=0, type=int, help="rows of the plain product")
    parser.add_argument("--variant", default="", help="part of the result's file name")
    parser.add_argument("--output", default="", help="folder of the result")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    serve(SIDES)
    main(parse(sys.argv[1:]))
