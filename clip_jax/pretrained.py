"""Trained models by name or path, whoever wrote them, with the preprocessing that is theirs.

Weights, architecture, activation and preprocessing come together from one place, or nothing comes:
a parameter that was not found is an error, never a random number.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from clip_jax.checkpoint import load_config, load_model
from clip_jax.checkpoint_folders import location, workdir_of
from clip_jax.config import did_you_mean
from clip_jax.errors import UserError
from clip_jax.files import is_local
from clip_jax.images import Preprocess
from clip_jax.models import CLIP, CLIPConfig
from clip_jax.models.architectures import ResNetConfig, SmallResNetConfig
from clip_jax.pytorch import configs, files, hf_configs, layouts, open_clip_configs
from clip_jax.pytorch.files import StateDict
from clip_jax.pytorch.layouts import Weights
from clip_jax.tokenizer import Tokenizer, tokenize

Path = pathlib.Path | epath.Path  # the latter also in a bucket

OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS = "open_clip_config.json", ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
HF_CONFIG, HF_PREPROCESSING = "config.json", "preprocessor_config.json"
HF_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
VOCABULARY = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
OPEN_CLIP_FILES = (OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS[0])  # what is asked of the hub
HF_FILES = (HF_CONFIG, HF_PREPROCESSING, "model*.safetensors", "model.safetensors.index.json")
CONFIG_IN_HEADER = "clip_jax_config"  # of the safetensors files that we write

# Repositories of the Hugging Face hub that hold open_clip's files.  OpenAI's names stand alone; others are
# ARCHITECTURE:TAG, in open_clip's words (`open_clip.list_pretrained()`).
HUB = {
    "RN50": "timm/resnet50_clip.openai",
    "RN101": "timm/resnet101_clip.openai",
    "RN50x4": "timm/resnet50x4_clip.openai",
    "RN50x16": "timm/resnet50x16_clip.openai",
    "RN50x64": "timm/resnet50x64_clip.openai",
    "ViT-B/32": "timm/vit_base_patch32_clip_224.openai",
    "ViT-B/16": "timm/vit_base_patch16_clip_224.openai",
    "ViT-L/14": "timm/vit_large_patch14_clip_224.openai",
    "ViT-L/14@336px": "timm/vit_large_patch14_clip_336.openai",
    "ViT-B-32:laion2b_s34b_b79k": "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "ViT-B-32:datacomp_xl_s13b_b90k": "laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K",
    "ViT-B-32-256:datacomp_s34b_b86k": "laion/CLIP-ViT-B-32-256x256-DataComp-s34B-b86K",
    "ViT-B-16:laion2b_s34b_b88k": "laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
    "ViT-B-16:datacomp_xl_s13b_b90k": "laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K",
    "ViT-L-14:laion2b_s32b_b82k": "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
    "ViT-L-14:datacomp_xl_s13b_b90k": "laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K",
    "ViT-H-14:laion2b_s32b_b79k": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "ViT-g-14:laion2b_s12b_b42k": "laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
    "ViT-g-14:laion2b_s34b_b88k": "laion/CLIP-ViT-g-14-laion2B-s34B-b88K",
    "ViT-bigG-14:laion2b_s39b_b160k": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
    **{
        f"{name}:webli": f"timm/{name}"
        for name in (
            "ViT-B-16-SigLIP",
            "ViT-B-16-SigLIP-256",
            "ViT-B-16-SigLIP-384",
            "ViT-B-16-SigLIP-512",
            "ViT-B-16-SigLIP-i18n-256",
            "ViT-L-16-SigLIP-256",
            "ViT-L-16-SigLIP-384",
            "ViT-SO400M-14-SigLIP",
            "ViT-SO400M-14-SigLIP-384",
            "ViT-B-32-SigLIP2-256",
            "ViT-B-16-SigLIP2",
            "ViT-B-16-SigLIP2-256",
            "ViT-B-16-SigLIP2-384",
            "ViT-B-16-SigLIP2-512",
            "ViT-L-16-SigLIP2-256",
            "ViT-L-16-SigLIP2-384",
            "ViT-L-16-SigLIP2-512",
            "ViT-SO400M-14-SigLIP2",
            "ViT-SO400M-14-SigLIP2-378",
            "ViT-SO400M-16-SigLIP2-256",
            "ViT-SO400M-16-SigLIP2-384",
            "ViT-SO400M-16-SigLIP2-512",
            "ViT-gopt-16-SigLIP2-256",
            "ViT-gopt-16-SigLIP2-384",
        )
    },
}


def available_models() -> list[str]:
    """The names that `load` downloads."""
    return list(HUB)


def load(
    name_or_path: str | pathlib.Path,
    dtype: str = "float32",
    image_size: int | None = None,
    context_length: int | None = None,
) -> tuple[CLIP, Preprocess | None]:
    """A trained model, and what makes its input of a `PIL.Image`; None for a text encoder alone, which has no such input.

    Args:
      name_or_path: a name of `available_models()`; `hf-hub:owner/repository`; or a workdir of
        train.py, here or at gs://, a local OpenAI `.pt`, open_clip file with its open_clip_config.json, or Hugging Face folder,
        the text encoder of a diffusion pipeline among them.
      dtype: of matrix products, "float32" or "bfloat16"; parameters are float32.
      image_size: another resolution, in pixels a side: the position embedding is interpolated.
      context_length: another number of tokens: the position embedding is interpolated.

    Raises:
      UserError: the name is unknown, or the files are not what they should be; it says which and how to mend it.
    """
    config, weights, _ = read(locate(name_or_path))
    config, weights = resize(config, weights, image_size, context_length)
    config = dataclasses.replace(config, dtype=dtype)
    return layouts.build_model(config, weights), Preprocess.of(config) if config.vision else None


def get_tokenizer(name_or_path: str | pathlib.Path) -> Tokenizer:
    """What makes a model's tokens of texts: `tokenizer(texts, truncate=False) -> [B, T]`, T its context length.

    Args:
      name_or_path: of the model, as `load` takes it.

    Raises:
      UserError: as `load`, or the model is a SigLIP and its vocabulary is not there.
    """
    path = locate(name_or_path)
    return tokenizer_of(read_config(path), path)


def tokenizer_of(config: CLIPConfig, path: Path) -> Tokenizer:
    """The tokenizer of a model whose configuration was read."""
    if config.tokenizer == "openai":
        return functools.partial(tokenize, context_length=config.text.context_length)
    from clip_jax.siglip_tokenizer import SigLIPTokenizer

    return SigLIPTokenizer.read(tokenizer_files(config, path)[0], config)


def tokenizer_files(config: CLIPConfig, path: Path) -> list[pathlib.Path]:
    """SigLIP's vocabulary, `tokenizer.json`, first, and what transformers wants with it; beside the weights or from the hub."""
    folder = pathlib.Path(workdir_of(location(path))) if _is_run(path) else path if path.is_dir() else path.parent
    if not (folder / VOCABULARY[0]).is_file():
        folder = _download(configs.TOKENIZERS[config.tokenizer], str(folder / VOCABULARY[0]), VOCABULARY)
    return [folder / name for name in VOCABULARY if (folder / name).is_file()]


