"""Memory of the losses and plans for pods, by the TPU compiler, on a machine without a TPU.  Remakes docs/scaling.md:

    pip install -e '.[tpu]'
    python benchmarks/scaling.py

About 25 minutes on two cores.  The tables are written row by row; a row that is there is not made again.
"""

import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
FILE = ROOT / "docs" / "scaling.md"
sys.path.insert(0, str(ROOT))

from clip_jax.plan import CHIPS, make_devices, make_plan, parse_topology

SCAN = ["--config.model.scan_layers=true"]
PLANS = (  # model, batch, topology, options
    ("ViT-B/32", 1_048_576, "v5e-256", [*SCAN, "--config.model.remat=full", "--config.microbatches=4"]),
    ("ViT-B/16", 32_768, "v5e-256", [*SCAN, "--config.model.remat=dots"]),
    ("ViT-L/14", 65_536, "v5e-256", [*SCAN, "--config.model.remat=full", "--config.mesh.fsdp=16", "--config.microbatches=2"]),
    ("ViT-H-14", 32_768, "v5p-128", [*SCAN, "--config.model.remat=full", "--config.mesh.fsdp=16"]),
    ("ViT-bigG-14", 32_768, "v5p-256", [*SCAN, "--config.model.remat=full", "--config.mesh.fsdp=64"]),
)
LOSSES = [(batch, devices) for devices in (8, 256) for batch in (8_192, 32_768, 131_072, 1_048_576)]
MICROBATCHES = ((256, 1), (256, 4), (1024, 4), (1024, 16), (4096, 16), (4096, 64))  # batch, microbatches

HEAD = """# Scaling

Made by `python benchmarks/scaling.py`, with the TPU compiler on a machine without a TPU.

Nothing here was run on a TPU.  The compiler says what a step needs, and the makers' data sheets what a device has.
"""
INTRO = {
    "losses": """## The loss alone

Value and gradients of the softmax loss, embedding 512, float32, as compiled for v5e.  Temporaries a device: they grow with
the local batch, and among several rings with the images of the neighbours, 64 MiB at most and their gradients.  The plain
form is not compiled, its matrices and what it gathers would take what is in the last column.

| global batch | devices | local batch | ring, temporaries | plain, predicted |
|---|---|---|---|---|""",
    "microbatches": """## Microbatches

The train step of ViT-B/32 on one v5e, in bfloat16, layers scanned, nothing rematerialised.

| batch | microbatches | batch / microbatches | activations and loss |
|---|---|---|---|""",
    "plans": """## Plans

The whole train step with AdamW.  "Model" FLOPs are the towers' once; the least time of a step includes the loss and what is
computed again.  "Loss's collectives" is the time that they take at the bandwidth of all links, next to that least time.
Memory and FLOPs are those of one device.

| model | batch | topology | fits | a device | parameters + optimizer | activations | loss | model TFLOPs | compiled TFLOPs | loss's collectives | step at least | pairs/s at most | options |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|""",
}


def configured(model: str, batch: int, options: list[str]):
    """A configuration from the command line's own words."""
    from clip_jax.config import parse_command_line

    arguments = [f"--config.model={model}", f"--config.batch_size={batch}", *options]
    return parse_command_line(arguments, {"config": str(ROOT / "configs" / "vit_b32.py")})[1]


def loss_row(batch: int, devices: int) -> str:
    import jax
    import numpy as np

    from clip_jax.losses import predicted_bytes
    from clip_jax.sharding import batch_sharding, make_mesh
    from clip_jax.step import make_loss

    config = configured("ViT-B/32", batch, ["--config.loss.form=ring"])
    mesh = make_mesh(config, make_devices("v5e", devices))
    x = jax.ShapeDtypeStruct((batch, 512), np.float32, sharding=batch_sharding(mesh))
    scalar = {"logit_scale": jax.ShapeDtypeStruct((), np.float32)}
    compiled = jax.jit(jax.value_and_grad(make_loss(config, mesh), argnums=(0, 1))).lower((x, x), scalar).compile()
    ring = compiled.memory_analysis().temp_size_in_bytes
    plain = predicted_bytes(batch, 512, devices, "tpu")["plain"]
    return f"| {batch:,} | {devices} | {batch // devices:,} | {ring / 2**20:,.0f} MiB | {plain / 2**20:,.0f} MiB |"


def microbatch_row(batch: int, count: int) -> str:
    config = configured("ViT-B/32", batch, [*SCAN, f"--config.microbatches={count}", "--config.loss.form=ring"])
    sizes = make_plan(config, make_devices("v5e", 1), CHIPS["v5e"]).bytes
    return f"| {batch:,} | {count} | {batch // count} | {(sizes['activations'] + sizes['loss']) / 1e9:.2f} GB |"


def plan_row(model: str, batch: int, topology: str, options: list[str]) -> str:
    kind, devices = parse_topology(topology)
    plan = make_plan(configured(model, batch, options), make_devices(kind, devices), CHIPS[kind])
    sizes, gigabytes = plan.bytes, lambda size: f"{size / 1e9:.2f} GB"
    share = sum(plan.collectives["loss"].values()) / plan.chip.link_bandwidth / plan.step_seconds
    cells = [model, f"{batch:,}", topology, "yes" if plan.fits else "NO", gigabytes(sum(sizes.values()))]
    cells += [gigabytes(sizes["parameters"] + sizes["optimizer"]), gigabytes(sizes["activations"]), gigabytes(sizes["loss"])]
    cells += [f"{plan.model_flops / 1e12:.1f}", f"{plan.compiled_flops / 1e12:.1f}", f"{share:.2%}"]
    cells += [f"{plan.step_seconds * 1e3:,.0f} ms", f"{plan.batch / plan.step_seconds:,.0f}"]
    return f"| {' | '.join(cells)} | {' '.join(o.removeprefix('--config.') for o in options)} |"


def main() -> None:
    done = FILE.read_text().splitlines() if FILE.exists() else []
    rows = {section: [] for section in INTRO}
    work = [("losses", f"| {b:,} | {n} |", loss_row, (b, n)) for b, n in LOSSES]
    work += [("plans", f"| {p[0]} | {p[1]:,} | {p[2]} |", plan_row, p) for p in PLANS]
    work += [("microbatches", f"| {b:,} | {k} | {b // k} |", microbatch_row, (b, k)) for b, k in MICROBATCHES]
    for section, start, make, arguments in work:
        began = time.perf_counter()
        rows[section].append(next((line for line in done if line.startswith(start)), None) or make(*arguments))
        print(f"{rows[section][-1]} {time.perf_counter() - began:.0f} s", flush=True)
        FILE.write_text("\n".join([HEAD, *("\n".join([INTRO[s], *rows[s], ""]) for s in rows)]))


if __name__ == "__main__":
    main()
