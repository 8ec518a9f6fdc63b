"""How others name the parameters of a CLIP: one table a layout, read in both directions.

A table has one entry for each of our parameters and running statistics.  Reading and writing use the
same entries, so that a round trip is exact, and refuse whatever the table does not hold.

Sources: openai/CLIP `clip/model.py`; open_clip `model.py`, `transformer.py`; timm `vision_transformer.py`,
`layers/attention_pool.py`; transformers `models/clip/modeling_clip.py`, `models/siglip/modeling_siglip.py`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from clip_jax.errors import UserError
from clip_jax.models import CLIP, CLIPConfig
from clip_jax.models.architectures import ResNetConfig, SigLIPTextConfig, SigLIPViTConfig, SmallResNetConfig, ViTConfig
from clip_jax.pytorch.files import StateDict
from clip_jax.step import abstract_model, split_model


@dataclasses.dataclass(frozen=True)
class Form:
    """How an array of theirs becomes ours, and back; both only move values."""

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


SAME = Form(lambda x: x, lambda x: x)
LINEAR = Form(lambda x: x.T, lambda x: x.T)  # [out, in] <-> [in, out]
CONVOLUTION = Form(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW <-> HWIO
SINGLE = Form(lambda x: x.reshape(x.shape[1:]), lambda x: x[None])  # one leading axis of length 1
PROBE = Form(lambda x: x.reshape(-1), lambda x: x[None, None])


def _patches_to_theirs(x: np.ndarray) -> np.ndarray:
    side = round((len(x) / 3) ** 0.5)
    return x.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


# [width, channel, row, column] <-> [(row, column, channel), width]
PATCHES = Form(lambda x: x.transpose(2, 3, 1, 0).reshape(-1, len(x)), _patches_to_theirs)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter of ours, and the tensors of theirs that make it, joined along their first axis."""

    ours: str  # the path, with slashes
    theirs: tuple[str, ...]
    form: Form = SAME
    shares: tuple[int, ...] = (1,)  # of the first axis, that each of theirs has


@dataclasses.dataclass(frozen=True)
class Layout:
    """A table, and the keys of theirs that say nothing: those of a pattern, and those that must be written."""

    name: str
    entries: list[Entry]
    benign: str = "$^"  # a regular expression
    constants: StateDict = dataclasses.field(default_factory=dict)


Weights = dict[str, np.ndarray]  # parameters and running statistics of ours, by their paths


def to_ours(state: StateDict, layout: Layout, config: CLIPConfig, where: str) -> Weights:
    """Our weights, in float32, from a state dict.

    Raises:
      UserError: a tensor is missing, unexpected or of another shape, by name.
    """
    shapes = weight_shapes(config)
    entries = [entry for entry in layout.entries if entry.ours in shapes]
    problems, known = [], set()
    for entry in entries:
        known |= set(entry.theirs)
        for name, shape in zip(entry.theirs, _their_shapes(entry, shapes[entry.ours])):
            if name not in state:
                problems.append(f"{name} {shape} is missing")
            elif state[name].shape != shape:
                problems.append(f"{name} is {state[name].shape}, expected {shape}")
    for name in state.keys() - known:
        if not re.fullmatch(layout.benign, name):
            problems.append(f"{name} {state[name].shape} is unexpected")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(
            f"{where}: not the weights of {config.name} as {layout.name} names them: {'; '.join(sorted(problems)[:5])}{more}; "
            "the configuration beside them must be theirs"
        )
    joined = lambda names: state[names[0]] if len(names) == 1 else np.concatenate([state[n] for n in names])
    return {e.ours: np.array(e.form.ours(joined(e.theirs)), np.float32, order="C") for e in entries}


