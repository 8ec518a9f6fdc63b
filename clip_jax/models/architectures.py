"""Every number that makes one CLIP differ from another, and the named architectures.

An architecture travels with its weights: checkpoints hold a `CLIPConfig` whole, preprocessing and
all, because an activation or a mean lost on reload has falsified published results (open_clip#771).

Sources: openai/CLIP `clip/model.py`; Radford et al. 2021 (arXiv 2103.00020), tables 19 and 20; open_clip
`src/open_clip/model_configs/`; Zhai et al. 2023 (arXiv 2303.15343); Tschannen et al. 2025 (arXiv 2502.14786).
"""

import dataclasses
import math

from clip_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A vision transformer, read at its class token."""

    image_size: int  # pixels a side
    patch_size: int  # pixels a side of one token
    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0
    pooling: str = "class"

    def __post_init__(self):
        _check_pooling(self)
        _check_sizes("vision", self)
        _check_heads("vision", self.width, self.heads)
        if self.pooling == "class":
            _check_image_size(self.image_size, self.patch_size, f"patch_size {self.patch_size}")
        if not self.grid:
            raise UserError(
                f"model.vision.image_size {self.image_size} holds no patch of patch_size {self.patch_size}; "
                f"expected at least {self.patch_size}"
            )

    @property
    def mlp_width(self) -> int:
        """Units between the two layers of an MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class SigLIPViTConfig(ViTConfig):
    """A vision transformer without class token, read by an attention pool (MAP).

    Pixels beyond the last whole patch are not seen: 384 pixels are 27 patches of 14.
    """

    pooling: str = "map"


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """The paper's ModifiedResNet: three-convolution stem, anti-aliased strides, attention pooling."""

    image_size: int  # pixels a side
    layers: tuple[int, ...]  # bottleneck blocks of each stage
    width: int  # channels out of the stem, and inside the blocks of the first stage
    heads: int  # of the attention pool
    pooling: str = "attention"

    def __post_init__(self):
        _check_pooling(self)
        _check_sizes("vision", self, width=2)  # half of which the stem's first convolution has
        _check_heads("vision", self.width * 4 * 2 ** (len(self.layers) - 1), self.heads)
        _check_image_size(self.image_size, self.stride, f"{self.stride}, the strides of {len(self.layers)} stages")

    @property
    def stride(self) -> int:
        """Pixels a side of one position of the last feature map."""
        return 4 * 2 ** (len(self.layers) - 1)


