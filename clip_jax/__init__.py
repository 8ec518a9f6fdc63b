"""CLIP in JAX: train image-text models with a contrastive loss, and measure them zero-shot."""

from clip_jax.pretrained import available_models as available_models
from clip_jax.pretrained import get_tokenizer as get_tokenizer
from clip_jax.pretrained import load as load
from clip_jax.tokenizer import tokenize as tokenize

__version__ = "0.1.0"
