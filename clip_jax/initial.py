"""The state of a run that begins with a trained model, perhaps of another resolution, in place of random parameters."""

from typing import Any

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from clip_jax import pretrained
from clip_jax.config import model_config
from clip_jax.distributed import errors_on_all
from clip_jax.errors import UserError
from clip_jax.models import CLIPConfig
from clip_jax.models.architectures import EXECUTION
from clip_jax.models.blocks import are_stacked
from clip_jax.optimizer import make_optimizer
from clip_jax.pytorch.layouts import Weights
from clip_jax.state import Params, TrainState, first_state

RESIZED = ("vision.image_size", "text.context_length")  # that position embeddings are interpolated to


def trained_state(config: ConfigDict, abstract_state: TrainState) -> TrainState:
    """The state before the first step, with the parameters and running statistics of `config.initialize`.

    Each process reads the weights into its own memory, and each device takes its part of them from there.  The optimizer
    begins anew.

    Args:
      abstract_state: shapes, types and shardings.

    Raises:
      UserError: there are no such weights, or they are of another architecture.
    """
    with errors_on_all():
        weights = trained_weights(config.initialize, model_config(config))

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if are_stacked([name]):
            tower, end = name.split("blocks/")
            array = np.stack([weights[f"{tower}blocks/{i}/{end}"] for i in range(len(leaf))]).astype(leaf.dtype)
        else:
            array = weights[name].astype(leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda part: array[part])

    def rest(params: Params) -> TrainState:
        return first_state({}, {}, make_optimizer(config).init(params), config.batch_size)

    params, batch_stats = (jax.tree.map_with_path(place, tree) for tree in (abstract_state.params, abstract_state.batch_stats))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state._replace(params={}, batch_stats={}))
    return jax.jit(rest, out_shardings=shardings)(params)._replace(params=params, batch_stats=batch_stats)


def trained_weights(name: str, wanted: CLIPConfig) -> Weights:
    """The weights of a trained model, with the position embeddings of `wanted`.

    Args:
      name: as `clip_jax.load` takes it.
      wanted: the same architecture, but for RESIZED and how it is computed.
    """
    found, weights, _ = pretrained.read(pretrained.locate(name))
    check_same_architecture(name, found, wanted)
    return pretrained.resize(found, weights, wanted.vision.image_size, wanted.text.context_length)[1]


def check_same_architecture(name: str, found: CLIPConfig, wanted: CLIPConfig) -> None:
    """Refuses weights of another architecture than the one to be trained, by the fields that differ."""
    flat = lambda values: traverse_util.flatten_dict(values, sep=".")
    there, here = flat(found.identity()), flat(wanted.identity())
    different = [field for field in here if field not in RESIZED and there.get(field) != here[field]]
    if different:
        there, here = flat(found.to_dict()), flat(wanted.to_dict())  # as they are written
        first = different[:3]
        fields = ", ".join(f"model.{field} is {there.get(field)!r} there and {here[field]!r} in the configuration" for field in first)
        more = f" and {len(different) - 3} more differ" if len(different) > 3 else ""
        raise UserError(
            f"config.initialize={name}: it holds another architecture, {fields}{more}; set "
            f"{', '.join(f'config.model.{field}' for field in first)} as there, or begin with other weights; "
            f"only {', '.join(f'model.{field}' for field in (*RESIZED, *EXECUTION))} may differ"
        )
