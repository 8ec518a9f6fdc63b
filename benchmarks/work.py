"""What both sides of a benchmark are given: architectures, weights, pictures and captions, the same from fixed seeds."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

SOT, EOT = 49406, 49407
CAPTIONS = ("full", "real")
# Tokens of real captions, SOT and EOT included: exp(normal(log MEDIAN, SPREAD)), rounded and clipped to SHORTEST and the context.
MEDIAN, SPREAD, SHORTEST = 13, 0.35, 5


def pictures(count: int, side: int) -> np.ndarray:
    """Random pixels, uint8 [B, S, S, 3]."""
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


def caption_lengths(count: int, kind: str, context: int) -> np.ndarray:
    """Tokens of each caption: all the context, or as real ones have."""
    if kind == "full":
        return np.full(count, context)
    drawn = np.exp(np.random.default_rng(1).normal(np.log(MEDIAN), SPREAD, count))
    return np.clip(np.rint(drawn).astype(int), min(SHORTEST, context), context)


def captions(count: int, kind: str, context: int) -> np.ndarray:
    """SOT, random tokens, EOT, and zeros after it: int32 [B, T]."""
    lengths = caption_lengths(count, kind, context)
    tokens = np.random.default_rng(2).integers(1, SOT, (count, context), np.int32)
    place = np.arange(context)[None]
    tokens[:, 0] = SOT
    tokens = np.where(place < lengths[:, None] - 1, tokens, 0).astype(np.int32)
    tokens[np.arange(count), lengths - 1] = EOT
    return tokens


def about_captions(count: int, context: int) -> dict[str, Any]:
    """Of the real ones, for the record."""
    lengths = caption_lengths(count, "real", context)
    law = f"lognormal, median {MEDIAN} tokens with SOT and EOT, sigma {SPREAD}, clipped to {min(SHORTEST, context)}..{context}"
    return {"law": law, "mean_tokens": float(lengths.mean()), "longest": int(lengths.max()), "context": context}


def architecture(name: str, dtype: str):
    """One of ours by name, or "toy", for trying things out."""
    import dataclasses

    from clip_jax.models.architectures import ARCHITECTURES, ViTConfig

    if name == "toy":
        config = dataclasses.replace(ARCHITECTURES["emoji-vit"], name="toy", vision=ViTConfig(32, 16, width=64, layers=2, heads=1))
    else:
        config = ARCHITECTURES[name]
    return dataclasses.replace(config, dtype=dtype)


def make_weights(name: str, folder: pathlib.Path) -> None:
    """Writes open_clip's configuration of an architecture, and the weights that it draws for it, into a folder.

    In a process of its own: it imports both sides.
    """
    import stand_ins

    stand_ins.install()
    open_clip = import_open_clip()
    import torch

    from clip_jax.pytorch.open_clip_configs import to_open_clip

    config = architecture(name, "float32")
    document = to_open_clip(config)
    (folder / "open_clip.json").write_text(json.dumps(document))
    torch.manual_seed(0)
    model = open_clip.CLIP(**document["model_cfg"])
    np.savez(folder / "weights.npz", **{key: tensor.numpy() for key, tensor in model.state_dict().items()})


def prepare_weights(name: str, folder: pathlib.Path) -> str:
    """`make_weights`, and an empty string; or why there are none, so that ours takes its own."""
    # A checkout on PYTHONPATH will do: it is importable, though no installed distribution has its name.
    if absent := [library for library in ("torch", "open_clip") if importlib.util.find_spec(library) is None]:
        return f"{' and '.join(absent)}: not installed"
    command = [sys.executable, "-W", "ignore", __file__, name, str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    lines = found.stderr.strip().splitlines()
    return "" if found.returncode == 0 else (lines[-1] if lines else f"status {found.returncode}")


def our_params(config, folder: pathlib.Path) -> Any:
    """Our parameters with open_clip's weights of the folder; None where there are none."""
    if not (folder / "weights.npz").exists():
        return None
    from clip_jax.pytorch import layouts
    from clip_jax.step import split_model

    weights = layouts.to_ours(dict(np.load(folder / "weights.npz")), layouts.LAYOUTS["open_clip"](config), config, "open_clip")
    return split_model(layouts.build_model(config, weights))[1]


def import_open_clip() -> Any:
    """open_clip's `model` module, also where torchvision's wheel is for GPUs and there is none."""
    sys.path.append(str(pathlib.Path(__file__).parents[1] / "tests"))
    from without_gpu import torchvision_without_gpu

    operators = torchvision_without_gpu()
    import open_clip.model

    open_clip.model.operators = operators  # which end with this object
    return open_clip.model


def open_clips(folder: pathlib.Path) -> tuple[Any, dict, str]:
    """open_clip's model with the weights of the folder, on the device; its configuration; and the device."""
    import torch

    module = import_open_clip()
    if not (folder / "open_clip.json").exists():
        raise RuntimeError("the weights could not be made")
    document = json.loads((folder / "open_clip.json").read_text())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as open_clip's training sets them
    model = module.CLIP(**document["model_cfg"])
    weights = np.load(folder / "weights.npz")
    model.load_state_dict({name: torch.from_numpy(weights[name]) for name in weights.files}, strict=True)
    return model.to(device), document, device


def ready_pictures(count: int, document: dict, device: str) -> Any:
    """The pictures as open_clip takes them, float32 [B, 3, S, S], normalised and on the device already: in its favour."""
    import torch

    about = document["preprocess_cfg"]
    x = torch.from_numpy(pictures(count, document["model_cfg"]["vision_cfg"]["image_size"])).to(device).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(about[name], device=device)[None, :, None, None] for name in ("mean", "std"))
    return ((x - mean) / std).contiguous()


def check_cosines(record: dict[str, Any]) -> None:
    """Says how far ours is from the others, and ends with an error where that is more than the record's tolerance."""
    limit = record["agreement"]["tolerance"]
    for side, found in record["agreement"].items():
        if isinstance(found, dict):
            print(f"  largest difference of a cosine from 1, ours and {side}'s: {found['1 - cosine']:.1e}")
            if not found["1 - cosine"] <= limit:
                sys.exit(f"error: {side}: features differ, expected at most {limit:.0e}")


if __name__ == "__main__":
    make_weights(sys.argv[1], pathlib.Path(sys.argv[2]))