@dataclasses.dataclass(frozen=True)
class SmallResNetConfig:
    """A residual network for small pictures: a convolution, then basic blocks, each with stride 2."""

    image_size: int  # pixels a side
    channels: tuple[int, ...]  # out of the convolution, and out of each block
    pooling: str = "mean"

    def __post_init__(self):
        _check_pooling(self)
        _check_sizes("vision", self)
        stride = 2 ** len(self.channels)
        _check_image_size(self.image_size, stride, f"{stride}, the strides of {len(self.channels)} channels")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The causal text transformer, pooled at the end-of-text token."""

    width: int
    layers: int
    heads: int
    context_length: int = 77
    vocabulary_size: int = 49408
    mlp_ratio: float = 4.0
    token_embedding_std: float = 0.02  # at the start of training
    pooling: str = "eot"

    def __post_init__(self):
        _check_pooling(self)
        _check_sizes("text", self, context_length=2)  # where a text begins and where it ends
        _check_heads("text", self.width, self.heads)

    @property
    def mlp_width(self) -> int:
        """Units between the two layers of an MLP."""
        return int(self.width * self.mlp_ratio)


@dataclasses.dataclass(frozen=True)
class SigLIPTextConfig(TextConfig):
    """The text transformer of SigLIP: every token sees every other, and the last one is read."""

    context_length: int = 64
    vocabulary_size: int = 32000
    pooling: str = "last"


VISION_TOWERS = (ViTConfig, SigLIPViTConfig, ResNetConfig, SmallResNetConfig)
TEXT_TOWERS = (TextConfig, SigLIPTextConfig)
CHOICES = {
    "activation": ("quick_gelu", "gelu", "gelu_tanh"),
    "tokenizer": ("openai", "siglip", "siglip-i18n", "siglip2"),
    "resize": ("shortest", "squash"),
    "interpolation": ("bicubic", "bilinear"),
    "dtype": ("bfloat16", "float32"),
    "remat": ("none", "dots", "full"),
    "attention": ("xla", "cudnn"),
}
EXECUTION = ("dtype", "scan_layers", "remat", "attention")  # how a model is computed, and not what it is


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Two towers, the space they share, and how pictures and texts enter."""

    name: str
    embedding: int  # width of the shared space; 0: texts are not projected into one
    vision: ViTConfig | SigLIPViTConfig | ResNetConfig | SmallResNetConfig | None  # None: a text encoder alone
    text: TextConfig | SigLIPTextConfig
    activation: str = "quick_gelu"  # of transformers: or "gelu", "gelu_tanh"
    layer_norm_eps: float = 1e-5
    initial_logit_scale: float = math.log(1 / 0.07)  # a logarithm; Radford et al. 2021, 2.5
    initial_logit_bias: float | None = None  # None: there is none
    tokenizer: str = "openai"  # or "siglip", "siglip-i18n", "siglip2"
    resize: str = "shortest"  # the shortest side, then the centre; or "squash", both sides
    interpolation: str = "bicubic"  # or "bilinear"
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    dtype: str = "bfloat16"  # of matrix products, or "float32"; parameters, norms, softmax and loss are float32
    scan_layers: bool = False  # a loop over the blocks of a transformer, compiled once; or all of them, one after the other
    remat: str = "none"  # what a block keeps for its gradient: everything; "dots", its matrix products; "full", nothing
    attention: str = "xla"  # or "cudnn", whose kernel never holds the weights: on NVIDIA's GPUs, in bfloat16 (docs/performance.md)

    def __post_init__(self):
        if self.embedding < (self.vision is not None):
            raise UserError(f"model.embedding is {self.embedding}, expected the width of the space that images and texts share")
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                raise UserError(f"model.{field} is {getattr(self, field)!r}, expected one of {', '.join(choices)}")
        if isinstance(self.vision, SigLIPViTConfig) and self.vision.width != self.embedding:
            raise UserError(
                f"model.embedding is {self.embedding}, expected model.vision.width {self.vision.width}: "
                "the attention pool of SigLIP's image tower has no projection behind it"
            )

    def identity(self) -> dict:
        """What two configurations of the same trained model have in common: all but the name, how it was
        initialised, how it is computed, and in which digits a ratio is written.
        """
        values = self.to_dict()
        for name in ("name", "initial_logit_scale", *EXECUTION):
            del values[name]
        for tower in ("vision", "text"):
            if values[tower] is None:
                continue
            values[tower].pop("token_embedding_std", None)
            if "mlp_ratio" in values[tower]:
                values[tower]["mlp_ratio"] = getattr(self, tower).mlp_width
        values["initial_logit_bias"] = self.initial_logit_bias is not None
        return values

    def to_dict(self) -> dict:
        """As plain values, for a configuration file or a checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "CLIPConfig":
        """The inverse of `to_dict`; lists, as JSON has them, become tuples."""
        return cls(
            **_tuples(values)
            | {"vision": values["vision"] and _tower(VISION_TOWERS, values["vision"]), "text": _tower(TEXT_TOWERS, values["text"])}
        )


def _tower(towers: tuple, values: dict):
    """The configuration whose pooling it is: that tells the towers apart."""
    known, pooling = {tower.pooling: tower for tower in towers}, values.get("pooling")
    if pooling not in known:
        raise UserError(f"pooling of a tower is {pooling!r}, expected one of {', '.join(known)}")
    return known[pooling](**_tuples(values))


def _tuples(values: dict) -> dict:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _check_pooling(tower) -> None:
    if tower.pooling != type(tower).pooling:
        raise UserError(f"pooling of {type(tower).__name__} is {type(tower).pooling!r}, found {tower.pooling!r}")


def _check_sizes(name: str, tower, **least: int) -> None:
    """Every whole number of a tower is 1 or more, or as many as `least` says, and so is the width of its MLPs."""
    for field in dataclasses.fields(tower):
        value, lowest = getattr(tower, field.name), least.get(field.name, 1)
        if field.type is int and value < lowest:
            raise UserError(f"model.{name}.{field.name} is {value}, expected at least {lowest}")
        if field.type == tuple[int, ...] and not (value and all(isinstance(part, int) and part >= 1 for part in value)):
            raise UserError(f"model.{name}.{field.name} is {value}, expected one or more whole numbers of at least 1")
    if getattr(tower, "mlp_width", 1) < 1:
        raise UserError(f"model.{name}.mlp_ratio is {tower.mlp_ratio}, expected a ratio that gives an MLP of width 1 or more")


def _check_image_size(size: int, step: int, what: str) -> None:
    if size % step:
        nearest = max(1, round(size / step)) * step
        raise UserError(f"model.vision.image_size {size} is not a multiple of {what}; the nearest is {nearest}")


def _check_heads(tower: str, width: int, heads: int) -> None:
    if width % heads:
        raise UserError(f"model.{tower}.width {width} is not a multiple of model.{tower}.heads {heads}")


def _openai(name: str, embedding: int, vision: ViTConfig | ResNetConfig, text_width: int) -> CLIPConfig:
    text = TextConfig(width=text_width, layers=12, heads=text_width // 64)
    return CLIPConfig(name=name, embedding=embedding, vision=vision, text=text)


def _open_clip(name: str, embedding: int, vision: ViTConfig, text: TextConfig) -> CLIPConfig:
    """LAION's and DataComp's, with exact GELU."""
    return CLIPConfig(name=name, embedding=embedding, vision=vision, text=text, activation="gelu")


def _siglip(size: str, patch: int, image_size: int, version: int = 1, multilingual: bool = False) -> CLIPConfig:
    """SigLIP (Zhai et al. 2023) and SigLIP 2 of fixed resolution, by open_clip's names."""
    width, layers, heads, mlp_ratio = _SIGLIP_VISION[size]
    text_width, text_layers, text_heads, text_ratio = _SIGLIP_TEXT[size]
    name = f"ViT-{size}-{patch}-SigLIP{'2' if version == 2 else ''}{'-i18n' if multilingual else ''}"
    tokenizer = "siglip2" if version == 2 else "siglip-i18n" if multilingual else "siglip"
    first = {14: 224, 16: 224, 32: 0}[patch]  # the resolution that the name does not say
    return CLIPConfig(
        name=name if image_size == first else f"{name}-{image_size}",
        embedding=width,
        vision=SigLIPViTConfig(image_size, patch, width, layers, heads, mlp_ratio),
        text=SigLIPTextConfig(
            text_width,
            text_layers,
            text_heads,
            context_length=16 if name == "ViT-SO400M-14-SigLIP" and image_size == first else 64,
            vocabulary_size=SIGLIP_VOCABULARIES[tokenizer],
            mlp_ratio=text_ratio,
        ),
        activation="gelu_tanh",
        layer_norm_eps=1e-6,
        initial_logit_scale=math.log(10),
        initial_logit_bias=-10.0,
        tokenizer=tokenizer,
        resize="squash",
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    )


