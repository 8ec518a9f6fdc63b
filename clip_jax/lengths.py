"""Texts cut to their length: in a causal tower, read at EOT, what follows EOT changes nothing.

The rows of a device (of a microbatch, where there are several) come in the order of their lengths, half of them in one part, three
eighths in the next and the longest eighth in the last, and each part is cut to its longest text, rounded up to one of LENGTHS.  So one
long caption costs an eighth of a batch and not all of it, and the step is compiled for a few combinations of lengths.  The loss is the
same in any order of the pairs.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Int32
from ml_collections import ConfigDict

from clip_jax.distributed import largest_on_all
from clip_jax.models.architectures import TextConfig
from clip_jax.sharding import BATCH, in_turns_of_devices

LENGTHS = (16, 24, 32, 48)  # tokens, below the context length
SHARES = (1 / 2, 7 / 8, 1)  # where the parts end


@runtime_checkable
class Batches(Protocol):
    """What data.py makes."""

    def __next__(self) -> dict[str, Any]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


def rows_together(config: ConfigDict, mesh: Mesh) -> int:
    """How many rows of a batch a device embeds at once, and which may come in any order; 1 where texts are not to be cut."""
    if config.model.text.pooling != TextConfig.pooling:  # SigLIP's tokens see all others, padding too
        return 1
    return config.batch_size // (math.prod(mesh.shape[axis] for axis in BATCH) * config.microbatches)


def by_length(tokens: Int32[np.ndarray, "B T"], together: int) -> Int[np.ndarray, "B"]:
    """The order that sorts every `together` rows by the length of their texts."""
    lengths = tokens.argmax(axis=1).reshape(-1, together)  # EOT has the largest id
    order = np.argsort(lengths, axis=1, kind="stable") + np.arange(0, len(tokens), together)[:, None]
    return order.reshape(-1)


def parts_of(together: int) -> list[slice]:
    """The parts of `together` rows; fewer than three where they would be empty."""
    ends = sorted({0, *(int(together * share) for share in SHARES)})
    return [slice(first, end) for first, end in zip(ends, ends[1:])]


def needed(tokens: Int32[np.ndarray, "B T"], together: int) -> Int32[np.ndarray, "P"]:
    """The length of the longest text of each part, EOT included."""
    lengths = tokens.argmax(axis=1).reshape(-1, together) + 1
    return np.array([lengths[:, part].max() for part in parts_of(together)], np.int32)


def cut(tokens: Int32[np.ndarray, "B T"], together: int, lengths: Int32[np.ndarray, "P"]) -> tuple[Int32[np.ndarray, "_ _"], ...]:
    """The parts, of the rows of all devices, cut to these lengths rounded up; each splits over devices as a batch does."""
    context, rows = tokens.shape[1], tokens.reshape(-1, together, tokens.shape[1])
    rounded = [next((step for step in LENGTHS if length <= step < context), context) for length in lengths.tolist()]
    # Parts of the same length are one.
    spans = {length: [part for part, other in zip(parts_of(together), rounded, strict=True) if other == length] for length in rounded}
    return tuple(
        np.ascontiguousarray(rows[:, parts[0].start : parts[-1].stop, :length]).reshape(-1, length) for length, parts in spans.items()
    )


def put_together(parts: Sequence[Float[Array, "_ E"]], mesh: Mesh) -> Float[Array, "B E"]:
    """The features of a batch from those of its parts, with nothing sent: each device has its rows of every part."""
    return parts[0] if len(parts) == 1 else in_turns_of_devices(parts, mesh)


class TextsCut:
    """Batches in whose `tokens` texts are cut, alike on all processes."""

    def __init__(self, batches: Batches, together: int):
        """`batches` have every `together` rows in the order of their lengths."""
        self.batches, self.together = batches, together
        self.ahead, self.state = None, batches.get_state()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        batch, lengths = self.ahead or self._begin()
        self.state = self.batches.get_state()
        # Of several processes each has one batch more at hand, about whose lengths they agree while the step before it runs.
        self.ahead = self._begin() if jax.process_count() > 1 else None
        return batch | {"tokens": cut(batch["tokens"], self.together, lengths())} if self.together > 1 else batch

    def _begin(self) -> tuple[dict[str, Any], Any]:
        batch = next(self.batches)
        return batch, largest_on_all(needed(batch["tokens"], self.together))

    def get_state(self) -> dict[str, Any]:
        """That of the batches, after the last one that was taken here."""
        return self.state

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.batches.set_state(state)
        self.ahead, self.state = None, self.batches.get_state()

    def close(self) -> None:
        self.batches.close()
