"""What a checkpoint says of itself, and what of it a run that goes on may not contradict."""

import hashlib
import json
import pathlib
from typing import Any

import jax
import orbax.checkpoint
from etils import epath
from ml_collections import ConfigDict

import clip_jax
from clip_jax.errors import UserError
from clip_jax.models import CLIPConfig
from clip_jax.models.architectures import EXECUTION
from clip_jax.state import TrainState, samples_seen
from clip_jax.tokenizer import vocabulary_sha256

# How batches are made, and not what is in them.
DATA_EXECUTION = ("threads", "workers", "prefetch", "max_bad", "stall_seconds")

# What the optimizer keeps is of this kind; in checkpoints from before there was a choice, of this one.
MOMENTS = {"name": "adamw", "mu_dtype": "float32"}


def about_state(state: TrainState, loss: float) -> dict[str, Any]:
    """The record of a run's checkpoint, but for its digests: `loss` is the mean since the checkpoint before."""
    return about_arrays() | {
        "tokenizer_sha256": vocabulary_sha256(),
        "step": int(state.step),
        "samples_seen": samples_seen(state.seen),
        "skipped_in_a_row": int(state.mishaps.skipped_in_a_row),
        "loss": loss,
    }


def about_arrays() -> dict[str, Any]:
    """What every checkpoint says besides its digests, also that of a model without a run."""
    return {"versions": {"clip_jax": clip_jax.__version__, "jax": jax.__version__, "orbax": orbax.checkpoint.__version__}}


def seal(about: dict[str, Any], config: dict[str, Any], data_position: dict | None) -> str:
    """A SHA-256 of what a checkpoint holds besides arrays, as it is before and after JSON."""
    about = {name: value for name, value in about.items() if name != "seal"}
    return hashlib.sha256(json.dumps([about, config, data_position], sort_keys=True).encode()).hexdigest()


def check_same_run(where: epath.Path, saved: dict[str, Any], about: dict[str, Any], config: ConfigDict) -> None:
    """Refuses to go on with another model, on other data, or for another aim than the run did, naming the field.

    Free are the batch size, the length of the run, the optimizer's numbers, patch dropout, the mesh, and how it is
    computed, logged and saved.
    """
    if "data" not in saved:
        raise UserError(
            f"checkpoint {where}: it holds a model without a run, expected one of train.py; take another --workdir"
        )
    # An architecture that was saved before a field existed has its default.
    saved = saved | {"model": CLIPConfig.from_dict(saved["model"]).to_dict()}
    there, here = _identity(saved), _identity(config.to_dict())
    for field, value in here.items():
        # A field of the data that is younger than the checkpoint had no say in it.
        if field.startswith("data.") and field not in there:
            continue
        if there.get(field) != value:
            what = "holds another architecture" if field.startswith("model.") else "is of another run"
            raise UserError(
                f"checkpoint {where}: it {what}, {field} is {there.get(field)!r} there and {value!r} in the "
                f"configuration; take another --workdir, or set config.{field} as it was"
            )
    if about["tokenizer_sha256"] != vocabulary_sha256():
        raise UserError(
            f"checkpoint {where}: its tokenizer's vocabulary has the SHA-256 {about['tokenizer_sha256']}, and this "
            f"program's {vocabulary_sha256()}; go on with clip_jax {about['versions']['clip_jax']}, or take another --workdir"
        )


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that make a run what it is, by their dotted names, as JSON gives them back."""
    data = {name: value for name, value in config["data"].items() if name not in DATA_EXECUTION}
    # A set keeps its name and version; where it is mounted may change.
    data["sets"] = ["/".join(pathlib.PurePath(folder).parts[-2:]) for folder in data["sets"]]
    model = {name: value for name, value in config["model"].items() if name not in EXECUTION}
    optimizer = {name: config["optimizer"].get(name, default) for name, default in MOMENTS.items()}
    parts = {"model": model, "seed": config["seed"], "loss": {"kind": config["loss"]["kind"]}, "optimizer": optimizer, "data": data}
    return _flatten(json.loads(json.dumps(parts)))


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
