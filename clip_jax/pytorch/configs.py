"""OpenAI's weights as a CLIPConfig, and what every reader of configurations needs.

Source: openai/CLIP `clip/model.py:build_model`.
"""

import dataclasses
import math
import re
from typing import Any

from clip_jax.errors import UserError
from clip_jax.models import ARCHITECTURES, CLIPConfig
from clip_jax.models.architectures import SIGLIP_VOCABULARIES, ResNetConfig, TextConfig, ViTConfig
from clip_jax.pytorch.files import StateDict

Json = dict[str, Any]

HALF = (0.5, 0.5, 0.5)
# Repositories of the hub that hold SigLIP's, as open_clip's own configurations name them.
TOKENIZERS = {"siglip": "timm/ViT-B-16-SigLIP", "siglip-i18n": "timm/ViT-B-16-SigLIP-i18n-256", "siglip2": "timm/ViT-B-16-SigLIP2"}


def openai_config(state: StateDict, where: str) -> CLIPConfig:
    """OpenAI's files have no configuration: the shapes tell, and the activation is always QuickGELU."""
    try:
        embedding = state["text_projection"].shape[1]
        vocabulary, text_width = state["token_embedding.weight"].shape
        text = TextConfig(
            text_width,
            _count(state, r"transformer\.resblocks\.(\d+)\.ln_1\.weight"),
            text_width // 64,
            len(state["positional_embedding"]),
            vocabulary,
        )
        if "visual.proj" in state:
            width, _, patch, _ = state["visual.conv1.weight"].shape
            grid = math.isqrt(len(state["visual.positional_embedding"]) - 1)
            layers = _count(state, r"visual\.transformer\.resblocks\.(\d+)\.ln_1\.weight")
            vision = ViTConfig(grid * patch, patch, width, layers, width // 64)
        else:
            width = len(state["visual.layer1.0.conv1.weight"])
            grid = math.isqrt(len(state["visual.attnpool.positional_embedding"]) - 1)
            stages = tuple(_count(state, rf"visual\.layer{i}\.(\d+)\.conv1\.weight") for i in (1, 2, 3, 4))
            vision = ResNetConfig(grid * 32, stages, width, width // 2)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{where}: expected the tensors of an OpenAI CLIP, found none of that name or shape: {error}") from error
    return named(CLIPConfig("custom", embedding, vision, text))


def named(config: CLIPConfig) -> CLIPConfig:
    """The configuration under the name of the architecture that it is, if it is one."""
    structure = lambda c: {k: v for k, v in c.identity().items() if k in ("vision", "text", "embedding", "activation")}
    for known in ARCHITECTURES.values():
        if structure(known) == structure(config):
            return dataclasses.replace(config, name=known.name)
    return config


def siglip_tokenizer(text: TextConfig) -> str:
    """Which of them it is, by the size of its vocabulary; SigLIP's first for one that nobody published."""
    return {size: name for name, size in SIGLIP_VOCABULARIES.items()}.get(text.vocabulary_size, "siglip")


def take_group(document: Json, name: str, where: str) -> Json:
    """A group of fields of a document; a UserError if it has none."""
    if not isinstance(document.get(name), dict):
        raise UserError(f"{where}: expected a group {name} in it, found {', '.join(document) or 'nothing'}")
    return document[name]


def _count(state: StateDict, pattern: str) -> int:
    return 1 + max(int(match[1]) for match in (re.fullmatch(pattern, name) for name in state) if match)
