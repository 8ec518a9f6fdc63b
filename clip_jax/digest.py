"""A number for each array, by which a changed bit is found, also when the array comes back onto another mesh."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Num, UInt32


def bit_sum(x: Num[Array, "..."]) -> UInt32[Array, ""]:
    """The sum, modulo 2^32, of the elements' bits times 1, 3, 5, and so on.

    Whole numbers that wrap add up to the same in any order, so on any mesh.  The weights are odd, so that no flipped
    bit can vanish, and differ, so that elements that changed places are seen, if not 2^31 elements apart.
    """
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        stride = math.prod(x.shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
    return (bits * (2 * place + 1)).sum(dtype=jnp.uint32)


def digests(tree: Any) -> tuple[dict[str, int], bool]:
    """The `bit_sum` of each array by its path, and whether all of them are finite; the same on all processes."""
    paths, leaves = zip(*jax.tree.leaves_with_path(tree))
    sums, finite = _compiled(_whole_everywhere(leaves[0]))(leaves)
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path in paths)
    return dict(zip(names, np.asarray(sums).tolist(), strict=True)), bool(finite)


def _whole_everywhere(array: Array) -> jax.sharding.Sharding | None:
    sharding = array.sharding
    named = isinstance(sharding, jax.sharding.NamedSharding)
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec()) if named else None


@functools.cache
def _compiled(sharding: jax.sharding.Sharding | None):
    def of(leaves: tuple[Array, ...]) -> tuple[Array, Bool[Array, ""]]:
        return jnp.stack([bit_sum(x) for x in leaves]), jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()

    return jax.jit(of, out_shardings=sharding)
