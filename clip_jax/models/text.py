"""The text tower: a causal transformer, read at the end-of-text token (Radford et al. 2021, 2.4)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from clip_jax.models.architectures import CLIPConfig
from clip_jax.models.placement import whole
from clip_jax.models.transformer import LayerNorm, Prefix, Transformer


class TextTower(nnx.Module):
    """Tokens + positions -> blocks -> ln_final: what CLIP's text tower and SigLIP's have in common."""

    def __init__(self, model: CLIPConfig, causal: bool, *, rngs: nnx.Rngs):
        config, width, normal = model.text, model.text.width, nnx.initializers.normal
        tokens = normal(config.token_embedding_std)(rngs.params(), (config.vocabulary_size, width))
        self.token_embedding = nnx.Param(tokens)
        self.position_embedding = nnx.Param(normal(0.01)(rngs.params(), (config.context_length, width)))
        self.transformer = Transformer(config, model, causal, rngs=rngs)
        self.ln_final = LayerNorm(width, model.layer_norm_eps, rngs=rngs)
        self.dtype = jnp.dtype(model.dtype)

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

    def __init__(self, model: CLIPConfig, *, rngs: nnx.Rngs):
        super().__init__(model, causal=True, rngs=rngs)
        if model.embedding:
            init = nnx.initializers.normal(model.text.width**-0.5)
            self.projection = nnx.Param(init(rngs.params(), (model.text.width, model.embedding)))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B E"]:
        """Features, not normalised, in float32.  T is at most the context length."""
        # EOT has the largest id, and argmax finds the first: right for any padding below it.
        return self._project(self.transformer(self.embed(tokens), jnp.argmax(tokens, axis=1)))

    def prefix(self, tokens: Int[Array, "P"]) -> list[Prefix]:
        """What texts that begin alike have in common: keys and values, which causal attention leaves as they are."""
        return self.transformer.prefix(self.embed(tokens[None])[0])

    def after(self, prefix: list[Prefix], length: Int[Array, ""], tokens: Int[Array, "B N"]) -> Float[Array, "B E"]:
        """The features of texts, of which `tokens` follow the first `length` tokens of a prefix."""
        positions = jnp.minimum(length + jnp.arange(tokens.shape[1]), len(self.position_embedding[...]) - 1)
        x = whole(self.token_embedding[...])[tokens] + self.position_embedding[...][positions][None]
        return self._project(self.transformer.after(x.astype(self.dtype), prefix, length, jnp.argmax(tokens, axis=1)))

    def _project(self, x: Float[Array, "B D"]) -> Float[Array, "B E"]:
        return (self.ln_final(x) @ self.projection[...].astype(x.dtype)).astype(jnp.float32)
