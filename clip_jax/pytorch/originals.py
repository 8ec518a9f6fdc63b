"""The PyTorch originals themselves, for comparison: openai/CLIP, open_clip and transformers.

The only file that runs their code.  What is not installed raises ImportError, with what to install.
"""

from typing import Any

import jax
import numpy as np

from clip_jax.models import CLIPConfig
from clip_jax.models.architectures import ResNetConfig, SigLIPViTConfig
from clip_jax.pytorch import hf_configs, open_clip_configs
from clip_jax.pytorch.files import StateDict


def build(layout: str, config: CLIPConfig, state: StateDict) -> Any:
    """The original's module with these weights, loaded strictly, in float32 and ready for inference."""
    import torch

    model = {"openai": _openai, "open_clip": _open_clip, "hf": _hf, "diffusers-text-encoder": _text_encoder}[layout](config)
    # The largest have 10 GB: these arrays become the parameters, without a copy.
    tensors = {name: torch.from_numpy(np.require(tensor, requirements="W")) for name, tensor in state.items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.float().eval()


def features(
    layout: str, config: CLIPConfig, state: StateDict, images: jax.Array, tokens: jax.Array
) -> dict[str, np.ndarray]:
    """Features of "images" and "texts" by the original, not normalised; of a text encoder its last "hidden states"."""
    import torch

    model = build(layout, config, state)
    pixels = torch.from_numpy(np.asarray(images).transpose(0, 3, 1, 2).copy())
    ids = torch.from_numpy(np.asarray(tokens).astype(np.int64))
    with torch.no_grad():
        if layout == "diffusers-text-encoder":
            return {"hidden states": model(ids).last_hidden_state.numpy()}
        if layout == "hf":
            return {"images": model.get_image_features(pixels).numpy(), "texts": model.get_text_features(ids).numpy()}
        return {"images": model.encode_image(pixels).numpy(), "texts": model.encode_text(ids).numpy()}


def _openai(config: CLIPConfig):
    try:
        from clip.model import CLIP
    except ImportError as error:
        raise ImportError(f"openai/CLIP cannot be imported (pip install clip-anytorch): {error}") from error
    vision, text = config.vision, config.text
    resnet = isinstance(vision, ResNetConfig)
    return CLIP(
        config.embedding,
        vision.image_size,
        vision.layers,
        vision.width,
        None if resnet else vision.patch_size,
        text.context_length,
        text.vocabulary_size,
        text.width,
        text.heads,
        text.layers,
    )


def _open_clip(config: CLIPConfig):
    try:
        from open_clip.model import CLIP, CustomTextCLIP
    except ImportError as error:
        raise ImportError(f"open_clip cannot be imported (pip install open_clip_torch): {error}") from error
    model = dict(open_clip_configs.to_open_clip(config)["model_cfg"])
    if not isinstance(config.vision, SigLIPViTConfig):
        return CLIP(**model)
    import torch

    model.pop("custom_text")
    model = CustomTextCLIP(**model)
    # SigLIP was trained with tanh-GELU; timm's older definitions of its towers say exact GELU.
    for module in model.visual.modules():
        if isinstance(getattr(module, "act", None), torch.nn.GELU):
            module.act = torch.nn.GELU(approximate="tanh")
    return model


def _hf(config: CLIPConfig):
    transformers = _transformers()
    document, _ = hf_configs.to_hf(config)
    kind = "Siglip" if document["model_type"] == "siglip" else "CLIP"
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config").from_dict(document))


def _text_encoder(config: CLIPConfig):
    transformers = _transformers()
    document = hf_configs.to_hf_text_encoder(hf_configs.text_encoder_config(config))
    return getattr(transformers, document["architectures"][0])(transformers.CLIPTextConfig.from_dict(document))


def _transformers():
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"transformers cannot be imported (pip install transformers): {error}") from error
    return transformers
