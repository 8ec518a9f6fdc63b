"""The towers of SigLIP (Zhai et al. 2023) and SigLIP 2 (Tschannen et al. 2025) of fixed resolution.

image: patches + positions -> blocks -> ln_post -> attention pool, whose width is the shared space's
text: tokens + positions -> blocks without causal mask -> ln_final of the last token -> projection with bias
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from clip_jax.models.architectures import CLIPConfig
from clip_jax.models.text import TextTower
from clip_jax.models.transformer import MLP, LayerNorm, Linear, Transformer
from clip_jax.models.vit import patches


class SigLIPViT(nnx.Module):
    """Images to features of the shared space."""

    def __init__(self, model: CLIPConfig, *, rngs: nnx.Rngs):
        config, dtype, eps = model.vision, jnp.dtype(model.dtype), model.layer_norm_eps
        width = config.width
        self.patch_size = config.patch_size
        inputs = config.patch_size**2 * 3
        init = nnx.initializers.normal(inputs**-0.5)
        self.patch_embedding = Linear(inputs, width, dtype=dtype, kernel_init=init, rngs=rngs)
        positions = width**-0.5 * jax.random.normal(rngs.params(), (config.grid**2, width))
        self.position_embedding = nnx.Param(positions)
        self.transformer = Transformer(config, model, causal=False, rngs=rngs)
        self.ln_post = LayerNorm(width, eps, rngs=rngs)
        self.pool = AttentionPool(width, config.heads, config.mlp_ratio, model.activation, eps, dtype, rngs=rngs)
        self.dtype = dtype

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B E"]:
        """Features, not normalised, in float32.  `images` are normalised by the model's mean and std."""
        return self.pooled(images).astype(jnp.float32)

    def pooled(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B E"]:
        """What is projected: here nothing is."""
        return self.pool(self.ln_post(self.transformer.hidden_states(self.embed(images), -1)))

    def tokens(self, images: Float[Array, "B H W 3"], layer: int) -> Float[Array, "B N D"]:
        """Hidden states of the patches after `layer` blocks, before ln_post, in reading order."""
        return self.transformer.hidden_states(self.embed(images), layer).astype(jnp.float32)

    def embed(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B N D"]:
        """What the first block sees."""
        x = self.patch_embedding(patches(images.astype(self.dtype), self.patch_size))
        return x + self.position_embedding[...][None].astype(x.dtype)


class AttentionPool(nnx.Module):
    """Multi-head attention from one learned probe, then a residual MLP (MAP: Lee et al. 2019, arXiv 1810.00825)."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        activation: str,
        eps: float,
        dtype: jnp.dtype,
        *,
        rngs: nnx.Rngs,
    ):
        self.heads = heads
        init = nnx.initializers.normal(width**-0.5)
        self.probe = nnx.Param(init(rngs.params(), (width,)))
        self.qkv = Linear(width, 3 * width, dtype=dtype, kernel_init=init, rngs=rngs)
        self.out = Linear(width, width, dtype=dtype, kernel_init=init, rngs=rngs)
        self.ln = LayerNorm(width, eps, rngs=rngs)
        self.mlp = MLP(width, mlp_ratio, activation, 1, dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B D"]:
        batch, tokens, width = x.shape
        kernel, bias = self.qkv.kernel[...].astype(x.dtype), self.qkv.bias[...].astype(x.dtype)
        q = self.probe[...].astype(x.dtype)[None] @ kernel[:, :width] + bias[None, :width]
        kv = x.reshape(-1, width) @ kernel[:, width:] + bias[None, width:]
        k, v = (part.reshape(batch, tokens, self.heads, -1) for part in jnp.split(kv, 2, axis=-1))
        q = jnp.tile(q.reshape(1, 1, self.heads, -1), (batch, 1, 1, 1))
        y = self.out(jax.nn.dot_product_attention(q, k, v).reshape(batch, width))
        return y + self.mlp(self.ln(y))


class SigLIPText(TextTower):
    """Token ids to features of the shared space."""

    def __init__(self, model: CLIPConfig, *, rngs: nnx.Rngs):
        super().__init__(model, causal=False, rngs=rngs)
        width, init = model.text.width, nnx.initializers.normal(model.text.width**-0.5)
        self.projection = Linear(width, model.embedding, dtype=self.dtype, kernel_init=init, rngs=rngs)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B E"]:
        """Features, not normalised, in float32.  T is the context length: the last token is read, padding or not."""
        last = jnp.full(len(tokens), tokens.shape[1] - 1, jnp.int32)
        return self.projection(self.ln_final(self.transformer(self.embed(tokens), last))).astype(jnp.float32)
