"""CLIP in JAX: train image-text models with a contrastive loss, and measure them zero-shot."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clip_jax.pretrained import available_models as available_models
    from clip_jax.pretrained import get_tokenizer as get_tokenizer
    from clip_jax.pretrained import load as load
    from clip_jax.tokenizer import tokenize as tokenize

__version__ = "0.1.0"

# Imported when they are first asked for, so that `import clip_jax` waits neither for JAX nor for Orbax.
_HOMES = {"available_models": "pretrained", "get_tokenizer": "pretrained", "load": "pretrained", "tokenize": "tokenizer"}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
