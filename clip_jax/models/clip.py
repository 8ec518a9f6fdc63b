"""CLIP: an image tower and a text tower with one space between them."""

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from clip_jax.errors import UserError
from clip_jax.models.architectures import (
    CLIPConfig,
    ResNetConfig,
    SigLIPTextConfig,
    SigLIPViTConfig,
    SmallResNetConfig,
    TextConfig,
    ViTConfig,
)
from clip_jax.models.resnet import ModifiedResNet
from clip_jax.models.siglip import SigLIPText, SigLIPViT
from clip_jax.models.small_resnet import SmallResNet
from clip_jax.models.text import TextTransformer
from clip_jax.models.vit import ViT

Images = Float[Array, "B H W 3"] | Float[np.ndarray, "B H W 3"]
Tokens = Int[Array, "B T"] | Int[np.ndarray, "B T"]

MAX_LOGIT_SCALE = math.log(100)  # Radford et al. 2021, 2.5


class CLIP(nnx.Module):
    """Image and text encoders, and the learned logit_scale, the logarithm of 1 / temperature.

    All methods work under `jax.jit`; `images` are [B, H, W, 3], normalised by the model's mean and std.
    """

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype = jnp.dtype(config.dtype)
        match config.vision:
            case SigLIPViTConfig():
                self.vision = SigLIPViT(config, rngs=rngs)
            case ViTConfig():
                self.vision = ViT(config, rngs=rngs)
            case ResNetConfig():
                self.vision = ModifiedResNet(config.vision, config.embedding, dtype, rngs=rngs)
            case SmallResNetConfig():
                self.vision = SmallResNet(config.vision, config.embedding, dtype, rngs=rngs)
        match config.text:
            case SigLIPTextConfig():
                self.text = SigLIPText(config, rngs=rngs)
            case TextConfig():
                self.text = TextTransformer(config, rngs=rngs)
        if config.vision:
            self.logit_scale = nnx.Param(jnp.float32(config.initial_logit_scale))
        if config.initial_logit_bias is not None:
            self.logit_bias = nnx.Param(jnp.float32(config.initial_logit_bias))

    def encode_image(
        self, images: Images, normalize: bool = False, kept_patches: Int[Array, "B K"] | None = None
    ) -> Float[Array, "B E"]:
        """Image features; with `normalize`, of length one; of a ViT, from some of the patches alone (`draw_patches`)."""
        tower, kept = self._image_tower(), {} if kept_patches is None else {"kept": kept_patches}
        features = tower(jnp.asarray(images), **kept)
        return l2_normalize(features) if normalize else features

    def pooled_image(self, images: Images) -> Float[Array, "B D"]:
        """What the image tower projects into the shared space, in float32: the features of the paper's linear probes."""
        return self._image_tower().pooled(jnp.asarray(images)).astype(jnp.float32)

    def encode_text(self, tokens: Tokens, normalize: bool = False) -> Float[Array, "B E"]:
        """Text features; with `normalize`, of length one."""
        if not self.config.embedding:
            raise UserError(f"{self.config.name}: its text encoder has no projection; take text_hidden_states")
        features = self.text(jnp.asarray(tokens))
        return l2_normalize(features) if normalize else features

    def __call__(
        self, images: Images, tokens: Int[Array, "C T"] | Int[np.ndarray, "C T"]
    ) -> tuple[Float[Array, "B C"], Float[Array, "C B"]]:
        """Cosine similarities, scaled, and shifted where there is a logit_bias: (logits_per_image, logits_per_text)."""
        image_features = self.encode_image(images, normalize=True)
        text_features = self.encode_text(tokens, normalize=True)
        logits_per_image = jnp.exp(self.logit_scale[...]) * image_features @ text_features.T
        if self.config.initial_logit_bias is not None:
            logits_per_image += self.logit_bias[...]
        return logits_per_image, logits_per_image.T

    def image_tokens(self, images: Images, layer: int = -1) -> Float[Array, "B N D"]:
        """Hidden states of a vision transformer after `layer` blocks (-1: the last, -2: the penultimate),
        before ln_post, the class token first where there is one; or the last feature map of a ResNet.  In float32.
        """
        tower = self._image_tower()
        if isinstance(self.config.vision, ViTConfig):
            return tower.tokens(jnp.asarray(images), layer)
        if layer != -1:
            raise UserError(f"layer {layer} of the image tower of {self.config.name}, expected -1: a ResNet gives its last map")
        x = tower.feature_map(jnp.asarray(images))
        return x.reshape(len(x), -1, x.shape[-1]).astype(jnp.float32)

    def text_hidden_states(
        self, tokens: Tokens, layer: int = -1, final_layer_norm: bool = True
    ) -> Float[Array, "B T D"]:
        """Hidden states of the text tower after `layer` blocks, in float32 (-1: the last, -2: the penultimate)."""
        return self.text.hidden_states(jnp.asarray(tokens), layer, final_layer_norm)

    def _image_tower(self) -> nnx.Module:
        if self.config.vision is None:
            raise UserError(f"{self.config.name}: a text encoder alone takes no images; load a whole CLIP")
        return self.vision


def l2_normalize(x: Float[Array, "B E"]) -> Float[Array, "B E"]:
    """x divided by its length; a zero row stays zero, with gradient zero."""
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jnp.where(squares > 0, jnp.maximum(squares, 1e-24), 1.0) ** -0.5
