"""Rows of an array, a part of them on each device, and there a block at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from clip_jax.sharding import BATCH, batch_sharding

BLOCK = 8192  # rows for which something is held at once, unless told otherwise


def split(x: np.ndarray, mesh: Mesh) -> Array:
    """Rows, a part of them on each device; zeros after the last one, where the devices do not divide them."""

    def part(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(rows)
        own = x[start:stop]
        return np.pad(own, ((0, stop - start - len(own)),) + ((0, 0),) * (x.ndim - 1))

    rows = -(-len(x) // mesh.devices.size) * mesh.devices.size
    return jax.make_array_from_callback((rows, *x.shape[1:]), batch_sharding(mesh), part)


def by_rows(on_device: Callable, mesh: Mesh) -> Callable:
    """A function of something whole and of rows, each device with its part of them; all of them have what it gives."""
    rows, whole = PartitionSpec(BATCH), PartitionSpec()
    run = jax.shard_map(on_device, mesh=mesh, in_specs=(whole, rows), out_specs=rows, check_vma=False)
    return lambda *given: jax.lax.with_sharding_constraint(run(*given), NamedSharding(mesh, whole))


def blocks(rows: Array, size: int = BLOCK) -> int:
    return -(-len(rows) // size)


def block(i: Int[Array, ""], *arrays: Array, size: int = BLOCK) -> tuple[list[Array], Array]:
    """Rows of block `i`, and which of them are new: the last block begins early enough to be whole, without padding."""
    size = min(size, len(arrays[0]))
    start = jnp.minimum(i * size, len(arrays[0]) - size)
    return [jax.lax.dynamic_slice_in_dim(a, start, size) for a in arrays], start + jnp.arange(size) >= i * size


def put(rows: Array, i: Int[Array, ""], block: Array, size: int = BLOCK) -> Array:
    """Writes a result where `block` took its rows from."""
    return jax.lax.dynamic_update_slice_in_dim(rows, block, i * size, 0)  # clamped as the start above
