"""Which example comes when: a pure function of seed and position.

A position is a number of places in an endless stream.  It says all that a checkpoint needs to know of the
order, costs the same to restore at any place, and means the same with another batch size.
"""

import functools
from collections.abc import Sequence

import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Int64

from clip_jax.errors import UserError

CYCLE = 10_000  # places after which a mixture repeats the sequence of its sets
ROUNDS = 4  # of the cipher that is the permutation


class Order:
    """The stream of examples of one set, or of several that are mixed by weight.

    Without weights the sets are one.  A pass shows each example once, in an order of its own; what is left over at its
    end, less than a batch, is passed over, so that no batch holds an example twice.  With weights each set has passes of
    its own, none of them cut.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int):
        if weights and (len(weights) != len(sizes) or min(weights) <= 0):
            raise UserError(
                f"config.data.weights is {tuple(weights)}, expected a number above zero for each of the {len(sizes)} config.data.sets"
            )
        if weights and not min(sizes):
            raise UserError(
                f"config.data.weights is {tuple(weights)}, and config.data.group makes one of records of several config.data.sets; "
                "set one of the two alone"
            )
        self.seed = seed
        self.sizes = list(sizes) if weights else [sum(sizes)]
        self.firsts = np.cumsum([0, *self.sizes])
        self.turns, self.counts = _turns(weights) if weights else (None, None)

    def start(self, position: int, batch: int) -> int:
        """Where a batch begins that would begin here: at the next pass, if this one has not enough left."""
        size = self.sizes[0]
        return position if self.turns is not None or position % size + batch <= size else position // size * size + size

    def after(self, position: int, batch: int, batches: int) -> int:
        """The position after so many batches."""
        size = self.sizes[0]
        if self.turns is not None:
            return position + batches * batch
        here = (size - position % size) // batch  # batches that this pass still has
        if batches <= here:
            return position + batches * batch
        passes, rest = divmod(batches - here - 1, size // batch)
        return (position // size + 1 + passes) * size + (rest + 1) * batch

    def example(self, place: int) -> int:
        """The number of the example at a place of the stream, counted over all sets."""
        if self.turns is None:
            return self._in_set(0, place)
        cycles, turn = divmod(place, CYCLE)
        which = int(self.turns[turn])
        return self._in_set(which, cycles * int(self.counts[-1][which]) + int(self.counts[turn][which]))

    def set_of(self, example: int) -> range:
        """The examples of the set that this one is of."""
        which = int(np.searchsorted(self.firsts, example, side="right")) - 1
        return range(int(self.firsts[which]), int(self.firsts[which + 1]))

    def _in_set(self, which: int, count: int) -> int:
        past, place = divmod(count, self.sizes[which])
        shuffled = index_shuffle(place, self.sizes[which] - 1, _key(self.seed, which, past), ROUNDS)
        return int(self.firsts[which]) + shuffled


@functools.lru_cache(maxsize=64)
def _key(seed: int, which: int, past: int) -> int:
    return int(np.random.SeedSequence((seed, 0, which, past)).generate_state(1)[0])


def _turns(weights: Sequence[float]) -> tuple[Int64[np.ndarray, "C"], Int64[np.ndarray, "C+1 K"]]:
    """Which set has each turn of a cycle, and how many turns each had before it."""
    shares = np.array(weights) / sum(weights)
    if min(shares) * CYCLE < 1:
        raise UserError(f"config.data.weights is {tuple(weights)}, expected at least {1 / CYCLE} of the sum for each")
    turns, had = [], np.zeros(len(weights))
    for turn in range(1, CYCLE + 1):
        which = int(np.argmax(shares * turn - had))  # the one that is furthest behind
        had[which] += 1
        turns.append(which)
    one_each = np.eye(len(weights), dtype=np.int64)[turns]
    return np.array(turns), np.concatenate([np.zeros((1, len(weights)), np.int64), np.cumsum(one_each, axis=0)])
