"""A number for each array, by which a changed bit is found, also when the array comes back onto another mesh."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Bool, Num, UInt32


@jax.jit  # traced once for each shape: a state has few
def bit_sum(x: Num[Array, "..."]) -> tuple[UInt32[Array, ""], Bool[Array, ""]]:
    """The sum, modulo 2^32, of the elements' bits times 1, 3, 5, and so on; and whether all of them are finite.

    Whole numbers that wrap add up to the same in any order, so on any mesh.  The weights are odd, so that no flipped
    bit can vanish, and differ, so that elements that changed places are seen, if not 2^31 elements apart.
    """
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        stride = math.prod(x.shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
    # Both in one reduction, which XLA's CPU compiler makes one loop over whole vectors.
    start, both = (jnp.uint32(0), jnp.uint32(0)), (bits * (2 * place + 1), (~jnp.isfinite(x)).astype(jnp.uint32))
    total, bad = jax.lax.reduce(both, start, lambda a, b: (a[0] + b[0], a[1] | b[1]), range(x.ndim))
    return total, bad == 0


def bit_sums(arrays: Sequence[Num[Array, "..."]]) -> tuple[UInt32[Array, " N"], Bool[Array, ""]]:
    """The `bit_sum` of each array, and whether all numbers are finite."""
    sums, finite = zip(*map(bit_sum, arrays))
    return jnp.stack(sums), jnp.stack(finite).all()


def by_path(structure: jax.tree_util.PyTreeDef, sums: UInt32[np.ndarray, " N"]) -> dict[str, int]:
    """The sums of a tree's arrays by their paths."""
    leaves = jax.tree.leaves_with_path(structure.unflatten(sums.tolist()))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): value for path, value in leaves}


def digests(tree: Any) -> dict[str, int]:
    """The `bit_sum` of each array by its path, the same on all processes."""
    leaves, structure = jax.tree.flatten(tree)
    sums, _ = _compiled(whole_everywhere(leaves[0].sharding))(leaves)
    return by_path(structure, np.asarray(sums))


def whole_everywhere(sharding: Sharding) -> Sharding | None:
    """On each device of a mesh, so that each process can read it; None where there is one device."""
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None


@functools.cache
def _compiled(sharding: Sharding | None) -> Callable:
    return jax.jit(bit_sums, out_shardings=sharding)
