"""CLIP in JAX: train image-text models with a contrastive loss, and measure them zero-shot."""

from clip_jax.tokenizer import tokenize as tokenize

__version__ = "0.1.0"
