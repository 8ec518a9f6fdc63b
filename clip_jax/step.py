"""One training step: a pure function of a state and a batch.

It reads from here to `losses.py` and `models/clip.py`; nothing else happens in it.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key, UInt8
from ml_collections import ConfigDict

from clip_jax.config import model_config
from clip_jax.images import normalize
from clip_jax.lengths import put_together
from clip_jax.losses import PLAIN_BYTES, clip_loss, predicted_bytes, ring_clip_loss, ring_siglip_loss, siglip_loss
from clip_jax.models import CLIP, CLIPConfig
from clip_jax.models.blocks import separate, stacked
from clip_jax.models.clip import MAX_LOGIT_SCALE
from clip_jax.models.vit import draw_patches
from clip_jax.optimizer import make_optimizer, make_schedule
from clip_jax.sharding import BATCH, activations_on, batch_sharding, from_microbatches, in_microbatches, state_shardings
from clip_jax.state import Mishaps, Params, TrainState, after_batch, first_state, schedule_position

# `image`; `tokens`, whole or in parts (lengths.py); and with patch dropout `place`, the row in the order of the data.
Batch = dict[str, UInt8[Array, "B H W 3"] | Int[Array, "B T"] | tuple[Int[Array, "_ _"], ...] | Int[Array, "B"]]
Metrics = dict[str, Float[Array, ""] | Int[Array, ""]]
Features = tuple[Float[Array, "B E"], Float[Array, "B E"]]  # of images and texts, of length one
Loss = Callable[[Features, Params], Float[Array, ""]]


def train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    gradients_of: Callable[[Callable, Params, Batch], tuple[Float[Array, ""], Params, Params]],
    draw: Callable[[Int[Array, ""], Batch], Batch],
    mesh: Mesh,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, Metrics]:
    """Forward, loss over the similarity matrix of all devices, backward, update, clamp.

    Where the loss or the gradient is not finite the batch counts as seen, and nothing else changes.
    """

    def encode(params: Params, batch: Batch) -> tuple[Features, Params]:
        """Features of images and texts, and BatchNorm's new statistics."""
        model = nnx.merge(graphdef, separate(params), state.batch_stats)
        model.train()
        images = normalize(batch["image"], model.config.image_mean, model.config.image_std)
        image_features = model.encode_image(images, normalize=True, kept_patches=batch.get("patches"))
        parts = [model.encode_text(tokens, normalize=True) for tokens in jax.tree.leaves(batch["tokens"])]
        text_features = put_together(parts, mesh)
        return (image_features, text_features), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    loss, gradients, batch_stats = gradients_of(encode, state.params, draw(state.step, batch))
    rate, norm = schedule(schedule_position(state.seen)), optax.tree.norm(gradients)
    # By the gradient's norm alone.  A loss that is not finite has a gradient that is not, and on a CPU one more use of
    # the loss rounded it otherwise.  If the new parameters were asked, a second copy of them would have to be held.
    finite = jnp.isfinite(norm)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params, finite=finite)
    params = optax.apply_updates(state.params, jax.tree.map(lambda update: -rate * update, updates))
    # The paper's clip at 100 (section 2.5), after the update, so that it holds for whoever reads it.
    params["logit_scale"] = jnp.minimum(params["logit_scale"], MAX_LOGIT_SCALE)
    params, batch_stats = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (params, batch_stats), (state.params, state.batch_stats)
    )
    before = state.mishaps
    mishaps = Mishaps(before.skipped + ~finite, jnp.where(finite, 0, before.skipped_in_a_row + 1), before.rollbacks)
    metrics = {
        "loss": loss,
        "lr": rate,
        "gradient_norm": norm,
        "logit_scale": jnp.exp(params["logit_scale"]),
        "skipped_steps": mishaps.skipped,
        "skipped_in_a_row": mishaps.skipped_in_a_row,
    }
    if "logit_bias" in params:
        metrics["logit_bias"] = params["logit_bias"]
    seen = after_batch(state.seen, len(batch["image"]))
    return TrainState(state.step + 1, seen, mishaps, params, batch_stats, optimizer_state), metrics


def whole_batch(loss: Loss, encode: Callable, params: Params, batch: Batch) -> tuple[Float[Array, ""], Params, Params]:
    """The loss, its gradients and new statistics, from the batch at once."""

    def loss_fn(params: Params):
        features, batch_stats = encode(params, batch)
        return loss(features, params), batch_stats

    (value, batch_stats), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return value, gradients, batch_stats


