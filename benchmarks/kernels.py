"""Parts of the step alone, in bfloat16: XLA's attention and cuDNN's, and the loss of a large batch.

    python benchmarks/kernels.py --what=attention [--batch=512] [--heads=12] [--rounds=5]
    python benchmarks/kernels.py --what=loss [--batch=32768] [--width=512]

Forward and backward.  Attention is that of the towers: [B, 50, 197 or 257, H, 64] without a mask, [B, 77, H, 64] causal.  The loss is the
softmax's of float32 features on one device: ours in its plain and its ring form, and open_clip's.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from measure import OutOfMemory, Side, serve, take_turns
from records import new_record, say, write
from work import import_open_clip

SHAPES = ((50, False), (197, False), (257, False), (77, True))  # tokens, causal
HEAD = 64  # width


def attention(options: dict, implementation: str) -> Side:
    import jax
    import jax.numpy as jnp

    heads, held, lanes, flops = options["heads"], {}, {}, {}
    for tokens, causal in SHAPES:
        if tokens not in options["tokens"]:
            continue
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

    from clip_jax.flops import loss_flops
    from clip_jax.losses import clip_loss, ring_clip_loss

    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    of = clip_loss if form == "plain" else lambda *a: ring_clip_loss(*a, mesh=mesh, axis="data")
    given, held = [*map(jnp.asarray, features(options["batch"], options["width"])), jnp.float32(14.3)], {}
    run = jax.jit(jax.value_and_grad(of, argnums=(0, 1, 2))).lower(*given).compile()
    facts = {"flops": {"": loss_flops(options["batch"], options["width"])}, "loss": float(run(*given)[0])}
    return Side({"": lambda: held.update(y=run(*given))}, lambda: jax.block_until_ready(held), "jax", "float32", facts)


def their_loss(options: dict) -> Side:
    import torch

    import_open_clip()
    from open_clip.loss import ClipLoss

    device, loss = "cuda" if torch.cuda.is_available() else "cpu", ClipLoss()
    torch.backends.cuda.matmul.allow_tf32 = True
    given = [torch.from_numpy(x).to(device).requires_grad_() for x in features(options["batch"], options["width"])]
    scale = torch.tensor(14.3, device=device, requires_grad=True)

    def once() -> None:
        torch.autograd.grad(loss(*given, scale), (*given, scale))

    with torch.no_grad():
        facts = {"loss": float(loss(*given, scale))}
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    return Side({"": once}, finish, "torch", "float32", facts, torch.cuda.empty_cache if device == "cuda" else lambda: None)


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
    record["agreement"] = {"losses": {name: its["loss"] for name, its in facts.items() if "loss" in its}}


def main(options: argparse.Namespace) -> None:
    given = {name: getattr(options, name) for name in ("batch", "heads", "width", "tokens")}
    record = new_record(options.what, options.variant or f"batch{options.batch}", unit="samples", **given)
    record["dtype"] = "bfloat16" if options.what == "attention" else "float32"
    record["items"] = {lane: options.batch for lane in ["", *(f"{n} tokens" for n, _ in SHAPES)]}
    record["pairs"] = [["ours, ring", "open_clip"], ["ours, plain", "open_clip"]]
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


if __name__ == "__main__":
    serve(SIDES)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--what", default="attention", choices=list(OF))
    parser.add_argument("--batch", default=512, type=int)
    parser.add_argument("--heads", default=12, type=int)
    parser.add_argument("--tokens", default=[n for n, _ in SHAPES], type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--width", default=512, type=int)
    parser.add_argument("--sides", default=[], type=lambda text: text.split(";"))
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--turn", default=0.5, type=float)
    parser.add_argument("--product", default=0, type=int, help="rows of the plain product")
    parser.add_argument("--variant", default="", help="part of the result's file name")
    parser.add_argument("--output", default="", help="folder of the result")
    main(parser.parse_args())
