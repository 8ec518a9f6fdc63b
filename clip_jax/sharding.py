"""Which device holds what: the mesh, and the rules by which arrays are laid out on it."""

import contextlib
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from clip_jax.errors import UserError
from clip_jax.models.placement import placed_by

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes that split a batch

# Which mesh axis splits which axis of a parameter, by its path.  "tensor" follows Megatron (Shoeybi et al. 2019, 3): the
# first product of a pair by its outputs, the second by its inputs.
RULES = (
    (r"(attention/qkv|mlp/up)/kernel", ("fsdp", "tensor")),
    (r"(attention/qkv|mlp/up)/bias", ("tensor",)),
    (r"(attention/out|mlp/down)/kernel", ("tensor", "fsdp")),
    (r"token_embedding", ("tensor", "fsdp")),
)

# Smaller arrays stay whole on every device: gathering them costs more than it saves.
SHARD_FROM = 2**16  # elements


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device]) -> Mesh:
    """The devices in a mesh with AXES, checked against the batch size."""
    sizes = {axis: config.mesh[axis] for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"config.mesh is {sizes}, expected positive sizes, of which at most one is -1")
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"config.mesh is {dict(config.mesh)}, but there are {len(devices)} devices; "
            f"expected data * fsdp * tensor = {len(devices)}, such as data={len(devices)} fsdp=1 tensor=1"
        )
    parts, each = math.prod(sizes[axis] for axis in BATCH), config.microbatches
    if config.batch_size % (parts * each):
        lower = config.batch_size // (parts * each) * parts * each
        what = f"the mesh of {parts} devices" if each == 1 else f"{each} microbatches on {parts} devices"
        raise UserError(
            f"config.batch_size is {config.batch_size}, which {what} {'does' if each == 1 else 'do'} not divide; "
            f"the nearest {f'are {lower} and' if lower else 'is'} {lower + parts * each}"
        )
    # Auto axes: XLA's partitioner places the collectives; explicit ones refuse `images @ texts.T`.
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices, or these, each of which has a part of what there is and the whole model."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices), 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis of a batch is split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def activations_on(mesh: Mesh) -> contextlib.AbstractContextManager[None]:
    """Inside, what models say of where arrays lie is meant of this mesh."""
    shardings = {"batch": batch_sharding(mesh), "whole": NamedSharding(mesh, PartitionSpec())}
    return placed_by(lambda x, where: jax.lax.with_sharding_constraint(x, shardings[where]))


def local_rows(batch_size: int, mesh: Mesh) -> list[int]:
    """The rows of a batch that the devices of this process hold."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (part,) in slices for row in range(*part.indices(batch_size))})


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """A sharding for each array of a training state.

    By RULES; of what has no rule, the largest axis that `fsdp` divides is split over it.  A mesh axis that
    does not divide its axis is left out.  The paths of a parameter's two optimizer moments end as its own
    does, so that they always lie alike.
    """

    def sharding(path: Any, array: jax.ShapeDtypeStruct) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        divides = lambda mesh_axis, axis: array.shape[axis] % mesh.shape[mesh_axis] == 0
        rule = next((axes for pattern, axes in RULES if re.search(pattern + "$", name)), None)
        if array.size < SHARD_FROM:
            rule = ()
        elif rule is None:
            largest = max((axis for axis in range(array.ndim) if divides("fsdp", axis)), key=array.shape.__getitem__, default=-1)
            rule = ["fsdp" if axis == largest else None for axis in range(array.ndim)]
        elif array.ndim == len(rule) + 1:  # stacked blocks
            rule = (None, *rule)
        spec = (mesh_axis if mesh_axis and divides(mesh_axis, axis) else None for axis, mesh_axis in enumerate(rule))
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map_with_path(sharding, state)


def in_microbatches(array: jax.Array, count: int, mesh: Mesh) -> jax.Array:
    """[B, ...] as [count, B / count, ...], each with a part of every device's rows, so that nothing is sent."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH)
    rows, rest = len(array) // (parts * count), array.shape[1:]
    array = array.reshape(parts, count, rows, *rest).swapaxes(0, 1).reshape(count, parts * rows, *rest)
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(None, BATCH)))


def from_microbatches(array: jax.Array, mesh: Mesh) -> jax.Array:
    """The inverse of `in_microbatches`."""
    parts, (count, size, *rest) = math.prod(mesh.shape[axis] for axis in BATCH), array.shape
    array = array.reshape(count, parts, size // parts, *rest).swapaxes(0, 1).reshape(count * size, *rest)
    return jax.lax.with_sharding_constraint(array, batch_sharding(mesh))


def in_turns_of_devices(arrays: Sequence[jax.Array], mesh: Mesh) -> jax.Array:
    """Arrays along the batch as one, in which each device has its rows of all of them, so that nothing is sent."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH)
    rest = arrays[0].shape[1:]
    joined = jnp.concatenate([array.reshape(parts, -1, *rest) for array in arrays], axis=1)
    return jax.lax.with_sharding_constraint(joined.reshape(-1, *rest), batch_sharding(mesh))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """The `local_rows` of a batch, as part of the global one on the devices."""
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(batch_sharding(mesh), array), batch)