def read_config(path: Path) -> CLIPConfig:
    """The configuration of what is at a path, without its weights where they are not needed for it."""
    if _is_run(path):
        return load_config(path)
    config, _ = _config_beside(_weights_file(path))
    return config or read(path)[0]


def locate(name_or_path: str | pathlib.Path) -> Path:
    """The path of a model, downloaded if it has to be."""
    name = str(name_or_path)
    if not is_local(name):
        if not _is_run(path := location(name)):
            raise UserError(f"{name}: expected the bucket of a run, found no folder checkpoints there; copy other weights here")
        return path
    path = pathlib.Path(name).expanduser()
    if path.exists():
        return path
    if name.startswith("hf-hub:"):
        return _download(name.removeprefix("hf-hub:"), name, OPEN_CLIP_FILES, HF_FILES)
    if name not in HUB:
        raise UserError(
            f"{name}: no such file or folder, nor a known model{did_you_mean(name, HUB)}; "
            "clip_jax.available_models() lists them, and hf-hub:owner/repository names any other"
        )
    return _download(HUB[name], name, OPEN_CLIP_FILES)


def read(path: Path) -> tuple[CLIPConfig, Weights, str]:
    """Configuration, weights and layout of whatever is at a path."""
    if _is_run(path):
        model, _ = load_model(path)
        return model.config, layouts.model_weights(model), "orbax"
    file = _weights_file(path)
    state, about = files.read_state_dict(file)
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}  # DistributedDataParallel's prefix
    config, name = _config_beside(file)
    if config is None and "input_resolution" in state:
        config, name = configs.openai_config(state, str(file)), "openai"
    if config is None:
        raise UserError(
            f"{file}: expected {HF_CONFIG if file.name in HF_WEIGHTS else OPEN_CLIP_CONFIG} beside it, found none; "
            "tensors do not tell the activation (GELU or QuickGELU) nor the preprocessing, and a wrong one spoils results in silence"
        )
    if name == "open_clip":
        state = _as_clip(state, config)
    _check_evidence(config, state, about, str(file))
    return config, layouts.to_ours(state, layouts.LAYOUTS[name](config), config, str(file)), name


def _is_run(path: Path) -> bool:
    """Whether it is a workdir, its folder `checkpoints`, or a step in there."""
    return path.is_dir() and (workdir_of(location(path)) / "checkpoints").is_dir()


