"""How far ours is from the PyTorch originals, and they from each other.  Remakes docs/parity.md:

    python tests/parity.py [MODEL...]

With names only their rows are measured, and the others stay.  The largest needs 24 GB of memory.

Each number is the largest difference over the standard deviation of the original's array, in float32, on
random weights that show every loss (tests/weights.py), for random pictures and texts.
"""

import dataclasses
import functools
import gc
import pathlib
import sys

import jax
import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from weights import rich_weights
from without_gpu import torchvision_without_gpu

from clip_jax.convert import sample_inputs
from clip_jax.models import ARCHITECTURES, CLIPConfig
from clip_jax.models.architectures import ResNetConfig, SigLIPViTConfig
from clip_jax.pytorch import layouts, originals

QUANTITIES = (
    "image_features",
    "text_features",
    "logits",
    "image_last",
    "image_penultimate",
    "text_last",
    "text_penultimate",
)
# Those of one architecture at another resolution are left out, and SigLIP's of which timm has a larger brother.
MODELS = (
    ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px")
    + ("ViT-B-32", "ViT-L-14", "ViT-H-14", "ViT-g-14", "ViT-bigG-14")
    + ("ViT-B-16-SigLIP", "ViT-L-16-SigLIP-256", "ViT-SO400M-14-SigLIP", "ViT-B-16-SigLIP2", "ViT-gopt-16-SigLIP2-256")
)
Outputs = dict[str, np.ndarray]


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(found, np.float64) - expected).max() / expected.std())


def our_outputs(config: CLIPConfig, images: jax.Array, tokens: jax.Array) -> Outputs:
    model = layouts.build_model(config, rich_weights(config))
    transformer = not isinstance(config.vision, ResNetConfig)

    @jax.jit
    def run(model, images, tokens):
        outputs = {
            "image_features": model.encode_image(images),
            "text_features": model.encode_text(tokens),
            "logits": model(images, tokens)[0],
            "image_last": model.image_tokens(images),
            "text_last": model.text_hidden_states(tokens),
            "text_penultimate": model.text_hidden_states(tokens, layer=-2, final_layer_norm=False),
        }
        return outputs | ({"image_penultimate": model.image_tokens(images, layer=-2)} if transformer else {})

    return {name: np.asarray(array) for name, array in run(model, images, tokens).items()}


def their_outputs(layout: str, config: CLIPConfig, images: jax.Array, tokens: jax.Array, double: bool = False) -> Outputs:
    import torch

    # The weights are made anew each time, so that they are in memory once.
    model = originals.build(layout, config, layouts.to_theirs(rich_weights(config), layouts.LAYOUTS[layout](config)))
    pixels = torch.from_numpy(np.asarray(images).transpose(0, 3, 1, 2).copy())
    if double:
        model, pixels = model.double(), pixels.double()
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):  # OpenAI's own goes by way of float32
                module.forward = functools.partial(torch.nn.LayerNorm.forward, module)
    ids = torch.from_numpy(np.asarray(tokens).astype(np.int64))
    if layout == "hf":
        image_blocks, text_blocks = model.vision_model.encoder.layers, model.text_model.encoder.layers
        final_norm = model.text_model.final_layer_norm
    else:
        visual, text = model.visual, getattr(model, "text", model)
        image_blocks = visual.trunk.blocks if hasattr(visual, "trunk") else getattr(visual, "transformer", visual)
        image_blocks = getattr(image_blocks, "resblocks", image_blocks)
        text_blocks, final_norm = text.transformer.resblocks, text.ln_final
    resnet = isinstance(config.vision, ResNetConfig)
    image_states, text_states = [], []
    keep = lambda states: lambda module, inputs, output: states.append(output[0] if isinstance(output, tuple) else output)
    for blocks, states in ((model.visual.layer4 if resnet else image_blocks, image_states), (text_blocks, text_states)):
        for block in blocks:
            block.register_forward_hook(keep(states))
    with torch.no_grad():
        if layout == "hf":
            features = model.get_image_features(pixels), model.get_text_features(ids)
        else:
            features = model.encode_image(pixels), model.encode_text(ids)
        unit = [x / x.norm(dim=1, keepdim=True) for x in features]
        logits = model.logit_scale.exp() * unit[0] @ unit[1].T
        if config.initial_logit_bias is not None:
            logits = logits + model.logit_bias
        batch_first = lambda x: x if x.shape[0] == len(tokens) else x.transpose(0, 1)
        text_states = [batch_first(x) for x in text_states]
        outputs = {
            "image_features": features[0],
            "text_features": features[1],
            "logits": logits,
            "text_last": final_norm(text_states[-1]),
            "text_penultimate": text_states[-2],
        }
        if resnet:
            outputs["image_last"] = image_states[-1].flatten(2).transpose(1, 2)
        else:
            outputs |= {"image_last": batch_first(image_states[-1]), "image_penultimate": batch_first(image_states[-2])}
    return {name: array.numpy() for name, array in outputs.items()}


