"""Fifty steps of the embedded default, on every mesh and in every way of computing them.

At a twentieth of its learning rate: at the whole one training is chaotic, and the control, one device with parameters
that differ by a rounding error at the start, is off by as much as any mesh.

    XLA_FLAGS=--xla_backend_optimization_level=3 python -m pytest -n 0 -m scaling -s tests/test_scaling.py

About twenty minutes; not part of the default run.  benchmarks/results/traces.md has what it printed.
"""

import jax
import numpy as np
import pytest

from clip_jax.config import load_config, set_field
from clip_jax.data import training_batches
from clip_jax.sharding import make_mesh, put_batch
from clip_jax.step import make_train_step

pytestmark = pytest.mark.scaling
STEPS = 50
# The ResNet of the default has neither microbatches nor, in its image tower, a transformer.
VIT = "configs/emoji_vit.py"
WAYS = {
    "data=8": ("configs/emoji.py", 8, {}),
    "fsdp=8": ("configs/emoji.py", 8, {"mesh.data": 1, "mesh.fsdp": 8}),
    "data=4 fsdp=2": ("configs/emoji.py", 8, {"mesh.data": 4, "mesh.fsdp": 2}),
    "data=2 fsdp=2 tensor=2": ("configs/emoji.py", 8, {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}),
    "data=8, ring": ("configs/emoji.py", 8, {"loss.form": "ring"}),
    "microbatches=4": (VIT, 1, {"microbatches": 4}),
    "microbatches=16": (VIT, 1, {"microbatches": 16}),
    "scan_layers": (VIT, 1, {"model.scan_layers": True}),
    "remat=dots": (VIT, 1, {"model.remat": "dots"}),
    "remat=full": (VIT, 1, {"model.remat": "full"}),
    "all together, data=2 fsdp=2 tensor=2": (
        VIT,
        8,
        {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "microbatches": 4, "loss.form": "ring"}
        | {"model.scan_layers": True, "model.remat": "full"},
    ),
}


@pytest.fixture(scope="module")
def traces():
    """Losses of a configuration on one device, computed once."""
    found = {}

    def of(file: str) -> np.ndarray:
        if file not in found:
            found[file] = trace(file, 1, {"loss.form": "plain"})
        return found[file]

    return of


def trace(file: str, devices: int, fields: dict, rate: float = 1e-4, disturbed: bool = False) -> np.ndarray:
    config = load_config(file)
    for name, value in (fields | {"optimizer.learning_rate": rate}).items():
        set_field(config, name, str(value))
    mesh = make_mesh(config, jax.devices()[:devices])
    init, step, _ = make_train_step(config, mesh)
    state, losses, batches = init(), [], training_batches(config)
    if disturbed:
        state = state._replace(params=jax.tree.map(lambda p: p * (1 + 1.2e-7), state.params))
    for _ in range(STEPS):
        state, metrics = step(state, put_batch(next(batches), mesh))
        losses.append(float(metrics["loss"]))
    return np.array(losses)


@pytest.mark.parametrize("way", WAYS)
def test_the_trace_is_the_same(way, traces):
    file, devices, fields = WAYS[way]
    expected, found = traces(file), trace(file, devices, fields)
    errors = np.abs(found / expected - 1)
    print(f"\n| {way} | {file} | {errors[:10].max():.1e} | {errors.max():.1e} | {expected[0]:.3f} to {expected[-1]:.3f} |")
    assert np.ptp(expected) > 0.1
    assert errors.max() < 1e-5, errors


def test_at_the_whole_rate_a_mesh_is_no_further_off_than_a_rounding_error():
    file, devices, fields = WAYS["data=8"]
    one = trace(file, 1, {}, rate=2e-3)
    control, mesh = (
        np.abs(other / one - 1) for other in (trace(file, 1, {}, 2e-3, disturbed=True), trace(file, devices, fields, 2e-3))
    )
    print(f"\n| control, whole rate | {file} | {control[:10].max():.1e} | {control.max():.1e} | {one[0]:.3f} to {one[-1]:.3f} |")
    print(f"| data=8, whole rate | {file} | {mesh[:10].max():.1e} | {mesh.max():.1e} | |")
    assert mesh[:10].max() < 1e-5 and mesh.max() < 3 * control.max()
