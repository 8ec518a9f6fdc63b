"""Whether a run fits a machine that is not here yet, and how fast it could be at best.

    python -m clip_jax.plan --config=configs/vit_b32.py --topology=v5e-256 --config.batch_size=32768

Compiles the real train step for a TPU pod (on a machine without one: `pip install libtpu`, as the extra `tpu` does),
or for so many GPUs or CPUs on virtual devices, and reports what the compiler says.
"""

import dataclasses
import difflib
import math
import os
import pathlib
import re
import sys
from typing import Any

from clip_jax.collectives import collective_bytes
from clip_jax.errors import UserError, run_program


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the makers' data sheets say of one device; of "cpu", round figures of a small server."""

    platform: str
    memory: float  # bytes
    flops: float  # of dense bfloat16 products, a second
    memory_bandwidth: float  # bytes a second
    link_bandwidth: float  # bytes a second that a device sends over all its links


CHIPS = {
    "v4": Chip("tpu", 32e9, 275e12, 1.2e12, 300e9),
    "v5e": Chip("tpu", 16e9, 197e12, 0.82e12, 200e9),
    "v5p": Chip("tpu", 95e9, 459e12, 2.77e12, 600e9),
    "v6e": Chip("tpu", 32e9, 918e12, 1.64e12, 448e9),
    "a100": Chip("gpu", 80e9, 312e12, 2.0e12, 300e9),
    "h100": Chip("gpu", 80e9, 989e12, 3.35e12, 450e9),
    "h200": Chip("gpu", 141e9, 989e12, 4.8e12, 450e9),
    "cpu": Chip("cpu", 16e9, 1e12, 50e9, 10e9),
}
# libtpu's names of the topologies, by the number of chips.
_SQUARE = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBE = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
TOPOLOGIES = {
    "v4": {n: f"v4:{shape}" for n, shape in _CUBE.items()},
    "v5e": {n: f"v5e:{shape}" for n, shape in _SQUARE.items()},
    "v5p": {n: f"v5:{shape}" for n, shape in _CUBE.items()},
    "v6e": {n: f"v6e:{shape}" for n, shape in _SQUARE.items()},
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiler says of a step; bytes and FLOPs are those of one device."""

    chip: Chip
    devices: int
    batch: int
    form: str  # of the loss
    bytes: dict[str, int]  # by kind
    model_flops: float  # of the towers, forward and backward, once
    needed_flops: float  # with the loss, and with what remat and microbatches compute again
    compiled_flops: float  # as the compiler counts them: a loop's body once
    collectives: dict[str, dict[str, float]]  # bytes by kind, of the whole step and of its loss
    seconds: dict[str, float]  # lower bounds, by what they are bound

    @property
    def fits(self) -> bool:
        """Whether one device has the memory."""
        return sum(self.bytes.values()) <= self.chip.memory

    @property
    def step_seconds(self) -> float:
        """No step is faster than this: arithmetic and communication may overlap."""
        return max(self.seconds.values())

    def largest_batch(self, multiple: int) -> int:
        """The batch that would fill the memory, if what grows with it grows in proportion."""
        fixed = self.bytes["parameters"] + self.bytes["optimizer"]
        per_pair = (sum(self.bytes.values()) - fixed) / self.batch
        return max(0, int((self.chip.memory - fixed) / per_pair) // multiple * multiple)


def main(arguments: list[str]) -> None:
    from clip_jax.config import parse_command_line

    root = pathlib.Path(__file__).parent.parent
    defaults = {"config": str(root / "configs" / "vit_b32.py"), "topology": "v5e-256"}
    options, config = parse_command_line(arguments, defaults)
    kind, count = parse_topology(options["topology"])
    devices = make_devices(kind, count)
    print(f"Compiling the step for {count} x {kind} ...", file=sys.stderr)
    print(format_plan(make_plan(config, devices, CHIPS[kind]), options["topology"], config))


def parse_topology(name: str) -> tuple[str, int]:
    """"v5e-256" as ("v5e", 256)."""
    kind, _, count = name.partition("-")
    if kind not in CHIPS or not count.isdigit() or int(count) < 1:
        known = [f"{k}-{n}" for k in TOPOLOGIES for n in TOPOLOGIES[k]]
        near = difflib.get_close_matches(name, known, 3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"--topology={name}: expected KIND-NUMBER, such as v5e-256 or h100-8; the kinds are {', '.join(CHIPS)}{hint}")
    if kind in TOPOLOGIES and int(count) not in TOPOLOGIES[kind]:
        sizes = TOPOLOGIES[kind]
        near = min(sizes, key=lambda n: abs(math.log(n / int(count))))
        raise UserError(f"--topology={name}: there are {kind} of {', '.join(map(str, sizes))} chips; the nearest is {kind}-{near}")
    return kind, int(count)


def make_devices(kind: str, count: int) -> list[Any]:
    """Devices to compile for: of a described TPU, or virtual ones.  To be called before JAX is used."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if kind not in TOPOLOGIES:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
        import jax

        if len(jax.devices()) < count:
            raise UserError(f"{kind}-{count}: JAX was started with {len(jax.devices())} devices in this process; run it in a new one")
        return jax.devices()[:count]
    # Without these libtpu asks the network what machine this is.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1"}
    from jax.experimental import topologies

    try:
        alone = {"chips_per_host_bounds": (1, 1, 1)} if count == 1 else {}
        return list(topologies.get_topology_desc(TOPOLOGIES[kind][count], "tpu", **alone).devices)
    except Exception as error:  # of libtpu, or of its absence
        reason = str(error).splitlines()[0]
        raise UserError(f"{kind}-{count}: cannot compile for TPUs here ({reason}); pip install 'jax[tpu]'") from error


def make_plan(config: Any, devices: list[Any], chip: Chip) -> Plan:
    """Compiles the train step of a configuration for these devices, and its loss alone."""
    import jax
    import numpy as np

    from clip_jax.sharding import BATCH, batch_sharding, make_mesh
    from clip_jax.step import loss_form, make_loss, make_train_step

    mesh = make_mesh(config, devices)
    _, step, state = make_train_step(config, mesh)
    side, length = config.model.vision.image_size, config.model.text.context_length
    batch = {
        "image": jax.ShapeDtypeStruct((config.batch_size, side, side, 3), np.uint8),
        "tokens": jax.ShapeDtypeStruct((config.batch_size, length), np.int32),  # not cut: the most that a batch may have
        "place": jax.ShapeDtypeStruct((config.batch_size,), np.int32),
    }
    lowered = step.lower(state, batch)
    try:
        compiled, too_much = lowered.compile(), 0
    except jax.errors.JaxRuntimeError as error:  # the TPU's compiler says so instead of a report
        needed = re.search(r"required for HLO temporaries \(([\d.]+)([KMGT])\)", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not needed:
            raise
        compiled, too_much = None, int(float(needed[1]) * 1024 ** (1 + "KMGT".index(needed[2])))
    features = jax.ShapeDtypeStruct((config.batch_size, config.model.embedding), np.float32, sharding=batch_sharding(mesh))
    scalars = {name: state.params[name] for name in ("logit_scale", "logit_bias") if name in state.params}
    loss = jax.jit(jax.value_and_grad(make_loss(config, mesh), argnums=(0, 1))).lower((features, features), scalars).compile()

    local = lambda tree: sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    loss_bytes = loss.memory_analysis().temp_size_in_bytes
    parts = math.prod(mesh.shape[axis] for axis in BATCH)
    sizes = {
        "parameters": local((state.params, state.batch_stats)),
        "optimizer": local(state.optimizer),
        "batch": (side * side * 3 + 4 * length) * config.batch_size // parts,
        "activations": max(0, (compiled.memory_analysis().temp_size_in_bytes if compiled else too_much) - loss_bytes),
        "loss": loss_bytes,
    }
    collectives = {"step": collective_bytes(compiled.as_text() if compiled else ""), "loss": collective_bytes(loss.as_text())}
    model_flops = 3 * forward_flops(config) * config.batch_size / len(devices)
    # A backward pass is two forward passes; remat and microbatches each ask for one more.
    passes = 3 + (config.model.remat == "full") + (config.microbatches > 1)
    form, _ = loss_form(config, mesh)
    needed = passes / 3 * model_flops + loss_flops(config, form) / len(devices)
    cost = (compiled.cost_analysis() if compiled else None) or {}
    seconds = {
        "arithmetic": needed / chip.flops,
        "memory": cost.get("bytes accessed", 0.0) / chip.memory_bandwidth,
        "communication": sum(collectives["step"].values()) / chip.link_bandwidth,
    }
    flops = model_flops, needed, cost.get("flops", 0.0)
    return Plan(chip, len(devices), config.batch_size, form, sizes, *flops, collectives, seconds)


def forward_flops(config: Any) -> float:
    """FLOPs of both towers for one pair: two for each multiplication in matrix products and convolutions."""
    import jax
    import numpy as np

    from clip_jax.config import model_config
    from clip_jax.models import CLIP
    from clip_jax.step import abstract_model

    plain = dataclasses.replace(model_config(config), scan_layers=False, remat="none")
    side, length = plain.vision.image_size, plain.text.context_length
    image, text = jax.ShapeDtypeStruct((1, side, side, 3), np.float32), jax.ShapeDtypeStruct((1, length), np.int32)

    def both(model: CLIP, image, text):
        return model.encode_image(image), model.encode_text(text)

    return _count_flops(jax.make_jaxpr(both)(abstract_model(plain), image, text).jaxpr)


def loss_flops(config: Any, form: str) -> float:
    """Of the loss and its gradient over the whole matrix: three products, and one again in the softmax's ring."""
    products = 4 if form == "ring" and config.loss.kind == "softmax" else 3
    return products * 2 * config.batch_size**2 * config.model.embedding


def _count_flops(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        shapes = [v.aval.shape for v in equation.invars if hasattr(v, "aval")]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(shapes[0][axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        elif equation.primitive.name == "conv_general_dilated":
            out_features = equation.params["dimension_numbers"].rhs_spec[0]
            inner = math.prod(shapes[1]) // shapes[1][out_features]
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        if "branches" in equation.params:  # one form for each platform, of which one runs
            total += max(_count_flops(branch.jaxpr) for branch in equation.params["branches"])
        for value in equation.params.values():
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                total += _count_flops(getattr(value, "jaxpr", value))
    return total


def format_plan(plan: Plan, topology: str, config: Any) -> str:
    """The report."""
    gigabytes = lambda size: f"{size / 1e9:9.3f} GB"
    total = sum(plan.bytes.values())
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines = [f"{config.model.name} at batch {plan.batch:,} on {topology}: {verdict}, {total / 1e9:.1f} of {plan.chip.memory / 1e9:.0f} GB a device"]
    lines += [f"  {kind:<16}{gigabytes(size)}" for kind, size in plan.bytes.items()]
    lines.append(f"  {config.loss.kind} loss in its {plan.form} form")
    lines.append(f"FLOPs a device: model {plan.model_flops:.3e}, needed {plan.needed_flops:.3e}, compiled {plan.compiled_flops:.3e} (a loop's body counted once)")
    lines.append("Collectives a device, bytes sent a step:")
    unknown = "none" if plan.compiled_flops else "not known: the compiler stopped at the memory"
    lines += [f"  {kind:<20}{gigabytes(size)}" for kind, size in plan.collectives["step"].items()] or [f"  {unknown}"]
    of_loss = sum(plan.collectives["loss"].values())
    share = of_loss / plan.chip.link_bandwidth / plan.step_seconds
    lines.append(f"  of them the loss's  {gigabytes(of_loss)}, {share:.2%} of the step's time")
    bounds = ", ".join(f"{what} {seconds * 1e3:.1f} ms" for what, seconds in plan.seconds.items())
    lines.append(f"No step is faster than {plan.step_seconds * 1e3:.1f} ms ({bounds}): {plan.batch / plan.step_seconds:,.0f} pairs/s at most")
    multiple = config.microbatches * plan.devices
    lines.append(f"Largest batch that fits, about: {plan.largest_batch(multiple):,}")
    if not plan.fits:
        lines.append("What would fit: " + "; ".join(_remedies(plan, config)))
    return "\n".join(lines)


def _remedies(plan: Plan, config: Any) -> list[str]:
    fixed, free = plan.bytes["parameters"] + plan.bytes["optimizer"], plan.chip.memory
    remedies = []
    if fixed > 0.5 * free and config.mesh.fsdp != plan.devices:
        remedies.append(f"--config.mesh.fsdp={plan.devices} --config.mesh.data=1, which divides parameters and optimizer")
    if config.model.remat != "full":
        remedies.append("--config.model.remat=full (or dots), which keeps a block's input alone")
    if plan.bytes["activations"] > 0 and free > fixed:
        parts = 2 ** math.ceil(math.log2(max(2, config.microbatches * plan.bytes["activations"] / (0.8 * (free - fixed)))))
        remedies.append(f"--config.microbatches={parts}")
    if plan.form == "plain":
        remedies.append("--config.loss.form=ring")
    return remedies


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
