"""transformers' `config.json` and `preprocessor_config.json` as a CLIPConfig, and back.

Source: transformers `configuration_clip.py`, `configuration_siglip.py`, and the image processors.
"""

import dataclasses
import math
import warnings

from clip_jax.errors import UserError
from clip_jax.models import CLIPConfig
from clip_jax.models.architectures import SigLIPTextConfig, SigLIPViTConfig, TextConfig, ViTConfig
from clip_jax.pytorch.configs import HALF, Json, named, siglip_tokenizer, take_group

HF_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
PIL_RESAMPLING = {2: "bilinear", 3: "bicubic"}


def hf_config(document: Json, preprocessing: Json | None, where: str) -> CLIPConfig:
    """From transformers' `config.json` and `preprocessor_config.json`."""
    kind = document.get("model_type")
    if kind == "clip_text_model":
        return _hf_text_encoder_config(document, where)
    if kind not in ("clip", "siglip"):
        raise UserError(f"{where}: model_type is {kind!r}, expected clip, clip_text_model, or siglip of one fixed resolution")
    siglip = kind == "siglip"
    vision, text = (_HF_DEFAULTS[kind][t] | take_group(document, f"{t}_config", where) for t in ("vision", "text"))
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
        tokenizer=siglip_tokenizer(text_config) if siglip else "openai",
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
    projection = {"projection_dim": config.embedding} if config.embedding else {}
    return document | ids | projection | {"pad_token_id": text.vocabulary_size - 1}


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


def _hf_sizes(tower: Json) -> tuple[int, int, int]:
    return tower["hidden_size"], tower["num_hidden_layers"], tower["num_attention_heads"]


def _hf_text(text: Json, kind: type[TextConfig]) -> TextConfig:
    return kind(*_hf_sizes(text), text["max_position_embeddings"], text["vocab_size"], _ratio(text))


def _hf_activation(tower: Json, where: str) -> str:
    if tower["hidden_act"] not in HF_ACTIVATIONS:
        raise UserError(f"{where}: hidden_act is {tower['hidden_act']!r}, expected one of {', '.join(HF_ACTIVATIONS)}")
    return HF_ACTIVATIONS[tower["hidden_act"]]


def _ratio(tower: Json) -> float:
    """The ratio of the MLP, such that `int(width * ratio)` is its hidden width: in four digits, as open_clip has it."""
    width, hidden = tower["hidden_size"], tower["intermediate_size"]
    ratio = math.ceil(hidden / width * 1e4) / 1e4
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width
