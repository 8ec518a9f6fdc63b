"""`open_clip_config.json` as a CLIPConfig, and back.

Source: open_clip `model.py:CLIPVisionCfg` and `CLIPTextCfg`.
"""

import dataclasses
import math
import re
import warnings

from clip_jax.errors import UserError
from clip_jax.models import ARCHITECTURES, CLIPConfig
from clip_jax.models.architectures import ResNetConfig, SigLIPTextConfig, SigLIPViTConfig, TextConfig, ViTConfig
from clip_jax.pytorch.configs import HALF, TOKENIZERS, Json, named, siglip_tokenizer, take_group

TIMM_SIZES = {"base": 768, "large": 1024, "so400m": 1152, "giantopt": 1536}  # name: width


def open_clip_config(document: Json, where: str) -> CLIPConfig:
    """From `open_clip_config.json`: `{"model_cfg": ..., "preprocess_cfg": ...}`."""
    model = take_group(document, "model_cfg", where)
    vision, text = dict(take_group(model, "vision_cfg", where)), dict(take_group(model, "text_cfg", where))
    model = {k: v for k, v in model.items() if k not in ("vision_cfg", "text_cfg")}
    embedding, quick_gelu = model.pop("embed_dim"), model.pop("quick_gelu", False)
    siglip = "timm_model_name" in vision
    text_class = SigLIPTextConfig if siglip else TextConfig
    text_config = text_class(
        text.pop("width", 512),
        text.pop("layers", 12),
        text.pop("heads", 8),
        text.pop("context_length", 77),
        text.pop("vocab_size", 49408),
        text.pop("mlp_ratio", 4.0),
    )
    eps = 1e-5
    if siglip:
        vision_config = _timm_vit(vision, where)
        expected = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
        for name, value in expected.items():
            if text.pop(name, None) != value:
                raise UserError(f"{where}: text_cfg.{name} is not {value}; of timm's towers only SigLIP's are known")
        text.pop("act_kwargs", None)  # tanh, as SigLIP was trained, whether said or not
        eps = text.pop("eps", 1e-6)
    else:
        width, layers, size = vision.pop("width", 768), vision.pop("layers", 12), vision.pop("image_size", 224)
        heads_width, patch = vision.pop("head_width", 64), vision.pop("patch_size", 16)
        if isinstance(layers, int):
            vision_config = ViTConfig(size, patch, width, layers, width // heads_width, vision.pop("mlp_ratio", 4.0))
        else:
            vision_config = ResNetConfig(size, tuple(layers), width, width * 32 // heads_width)
    model.pop("custom_text", None), text.pop("hf_tokenizer_name", None), text.pop("tokenizer_kwargs", None)
    scale = model.pop("init_logit_scale", None)
    bias = model.pop("init_logit_bias", None)
    left = [*model, *(f"vision_cfg.{k}" for k in vision), *(f"text_cfg.{k}" for k in text)]
    if left:
        raise UserError(f"{where}: {', '.join(left)} {'is' if len(left) == 1 else 'are'} not known here; this model has a part that CLIP does not have")
    config = CLIPConfig(
        "custom",
        embedding,
        vision_config,
        text_config,
        activation="gelu_tanh" if siglip else "quick_gelu" if quick_gelu else "gelu",
        layer_norm_eps=eps,
        initial_logit_scale=scale if scale is not None else math.log(10 if siglip else 1 / 0.07),
        initial_logit_bias=bias,
        tokenizer=siglip_tokenizer(text_config) if siglip else "openai",
    )
    return named(_open_clip_preprocessing(config, document.get("preprocess_cfg"), where))


def to_open_clip(config: CLIPConfig) -> Json:
    """The inverse of `open_clip_config`."""
    vision, text = config.vision, config.text
    text_cfg = {
        "context_length": text.context_length,
        "vocab_size": text.vocabulary_size,
        "width": text.width,
        "heads": text.heads,
        "layers": text.layers,
    }
    text_cfg |= {} if text.mlp_ratio == 4.0 else {"mlp_ratio": text.mlp_ratio}
    model: Json = {"embed_dim": config.embedding}
    match vision:
        case SigLIPViTConfig():
            size = {width: name for name, width in TIMM_SIZES.items()}.get(vision.width)
            name = f"vit_{size}_patch{vision.patch_size}_siglip_{vision.image_size}"
            if size is None or _timm_vit({"timm_model_name": name}, name) != vision:
                raise UserError(f"timm has no SigLIP tower like that of {config.name}, so open_clip cannot express it; take --to hf")
            model |= {"init_logit_bias": config.initial_logit_bias, "custom_text": True}
            model["vision_cfg"] = {
                "image_size": vision.image_size,
                "timm_model_name": name,
                "timm_model_pretrained": False,
                "timm_pool": "map",
                "timm_proj": "none",
            }
            text_cfg |= {
                "hf_tokenizer_name": TOKENIZERS[config.tokenizer],
                "tokenizer_kwargs": {"clean": "canonicalize"},
                "no_causal_mask": True,
                "proj_bias": True,
                "pool_type": "last",
                "norm_kwargs": {"eps": 1e-6},
                "act_kwargs": {"approximate": "tanh"},
            }
        case ViTConfig():
            model["vision_cfg"] = {
                "image_size": vision.image_size,
                "layers": vision.layers,
                "width": vision.width,
                "patch_size": vision.patch_size,
            }
            heads_width = vision.width // vision.heads
            model["vision_cfg"] |= {} if heads_width == 64 else {"head_width": heads_width}
            model["vision_cfg"] |= {} if vision.mlp_ratio == 4.0 else {"mlp_ratio": vision.mlp_ratio}
        case ResNetConfig():
            model["vision_cfg"] = {
                "image_size": vision.image_size,
                "layers": list(vision.layers),
                "width": vision.width,
                "patch_size": None,
            }
            heads_width = vision.width * 32 // vision.heads
            model["vision_cfg"] |= {} if heads_width == 64 else {"head_width": heads_width}
    model |= {"quick_gelu": True} if config.activation == "quick_gelu" else {}
    if config.activation == "gelu_tanh" and not isinstance(vision, SigLIPViTConfig):
        raise UserError(f"open_clip has no CLIP with tanh-GELU in both towers, so it cannot express {config.name}; take --to hf")
    model["text_cfg"] = text_cfg
    preprocess = {
        "mean": list(config.image_mean),
        "std": list(config.image_std),
        "interpolation": config.interpolation,
        "resize_mode": config.resize,
    }
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def _timm_vit(vision: Json, where: str) -> SigLIPViTConfig:
    name = vision.pop("timm_model_name")
    match = re.fullmatch(r"vit_(base|large|so400m|giantopt)_patch(\d+)_siglip_(\d+)", name)
    if not match:
        raise UserError(f"{where}: timm_model_name {name!r}, expected a SigLIP tower such as vit_base_patch16_siglip_224")
    size, patch, side = match[1], int(match[2]), int(match[3])
    towers = [c.vision for c in ARCHITECTURES.values() if isinstance(c.vision, SigLIPViTConfig)]
    like = next(v for v in towers if v.width == TIMM_SIZES[size])
    for key in ("image_size", "timm_model_pretrained", "timm_pool", "timm_proj"):
        vision.pop(key, None)
    return dataclasses.replace(like, image_size=side, patch_size=patch)


def _open_clip_preprocessing(config: CLIPConfig, preprocess: Json | None, where: str) -> CLIPConfig:
    siglip = isinstance(config.vision, SigLIPViTConfig)
    if siglip:
        config = dataclasses.replace(config, resize="squash", image_mean=HALF, image_std=HALF)
    if not preprocess:
        warnings.warn(f"{where}: no preprocess_cfg in it; taking the mean and std of the authors", stacklevel=2)
        return config
    return dataclasses.replace(
        config,
        image_mean=tuple(preprocess.get("mean", config.image_mean)),
        image_std=tuple(preprocess.get("std", config.image_std)),
        interpolation=preprocess.get("interpolation", config.interpolation),
        resize=preprocess.get("resize_mode", config.resize),
    )
