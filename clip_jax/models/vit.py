"""The image tower: a vision transformer (Dosovitskiy et al. 2021) as CLIP uses it.

patches -> (class token, patches) + positions -> ln_pre -> blocks -> ln_post of the class token -> projection
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from clip_jax.models.architectures import CLIPConfig
from clip_jax.models.transformer import LayerNorm, Linear, Transformer


class ViT(nnx.Module):
    """Images to features of the shared space."""

    def __init__(self, model: CLIPConfig, *, rngs: nnx.Rngs):
        config, dtype, eps = model.vision, jnp.dtype(model.dtype), model.layer_norm_eps
        width, scale = config.width, config.width**-0.5
        normal = lambda *shape: scale * jax.random.normal(rngs.params(), shape)
        self.patch_size = config.patch_size
        inputs = config.patch_size**2 * 3
        self.patch_embedding = Linear(
            inputs,
            width,
            use_bias=False,
            dtype=dtype,
            kernel_init=nnx.initializers.normal(inputs**-0.5),
            rngs=rngs,
        )
        self.class_embedding = nnx.Param(normal(width))
        self.position_embedding = nnx.Param(normal(config.grid**2 + 1, width))
        self.ln_pre = LayerNorm(width, eps, rngs=rngs)
        self.transformer = Transformer(config, model, causal=False, rngs=rngs)
        self.ln_post = LayerNorm(width, eps, rngs=rngs)
        self.projection = nnx.Param(normal(width, model.embedding))
        self.dtype = dtype

    def __call__(self, images: Float[Array, "B H W 3"], kept: Int[Array, "B K"] | None = None) -> Float[Array, "B E"]:
        """Features, not normalised, in float32.  `images` are normalised by the model's mean and std."""
        x = self.pooled(images, kept)
        return (x @ self.projection[...].astype(x.dtype)).astype(jnp.float32)

    def pooled(self, images: Float[Array, "B H W 3"], kept: Int[Array, "B K"] | None = None) -> Float[Array, "B D"]:
        """What is projected: the class token after ln_post."""
        x = self.embed(images, kept)
        return self.ln_post(self.transformer(x, jnp.zeros(len(x), jnp.int32)))

    def tokens(self, images: Float[Array, "B H W 3"], layer: int) -> Float[Array, "B N D"]:
        """Hidden states after `layer` blocks, before ln_post: the class token, then the patches in reading order."""
        return self.transformer.hidden_states(self.embed(images), layer).astype(jnp.float32)

    def embed(self, images: Float[Array, "B H W 3"], kept: Int[Array, "B K"] | None = None) -> Float[Array, "B N D"]:
        """What the first block sees: the class token, and all patches or those that are kept."""
        x = self.patch_embedding(patches(images.astype(self.dtype), self.patch_size))
        class_token = jnp.tile(self.class_embedding[...].astype(x.dtype), (len(x), 1, 1))
        x = jnp.concatenate([class_token, x], axis=1) + self.position_embedding[...][None].astype(x.dtype)
        if kept is not None:
            x = jnp.concatenate([x[:, :1], jnp.take_along_axis(x[:, 1:], kept[:, :, None], axis=1)], axis=1)
        return self.ln_pre(x)


def draw_patches(key: Key[Array, ""], examples: Int[Array, "B"], patches: int, rate: float) -> Int[Array, "B K"]:
    """Which patches of each example to keep, in reading order: patch dropout (Li et al. 2023, arXiv 2212.00794).

    Args:
      key: of the step.
      examples: the places in the batch.  Each example has draws of its own, whatever it is computed beside.
      patches: how many there are.
      rate: the share that is dropped.
    """
    scores = jax.vmap(lambda example: jax.random.uniform(jax.random.fold_in(key, example), (patches,)))(examples)
    kept = max(1, int(patches * (1 - rate)))
    return jnp.sort(jnp.argsort(scores, axis=1)[:, :kept], axis=1)


def patches(x: Float[Array, "B H W C"], size: int) -> Float[Array, "B N P"]:
    """Squares of `size` pixels a side, in reading order, each flattened as (row, column, channel).

    What is left of a side beyond its last whole square is dropped.
    """
    batch, height, width, channels = x.shape
    height, width = height // size * size, width // size * size
    x = x[:, :height, :width].reshape(batch, height // size, size, width // size, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, size * size * channels)
