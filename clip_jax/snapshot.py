"""What a checkpoint is written from: the arrays as they are now and their digests, both made while the devices go on."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Bool, UInt32

from clip_jax.digest import bit_sums, by_path, whole_everywhere


class Snapshot:
    """Arrays copied into the memory of their hosts, and their digests; begun at once, and waited for by who asks.

    The arrays may be donated to the next step, which waits on its devices for the copy.  It is one program for all of
    them, for JAX's own time for each array, were it copied by itself, would be most of what a checkpoint holds up.
    What several devices hold alike is copied but once, a part from each.
    """

    def __init__(self, tree: Any):
        leaves, self._structure = jax.tree.flatten(tree)
        compiled = program(tuple(leaf.sharding for leaf in leaves), tuple(leaf.shape for leaf in leaves))
        self._sums, self.finite, self._arrays = compiled(leaves)  # finite: whether all numbers are, to be asked later

    def digests(self) -> dict[str, int]:
        """The `bit_sum` of each array by its path, the same on all processes."""
        return by_path(self._structure, np.asarray(self._sums))

    def arrays(self) -> Any:
        """The tree, in the memory of the hosts."""
        return self._structure.unflatten(self._arrays)


@functools.cache
def program(shardings: tuple[Sharding, ...], shapes: tuple[tuple[int, ...], ...]) -> Callable:
    """What makes a snapshot of arrays that are laid out so."""

    def snapshot(leaves: list[Array]) -> tuple[UInt32[Array, " N"], Bool[Array, ""], list[Array]]:
        # Behind the barrier they are arrays of their own, and no part of the reductions, which would be slower by it.
        return *bit_sums(leaves), jax.lax.optimization_barrier(leaves)

    whole = whole_everywhere(shardings[0])
    return jax.jit(snapshot, out_shardings=(whole, whole, list(map(_on_hosts, shardings, shapes))))


def _on_hosts(sharding: Sharding, shape: tuple[int, ...]) -> Sharding:
    """Where an array is copied to: over each mesh axis along which it is repeated, its first axis that can be divided is divided."""
    if isinstance(sharding, NamedSharding):
        mesh, spec = sharding.mesh.shape, [names if isinstance(names, tuple) else (names,) * (names is not None) for names in sharding.spec]
        spec += [()] * (len(shape) - len(spec))
        for name, size in mesh.items():
            if size == 1 or any(name in names for names in spec):
                continue
            for axis, names in enumerate(spec):
                if shape[axis] % (size * math.prod(mesh[other] for other in names)) == 0:
                    spec[axis] = (*names, name)
                    break
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    # The memory of hosts that accelerators reach; a CPU's own is the host's.
    return sharding if next(iter(sharding.device_set)).platform == "cpu" else sharding.with_memory_kind("pinned_host")
