"""Value and gradients of the losses: the ring and the plain form, and open_clip's under PyTorch, in one run.

    pip install -r tests/pytorch.txt && pip install --no-deps -r tests/pytorch-no-deps.txt
    python benchmarks/losses.py [BATCH...]

Each measurement is a process of its own; the sides take turns, and medians are printed.  Peak memory is what the
process grows by while it computes, with the features and their gradients.  float32, one device, all its cores.
"""

import pathlib
import resource
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SIDES = ("ring", "plain", "open_clip")
REPEATS = 3
FITS = 16_384  # up to this batch the forms that hold the matrix are run: 32,768 would take them 17 GB


def jax_side(form: str, loss: str, batch: int, width: int):
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType

    from clip_jax import losses

    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    function = getattr(losses, f"ring_{loss}_loss" if form == "ring" else f"{loss}_loss")
    of = lambda *a: function(*a, mesh=mesh, axis="data") if form == "ring" else function(*a)
    rest = (jnp.float32(14.3), jnp.float32(-10.0))[: 2 if loss == "siglip" else 1]
    arguments = [jnp.asarray(x) for x in features(np, batch, width)] + list(rest)
    compiled = jax.jit(jax.value_and_grad(of, argnums=tuple(range(len(arguments))))).lower(*arguments).compile()
    return lambda: float(jax.block_until_ready(compiled(*arguments))[0])


def torch_side(loss: str, batch: int, width: int):
    from parity import torchvision_without_gpu

    library = torchvision_without_gpu()
    import numpy as np
    import torch
    from open_clip.loss import ClipLoss, SigLipLoss

    images, texts = (torch.from_numpy(x).requires_grad_() for x in features(np, batch, width))
    scale, bias = torch.tensor(14.3, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    module = ClipLoss() if loss == "clip" else SigLipLoss()

    def run(library=library) -> float:  # whose declarations end with it
        for leaf in (images, texts, scale, bias):
            leaf.grad = None
        value = module(images, texts, scale, *((bias,) if loss == "siglip" else ()))
        value.backward()
        return float(value)

    return run


def features(np, batch: int, width: int):
    for seed in (0, 1):
        x = np.random.default_rng(seed).standard_normal((batch, width), np.float32)
        yield x / np.linalg.norm(x, axis=1, keepdims=True)


def child(side: str, loss: str, batch: int, width: int) -> None:
    run = torch_side(loss, batch, width) if side == "open_clip" else jax_side(side, loss, batch, width)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    start = time.perf_counter()
    value = run()
    print(time.perf_counter() - start, peak / 2**10, value)


def measured(side: str, loss: str, batch: int, width: int) -> tuple[float, float, float]:
    command = [sys.executable, "-W", "ignore", __file__, "--child", side, loss, str(batch), str(width)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(map(float, output.split()[-3:]))


def main(batches: list[int]) -> None:
    print("| loss | batch | width | " + " | ".join(f"{s}, s | {s}, MiB" for s in SIDES) + " | time ring / plain | memory plain / ring |")
    print("|---" * (5 + 2 * len(SIDES)) + "|")
    for width in (512, 768):
        for loss in ("clip", "siglip"):
            for batch in batches:
                sides = SIDES if batch <= FITS else ("ring",)
                found = {side: [] for side in sides}
                for _ in range(REPEATS if batch <= FITS else 1):
                    for side in sides:
                        found[side].append(measured(side, loss, batch, width))
                values = [rows[0][2] for rows in found.values()]
                assert max(values) - min(values) < 1e-5 * max(values), values
                time_of = {s: statistics.median(row[0] for row in rows) for s, rows in found.items()}
                memory = {s: statistics.median(row[1] for row in rows) for s, rows in found.items()}
                cells = [f"{time_of[s]:.2f} | {memory[s]:,.0f}" if s in found else " | " for s in SIDES]
                ratios = [f"{time_of['ring'] / time_of['plain']:.2f}", f"{memory['plain'] / memory['ring']:.1f}"] if "plain" in found else ["", ""]
                print(f"| {loss} | {batch:,} | {width} | {' | '.join(cells + ratios)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        main([int(a) for a in sys.argv[1:]] or [4_096, 8_192, 16_384, 65_536])
