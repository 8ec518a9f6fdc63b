"""How many FLOPs a CLIP takes, by arithmetic, and how many a device could make.

Matrix products and convolutions alone, a multiply-add as two; attention, causal or not, as the whole square, and a
convolution with its padding.  What this code saves exactly is not counted: the last block computes one position, and
attention pools have one query.  Neither is what it computes again, by `remat`, in microbatches or in the ring form of
the loss: these are model FLOPs, as model FLOP utilisation means them (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from clip_jax.config import model_config
from clip_jax.errors import UserError
from clip_jax.models import CLIPConfig
from clip_jax.models.architectures import (
    ResNetConfig,
    SigLIPTextConfig,
    SigLIPViTConfig,
    SmallResNetConfig,
    TextConfig,
    ViTConfig,
)
from clip_jax.models.resnet import EXPANSION

# Dense bfloat16 products a second of one device, by its makers' data sheets: Google's pages on the versions of Cloud TPU, by
# the whole name of the kind; NVIDIA's, by a word of it, half of what they say "with sparsity".  Older ones, such as V100 and
# T4, have no bfloat16 units.
TPUS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}
GPUS = {  # the first that is found
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
}


def step_flops(config: ConfigDict, batch: Mapping[str, Any]) -> float:
    """Of one training step, forward and backward, on all devices together.

    Args:
      config: of the run.
      batch: the global one, of which shapes are read and nothing else; `tokens` is [B, T], or several of these with the
        texts by their length.
    """
    model, groups, kept = model_config(config), batch["tokens"], None
    groups = groups if isinstance(groups, (tuple, list)) else (groups,)
    if config.patch_dropout:  # as many as models/vit.py:draw_patches keeps
        kept = max(1, int(model.vision.grid**2 * (1 - config.patch_dropout)))
    pairs = sum(tokens.shape[0] * pair_flops(model, tokens.shape[1], kept) for tokens in groups)
    return pairs + loss_flops(sum(tokens.shape[0] for tokens in groups), model.embedding)


def pair_flops(config: CLIPConfig, length: int, patches_kept: int | None = None) -> float:
    """Of both towers for one pair in training, forward and backward, its text cut to `length` tokens.

    A product has two gradients, each as large as itself; the first layer of an image tower has one, as pixels are not learned.
    """
    first, others = _image_layers(config, patches_kept)
    return 2 * first + 3 * (others + text_flops(config, length))


def loss_flops(batch: int, embedding: int) -> float:
    """Of the loss and its gradient over the whole similarity matrix: three products of its size."""
    return 3.0 * 2 * batch**2 * embedding


def image_flops(config: CLIPConfig, patches_kept: int | None = None) -> float:
    """Of the image tower for one picture, forward; with patch dropout, where a ViT goes on with so many patches."""
    return sum(_image_layers(config, patches_kept))


def text_flops(config: CLIPConfig, length: int) -> float:
    """Of the text tower for one text cut to `length` tokens, forward, with its projection where there is one."""
    text = config.text
    return _transformer(text, length) + 2.0 * text.width * config.embedding


def peak_flops(device: jax.Device) -> float | None:
    """FLOPs a second of dense bfloat16 products, by the data sheet; None where it is not known, as of CPUs.

    The same for a model in float32, whose utilisation is low for that reason too.
    """
    kind = device.device_kind
    if kind in TPUS:
        return TPUS[kind]
    if "MIG" in kind.split():  # a part of a GPU, under the name of the whole
        return None
    return next((peak for name, peak in GPUS.items() if re.search(rf"\b{name}\b", kind)), None)


def block_flops(width: int, mlp_width: int, tokens: int, queries: int) -> float:
    """Of one block of a transformer that computes `queries` positions of `tokens`, forward."""
    keys_and_values = 4.0 * tokens * width**2
    query_and_output = 4.0 * queries * width**2
    attention = 4.0 * queries * tokens * width
    return keys_and_values + query_and_output + attention + 4.0 * queries * width * mlp_width


def _image_layers(config: CLIPConfig, patches_kept: int | None) -> tuple[float, float]:
    """Of the image tower, forward: of its first layer, and of all others."""
    vision = config.vision
    if patches_kept is not None and (vision is None or vision.pooling != ViTConfig.pooling):
        raise UserError(f"{config.name}: {patches_kept} patches kept, and only a ViT has patches that can be left out; give None")
    match vision:
        case SigLIPViTConfig():
            return _siglip_vit(vision)
        case ViTConfig():
            tokens = 1 + (vision.grid**2 if patches_kept is None else patches_kept)
            return _patch_embedding(vision), _transformer(vision, tokens) + 2.0 * vision.width * config.embedding
        case ResNetConfig():
            return _resnet(vision, config.embedding)
        case SmallResNetConfig():
            return _small_resnet(vision, config.embedding)
    raise UserError(f"{config.name}: a text encoder alone takes no images; give the configuration of a whole CLIP")


def _transformer(tower: ViTConfig | TextConfig | SigLIPTextConfig, tokens: int) -> float:
    """The last block computes one position."""
    block = lambda queries: block_flops(tower.width, tower.mlp_width, tokens, queries)
    return (tower.layers - 1) * block(tokens) + block(1)


def _patch_embedding(vision: ViTConfig) -> float:
    return 2.0 * vision.grid**2 * vision.patch_size**2 * 3 * vision.width


def _siglip_vit(vision: SigLIPViTConfig) -> tuple[float, float]:
    """All blocks are whole.  The pool is one more, whose query, the same for all pictures, is computed once a batch."""
    tokens, sizes = vision.grid**2, (vision.width, vision.mlp_width)
    blocks = vision.layers * block_flops(*sizes, tokens, tokens)
    pool = block_flops(*sizes, tokens, 1) - 2.0 * vision.width**2
    return _patch_embedding(vision), blocks + pool


def _convolution(side: int, size: int, channels: int, features: int) -> float:
    """`side`: of the map that comes out."""
    return 2.0 * side**2 * size**2 * channels * features


def _resnet(vision: ResNetConfig, embedding: int) -> tuple[float, float]:
    side, half, channels = vision.image_size // 2, vision.width // 2, vision.width
    first = _convolution(side, 3, 3, half)
    others = _convolution(side, 3, half, half) + _convolution(side, 3, half, channels)
    side //= 2
    for stage, count in enumerate(vision.layers):
        width = vision.width * 2**stage
        for block in range(count):
            others += _convolution(side, 1, channels, width) + _convolution(side, 3, width, width)
            if stage > 0 and block == 0:
                side //= 2
            others += _convolution(side, 1, width, EXPANSION * width)
            if block == 0:  # the shortcut
                others += _convolution(side, 1, channels, EXPANSION * width)
            channels = EXPANSION * width
    pool = block_flops(channels, 0, side**2 + 1, 1) - 2.0 * channels**2  # without the output layer, which is the projection
    return first, others + pool + 2.0 * channels * embedding


def _small_resnet(vision: SmallResNetConfig, embedding: int) -> tuple[float, float]:
    side, channels = vision.image_size // 2, vision.channels[0]
    first, others = _convolution(side, 3, 3, channels), 2.0 * vision.channels[-1] * embedding
    for features in vision.channels[1:]:
        side //= 2
        others += _convolution(side, 3, channels, features) + _convolution(side, 3, features, features)
        others += _convolution(side, 1, channels, features)  # the shortcut
        channels = features
    return first, others
