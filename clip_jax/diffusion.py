"""The text encoders of Stable Diffusion: which model, which hidden state, with or without ln_final, which padding.

People have been misled by these four for years (diffusers#1721, #1863, #10754), so they have names here.
Sources: Rombach et al. 2022; Podell et al. 2023 (arXiv 2307.01952), 2.1; Esser et al. 2024 (arXiv 2403.03206);
diffusers `pipelines/stable_diffusion*/pipeline_*.py:encode_prompt`.
"""

import dataclasses
import functools

import jax
import numpy as np
from jaxtyping import Array, Float, Int32

from clip_jax.config import did_you_mean
from clip_jax.errors import UserError
from clip_jax.models import CLIP
from clip_jax.tokenizer import END_OF_TEXT, tokenize


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """What a pipeline takes from a CLIP."""

    model: str  # as clip_jax.load takes it
    layer: int  # -1: after the last block, -2: after the penultimate
    final_layer_norm: bool
    padding: int  # the id after the end of a text; OpenAI's own is 0


TEXT_ENCODERS = {
    "sd1": TextEncoder("ViT-L/14", -1, True, END_OF_TEXT),
    "sd2": TextEncoder("ViT-H-14:laion2b_s32b_b79k", -2, True, 0),
    "sdxl-1": TextEncoder("ViT-L/14", -2, False, END_OF_TEXT),
    "sdxl-2": TextEncoder("ViT-bigG-14:laion2b_s39b_b160k", -2, False, 0),
    "sd3-1": TextEncoder("ViT-L/14", -2, False, END_OF_TEXT),
    "sd3-2": TextEncoder("ViT-bigG-14:laion2b_s39b_b160k", -2, False, 0),
}


def encode_prompts(
    model: CLIP, prompts: list[str], encoder: str, clip_skip: int = 0
) -> tuple[Float[Array, "B T D"], Float[Array, "B E"] | None]:
    """What conditions the denoiser: a hidden state for each token, and the pooled features (SDXL's second, SD 3's both),
    None from a text encoder without projection.

    A prompt that is too long is cut, as the pipelines do; the empty one is a prompt like any other.

    Args:
      encoder: a name in TEXT_ENCODERS; its `model` says what to load.
      clip_skip: so many further blocks from the end are left out, as diffusers counts: 1 with "sd1" takes the
        penultimate hidden state, through ln_final.
    """
    preset = _preset(encoder)
    tokens = prompt_tokens(prompts, encoder, model.config.text.context_length)
    return _encode(model, tokens, preset.layer - clip_skip, preset.final_layer_norm)


@functools.partial(jax.jit, static_argnames=("layer", "final_layer_norm"))
def _encode(model: CLIP, tokens: Int32[Array, "B T"], layer: int, final_layer_norm: bool):
    states = model.text_hidden_states(tokens, layer, final_layer_norm)
    return states, model.encode_text(tokens) if model.config.embedding else None


def prompt_tokens(prompts: list[str], encoder: str, context_length: int = 77) -> Int32[np.ndarray, "B T"]:
    """Token ids with the padding that the pipeline was trained with; it shows in the hidden states."""
    tokens = tokenize(prompts, context_length, truncate=True)
    after_the_end = np.arange(context_length)[None] > tokens.argmax(axis=1)[:, None]
    return np.where(after_the_end, np.int32(_preset(encoder).padding), tokens)


def _preset(name: str) -> TextEncoder:
    if name not in TEXT_ENCODERS:
        raise UserError(f"no text encoder {name!r}{did_you_mean(name, TEXT_ENCODERS)}; there are {', '.join(TEXT_ENCODERS)}")
    return TEXT_ENCODERS[name]
