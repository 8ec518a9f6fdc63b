"""What others write beside their weights, as a CLIPConfig, and back.

Sources: openai/CLIP `clip/model.py:build_model`; open_clip `model.py:CLIPVisionCfg` and `CLIPTextCfg`, and its
`open_clip_config.json`; transformers `configuration_clip.py`, `configuration_siglip.py`, and the image processors.
"""

import dataclasses
import math
import re
import warnings
from typing import Any

from clip_jax.errors import UserError
from clip_jax.models import ARCHITECTURES, CLIPConfig
from clip_jax.models.architectures import (
    SIGLIP_VOCABULARIES,
    ResNetConfig,
    SigLIPTextConfig,
    SigLIPViTConfig,
    TextConfig,
    ViTConfig,
)
from clip_jax.pytorch.files import StateDict

Json = dict[str, Any]

HALF = (0.5, 0.5, 0.5)
HF_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
PIL_RESAMPLING = {2: "bilinear", 3: "bicubic"}
# Repositories of the hub that hold SigLIP's, as open_clip's own configurations name them.
TOKENIZERS = {"siglip": "timm/ViT-B-16-SigLIP", "siglip-i18n": "timm/ViT-B-16-SigLIP-i18n-256", "siglip2": "timm/ViT-B-16-SigLIP2"}
TIMM_SIZES = {"base": 768, "large": 1024, "so400m": 1152, "giantopt": 1536}  # name: width


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


def open_clip_config(document: Json, where: str) -> CLIPConfig:
    """From `open_clip_config.json`: `{"model_cfg": ..., "preprocess_cfg": ...}`."""
    model = _take(document, "model_cfg", where)
    vision, text = dict(_take(model, "vision_cfg", where)), dict(_take(model, "text_cfg", where))
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
        tokenizer=_siglip_tokenizer(text_config) if siglip else "openai",
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


def hf_config(document: Json, preprocessing: Json | None, where: str) -> CLIPConfig:
    """From transformers' `config.json` and `preprocessor_config.json`."""
    kind = document.get("model_type")
    if kind == "clip_text_model":
        return _hf_text_encoder_config(document, where)
    if kind not in ("clip", "siglip"):
        raise UserError(f"{where}: model_type is {kind!r}, expected clip, clip_text_model, or siglip of one fixed resolution")
    siglip = kind == "siglip"
    vision, text = (_HF_DEFAULTS[kind][t] | _take(document, f"{t}_config", where) for t in ("vision", "text"))
    for name in ("hidden_act", "layer_norm_eps"):
        if vision[name] != text[name]:
            raise UserError(
                f"{where}: vision_config.{name} is {vision[name]!r} and text_config.{name} is {text[name]!r}; "
                "no CLIP was trained so, mend the one that is wrong"
            )
    activation = _hf_activation(text, where)
    size = vision["image_size"], vision["patch_size"]
    vision_config = (SigLIPViTConfig if siglip else ViTConfig)(*size, *_hf_sizes(vision), _ratio(vision))
    text_config = _hf_text(text, SigLIPTextConfig if siglip else TextConfig)
    embedding = vision["hidden_size"] if siglip else document.get("projection_dim", 512)
    config = CLIPConfig(
        "custom",
        embedding,
        vision_config,
        text_config,
        activation=activation,
        layer_norm_eps=text["layer_norm_eps"],
        initial_logit_scale=math.log(10) if siglip else CLIPConfig.initial_logit_scale,
        initial_logit_bias=-10.0 if siglip else None,
        tokenizer=_siglip_tokenizer(text_config) if siglip else "openai",
        **({"resize": "squash", "image_mean": HALF, "image_std": HALF} if siglip else {}),
    )
    if preprocessing is None:
        warnings.warn(f"{where}: no preprocessor_config.json beside it; taking the mean and std of {kind}'s authors", stacklevel=2)
        return named(config)
    return named(
        dataclasses.replace(
            config,
            image_mean=tuple(preprocessing["image_mean"]),
            image_std=tuple(preprocessing["image_std"]),
            interpolation=PIL_RESAMPLING.get(preprocessing["resample"], preprocessing["resample"]),
            resize="shortest" if preprocessing.get("do_center_crop") else "squash",
        )
    )


def _hf_text_encoder_config(document: Json, where: str) -> CLIPConfig:
    """From the `config.json` of a CLIPTextModel, or of a CLIPTextModelWithProjection."""
    text = _HF_DEFAULTS["clip"]["text"] | {"projection_dim": 512} | document
    projected = "CLIPTextModelWithProjection" in document.get("architectures", ())
    return CLIPConfig(
        "text-encoder",
        text["projection_dim"] if projected else 0,
        None,
        _hf_text(text, TextConfig),
        activation=_hf_activation(text, where),
        layer_norm_eps=text["layer_norm_eps"],
    )


def text_encoder_config(config: CLIPConfig) -> CLIPConfig:
    """The text tower alone, without projection unless it is alone already."""
    embedding = 0 if config.vision else config.embedding
    return CLIPConfig(
        "text-encoder", embedding, None, config.text, config.activation, config.layer_norm_eps, dtype=config.dtype
    )