def layouts_of(config: CLIPConfig) -> list[str]:
    if isinstance(config.vision, SigLIPViTConfig):
        # open_clip takes SigLIP's tower from timm, whole.
        whole = any(c.vision == config.vision for c in ARCHITECTURES.values())
        return ["hf", "open_clip"] if whole else ["hf"]
    if isinstance(config.vision, ResNetConfig):
        return ["openai", "open_clip"]
    return ["openai", "open_clip", "hf"] if config.activation == "quick_gelu" else ["open_clip", "hf"]


def measure(config: CLIPConfig, count: int = 4) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Errors of ours against each original, and the largest of the originals among themselves."""
    config = dataclasses.replace(config, dtype="float32")
    images, tokens = sample_inputs(config, count)
    theirs = {}
    for layout in layouts_of(config):
        theirs[layout] = their_outputs(layout, config, images, tokens)
        gc.collect()
    if isinstance(config.vision, ResNetConfig):
        # In float32 they run the same convolutions, so what rounding does shows against float64 alone.
        theirs["openai in float64"] = their_outputs("openai", config, images, tokens, double=True)
    ours = our_outputs(config, images, tokens)
    errors = {layout: {q: relative_error(ours[q], theirs[layout][q]) for q in ours} for layout in theirs}
    among = {
        q: max([relative_error(theirs[a][q], theirs[b][q]) for a in theirs for b in theirs if a < b], default=0.0)
        for q in ours
    }
    return errors, among


def shallow(name: str, layers: int = 2) -> CLIPConfig:
    """A full-width architecture with few layers."""
    config = ARCHITECTURES[name]
    return dataclasses.replace(
        config,
        name=f"{name}, {layers} layers a tower",
        vision=dataclasses.replace(config.vision, layers=layers),
        text=dataclasses.replace(config.text, layers=layers, vocabulary_size=min(config.text.vocabulary_size, 49408)),
    )


def main(names: list[str]) -> None:
    library = torchvision_without_gpu()
    file = HERE.parent / "docs" / "parity.md"
    rows = {}
    for line in file.read_text().splitlines() if file.exists() and names else ():
        if line.startswith("| ") and (name := line.split(" | ")[0][2:]) in ARCHITECTURES:
            rows.setdefault(name, []).append(line)
    how = "Each number is" + __doc__.split("Each number is")[1].rstrip()
    head = ["# Parity with the PyTorch originals", "", "Made by `python tests/parity.py`.", "", how, ""]
    head += [f"| model | against | {' | '.join(q.replace('_', ' ') for q in QUANTITIES)} |", "|---" * (2 + len(QUANTITIES)) + "|"]
    for name in names or MODELS:
        config = ARCHITECTURES[name]
        errors, among = measure(config, 8 if config.vision.width <= 1024 else 4)
        rows[name] = []
        for against, row in (errors | ({"they among themselves": among} if len(errors) > 1 else {})).items():
            cells = (f"{row[q]:.1e}" if q in row else "" for q in QUANTITIES)
            rows[name].append(f"| {name} | {against} | {' | '.join(cells)} |")
            print(rows[name][-1], flush=True)
        # After each, for the largest take many minutes.
        file.write_text("\n".join([*head, *(line for known in MODELS for line in rows.get(known, ()))]) + "\n")
    del library


if __name__ == "__main__":
    main(sys.argv[1:])