def _weights_file(path: pathlib.Path) -> pathlib.Path:
    """The file of weights at a path, which is that file or its folder."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    names = OPEN_CLIP_WEIGHTS + HF_WEIGHTS
    if file := next((path / name for name in names if (path / name).is_file()), None):
        return file
    raise UserError(
        f"{path}: expected the workdir of a run, or a folder with one of {', '.join(names)}; "
        f"found {', '.join(sorted(f.name for f in path.iterdir())[:8]) or 'nothing'}"
    )


def _config_beside(file: pathlib.Path) -> tuple[CLIPConfig | None, str]:
    """What the files beside the weights say of them, and whose words these are."""
    folder = file.parent
    if (folder / OPEN_CLIP_CONFIG).is_file() and file.name not in HF_WEIGHTS:
        return _parse(folder / OPEN_CLIP_CONFIG, open_clip_configs.open_clip_config), "open_clip"
    if (folder / HF_CONFIG).is_file() and file.name in HF_WEIGHTS:
        preprocessing = _parse(folder / HF_PREPROCESSING) if (folder / HF_PREPROCESSING).is_file() else None
        config = _parse(folder / HF_CONFIG, lambda document, where: hf_configs.hf_config(document, preprocessing, where))
        return config, "hf" if config.vision else "diffusers-text-encoder"
    return None, ""


def resize(
    config: CLIPConfig, weights: Weights, image_size: int | None, context_length: int | None
) -> tuple[CLIPConfig, Weights]:
    """The same model for another resolution or length of text, with interpolated position embeddings.

    Images: bicubic over the grid of patches, with antialiasing, the class token's embedding kept (open_clip
    `model.py:resize_pos_embed`).  Text: linear.
    """
    weights = dict(weights)
    if image_size is not None and (config.vision is None or image_size != config.vision.image_size):
        if config.vision is None:
            raise UserError(f"image_size {image_size}: {config.name} is a text encoder alone, which takes no images")
        if isinstance(config.vision, (ResNetConfig, SmallResNetConfig)):
            raise UserError(f"image_size {image_size}: {config.name} is a ResNet, made for {config.vision.image_size} pixels a side")
        old, vision = config.vision.grid, dataclasses.replace(config.vision, image_size=image_size)
        table = weights["vision/position_embedding"]
        first, grid = table[: len(table) - old**2], table[len(table) - old**2 :].reshape(old, old, -1)
        grid = jax.image.resize(jnp.asarray(grid), (vision.grid, vision.grid, grid.shape[-1]), "cubic")
        weights["vision/position_embedding"] = np.concatenate([first, np.asarray(grid).reshape(vision.grid**2, -1)])
        config = dataclasses.replace(config, vision=vision)
    if context_length not in (None, config.text.context_length):
        text, table = dataclasses.replace(config.text, context_length=context_length), jnp.asarray(weights["text/position_embedding"])
        shape = (context_length, table.shape[1])
        weights["text/position_embedding"] = np.asarray(jax.image.resize(table, shape, "linear", antialias=False))
        config = dataclasses.replace(config, text=text)
    return config, weights


def _download(repository: str, name: str, *choices: tuple[str, ...]) -> pathlib.Path:
    """The folder of a hub repository in huggingface_hub's own cache; what is there is not asked for again.

    The first of the `choices` of files whose first file is there is taken.
    """
    import huggingface_hub

    for wanted in choices:
        try:
            folder = pathlib.Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(wanted)))
        except (OSError, ValueError) as error:  # what its many errors have in common
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{name}: cannot get {repository} from the Hugging Face hub and its cache does not hold it ({reason}); where there "
                f"is a network run `hf download {repository}`, then copy the cache, or the folder that it prints"
            ) from error
        if (folder / wanted[0]).is_file():
            return folder
    found = ", ".join(sorted(f.name for f in folder.iterdir())) or "nothing"
    raise UserError(f"{name}: expected {' or '.join(wanted[0] for wanted in choices)} in {repository} of the hub; found {found}")


def _parse(file: pathlib.Path, interpret: Callable = lambda document, where: document):
    try:
        document = json.loads(file.read_text())
        if not isinstance(document, dict):
            raise ValueError(f"it holds {type(document).__name__}, expected an object")
        return interpret(document, str(file))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not the configuration of a CLIP ({type(error).__name__}: {error}); copy or download it again") from error


def _as_clip(state: StateDict, config: CLIPConfig) -> StateDict:
    """The names of open_clip's `CLIP` for a text tower that was saved as a module of its own (`CustomTextCLIP`)."""
    if config.tokenizer != "openai" or "text.token_embedding.weight" not in state:
        return state
    return {name.removeprefix("text."): tensor for name, tensor in state.items()}


def _check_evidence(config: CLIPConfig, state: StateDict, about: dict[str, str], where: str) -> None:
    """Refuses a configuration that the weights themselves contradict."""
    if "input_resolution" in state and config.activation != "quick_gelu":
        raise UserError(
            f"{where}: these are OpenAI's weights (input_resolution is among them), trained with quick_gelu, and the "
            f"configuration beside them says {config.activation}; set quick_gelu to true in it"
        )
    if CONFIG_IN_HEADER in about:
        written = CLIPConfig.from_dict(json.loads(about[CONFIG_IN_HEADER]))
        expected = written.identity()
        for name, found in config.identity().items():
            if found != expected[name]:
                raise UserError(
                    f"{where}: the configuration beside it says {name} {found!r}, but these weights were written with "
                    f"{expected[name]!r}; restore the configuration"
                )
