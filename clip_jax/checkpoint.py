"""Checkpoints: state, data position and configuration, written by Orbax, in the background.

    WORKDIR/checkpoints/STEP/{state,data,config}

`state` is the TrainState; a model that was converted has its parameters and statistics alone, at step 0.  A checkpoint
appears under its name only when it is whole, so a run that is killed while writing loses nothing older.
"""

import pathlib

import jax
import orbax.checkpoint as ocp
from flax import nnx
from ml_collections import ConfigDict

from clip_jax.config import model_config
from clip_jax.errors import UserError
from clip_jax.models import CLIP, CLIPConfig
from clip_jax.models.architectures import EXECUTION
from clip_jax.step import TrainState, abstract_model, split_model

ITEMS = ("state", "data", "config")


class Checkpoints:
    """The checkpoints of a run."""

    def __init__(self, workdir: str | pathlib.Path, kept: int = 1):
        self.folder = pathlib.Path(workdir).expanduser().resolve() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=kept, create=True)
        self.manager = ocp.CheckpointManager(self.folder, options=options, item_names=ITEMS)

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self.manager.latest_step()

    def save(self, state: TrainState, data_position: dict, config: ConfigDict) -> None:
        """Starts to write the state after `state.step` steps; training may go on meanwhile."""
        step = int(state.step)
        if step != self.latest_step():
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(state._asdict()),
                data=ocp.args.JsonSave(data_position),
                config=ocp.args.JsonSave(config.to_dict()),
            )
            self.manager.save(step, args=items)

    def restore(self, abstract_state: TrainState, config: ConfigDict) -> tuple[TrainState, dict]:
        """The newest state, laid out as `abstract_state` says, and its data position."""
        step = self.latest_step()
        saved = self.manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
        check_architecture(self.folder / str(step), saved.config, model_config(config))
        items = self.manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract_state._asdict()), data=ocp.args.JsonRestore()
            ),
        )
        return TrainState(**items.state), items.data

    def close(self) -> None:
        """Waits until everything is written."""
        self.manager.close()


def check_architecture(where: pathlib.Path, saved: dict, expected: CLIPConfig) -> None:
    """Refuses a checkpoint whose model is not the configured one, naming the first field that differs."""
    saved_fields = _flatten(CLIPConfig.from_dict(saved["model"]).to_dict())
    for field, value in _flatten(expected.to_dict()).items():
        if field.removeprefix("model.") not in EXECUTION and saved_fields.get(field) != value:
            raise UserError(
                f"checkpoint {where}: it holds another architecture, {field} is {saved_fields.get(field)!r} there "
                f"and {value!r} in the configuration; take another --workdir, or set config.{field} as it was"
            )


def load_model(path: str | pathlib.Path) -> tuple[CLIP, dict]:
    """The model of a run's newest checkpoint, or of one checkpoint, and the configuration of the run.

    Args:
      path: a workdir, its folder `checkpoints`, or the folder of one step.
    """
    checkpoint = _checkpoint(path)
    config = _restore(checkpoint, config=ocp.args.JsonRestore()).config
    graphdef, params, batch_stats = split_model(abstract_model(CLIPConfig.from_dict(config["model"])))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        {"params": params, "batch_stats": batch_stats},
    )
    # The optimizer's moments, two thirds of the bytes, stay on disk.
    arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
    state = _restore(
        checkpoint, state=ocp.args.PyTreeRestore(item=abstract, restore_args=arguments, partial_restore=True)
    ).state
    return nnx.merge(graphdef, state["params"], state["batch_stats"]), config


def load_config(path: str | pathlib.Path) -> CLIPConfig:
    """The configuration of the model that `load_model` would read."""
    return CLIPConfig.from_dict(_restore(_checkpoint(path), config=ocp.args.JsonRestore()).config["model"])


def _checkpoint(path: str | pathlib.Path) -> pathlib.Path:
    """The folder of the checkpoint that is meant: this one, or the newest."""
    folder = pathlib.Path(path).expanduser().resolve()
    checkpoints = workdir_of(folder) / "checkpoints"
    if not checkpoints.is_dir():
        found = "no folder checkpoints in it" if folder.is_dir() else "no such folder"
        raise UserError(f"--checkpoint={path}: expected the workdir of a run, or one of its checkpoints; found {found}")
    steps = sorted(ocp.utils.checkpoint_steps(checkpoints))
    step = int(folder.name) if folder.parent == checkpoints else max(steps, default=None)
    if step not in steps:
        raise UserError(f"--checkpoint={path}: found no whole checkpoint there; the steps are {steps or 'none'}")
    return checkpoints / str(step)


def _restore(checkpoint: pathlib.Path, **items: ocp.args.CheckpointArgs) -> ocp.args.Composite:
    """Some of the items of a checkpoint, read without a manager, which would own the folder."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        return reader.restore(checkpoint, args=ocp.args.Composite(**items))


def workdir_of(folder: pathlib.Path) -> pathlib.Path:
    """The workdir of a path that is one, or its folder `checkpoints`, or a step in there."""
    checkpoints = folder.parent if folder.name.isdigit() else folder
    return checkpoints.parent if checkpoints.name == "checkpoints" else folder


def save_model(folder: str | pathlib.Path, model: CLIP) -> None:
    """Writes a model without a run, as the checkpoint of step 0, for `load_model`."""
    _, params, batch_stats = split_model(model)
    with ocp.CheckpointManager(pathlib.Path(folder).resolve() / "checkpoints", item_names=ITEMS) as manager:
        items = ocp.args.Composite(
            state=ocp.args.StandardSave({"params": params, "batch_stats": batch_stats}),
            config=ocp.args.JsonSave({"model": model.config.to_dict()}),
        )
        manager.save(0, args=items)


def _flatten(values: dict, prefix: str = "model.") -> dict:
    flat = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
