"""CLIP: an image tower and a text tower with one space between them."""

import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from clip_jax.models.architectures import CLIPConfig, ResNetConfig, SmallResNetConfig, ViTConfig
from clip_jax.models.resnet import ModifiedResNet
from clip_jax.models.small_resnet import SmallResNet
from clip_jax.models.text import TextTransformer
from clip_jax.models.vit import ViT

INITIAL_TEMPERATURE = 0.07  # Radford et al. 2021, 2.5, who clip the learned scale at 100
MAX_LOGIT_SCALE = math.log(100)


class CLIP(nnx.Module):
    """Image and text encoders and the learned logit_scale, the logarithm of 1 / temperature."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype = jnp.dtype(config.dtype)
        transformer = (config.embedding, config.activation, config.layer_norm_eps, dtype)
        match config.vision:
            case ViTConfig():
                self.vision = ViT(config.vision, *transformer, rngs=rngs)
            case ResNetConfig():
                self.vision = ModifiedResNet(config.vision, config.embedding, dtype, rngs=rngs)
            case SmallResNetConfig():
                self.vision = SmallResNet(config.vision, config.embedding, dtype, rngs=rngs)
        self.text = TextTransformer(config.text, *transformer, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.float32(math.log(1 / INITIAL_TEMPERATURE)))

    def encode_image(self, images: Float[Array, "B H W 3"], normalize: bool = False) -> Float[Array, "B E"]:
        """Image features; with `normalize`, of length one."""
        features = self.vision(images)
        return l2_normalize(features) if normalize else features

    def encode_text(self, tokens: Int[Array, "B T"], normalize: bool = False) -> Float[Array, "B E"]:
        """Text features; with `normalize`, of length one."""
        features = self.text(tokens)
        return l2_normalize(features) if normalize else features

    def __call__(
        self, images: Float[Array, "B H W 3"], tokens: Int[Array, "C T"]
    ) -> tuple[Float[Array, "B C"], Float[Array, "C B"]]:
        """Scaled cosine similarities: (logits_per_image, logits_per_text)."""
        image_features = self.encode_image(images, normalize=True)
        text_features = self.encode_text(tokens, normalize=True)
        logits_per_image = jnp.exp(self.logit_scale[...]) * image_features @ text_features.T
        return logits_per_image, logits_per_image.T


def l2_normalize(x: Float[Array, "B E"]) -> Float[Array, "B E"]:
    """x divided by its length; a zero row stays zero, with gradient zero."""
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jnp.where(squares > 0, jnp.maximum(squares, 1e-24), 1.0) ** -0.5