def in_turn(
    loss: Loss, count: int, mesh: Mesh, encode: Callable, params: Params, batch: Batch
) -> tuple[Float[Array, ""], Params, Params]:
    """What `whole_batch` gives, from `count` microbatches one after the other (Gao et al. 2021, arXiv 2101.06983).

    All are embedded; the loss over all features gives their gradients; then each is embedded again, and
    its own gradient goes on to the parameters.
    """
    parts = jax.tree.map(lambda x: in_microbatches(x, count, mesh), batch)
    features = jax.lax.map(lambda part: encode(params, part)[0], parts)
    features = jax.tree.map(lambda x: from_microbatches(x, mesh), features)
    value, (of_features, gradients) = jax.value_and_grad(loss, argnums=(0, 1))(features, params)
    of_features = jax.tree.map(lambda x: in_microbatches(x, count, mesh), of_features)

    def replay(gradients: Params, part: tuple[Batch, Features]) -> tuple[Params, None]:
        _, pull_back = jax.vjp(lambda params: encode(params, part[0])[0], params)
        return jax.tree.map(jnp.add, gradients, pull_back(part[1])[0]), None

    return value, jax.lax.scan(replay, gradients, (parts, of_features))[0], {}


def loss_form(config: ConfigDict, mesh: Mesh) -> tuple[str, str]:
    """The form of the loss that is taken, plain or ring, and a line that says why."""
    devices, platform = math.prod(mesh.shape[axis] for axis in BATCH), mesh.devices.flat[0].platform
    predicted = predicted_bytes(config.batch_size, config.model.embedding, devices, platform)
    form = config.loss.form
    if form == "auto":
        form = "plain" if predicted["plain"] <= PLAIN_BYTES else "ring"
    sizes = ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in predicted.items())
    return form, f"{config.loss.kind} loss in its {form} form; predicted a device: {sizes}"


def make_loss(config: ConfigDict, mesh: Mesh) -> Loss:
    """The loss of features, with the scale and bias that are among the parameters."""
    kinds = {"softmax": (clip_loss, ring_clip_loss), "sigmoid": (siglip_loss, ring_siglip_loss)}
    plain, ring = kinds[config.loss.kind]
    form, _ = loss_form(config, mesh)
    loss = plain if form == "plain" else functools.partial(ring, mesh=mesh, axis=BATCH)

    def of(features: Features, params: Params) -> Float[Array, ""]:
        bias = (params["logit_bias"],) if "logit_bias" in params else ()
        return loss(*features, jnp.exp(params["logit_scale"]), *bias)

    return of


def drawn_patches(config: ConfigDict, step: Int[Array, ""], batch: Batch) -> Batch:
    """The batch, with the patches of each image that the step sees."""
    if not config.patch_dropout:
        return batch
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    patches = config.model.vision.image_size // config.model.vision.patch_size
    return batch | {"patches": draw_patches(key, batch["place"], patches**2, config.patch_dropout)}


def split_model(model: CLIP) -> tuple[nnx.GraphDef, Params, Params]:
    """A model's structure, parameters and running statistics; `nnx.merge` is the inverse."""
    graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)


class Draws(nnx.Rngs):
    """The keys of `nnx.Rngs(seed)`, counted in Python.

    Flax counts in a variable, whose tracing takes time that grows with the square of the number of
    layers, and minutes for the largest models.
    """

    def __init__(self, seed: int):
        self.key, self.drawn = jax.random.key(seed), 0

    def params(self) -> Key[Array, ""]:
        self.drawn += 1
        return jax.random.fold_in(self.key, self.drawn - 1)


def abstract_model(config: CLIPConfig) -> CLIP:
    """A model of shapes without values."""
    return nnx.eval_shape(lambda: CLIP(config, rngs=Draws(0)))


def init_state(config: ConfigDict) -> TrainState:
    """The state before the first step, from `config.seed`."""
    _, params, batch_stats = split_model(CLIP(model_config(config), rngs=Draws(config.seed)))
    params = stacked(params) if config.model.scan_layers else params
    return first_state(params, batch_stats, make_optimizer(config).init(params), config.batch_size)


def model_of(arrays: tuple[Params, Params], config: ConfigDict) -> CLIP:
    """The model with these parameters and running statistics of a state."""
    params, batch_stats = arrays
    return nnx.merge(nnx.graphdef(abstract_model(model_config(config))), separate(params), batch_stats)


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
    loss, count = make_loss(config, mesh), config.microbatches
    gradients_of = functools.partial(whole_batch, loss) if count == 1 else functools.partial(in_turn, loss, count, mesh)
    draw = functools.partial(drawn_patches, config)

    def on_mesh(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with activations_on(mesh):
            return train_step(graphdef, make_optimizer(config), make_schedule(config), gradients_of, draw, mesh, state, batch)

    on_mesh.__name__ = "train_step"  # as it is called in logs and profiles
    step = jax.jit(
        on_mesh,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )
    return init, step, abstract_state