def to_theirs(weights: Weights, layout: Layout) -> StateDict:
    """The state dict that holds these weights."""
    state = {}
    for entry in layout.entries:
        array = entry.form.theirs(weights[entry.ours])
        ends = np.cumsum(entry.shares) * (len(array) // sum(entry.shares) if array.ndim else 0)
        parts = np.split(array, ends[:-1]) if len(entry.theirs) > 1 else [array]
        for name, part in zip(entry.theirs, parts, strict=True):
            state[name] = np.array(part, order="C")
    return state | layout.constants


@functools.lru_cache(maxsize=8)  # tracing a large model takes seconds
def weight_shapes(config: CLIPConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each of our weights."""
    _, params, batch_stats = split_model(abstract_model(config))
    return {path: leaf.shape for path, leaf in (_flatten(params) | _flatten(batch_stats)).items()}


def model_weights(model: CLIP) -> Weights:
    """The weights of a model."""
    _, params, batch_stats = split_model(model)
    return {path: np.asarray(leaf) for path, leaf in (_flatten(params) | _flatten(batch_stats)).items()}


def build_model(config: CLIPConfig, weights: Weights) -> CLIP:
    """A model with these weights, all of them, ready for inference."""
    graphdef, params, batch_stats = split_model(abstract_model(config))
    filled = [
        jax.tree.map_with_path(lambda path, leaf: jax.numpy.asarray(weights[_name(path)], leaf.dtype), tree)
        for tree in (params, batch_stats)
    ]
    model = nnx.merge(graphdef, *filled)
    model.eval()
    return model


def _flatten(tree) -> dict:
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _name(path) -> str:
    return "/".join(str(part.key) for part in path)


def _their_shapes(entry: Entry, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    whole = entry.form.theirs(np.broadcast_to(np.float32(0), shape)).shape
    if len(entry.theirs) == 1:
        return [whole]
    return [(whole[0] * share // sum(entry.shares), *whole[1:]) for share in entry.shares]


def openai_layout(config: CLIPConfig) -> Layout:
    """openai/CLIP's, which open_clip's `CLIP` shares: ViTs and ResNets."""
    _expect_clip("openai", config)
    match config.vision:
        case ViTConfig():
            vision = [
                Entry("vision/patch_embedding/kernel", ("visual.conv1.weight",), PATCHES),
                Entry("vision/class_embedding", ("visual.class_embedding",)),
                Entry("vision/position_embedding", ("visual.positional_embedding",)),
                *_norm("vision/ln_pre", "visual.ln_pre"),
                *_blocks("vision", "visual.transformer.resblocks", config.vision.layers, _openai_block),
                *_norm("vision/ln_post", "visual.ln_post"),
                Entry("vision/projection", ("visual.proj",)),
            ]
        case ResNetConfig():
            vision = _openai_resnet(config.vision)
    entries = [*vision, *_openai_text(config, ""), Entry("logit_scale", ("logit_scale",))]
    counters = {
        name.replace("running_mean", "num_batches_tracked"): np.array(0)
        for entry in entries
        for name in entry.theirs
        if name.endswith("running_mean")
    }
    return Layout(
        "openai", entries, r"input_resolution|context_length|vocab_size|attn_mask|.*\.num_batches_tracked", counters
    )


def open_clip_layout(config: CLIPConfig) -> Layout:
    """open_clip's: as OpenAI's, and for SigLIP a tower of timm's beside a text tower of its own."""
    if not isinstance(config.vision, SigLIPViTConfig):
        _expect_clip("open_clip", config)
        return dataclasses.replace(openai_layout(config), name="open_clip")
    entries = [
        Entry("vision/patch_embedding/kernel", ("visual.trunk.patch_embed.proj.weight",), PATCHES),
        Entry("vision/patch_embedding/bias", ("visual.trunk.patch_embed.proj.bias",)),
        Entry("vision/position_embedding", ("visual.trunk.pos_embed",), SINGLE),
        *_blocks("vision", "visual.trunk.blocks", config.vision.layers, _timm_block),
        *_norm("vision/ln_post", "visual.trunk.norm"),
        Entry("vision/pool/probe", ("visual.trunk.attn_pool.latent",), PROBE),
        *_linear("vision/pool/qkv", "visual.trunk.attn_pool.q", "visual.trunk.attn_pool.kv", shares=(1, 2)),
        *_linear("vision/pool/out", "visual.trunk.attn_pool.proj"),
        *_norm("vision/pool/ln", "visual.trunk.attn_pool.norm"),
        *_linear("vision/pool/mlp/up", "visual.trunk.attn_pool.mlp.fc1"),
        *_linear("vision/pool/mlp/down", "visual.trunk.attn_pool.mlp.fc2"),
        *_openai_text(config, "text."),
        Entry("logit_scale", ("logit_scale",)),
        Entry("logit_bias", ("logit_bias",)),
    ]
    return Layout("open_clip", entries, r"text\.attn_mask")


def hf_layout(config: CLIPConfig) -> Layout:
    """transformers' CLIPModel and SiglipModel."""
    if isinstance(config.vision, SigLIPViTConfig):
        return Layout("hf", _hf_siglip(config))
    _expect_clip("hf", config)
    if not isinstance(config.vision, ViTConfig):
        raise UserError(
            f"transformers has no CLIP with a ResNet tower, so --to hf cannot express {config.name}; take --to openai or open_clip"
        )
    embeddings = "vision_model.embeddings"
    entries = [
        Entry("vision/patch_embedding/kernel", (f"{embeddings}.patch_embedding.weight",), PATCHES),
        Entry("vision/class_embedding", (f"{embeddings}.class_embedding",)),
        Entry("vision/position_embedding", (f"{embeddings}.position_embedding.weight",)),
        *_norm("vision/ln_pre", "vision_model.pre_layrnorm"),  # their spelling
        *_blocks("vision", "vision_model.encoder.layers", config.vision.layers, _hf_block),
        *_norm("vision/ln_post", "vision_model.post_layernorm"),
        Entry("vision/projection", ("visual_projection.weight",), LINEAR),
        *_hf_text(config),
        Entry("text/projection", ("text_projection.weight",), LINEAR),
        Entry("logit_scale", ("logit_scale",)),
    ]
    return Layout("hf", entries, r".*\.position_ids")


def text_encoder_layout(config: CLIPConfig) -> Layout:
    """transformers' CLIPTextModel, which diffusion pipelines condition on: the text tower without projection.

    What is a text tower alone already keeps its projection, and is a CLIPTextModelWithProjection.
    """
    _expect_clip("diffusers-text-encoder", config)
    projected = config.vision is None and config.embedding
    projection = [Entry("text/projection", ("text_projection.weight",), LINEAR)] if projected else []
    return Layout("diffusers-text-encoder", _hf_text(config) + projection, r".*\.position_ids")


def _expect_clip(layout: str, config: CLIPConfig) -> None:
    """Refuses what the layout has no names for."""
    if isinstance(config.text, SigLIPTextConfig):
        raise UserError(f"the layout {layout} cannot express SigLIP ({config.name}); take open_clip or hf")
    if config.vision is None and layout != "diffusers-text-encoder":
        raise UserError(f"{config.name} is a text encoder alone, which {layout} cannot express; take orbax or diffusers-text-encoder")
    if isinstance(config.vision, SmallResNetConfig) and layout != "diffusers-text-encoder":
        raise UserError(
            f"no PyTorch library has the image tower of {config.name} (SmallResNet), so {layout} cannot express it; "
            "diffusers-text-encoder can take its text tower"
        )


def _openai_text(config: CLIPConfig, prefix: str) -> list[Entry]:
    if isinstance(config.text, SigLIPTextConfig):
        projection = _linear("text/projection", f"{prefix}text_projection")
    else:
        projection = [Entry("text/projection", (f"{prefix}text_projection",))]
    return [
        Entry("text/token_embedding", (f"{prefix}token_embedding.weight",)),
        Entry("text/position_embedding", (f"{prefix}positional_embedding",)),
        *_blocks("text", f"{prefix}transformer.resblocks", config.text.layers, _openai_block),
        *_norm("text/ln_final", f"{prefix}ln_final"),
        *projection,
    ]


def _openai_resnet(config: ResNetConfig) -> list[Entry]:
    entries = []
    for i in range(3):
        entries += _convolution(f"vision/stem/{i}", f"visual.conv{i + 1}", f"visual.bn{i + 1}")
    index = 0
    for stage, count in enumerate(config.layers):
        for block in range(count):
            ours, theirs = f"vision/blocks/{index}", f"visual.layer{stage + 1}.{block}"
            for part, k in (("reduce", 1), ("convolve", 2), ("expand", 3)):
                entries += _convolution(f"{ours}/{part}", f"{theirs}.conv{k}", f"{theirs}.bn{k}")
            if block == 0:
                entries += _convolution(f"{ours}/shortcut", f"{theirs}.downsample.0", f"{theirs}.downsample.1")
            index += 1
    for part, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "c_proj")):
        entries += _linear(f"vision/pool/{part}", f"visual.attnpool.{name}")
    return [*entries, Entry("vision/pool/position_embedding", ("visual.attnpool.positional_embedding",))]


