"""Pictures of a run: its loss, what it finds alike, and what it finds for a text."""

import math
import pathlib

import jax
import matplotlib

matplotlib.use("Agg")  # files only; no window system is needed
import matplotlib.pyplot as plt
import numpy as np

from clip_jax.evaluation.emoji import Emoji, load_emoji
from clip_jax.evaluation.encoder import Encoder
from clip_jax.metrics import read_metrics
from clip_jax.models import CLIP

# Emoji for the heat map, as different as the photographs of the paper's demo.
PAIRS = ("dog face", "red apple", "guitar", "rocket", "cactus", "umbrella", "octopus", "bicycle")

QUERIES = ("smiling face", "fruit", "fish", "flower", "clock", "red heart")
FOUND = 5


def draw_figures(model: CLIP, workdir: pathlib.Path) -> None:
    """Writes loss.png, similarity.png and retrieval.png."""
    # The first of several processes is alone here.
    encoder, emoji = Encoder(model, devices=jax.local_devices()), load_emoji()
    draw_loss(workdir / "metrics.jsonl", workdir / "loss.png")
    draw_similarity(encoder, emoji, workdir / "similarity.png")
    draw_retrieval(encoder, emoji, workdir / "retrieval.png")


def draw_loss(metrics: pathlib.Path, file: pathlib.Path) -> None:
    """The loss of every logged step, and the loss of guessing."""
    records = read_metrics(metrics)
    steps, losses = [r["step"] for r in records], [math.nan if r["loss"] is None else r["loss"] for r in records]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses, linewidth=1.5)
    if records:
        batch_size = records[0]["samples_seen"] // records[0]["step"]
        axes.axhline(math.log(batch_size), color="grey", linestyle="--", linewidth=1)
        axes.annotate(f"guessing: ln {batch_size}", (steps[-1], math.log(batch_size)), ha="right", va="bottom", color="grey")
    axes.set(xlabel="step", ylabel="contrastive loss (nats)", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_similarity(encoder: Encoder, emoji: Emoji, file: pathlib.Path) -> None:
    """Cosine similarities of test pictures and their names (openai/CLIP `Interacting_with_CLIP.ipynb`)."""
    chosen = [emoji.names.index(name) for name in PAIRS]
    pictures = [emoji.pictures[i] for i in chosen]
    similarity = encoder.texts(list(PAIRS)) @ encoder.images(pictures).T
    count = len(PAIRS)
    figure, axes = plt.subplots(figsize=(7.5, 7.5), layout="constrained")
    axes.imshow(similarity, cmap="viridis", vmin=0, vmax=1)
    for x, picture in enumerate(pictures):
        axes.imshow(np.asarray(picture), extent=(x - 0.4, x + 0.4, -0.6, -1.4))
    for y in range(count):
        for x in range(count):
            color = "black" if similarity[y, x] > 0.6 else "white"
            axes.text(x, y, f"{similarity[y, x]:.2f}", ha="center", va="center", color=color, size=10)
    axes.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -1.5), xticks=[], yticks=range(count), yticklabels=PAIRS)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("Cosine similarity of names and pictures by a vendor never trained on", size=11)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_retrieval(encoder: Encoder, emoji: Emoji, file: pathlib.Path) -> None:
    """For each query the test pictures of highest similarity."""
    similarity = encoder.texts(list(QUERIES)) @ encoder.images(emoji.pictures).T
    figure, grid = plt.subplots(len(QUERIES), FOUND, figsize=(7.5, 1.25 * len(QUERIES)), layout="constrained")
    for query, row, axes in zip(QUERIES, similarity, grid):
        for place, i in zip(axes, np.argsort(-row)[:FOUND]):
            place.imshow(np.asarray(emoji.pictures[i]))
            place.set_xlabel(f"{emoji.names[i][:18]} {row[i]:.2f}", size=6.5)
            place.set(xticks=[], yticks=[])
            place.spines[:].set_visible(False)
        axes[0].set_ylabel(query, rotation=0, ha="right", va="center", size=10)
    figure.savefig(file, dpi=120)
    plt.close(figure)
