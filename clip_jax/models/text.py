"""The text tower: a causal transformer, read at the end-of-text token (Radford et al. 2021, 2.4)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from clip_jax.models.architectures import TextConfig
from clip_jax.models.transformer import LayerNorm, Transformer


class TextTransformer(nnx.Module):
    """Token ids to features of the shared space."""

    def __init__(
        self, config: TextConfig, embedding: int, activation: str, eps: float, dtype: jnp.dtype, *, rngs: nnx.Rngs
    ):
        width = config.width
        normal = nnx.initializers.normal
        self.token_embedding = nnx.Param(
            normal(config.token_embedding_std)(rngs.params(), (config.vocabulary_size, width))
        )
        self.position_embedding = nnx.Param(normal(0.01)(rngs.params(), (config.context_length, width)))
        self.transformer = Transformer(
            width,
            config.layers,
            config.heads,
            config.mlp_ratio,
            activation,
            eps,
            causal=True,
            dtype=dtype,
            rngs=rngs,
        )
        self.ln_final = LayerNorm(width, eps, rngs=rngs)
        self.projection = nnx.Param(normal(width**-0.5)(rngs.params(), (width, embedding)))
        self.dtype = dtype

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B E"]:
        """Features, not normalised, in float32.  T is at most the context length."""
        # EOT has the largest id, and argmax finds the first: right for any padding below it.
        x = self.transformer(self.embed(tokens), jnp.argmax(tokens, axis=1))
        x = self.ln_final(x) @ self.projection[...].astype(x.dtype)
        return x.astype(jnp.float32)

    def hidden_states(self, tokens: Int[Array, "B T"], layer: int, final_layer_norm: bool) -> Float[Array, "B T D"]:
        """After `layer` blocks, in float32."""
        x = self.transformer.hidden_states(self.embed(tokens), layer)
        return (self.ln_final(x) if final_layer_norm else x).astype(jnp.float32)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What the first block sees."""
        x = self.token_embedding[tokens] + self.position_embedding[None, : tokens.shape[1]]
        return x.astype(self.dtype)