SIGLIP_VOCABULARIES = {"siglip": 32000, "siglip-i18n": 250000, "siglip2": 256000}

# Width, layers, heads, ratio of the MLP.
_SIGLIP_VISION = {
    "B": (768, 12, 12, 4.0),
    "L": (1024, 24, 16, 4.0),
    "SO400M": (1152, 27, 16, 3.7362),
    "gopt": (1536, 40, 16, 4.0),
}
_SIGLIP_TEXT = _SIGLIP_VISION | {"gopt": _SIGLIP_VISION["SO400M"]}

_OPEN_CLIP_TEXT = {
    512: TextConfig(512, 12, 8),
    768: TextConfig(768, 12, 12),
    1024: TextConfig(1024, 24, 16),
    1280: TextConfig(1280, 32, 20),
}

# For pictures of 32 pixels a side and short captions.  Token embeddings that start near zero are
# learned soonest, which counts in a run of minutes (docs/emoji.md).
_EMOJI_TEXT = TextConfig(width=128, layers=1, heads=2, context_length=16, token_embedding_std=0.004)

ARCHITECTURES: dict[str, CLIPConfig] = {
    config.name: config
    for config in (
        _openai("RN50", 1024, ResNetConfig(224, (3, 4, 6, 3), 64, 32), 512),
        _openai("RN101", 512, ResNetConfig(224, (3, 4, 23, 3), 64, 32), 512),
        _openai("RN50x4", 640, ResNetConfig(288, (4, 6, 10, 6), 80, 40), 640),
        _openai("RN50x16", 768, ResNetConfig(384, (6, 8, 18, 8), 96, 48), 768),
        _openai("RN50x64", 1024, ResNetConfig(448, (3, 15, 36, 10), 128, 64), 1024),
        _openai("ViT-B/32", 512, ViTConfig(224, 32, 768, 12, 12), 512),
        _openai("ViT-B/16", 512, ViTConfig(224, 16, 768, 12, 12), 512),
        _openai("ViT-L/14", 768, ViTConfig(224, 14, 1024, 24, 16), 768),
        _openai("ViT-L/14@336px", 768, ViTConfig(336, 14, 1024, 24, 16), 768),
        _open_clip("ViT-B-32", 512, ViTConfig(224, 32, 768, 12, 12), _OPEN_CLIP_TEXT[512]),
        _open_clip("ViT-B-32-256", 512, ViTConfig(256, 32, 768, 12, 12), _OPEN_CLIP_TEXT[512]),
        _open_clip("ViT-B-16", 512, ViTConfig(224, 16, 768, 12, 12), _OPEN_CLIP_TEXT[512]),
        _open_clip("ViT-L-14", 768, ViTConfig(224, 14, 1024, 24, 16), _OPEN_CLIP_TEXT[768]),
        _open_clip("ViT-L-14-336", 768, ViTConfig(336, 14, 1024, 24, 16), _OPEN_CLIP_TEXT[768]),
        _open_clip("ViT-H-14", 1024, ViTConfig(224, 14, 1280, 32, 16), _OPEN_CLIP_TEXT[1024]),
        _open_clip("ViT-g-14", 1024, ViTConfig(224, 14, 1408, 40, 16, 4.3637), _OPEN_CLIP_TEXT[1024]),
        _open_clip("ViT-bigG-14", 1280, ViTConfig(224, 14, 1664, 48, 16, 4.9231), _OPEN_CLIP_TEXT[1280]),
        *(_siglip("B", 16, side) for side in (224, 256, 384, 512)),
        *(_siglip("L", 16, side) for side in (256, 384)),
        *(_siglip("SO400M", 14, side) for side in (224, 378, 384)),
        _siglip("B", 16, 256, multilingual=True),
        _siglip("B", 32, 256, version=2),
        *(_siglip("B", 16, side, version=2) for side in (224, 256, 384, 512)),
        *(_siglip("L", 16, side, version=2) for side in (256, 384, 512)),
        *(_siglip("SO400M", 14, side, version=2) for side in (224, 378)),
        *(_siglip("SO400M", 16, side, version=2) for side in (256, 384, 512)),
        *(_siglip("gopt", 16, side, version=2) for side in (256, 384)),
        CLIPConfig(
            name="emoji",
            embedding=256,
            vision=SmallResNetConfig(32, (32, 48, 128, 256)),
            text=_EMOJI_TEXT,
        ),
        CLIPConfig(
            name="emoji-vit",
            embedding=256,
            vision=ViTConfig(32, 8, width=128, layers=4, heads=2),
            text=_EMOJI_TEXT,
        ),
    )
}
