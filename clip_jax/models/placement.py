"""What models say of where arrays lie, without knowing of devices; sharding.py gives it a meaning."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax

_PLACE: contextvars.ContextVar[Callable[[jax.Array, str], jax.Array] | None] = contextvars.ContextVar("place", default=None)


@contextlib.contextmanager
def placed_by(place: Callable[[jax.Array, str], jax.Array]) -> Iterator[None]:
    """Inside, `place(array, "batch" or "whole")` decides; outside, arrays stay where they are."""
    token = _PLACE.set(place)
    try:
        yield
    finally:
        _PLACE.reset(token)


def along_batch(x: jax.Array) -> jax.Array:
    """Says that the first axis is the batch: of what goes from block to block.

    Without it XLA may follow the parameters instead, and hold the activations of a whole group of devices.
    """
    place = _PLACE.get()
    return x if place is None else place(x, "batch")


def whole(x: jax.Array) -> jax.Array:
    """Says that every device is to hold all of a parameter while it uses it: of tables that are looked up.

    Their gradient adds rows, which XLA cannot split well.
    """
    place = _PLACE.get()
    return x if place is None else place(x, "whole")