def _hf_text(config: CLIPConfig) -> list[Entry]:
    return [
        Entry("text/token_embedding", ("text_model.embeddings.token_embedding.weight",)),
        Entry("text/position_embedding", ("text_model.embeddings.position_embedding.weight",)),
        *_blocks("text", "text_model.encoder.layers", config.text.layers, _hf_block),
        *_norm("text/ln_final", "text_model.final_layer_norm"),
    ]


def _hf_siglip(config: CLIPConfig) -> list[Entry]:
    embeddings, head = "vision_model.embeddings", "vision_model.head"
    return [
        Entry("vision/patch_embedding/kernel", (f"{embeddings}.patch_embedding.weight",), PATCHES),
        Entry("vision/patch_embedding/bias", (f"{embeddings}.patch_embedding.bias",)),
        Entry("vision/position_embedding", (f"{embeddings}.position_embedding.weight",)),
        *_blocks("vision", "vision_model.encoder.layers", config.vision.layers, _hf_block),
        *_norm("vision/ln_post", "vision_model.post_layernorm"),
        Entry("vision/pool/probe", (f"{head}.probe",), PROBE),
        Entry("vision/pool/qkv/kernel", (f"{head}.attention.in_proj_weight",), LINEAR),
        Entry("vision/pool/qkv/bias", (f"{head}.attention.in_proj_bias",)),
        *_linear("vision/pool/out", f"{head}.attention.out_proj"),
        *_norm("vision/pool/ln", f"{head}.layernorm"),
        *_linear("vision/pool/mlp/up", f"{head}.mlp.fc1"),
        *_linear("vision/pool/mlp/down", f"{head}.mlp.fc2"),
        *_hf_text(config),
        *_linear("text/projection", "text_model.head"),
        Entry("logit_scale", ("logit_scale",), SINGLE),
        Entry("logit_bias", ("logit_bias",), SINGLE),
    ]


