"""Which device holds what: the mesh, and the rules by which arrays are laid out on it."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from clip_jax.errors import UserError

# Smaller arrays stay whole on every device: gathering them costs more than it saves.
SHARD_FROM = 2**12  # elements


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device]) -> Mesh:
    """The devices in a mesh with axes `data` and `fsdp`, checked against the batch size."""
    sizes = {axis: config.mesh[axis] for axis in ("data", "fsdp")}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"config.mesh is {sizes}, expected positive sizes, of which at most one is -1")
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"config.mesh is {dict(config.mesh)}, but there are {len(devices)} devices; "
            f"expected data * fsdp = {len(devices)}, such as data={len(devices)} fsdp=1"
        )
    if config.batch_size % len(devices):
        lower = config.batch_size // len(devices) * len(devices) or len(devices)
        raise UserError(
            f"config.batch_size is {config.batch_size}, which the mesh of {len(devices)} devices does not divide; "
            f"the nearest are {lower} and {lower + len(devices)}"
        )
    # Auto axes: XLA's partitioner places the collectives; explicit ones refuse `images @ texts.T`.
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis of a batch is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """A sharding for each array of a training state.

    The largest axis that `fsdp` divides is split over it.  The rule looks at shapes alone, so a
    parameter and its two optimizer moments always lie alike.
    """

    def sharding(array: jax.ShapeDtypeStruct) -> NamedSharding:
        spec = [None] * array.ndim
        fsdp = mesh.shape["fsdp"]
        divisible = [axis for axis, size in enumerate(array.shape) if size % fsdp == 0]
        if fsdp > 1 and divisible and array.size >= SHARD_FROM:
            spec[max(divisible, key=lambda axis: array.shape[axis])] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(sharding, state)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A host's part of a batch, as part of the global one on the devices."""
    return {
        name: jax.make_array_from_process_local_data(batch_sharding(mesh), array) for name, array in batch.items()
    }
