"""Small models with random weights that show every loss."""

import dataclasses

import numpy as np

from clip_jax.models import CLIPConfig
from clip_jax.models.architectures import ResNetConfig, SigLIPTextConfig, SigLIPViTConfig, TextConfig, ViTConfig
from clip_jax.pytorch.layouts import Weights, weight_shapes

# The vocabulary is OpenAI's, because the files written for transformers hold it.
TEXT = TextConfig(width=64, layers=2, heads=1, context_length=16)
VIT = CLIPConfig("small-vit", 32, ViTConfig(32, 8, width=128, layers=2, heads=2), TEXT, dtype="float32")
SMALL = {
    "vit": VIT,
    "vit-gelu": dataclasses.replace(VIT, activation="gelu", image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5)),
    "resnet": CLIPConfig("small-resnet", 32, ResNetConfig(64, (1, 2, 1, 1), width=16, heads=8), TEXT, dtype="float32"),
    "siglip": CLIPConfig(
        "small-siglip",
        128,
        SigLIPViTConfig(36, 8, width=128, layers=2, heads=2, mlp_ratio=3.7362),
        SigLIPTextConfig(64, 2, 1, 16, vocabulary_size=128),
        activation="gelu_tanh",
        layer_norm_eps=1e-6,
        initial_logit_bias=-10.0,
        tokenizer="siglip",
        resize="squash",
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        dtype="float32",
    ),
}
# Which layouts can express which model; open_clip's SigLIP needs a tower of timm's, of full size.
LAYOUTS = {
    "vit": ("openai", "open_clip", "hf"),
    "vit-gelu": ("open_clip", "hf"),
    "resnet": ("openai", "open_clip"),
    "siglip": ("hf",),
}


def rich_weights(config: CLIPConfig, seed: int = 0) -> Weights:
    """Every weight, gain, bias and running statistic away from its start.

    Embeddings and stems stay small, so that a wrong epsilon of a norm shows as well.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in weight_shapes(config).items():
        leaf, noise = name.rsplit("/")[-1], rng.standard_normal(shape, np.float32)
        if leaf == "kernel":
            small = 0.3 if "stem" in name or "patch_embedding" in name else 1.0
            weights[name] = noise * np.float32(small * np.prod(shape[:-1]) ** -0.5)
        elif leaf == "var":
            weights[name] = 1 + 0.5 * np.tanh(noise)
        elif leaf == "scale":
            weights[name] = 1 + 0.2 * noise
        elif leaf in ("bias", "mean", "probe"):
            weights[name] = 0.2 * noise
        elif leaf == "projection":
            weights[name] = noise * np.float32(shape[0] ** -0.5)
        elif leaf == "logit_scale":
            weights[name] = np.array(3.1, np.float32)
        elif leaf == "logit_bias":
            weights[name] = np.array(-7.3, np.float32)
        else:
            weights[name] = 0.05 * noise  # embeddings
        weights[name] = np.asarray(weights[name], np.float32)
    return weights
