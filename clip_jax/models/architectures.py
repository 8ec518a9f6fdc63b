"""Every number that makes one CLIP differ from another, and the named architectures.

An architecture travels with its weights: checkpoints hold a `CLIPConfig` whole, preprocessing and
all, because an activation or a mean lost on reload has falsified published results (open_clip#771).

Sources: openai/CLIP `clip/model.py`; Radford et al. 2021 (arXiv 2103.00020), tables 19 and 20.
"""

import dataclasses

from clip_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A vision transformer."""

    image_size: int  # pixels a side
    patch_size: int  # pixels a side of one token
    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0

    def __post_init__(self):
        _check_heads("vision", self.width, self.heads)
        if self.image_size % self.patch_size:
            raise UserError(
                f"model.vision.image_size {self.image_size} is not a multiple of patch_size {self.patch_size}; "
                f"the nearest is {self.image_size // self.patch_size * self.patch_size}"
            )


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """The paper's ModifiedResNet: three-convolution stem, anti-aliased strides, attention pooling."""

    image_size: int  # pixels a side
    layers: tuple[int, ...]  # bottleneck blocks of each stage
    width: int  # channels out of the stem, and inside the blocks of the first stage
    heads: int  # of the attention pool

    def __post_init__(self):
        _check_heads("vision", self.width * 4 * 2 ** (len(self.layers) - 1), self.heads)
        if self.image_size % self.stride:
            raise UserError(
                f"model.vision.image_size {self.image_size} is not a multiple of {self.stride}, the strides of "
                f"{len(self.layers)} stages; the nearest is {self.image_size // self.stride * self.stride}"
            )

    @property
    def stride(self) -> int:
        """Pixels a side of one position of the last feature map."""
        return 4 * 2 ** (len(self.layers) - 1)


@dataclasses.dataclass(frozen=True)
class SmallResNetConfig:
    """A residual network for small pictures: a convolution, then basic blocks, each with stride 2."""

    image_size: int  # pixels a side
    channels: tuple[int, ...]  # out of the convolution, and out of each block

    def __post_init__(self):
        if self.image_size % 2 ** len(self.channels):
            stride = 2 ** len(self.channels)
            raise UserError(
                f"model.vision.image_size {self.image_size} is not a multiple of {stride}, the strides of "
                f"{len(self.channels)} channels; the nearest is {self.image_size // stride * stride}"
            )


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

    def __post_init__(self):
        _check_heads("text", self.width, self.heads)


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Two towers, the space they share, and how pictures enter."""

    name: str
    embedding: int  # width of the shared space
    vision: ViTConfig | ResNetConfig | SmallResNetConfig
    text: TextConfig
    activation: str = "quick_gelu"  # or "gelu", "gelu_tanh"
    layer_norm_eps: float = 1e-5
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    dtype: str = "bfloat16"  # of matrix products, or "float32"; parameters, norms, softmax and loss are float32

    def __post_init__(self):
        for field, choices in (("activation", ("quick_gelu", "gelu", "gelu_tanh")), ("dtype", ("bfloat16", "float32"))):
            if getattr(self, field) not in choices:
                raise UserError(f"model.{field} is {getattr(self, field)!r}, expected one of {', '.join(choices)}")

    def to_dict(self) -> dict:
        """As plain values, for a configuration file or a checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "CLIPConfig":
        """The inverse of `to_dict`; lists, as JSON has them, become tuples."""
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        vision = {k: tuple(v) if isinstance(v, list) else v for k, v in values["vision"].items()}
        towers = (ViTConfig, ResNetConfig, SmallResNetConfig)
        (tower,) = (t for t in towers if {field.name for field in dataclasses.fields(t)} == vision.keys())
        return cls(**values | {"vision": tower(**vision), "text": TextConfig(**values["text"])})


def _check_heads(tower: str, width: int, heads: int) -> None:
    if width % heads:
        raise UserError(f"model.{tower}.width {width} is not a multiple of model.{tower}.heads {heads}")


def _openai(name: str, embedding: int, vision: ViTConfig | ResNetConfig, text_width: int) -> CLIPConfig:
    text = TextConfig(width=text_width, layers=12, heads=text_width // 64)
    return CLIPConfig(name=name, embedding=embedding, vision=vision, text=text)


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
