"""The text tower: a causal transformer, read at the end-of-text token (Radford et al. 2021, 2.4)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from clip_jax.models.architectures import TextConfig
from clip_jax.models.transformer import LayerNorm, Transformer
from clip_jax.sharding import whole


class TextTower(nnx.Module):
    """Tokens + positions -> blocks -> ln_final: what CLIP's text tower and SigLIP's have in common."""

    def __init__(
        self, config: TextConfig, activation: str, eps: float, causal: bool, dtype: jnp.dtype, *, rngs: nnx.Rngs
    ):
        width, normal = config.width, nnx.initializers.normal
        tokens = normal(config.token_embedding_std)(rngs.params(), (config.vocabulary_size, width))
        self.token_embedding = nnx.Param(tokens)
        self.position_embedding = nnx.Param(normal(0.01)(rngs.params(), (config.context_length, width)))
        self.transformer = Transformer(
            width, config.layers, config.heads, config.mlp_ratio, activation, eps, causal, dtype, rngs=rngs
        )
        self.ln_final = LayerNorm(width, eps, rngs=rngs)
        self.dtype = dtype

    def hidden_states(self, tokens: Int[Array, "B T"], layer: int, final_layer_norm: bool) -> Float[Array, "B T D"]:
        """After `layer` blocks, in float32."""
        x = self.transformer.hidden_states(self.embed(tokens), layer)
        return (self.ln_final(x) if final_layer_norm else x).astype(jnp.float32)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What the first block sees."""
        x = whole(self.token_embedding[...])[tokens] + self.position_embedding[None, : tokens.shape[1]]
        return x.astype(self.dtype)


class TextTransformer(TextTower):
    """Token ids to features of the shared space."""

    def __init__(
        self, config: TextConfig, embedding: int, activation: str, eps: float, dtype: jnp.dtype, *, rngs: nnx.Rngs
    ):
        super().__init__(config, activation, eps, True, dtype, rngs=rngs)
        if embedding:
            init = nnx.initializers.normal(config.width**-0.5)
            self.projection = nnx.Param(init(rngs.params(), (config.width, embedding)))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B E"]:
        """Features, not normalised, in float32.  T is at most the context length."""
        # EOT has the largest id, and argmax finds the first: right for any padding below it.
        x = self.transformer(self.embed(tokens), jnp.argmax(tokens, axis=1))
        x = self.ln_final(x) @ self.projection[...].astype(x.dtype)
        return x.astype(jnp.float32)