def to_hf_text_encoder(config: CLIPConfig) -> Json:
    """The inverse of `hf_config` for a text encoder alone."""
    name = "CLIPTextModelWithProjection" if config.embedding else "CLIPTextModel"
    return {"architectures": [name], "torch_dtype": "float32"} | hf_text_config(config)


def to_hf(config: CLIPConfig) -> tuple[Json, Json]:
    """The inverse of `hf_config`: `config.json` and `preprocessor_config.json`."""
    siglip = isinstance(config.vision, SigLIPViTConfig)
    kind, prefix = ("siglip", "Siglip") if siglip else ("clip", "CLIP")
    document = {
        "architectures": [f"{prefix}Model"],
        "model_type": kind,
        "torch_dtype": "float32",
        "text_config": hf_text_config(config),
        "vision_config": {
            "model_type": f"{kind}_vision_model",
            "image_size": config.vision.image_size,
            "patch_size": config.vision.patch_size,
            **_hf_tower(config, config.vision),
        },
    }
    if not siglip:
        document |= {"projection_dim": config.embedding, "logit_scale_init_value": config.initial_logit_scale}
        document["vision_config"]["projection_dim"] = config.embedding
    side = config.vision.image_size
    square = {"height": side, "width": side}
    crop = config.resize == "shortest"
    preprocessing = {
        "image_processor_type": f"{prefix}ImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side} if crop else square,
        "resample": {name: number for number, name in PIL_RESAMPLING.items()}[config.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
        "do_convert_rgb": True,
    }
    preprocessing |= {"do_center_crop": True, "crop_size": square} if crop else {}
    return document, preprocessing


def hf_text_config(config: CLIPConfig) -> Json:
    """transformers' CLIPTextConfig or SiglipTextConfig."""
    text = config.text
    document = {
        "model_type": "siglip_text_model" if isinstance(text, SigLIPTextConfig) else "clip_text_model",
        "max_position_embeddings": text.context_length,
        "vocab_size": text.vocabulary_size,
        **_hf_tower(config, text),
    }
    if isinstance(text, SigLIPTextConfig):
        return document | {"projection_size": config.embedding}
    ids = {"bos_token_id": text.vocabulary_size - 2, "eos_token_id": text.vocabulary_size - 1}
    return document | ids | {"projection_dim": config.embedding, "pad_token_id": text.vocabulary_size - 1}


def named(config: CLIPConfig) -> CLIPConfig:
    """The configuration under the name of the architecture that it is, if it is one."""
    structure = lambda c: {k: v for k, v in c.identity().items() if k in ("vision", "text", "embedding", "activation")}
    for known in ARCHITECTURES.values():
        if structure(known) == structure(config):
            return dataclasses.replace(config, name=known.name)
    return config


def _hf_sizes(tower: Json) -> tuple[int, int, int]:
    return tower["hidden_size"], tower["num_hidden_layers"], tower["num_attention_heads"]


def _hf_text(text: Json, kind: type[TextConfig]) -> TextConfig:
    return kind(*_hf_sizes(text), text["max_position_embeddings"], text["vocab_size"], _ratio(text))


def _hf_activation(tower: Json, where: str) -> str:
    if tower["hidden_act"] not in HF_ACTIVATIONS:
        raise UserError(f"{where}: hidden_act is {tower['hidden_act']!r}, expected one of {', '.join(HF_ACTIVATIONS)}")
    return HF_ACTIVATIONS[tower["hidden_act"]]


def _siglip_tokenizer(text: TextConfig) -> str:
    """Which of them it is, by the size of its vocabulary; SigLIP's first for one that nobody published."""
    return {size: name for name, size in SIGLIP_VOCABULARIES.items()}.get(text.vocabulary_size, "siglip")


# What transformers leaves out of a config.json when it has its default.
_HF_DEFAULTS = {
    kind: {
        "vision": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": patch,
            "hidden_act": activation,
            "layer_norm_eps": eps,
        },
        "text": {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": 12,
            "num_attention_heads": width // 64,
            "max_position_embeddings": context,
            "vocab_size": vocabulary,
            "hidden_act": activation,
            "layer_norm_eps": eps,
        },
    }
    for kind, patch, width, context, vocabulary, activation, eps in (
        ("clip", 32, 512, 77, 49408, "quick_gelu", 1e-5),
        ("siglip", 16, 768, 64, 32000, "gelu_pytorch_tanh", 1e-6),
    )
}


def _hf_tower(config: CLIPConfig, tower: ViTConfig | TextConfig) -> Json:
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": {ours: theirs for theirs, ours in reversed(HF_ACTIVATIONS.items())}[config.activation],
        "layer_norm_eps": config.layer_norm_eps,
    }


def _ratio(tower: Json) -> float:
    """The ratio of the MLP, such that `int(width * ratio)` is its hidden width: in four digits, as open_clip has it."""
    width, hidden = tower["hidden_size"], tower["intermediate_size"]
    ratio = math.ceil(hidden / width * 1e4) / 1e4
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


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


def _take(document: Json, name: str, where: str) -> Json:
    if not isinstance(document.get(name), dict):
        raise UserError(f"{where}: expected a group {name} in it, found {', '.join(document) or 'nothing'}")
    return document[name]


def _count(state: StateDict, pattern: str) -> int:
    return 1 + max(int(match[1]) for match in (re.fullmatch(pattern, name) for name in state) if match)
