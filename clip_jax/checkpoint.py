"""Checkpoints: state, data position, configuration, and what they say of themselves, written by Orbax meanwhile.

    WORKDIR/checkpoints/STEP/{state,data,config,about}, or below config.bucket, gs://NAME/PATH

`state` is the TrainState; a model that was converted has its parameters and statistics alone, at step 0.  A checkpoint
appears under its name only when it is whole, so a run that is killed while writing loses nothing older.  What happens
to it later is found when it is read, by the digests in `about`: then the newest whole one counts.
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers

from clip_jax.about import about_arrays, about_state, check_same_run, seal
from clip_jax.checkpoint_folders import half_written, location, step_folders, workdir_of
from clip_jax.digest import digests
from clip_jax.distributed import all_agree, first_says, is_first, wait_for_all
from clip_jax.errors import UserError, warn
from clip_jax.models import CLIP, CLIPConfig
from clip_jax.models.blocks import are_stacked, separate, stacked
from clip_jax.sharding import state_shardings
from clip_jax.snapshot import Snapshot
from clip_jax.state import TrainState
from clip_jax.step import abstract_model, split_model

ITEMS = ("state", "data", "config", "about")

Read = TypeVar("Read")


class NotWhole(Exception):
    """A checkpoint, or a part of it, is not what was written."""


class Checkpoints:
    """The checkpoints of a run: when they are due, which are kept, and the way back."""

    def __init__(self, workdir: str | pathlib.Path, config: ConfigDict):
        self.folder = location(config.bucket or workdir) / "checkpoints"
        self.config = config
        self.postponed = False
        self.begun = time.monotonic()  # of the time until the next
        if is_first():
            for half in half_written(self.folder):
                warn(f"checkpoint {half}: half-written, removed")
            self.folder.mkdir(parents=True, exist_ok=True)
        wait_for_all("the folder of checkpoints is there")
        keep: list[checkpoint_managers.PreservationPolicy] = [checkpoint_managers.LatestN(config.checkpoints_kept)]
        if config.milestone_every:
            keep.append(checkpoint_managers.EveryNSteps(config.milestone_every))
        if config.keep_best:
            self.losses = {int(step.name): _loss(step) for step in step_folders(self.folder)}
            keep.append(LowestLoss(self.losses))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
            create=False,
            cleanup_tmp_directories=True,
            lightweight_initialize=True,  # reads no file that may be broken
            enable_async_checkpointing=False,  # all of it is in the writer's thread
            multiprocessing_options=_writers(),
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options, item_names=ITEMS)
        self.writer = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self.written = concurrent.futures.Future()
        self.written.set_result(None)
        self.newest, self.is_finite = self.manager.latest_step(), True

    def any(self) -> bool:
        """Whether there is a checkpoint, whole or not; waits for one that is being written; alike on all processes."""
        with self.writing():
            self.written.result()
        return first_says(bool(step_folders(self.folder)))  # a shared file system may show others an older folder

    def due(self, step: int) -> bool:
        """Whether to save after this step, by its number, by the time, or since it was put off; alike on all processes."""
        with self.writing():
            if self.written.done():
                self.written.result()
        config, late = self.config, False
        # Clocks differ, so the first process decides; asking it takes all of them, so not at every step.
        if config.checkpoint_minutes and (jax.process_count() == 1 or step % config.log_every == 0):
            late = first_says(time.monotonic() - self.begun >= 60 * config.checkpoint_minutes)
        milestone = config.milestone_every and step % config.milestone_every == 0
        return self.postponed or late or milestone or step % config.checkpoint_every == 0

    def save(self, state: TrainState, data_position: dict, loss: float = math.inf, at_once: bool = False) -> None:
        """Starts to write the state after `state.step` steps; training goes on meanwhile, and may donate it.

        What takes time, the digests, the way to the hosts and to the disk, is begun here and waited for by a thread.
        A state that is not finite is not written, which `finite` tells.

        Args:
          state: a state, of which every number has to be finite.
          data_position: of the batches.
          loss: the mean since the last checkpoint.
          at_once: also amid skipped steps.  Else it is put off until one is finite: a run that diverged comes back from
            a checkpoint, which should be older than its troubles.
        """
        step = int(state.step)
        if step == self.newest:
            return
        self.postponed = int(state.mishaps.skipped_in_a_row) > 0 and not at_once
        if self.postponed:
            return
        with self.writing():
            self.written.result()
        self.newest, self.begun = step, time.monotonic()
        snapshot = Snapshot(state._asdict())
        self.is_finite, about, config = snapshot.finite, about_state(state, loss), self.config.to_dict()
        self.written = self.writer.submit(self._write, step, snapshot, about, config, data_position)

    def finite(self) -> bool:
        """Whether the state that was last given to `save` is finite, and is written; alike on all processes."""
        finite, self.is_finite = bool(self.is_finite), True
        if not finite:
            self.newest = None
        return finite

    def _write(self, step: int, snapshot: Snapshot, about: dict, config: dict, data_position: dict) -> None:
        """In the writer's thread, where processes wait for each other without their devices, which are at work."""
        if not snapshot.finite:
            return
        if self.config.keep_best:
            self.losses[step] = about["loss"]
        self.manager.save(step, args=_items(snapshot.arrays(), about | {"digests": snapshot.digests()}, config, data_position))

    def restore(self, abstract_state: TrainState, good: bool = False) -> tuple[TrainState, dict]:
        """The newest whole state, laid out as `abstract_state` says, and its data position.

        Newer checkpoints that are not whole are named in a warning, and renamed to STEP.corrupt.

        Args:
          abstract_state: shapes, types and shardings.
          good: pass over checkpoints that were saved amid skipped steps.
        """

        def read(checkpoint: epath.Path) -> tuple[TrainState, dict] | None:
            with _agreed():
                about, config, data_position = _read_records(checkpoint)
                check_same_run(checkpoint, config, about, self.config)
                if good and about["skipped_in_a_row"]:
                    return None
                there, to_ours = _as_written(abstract_state, about["digests"])
                state = _restore(checkpoint, state=ocp.args.StandardRestore(there._asdict())).state
            check_digests(state, about["digests"])
            return to_ours(TrainState(**state)), data_position

        found, broken = first_whole(step_folders(self.folder), read)
        if broken:
            if is_first():
                for checkpoint in broken:
                    aside = checkpoint.with_name(f"{checkpoint.name}.corrupt")
                    if aside.exists():
                        aside.rmtree()
                    checkpoint.rename(aside)
            wait_for_all("corrupt checkpoints are set aside")
            self.manager.reload()
            self.newest = self.manager.latest_step()  # the steps of those set aside will be saved again
        return found

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, what goes wrong is of the disk, and is told so."""
        try:
            yield
        except Exception as error:
            raise UserError(
                f"checkpoints in {self.folder}: writing one failed ({_reason(error)}), and those before it are whole; "
                "make room, or mend what is named, and the same command goes on after the newest"
            ) from error

    def close(self) -> None:
        """Waits until everything is written."""
        with self.writing():
            self.written.result()
            self.manager.close()
        self.writer.shutdown()


def _writers() -> ocp.options.MultiprocessingOptions:
    """All processes, named, so that Orbax waits for them by their coordinator: the devices would mix it up with the steps."""
    several = jax.process_count() > 1
    return ocp.options.MultiprocessingOptions(active_processes=set(range(jax.process_count())) if several else None)


def _as_written(abstract_state: TrainState, names: Iterable[str]) -> tuple[TrainState, Callable[[TrainState], TrainState]]:
    """The layout of a checkpoint with arrays of these names, its blocks stacked or not, and the way to that of `abstract_state`."""
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(abstract_state)]
    ours, theirs = are_stacked(paths), are_stacked(names)
    if ours == theirs:
        return abstract_state, lambda state: state
    shapes = jax.eval_shape(stacked if theirs else separate, abstract_state)
    shardings = state_shardings(shapes, abstract_state.step.sharding.mesh)
    there = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings)
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    return there, jax.jit(stacked if ours else separate, out_shardings=placed)


@dataclasses.dataclass
class LowestLoss(checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoint with the lowest loss, of these by step."""

    losses: dict[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        best = min((self.losses.get(checkpoint.step, math.inf) for checkpoint in checkpoints), default=math.inf)
        return [best < math.inf and self.losses.get(checkpoint.step) == best for checkpoint in checkpoints]


def first_whole(
    checkpoints: list[epath.Path], read: Callable[[epath.Path], Read | None]
) -> tuple[Read, list[epath.Path]]:
    """What `read` makes of the first whole checkpoint for which it is not None, and those before that are not whole."""
    broken = []
    for checkpoint in checkpoints:
        try:
            found = read(checkpoint)
        except (UserError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        # Orbax and TensorStore have no error of their own for a file that is cut short or changed.
        except Exception as error:
            if is_first():
                warn(f"checkpoint {checkpoint}: passed over, for it is not whole ({_reason(error)})")
            broken.append(checkpoint)
            continue
        if found is not None:
            return found, broken
    if not broken:
        raise UserError(
            f"checkpoint {checkpoints[0]}: it and all older ones were saved amid steps that were not finite"
        )
    raise UserError(
        f"checkpoint {broken[0]}: not whole, and no older one is; put a copy there, or take another --workdir to begin anew"
    )


def check_digests(tree: Any, expected: dict[str, int]) -> None:
    """Compares arrays with the digests with which they were saved."""
    found = digests(tree)
    changed = [name for name, value in found.items() if expected.get(name) != value]
    if changed:
        raise NotWhole(f"array {changed[0]} is not what was written, nor {len(changed) - 1} others")


@contextlib.contextmanager
def _agreed() -> Iterator[None]:
    """Makes an error on one process one on all, so that none waits for the others in vain."""
    error = None
    try:
        yield
    except UserError:  # the same one on all
        raise
    except Exception as caught:
        error = caught
    if not all_agree(error is None):
        raise error or NotWhole("another process could not read its part")


def _reason(error: Exception) -> str:
    """One line: the operating system's own words where TensorStore quotes their number, else the error's first line."""
    number = error.errno if isinstance(error, OSError) else re.search(r"os_error_code='(\d+)'", str(error))
    if number:
        return os.strerror(number if isinstance(number, int) else int(number[1]))
    # TensorStore's messages go on with pages of what was to be opened.
    said = re.split(r"\n| \[tensorstore_spec|\. See full TensorStore", str(error).strip())[0]
    return f"{type(error).__name__}: {said}"


def _loss(checkpoint: epath.Path) -> float:
    """The mean loss that a checkpoint was saved with, infinite if it cannot be read."""
    try:
        return _read_records(checkpoint)[0]["loss"]
    except Exception:  # of a broken checkpoint, which restoring will name
        return math.inf


def load_model(path: str | os.PathLike) -> tuple[CLIP, dict]:
    """The model of a run's newest whole checkpoint, or of one checkpoint, and the configuration of the run.

    Args:
      path: a workdir, its folder `checkpoints`, or the folder of one step.
    """
    return first_whole(_meant(path), _read_model)[0]


def load_config(path: str | os.PathLike) -> CLIPConfig:
    """The configuration of the model that `load_model` would read."""
    return CLIPConfig.from_dict(first_whole(_meant(path), _read_records)[0][1]["model"])


def _read_model(checkpoint: epath.Path) -> tuple[CLIP, dict]:
    about, config, _ = _read_records(checkpoint)
    graphdef, params, batch_stats = split_model(abstract_model(CLIPConfig.from_dict(config["model"])))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        {"params": params, "batch_stats": batch_stats},
    )
    # The optimizer's moments, two thirds of the bytes, stay on disk.
    if are_stacked(about["digests"]):
        abstract["params"] = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), jax.eval_shape(stacked, abstract["params"])
        )
    arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
    state = _restore(
        checkpoint, state=ocp.args.PyTreeRestore(item=abstract, restore_args=arguments, partial_restore=True)
    ).state
    check_digests(state, about["digests"])
    return nnx.merge(graphdef, separate(state["params"]), state["batch_stats"]), config


