"""A number for each array, by which a changed bit is found, also when the array comes back onto another mesh."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Num, UInt32


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


class Digests:
    """The `bit_sum` of each array of a tree, computed by its devices while the program goes on."""

    def __init__(self, tree: Any):
        leaves, self._structure = jax.tree.flatten(tree)
        self._sums, self._finite = _compiled(_whole_everywhere(leaves[0]))(leaves)

    def by_path(self) -> dict[str, int]:
        """Waits for them; the same on all processes."""
        sums = jax.tree.leaves_with_path(self._structure.unflatten(np.asarray(self._sums).tolist()))
        return {jax.tree_util.keystr(path, simple=True, separator="/"): value for path, value in sums}

    def finite(self) -> bool:
        """Whether all numbers are finite; waits, and is the same on all processes."""
        return bool(self._finite)


def digests(tree: Any) -> dict[str, int]:
    """The `bit_sum` of each array by its path, the same on all processes."""
    return Digests(tree).by_path()


def _whole_everywhere(array: Array) -> jax.sharding.Sharding | None:
    sharding = array.sharding
    named = isinstance(sharding, jax.sharding.NamedSharding)
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec()) if named else None


@functools.cache
def _compiled(sharding: jax.sharding.Sharding | None):
    def of(leaves: list[Array]) -> tuple[UInt32[Array, " N"], Bool[Array, ""]]:
        sums, finite = zip(*map(bit_sum, leaves))
        return jnp.stack(sums), jnp.stack(finite).all()

    return jax.jit(of, out_shardings=sharding)
