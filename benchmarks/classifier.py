"""Building a zero-shot classifier of 1,000 classes by 80 templates for ViT-B/32, beside open_clip's on the same processor.

    python benchmarks/classifier.py [CLASSES_OF_OPEN_CLIP]

Both have the same random weights, in float32, in one process.  open_clip's time grows with the classes, ten at a time: it is
measured on some of them, before and after ours, and multiplied.  Ours is measured whole, with the time of compilation.
"""

import dataclasses
import pathlib
import sys
import time

import jax
import numpy as np
import torch

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from parity import torchvision_without_gpu

operators = torchvision_without_gpu()
import open_clip

from clip_jax.evaluation.classifier import zero_shot_classifier
from clip_jax.evaluation.encoder import Encoder
from clip_jax.evaluation.names import class_names, templates
from clip_jax.models.architectures import ARCHITECTURES
from clip_jax.pytorch import layouts


def open_clips(classes: list[str], model: torch.nn.Module, prompts: list) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    found = open_clip.build_zero_shot_classifier(
        model, open_clip.get_tokenizer("ViT-B-32"), classes, prompts, num_classes_per_batch=10, device="cpu"
    )
    return time.perf_counter() - start, found.T.numpy()


def ours(classes: list[str], encoder: Encoder, prompts: tuple[str, ...]) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    found = zero_shot_classifier(encoder, classes, prompts)
    return time.perf_counter() - start, found


def main(few: int) -> None:
    config = dataclasses.replace(ARCHITECTURES["ViT-B/32"], dtype="float32")
    theirs = open_clip.create_model("ViT-B-32-quickgelu").eval()
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    model = layouts.build_model(config, layouts.to_ours(state, layouts.LAYOUTS["open_clip"](config), config, "open_clip"))
    classes, prompts = class_names("imagenet2012"), templates("imagenet2012")
    functions = [lambda name, template=template: template.format(name) for template in prompts]
    encoder = Encoder(model)
    before, found = open_clips(classes[:few], theirs, functions)
    one, whole = ours(classes, encoder, prompts)
    after, _ = open_clips(classes[:few], theirs, functions)
    other = (before + after) / 2 * len(classes) / few
    cosines = (whole[:few] * found).sum(axis=1)
    print(f"jax {jax.__version__}, torch {torch.__version__}, open_clip {open_clip.__version__}, {torch.get_num_threads()} threads")
    print(f"open_clip: {other:,.0f} s, from {few} of {len(classes):,} classes before and after ours")
    print(f"ours: {one:,.0f} s for all, compilation included: {other / one:.1f} times as fast")
    print(f"largest difference of a number {np.abs(whole[:few] - found).max():.1e}, of a cosine from 1: {np.abs(1 - cosines).max():.1e}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