def _meant(path: str | os.PathLike) -> list[epath.Path]:
    """The folders of the checkpoints that are meant: this one, or all of the run, the newest first."""
    folder = location(path)
    checkpoints = workdir_of(folder) / "checkpoints"
    if not checkpoints.is_dir():
        found = "no folder checkpoints in it" if folder.is_dir() else "no such folder"
        raise UserError(f"--checkpoint={path}: expected the workdir of a run, or one of its checkpoints; found {found}")
    folders = step_folders(checkpoints)
    meant = [folder] if folder.parent == checkpoints else folders
    if not meant or meant[0] not in folders:
        steps = sorted(int(step.name) for step in folders)
        raise UserError(f"--checkpoint={path}: found no checkpoint there; the steps are {steps or 'none'}")
    return meant


def _items(state: dict, about: dict, config: dict, data_position: dict | None) -> ocp.args.Composite:
    """What a checkpoint is made of; a model without a run has no data position, which JSON calls null."""
    return ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        data=ocp.args.JsonSave(data_position),
        config=ocp.args.JsonSave(config),
        about=ocp.args.JsonSave(about | {"seal": seal(about, config, data_position)}),
    )


def _read_records(checkpoint: epath.Path) -> tuple[dict, dict, dict | None]:
    """What a checkpoint says of itself, the configuration, and the data position, if they are what was written."""
    names = ("about", "config", "data")
    items = _restore(checkpoint, **{name: ocp.args.JsonRestore() for name in names})
    about, config, data_position = (items[name] for name in names)
    if about.get("seal") != seal(about, config, data_position):
        raise NotWhole("its configuration, its data position or what it says of itself is not what was written")
    return about, config, data_position


def _restore(checkpoint: epath.Path, **items: ocp.args.CheckpointArgs) -> ocp.args.Composite:
    """Some of the items of a checkpoint, read without a manager, which would own the folder.

    Each process reads what its devices hold, without waiting for the others: one of them may find its part broken.
    """
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}, barrier_sync_key_prefix="reader"
    )
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone) as reader:
        return reader.restore(checkpoint, args=ocp.args.Composite(**items))


def save_model(folder: str | pathlib.Path, model: CLIP) -> None:
    """Writes a model without a run, as the checkpoint of step 0, for `load_model`."""
    _, params, batch_stats = split_model(model)
    with ocp.CheckpointManager(pathlib.Path(folder).resolve() / "checkpoints", item_names=ITEMS) as manager:
        state = {"params": params, "batch_stats": batch_stats}
        about, config = about_arrays() | {"digests": digests(state)}, {"model": model.config.to_dict()}
        manager.save(0, args=_items(state, about, config, None))