def _blocks(tower: str, theirs: str, layers: int, block: Callable[[str, str], list[Entry]]) -> list[Entry]:
    return [entry for i in range(layers) for entry in block(f"{tower}/transformer/blocks/{i}", f"{theirs}.{i}")]


def _openai_block(ours: str, theirs: str) -> list[Entry]:
    return [
        *_norm(f"{ours}/ln_1", f"{theirs}.ln_1"),
        Entry(f"{ours}/attention/qkv/kernel", (f"{theirs}.attn.in_proj_weight",), LINEAR),
        Entry(f"{ours}/attention/qkv/bias", (f"{theirs}.attn.in_proj_bias",)),
        *_linear(f"{ours}/attention/out", f"{theirs}.attn.out_proj"),
        *_norm(f"{ours}/ln_2", f"{theirs}.ln_2"),
        *_linear(f"{ours}/mlp/up", f"{theirs}.mlp.c_fc"),
        *_linear(f"{ours}/mlp/down", f"{theirs}.mlp.c_proj"),
    ]


def _timm_block(ours: str, theirs: str) -> list[Entry]:
    return [
        *_norm(f"{ours}/ln_1", f"{theirs}.norm1"),
        *_linear(f"{ours}/attention/qkv", f"{theirs}.attn.qkv"),
        *_linear(f"{ours}/attention/out", f"{theirs}.attn.proj"),
        *_norm(f"{ours}/ln_2", f"{theirs}.norm2"),
        *_linear(f"{ours}/mlp/up", f"{theirs}.mlp.fc1"),
        *_linear(f"{ours}/mlp/down", f"{theirs}.mlp.fc2"),
    ]


def _hf_block(ours: str, theirs: str) -> list[Entry]:
    query_key_value = [f"{theirs}.self_attn.{part}_proj" for part in "qkv"]
    return [
        *_norm(f"{ours}/ln_1", f"{theirs}.layer_norm1"),
        *_linear(f"{ours}/attention/qkv", *query_key_value),
        *_linear(f"{ours}/attention/out", f"{theirs}.self_attn.out_proj"),
        *_norm(f"{ours}/ln_2", f"{theirs}.layer_norm2"),
        *_linear(f"{ours}/mlp/up", f"{theirs}.mlp.fc1"),
        *_linear(f"{ours}/mlp/down", f"{theirs}.mlp.fc2"),
    ]


def _norm(ours: str, theirs: str) -> list[Entry]:
    return [Entry(f"{ours}/scale", (f"{theirs}.weight",)), Entry(f"{ours}/bias", (f"{theirs}.bias",))]


def _linear(ours: str, *theirs: str, shares: tuple[int, ...] | None = None) -> list[Entry]:
    shares = shares or (1,) * len(theirs)
    return [
        Entry(f"{ours}/kernel", tuple(f"{t}.weight" for t in theirs), LINEAR, shares),
        Entry(f"{ours}/bias", tuple(f"{t}.bias" for t in theirs), SAME, shares),
    ]


def _convolution(ours: str, convolution: str, norm: str) -> list[Entry]:
    return [
        Entry(f"{ours}/kernel", (f"{convolution}.weight",), CONVOLUTION),
        *_norm(f"{ours}/norm", norm),
        Entry(f"{ours}/norm/mean", (f"{norm}.running_mean",)),
        Entry(f"{ours}/norm/var", (f"{norm}.running_var",)),
    ]


LAYOUTS = {
    "openai": openai_layout,
    "open_clip": open_clip_layout,
    "hf": hf_layout,
    "diffusers-text-encoder": text_encoder_layout,
}
