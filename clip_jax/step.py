"""One training step: a pure function of a state and a batch.

It reads from here to `losses.py` and `models/clip.py`; nothing else happens in it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import ConfigDict

from clip_jax.config import model_config
from clip_jax.images import normalize
from clip_jax.losses import clip_loss
from clip_jax.models import CLIP, CLIPConfig
from clip_jax.models.clip import MAX_LOGIT_SCALE
from clip_jax.optimizer import make_optimizer, make_schedule
from clip_jax.sharding import batch_sharding, state_shardings

Batch = dict[str, UInt8[Array, "B H W 3"] | Int[Array, "B T"]]
Metrics = dict[str, Float[Array, ""]]
Params = dict[str, Any]  # arrays in nested dictionaries, by the names of modules


class TrainState(NamedTuple):
    """Everything that a step reads and writes, and a checkpoint keeps."""

    step: Int[Array, ""]  # steps taken
    params: Params  # float32
    batch_stats: Params  # running statistics of BatchNorm, empty without it
    optimizer: optax.OptState


def train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, Metrics]:
    """Forward, loss over the similarity matrix of all devices, backward, update, clamp."""

    def loss_fn(params: Params):
        model = nnx.merge(graphdef, params, state.batch_stats)
        model.train()
        images = normalize(batch["image"], model.config.image_mean, model.config.image_std)
        image_features = model.encode_image(images, normalize=True)
        text_features = model.encode_text(batch["tokens"], normalize=True)
        loss = clip_loss(image_features, text_features, jnp.exp(model.logit_scale[...]))
        return loss, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    (loss, batch_stats), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    # The paper's clip at 100 (section 2.5), after the update, so that it holds for whoever reads it.
    params["logit_scale"] = jnp.minimum(params["logit_scale"], MAX_LOGIT_SCALE)
    metrics = {
        "loss": loss,
        "lr": schedule(state.step),
        "gradient_norm": optax.tree.norm(gradients),
        "logit_scale": jnp.exp(params["logit_scale"]),
    }
    return TrainState(state.step + 1, params, batch_stats, optimizer_state), metrics


def split_model(model: CLIP) -> tuple[nnx.GraphDef, Params, Params]:
    """A model's structure, parameters and running statistics; `nnx.merge` is the inverse."""
    graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)


class _OneKey(nnx.Rngs):
    """Draws the same key again and again: enough for shapes.

    A true `nnx.Rngs` counts its draws in a variable, whose tracing takes time that grows with the
    square of the number of layers, and twenty seconds for the largest models.
    """

    def __init__(self):
        self.key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self.key


def abstract_model(config: CLIPConfig) -> CLIP:
    """A model of shapes without values."""
    return nnx.eval_shape(lambda: CLIP(config, rngs=_OneKey()))


def init_state(config: ConfigDict) -> TrainState:
    """The state before the first step, from `config.seed`."""
    _, params, batch_stats = split_model(CLIP(model_config(config), rngs=nnx.Rngs(config.seed)))
    return TrainState(jnp.int32(0), params, batch_stats, make_optimizer(config).init(params))


def make_train_step(config: ConfigDict, mesh: Mesh):
    """The step and the initialisation, compiled for a mesh.

    Returns:
      init: () -> TrainState, placed on the mesh.
      step: (TrainState, Batch) -> (TrainState, Metrics).  It donates the state it is given.
      abstract_state: the shapes, types and shardings of a state, for restoring into.
    """
    graphdef = nnx.graphdef(abstract_model(model_config(config)))
    shapes = jax.eval_shape(lambda: init_state(config))
    shardings = state_shardings(shapes, mesh)
    abstract_state = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), shapes, shardings
    )
    init = jax.jit(lambda: init_state(config), out_shardings=shardings)
    step = jax.jit(
        functools.partial(train_step, graphdef, make_optimizer(config), make_schedule(config)),
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )
    return init, step, abstract_state
