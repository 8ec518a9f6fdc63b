"""What a step reads and writes, and a checkpoint keeps."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

Params = dict[str, Any]  # arrays in nested dictionaries, by the names of modules


class Seen(NamedTuple):
    """Samples seen, `batches * batch_size + rest`: three numbers, for JAX's integers end at 2^31."""

    batches: Int[Array, ""]
    rest: Int[Array, ""]  # below batch_size
    batch_size: Int[Array, ""]  # with which the run began; a resumed run may have another


class Mishaps(NamedTuple):
    """What went wrong in the steps taken."""

    skipped: Int[Array, ""]  # steps that changed nothing, because their loss or gradient was not finite
    skipped_in_a_row: Int[Array, ""]  # of these, the last ones
    rollbacks: Int[Array, ""]  # times that the model and its optimizer came back from a checkpoint


class TrainState(NamedTuple):
    """The state between two steps."""

    step: Int[Array, ""]  # steps taken
    seen: Seen
    mishaps: Mishaps
    params: Params  # float32
    batch_stats: Params  # running statistics of BatchNorm, empty without it
    optimizer: optax.OptState


def first_state(params: Params, batch_stats: Params, optimizer: optax.OptState, batch_size: int) -> TrainState:
    """The state before the first step of a run that begins with this batch size."""
    zero = jnp.int32(0)
    seen, mishaps = Seen(zero, zero, jnp.int32(batch_size)), Mishaps(zero, zero, zero)
    return TrainState(zero, seen, mishaps, params, batch_stats, optimizer)


def after_batch(seen: Seen, batch_size: int) -> Seen:
    """What has been seen after one more batch, of any size."""
    rest = seen.rest + batch_size
    return Seen(seen.batches + rest // seen.batch_size, rest % seen.batch_size, seen.batch_size)


def schedule_position(seen: Seen) -> Float[Array, ""]:
    """Where the schedule is, in batches of the size with which the run began: a whole number as long as it keeps it."""
    return seen.batches + seen.rest / seen.batch_size


def samples_seen(seen: Seen) -> int:
    """The exact number, on the host."""
    batches, rest, batch_size = (int(np.asarray(number)) for number in seen)
    return batches * batch_size + rest


def steps_left(seen: Seen, config: ConfigDict) -> int:
    """Steps of `config.batch_size` until `config.total_steps` batches of the size with which the run began are seen."""
    left = config.total_steps * int(seen.batch_size) - samples_seen(seen)
    return max(0, math.ceil(left / config.batch_size))
