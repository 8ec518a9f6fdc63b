"""Several processes as one: joining them, and what one of them does for all.

docs/clusters.md has the commands.  All processes run the same program; each reads its part of every batch, holds
its part of the arrays and writes its part of the checkpoints; the first one writes and prints what people read.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Int32

from clip_jax.errors import UserError

CHOICES = ("auto", "on", "off")
# For processes that no scheduler starts; JAX itself knows the first.
BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join(choice: str) -> None:
    """Joins the processes of a cluster, before any device is used.

    Args:
      choice: "auto", if the variables of Slurm, Open MPI or GKE say so, or BY_HAND; "on", wherever JAX finds a cluster, a
        TPU pod among them, or fail; "off".
    """
    if choice not in CHOICES:
        raise UserError(f"--distributed={choice}, expected one of {', '.join(CHOICES)}")
    given = [name for name in BY_HAND if os.environ.get(name)]
    if choice == "off" or (choice == "auto" and not given and not several_processes(os.environ)):
        return
    arguments = {}
    if given:
        if len(given) < len(BY_HAND):
            missing = [name for name in BY_HAND if name not in given]
            raise UserError(f"{', '.join(given)} set, expected {' and '.join(missing)} too; set them, or --distributed=off")
        address, count, process = (os.environ[name] for name in BY_HAND)
        if not (count.isdigit() and process.isdigit() and int(process) < int(count)):
            raise UserError(f"JAX_PROCESS_ID is {process} of JAX_NUM_PROCESSES {count}, expected numbers, the first from 0 and below the second")
        arguments = {"coordinator_address": address, "num_processes": int(count), "process_id": int(process)}
    try:
        jax.distributed.initialize(**arguments)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--distributed={choice}: the processes did not find each other ({reason}); set {', '.join(BY_HAND)}, "
            "or --distributed=off for one process; docs/clusters.md has the commands"
        ) from error


def several_processes(environment: Mapping[str, str]) -> bool:
    """Whether a scheduler started more than one process, by its variables."""
    counts = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    if any(environment.get(name, "").isdigit() and int(environment[name]) > 1 for name in counts):
        # Inside `salloc` alone, without `srun`, there is one process.
        return "OMPI_COMM_WORLD_SIZE" in environment or "SLURM_PROCID" in environment
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return len(hosts) > 1 or "MEGASCALE_COORDINATOR_ADDRESS" in environment


def is_first() -> bool:
    """Whether this process is the one that prints."""
    return jax.process_index() == 0


def on_every_host(tree: Any) -> Any:
    """Arrays that lie on the devices of several hosts, whole on the first device of each."""
    if jax.process_count() > 1:
        tree = multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_put(tree, jax.local_devices()[0])


def all_agree(yes: bool) -> bool:
    """Whether every process says yes; each has to ask."""
    return yes if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.bool_(yes)).all())


def first_says(yes: bool) -> bool:
    """What the first process says, on all of them; each has to ask."""
    return yes if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.bool_(yes)))


def largest_on_all(numbers: Int32[np.ndarray, "N"]) -> Callable[[], Int32[np.ndarray, "N"]]:
    """The largest of each over all processes; each has to ask.  Devices compare them when they come to it, and the result waits for that."""
    if jax.process_count() == 1:
        return lambda: numbers
    sharding, largest = _largest()
    rows = np.tile(numbers, (jax.local_device_count(), 1))
    found = largest(jax.make_array_from_process_local_data(sharding, rows))
    return lambda: np.asarray(found.addressable_data(0))


@functools.cache
def _largest() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    everyone = jax.make_mesh((len(jax.devices()),), ("device",), axis_types=(AxisType.Auto,))
    largest = jax.jit(lambda rows: rows.max(axis=0), out_shardings=NamedSharding(everyone, PartitionSpec()))
    return NamedSharding(everyone, PartitionSpec("device")), largest


@contextlib.contextmanager
def errors_on_all() -> Iterator[None]:
    """Inside, what is an error for people on one process becomes one on all, so that none waits for the others in vain."""
    error = None
    try:
        yield
    except UserError as caught:
        error = caught
    if not all_agree(error is None):
        raise error or UserError("another process found an error; its own output says which")


def check_same_data(samples: int, digest: str) -> None:
    """Refuses, on all processes, to train where one of them sees other data than the first."""
    if jax.process_count() == 1:
        return
    own = np.array([samples, int(digest[:15], 16)]).astype(np.int64).view(np.int32)  # JAX has 32 bits
    seen = multihost_utils.process_allgather(own).view(np.int64)
    other = next((i for i, found in enumerate(seen) if (found != seen[0]).any()), None)
    if other is not None:
        raise UserError(
            f"config.data.sets: process {other} sees {seen[other][0]:,} samples, and process 0 {seen[0][0]:,}, "
            "or others of that number; give all of them the same files under the same names"
        )


def wait_for_all(where: str) -> None:
    """Until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)
