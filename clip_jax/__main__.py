"""CLIP from the command line.

    python -m clip_jax classify IMAGE... --labels LABEL...           which of these labels a picture shows
    python -m clip_jax embed SOURCE --out features.npz               the features of many pictures or texts
    python -m clip_jax search TEXT --features features.npz           those that are nearest to a text
"""

import argparse
import concurrent.futures
import contextlib
import itertools
import math
import os
import pathlib
import sys
import tempfile
from typing import NoReturn

import numpy as np
import tqdm
from jaxtyping import Float, Float32

import clip_jax
from clip_jax import images
from clip_jax.errors import UserError, run_program
from clip_jax.evaluation.encoder import BATCH, Encoder
from clip_jax.features import Features, one_line
from clip_jax.models import CLIP
from clip_jax.sources import Source, read_file

DEFAULT_MODEL = "ViT-B/32"
LIKELIEST = 5  # labels in a row of the table
LARGEST_SHEET = 100  # pictures


def main(arguments: list[str]) -> None:
    parser = _Parser("python -m clip_jax", description="CLIP from the command line.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    model = f"a name or a path, as clip_jax.load takes it ({DEFAULT_MODEL})"
    command = commands.add_parser("classify", help="which of some labels each picture shows")
    command.add_argument("images", nargs="+", metavar="IMAGE")
    command.add_argument("--labels", nargs="+", required=True, metavar="LABEL", help='such as "a photo of a dog"')
    command.add_argument("--model", default=DEFAULT_MODEL, help=model)
    command.set_defaults(run=classify)

    command = commands.add_parser("embed", help="the features of many pictures or texts, in one .npz")
    kinds = 'a folder, .csv, .jsonl, .txt, .tar or, in quotes, "shards-{000..003}.tar"'
    command.add_argument("source", metavar="SOURCE", help=kinds)
    command.add_argument("--out", required=True, type=pathlib.Path, help="a new file")
    command.add_argument("--model", default=DEFAULT_MODEL, help=model)
    command.add_argument("--batch-size", type=int, default=64, help="pictures or texts encoded at once (64)")
    command.set_defaults(run=embed)

    command = commands.add_parser("search", help="the pictures or texts of an .npz that are nearest to a text")
    command.add_argument("text", metavar="TEXT")
    command.add_argument("--features", required=True, type=pathlib.Path, help="what embed wrote")
    command.add_argument("--top", type=int, default=5, help="how many (5)")
    command.add_argument("--sheet", type=pathlib.Path, help="a new .png that shows the pictures found")
    command.add_argument("--model", help="as clip_jax.load takes it (the one that made the features)")
    command.set_defaults(run=search)

    options = parser.parse_args(arguments)
    options.run(options)


def classify(options: argparse.Namespace) -> None:
    """Prints each picture's likeliest labels."""
    names = options.images
    encoded = [read_file(pathlib.Path(name), name) for name in names]
    model, preprocess = _load(options.model)
    pixels = np.stack([preprocess.pixels(images.decode(*picture), picture[1]) for picture in zip(encoded, names)])
    tokenizer = clip_jax.get_tokenizer(options.model)
    text_features = Encoder(model, min(len(options.labels), BATCH), tokenizer).texts(options.labels, truncate=False)
    image_features = Encoder(model, min(len(pixels), BATCH)).pixels(pixels)
    print(format_table(names, options.labels, probabilities(model, image_features, text_features)))


def _load(name: str) -> tuple[CLIP, images.Preprocess]:
    model, preprocess = clip_jax.load(name)
    if preprocess is None:
        raise UserError(f"--model {name}: a text encoder alone, expected a CLIP, with images and texts in one space")
    return model, preprocess


def probabilities(
    model: CLIP, image_features: Float[np.ndarray, "N E"], text_features: Float[np.ndarray, "C E"]
) -> Float[np.ndarray, "N C"]:
    """Of each label: among these labels, a sum of one; or by itself, for a model with a logit_bias, as SigLIP."""
    logits = math.exp(model.logit_scale[...]) * image_features.astype(np.float64) @ text_features.astype(np.float64).T
    if model.config.initial_logit_bias is not None:
        return 1 / (1 + np.exp(-logits - float(model.logit_bias[...])))
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def format_table(names: list[str], labels: list[str], shares: Float[np.ndarray, "N C"]) -> str:
    """A row a picture, with its likeliest labels first."""
    names, labels = [one_line(name) for name in names], [one_line(label) for label in labels]
    name_width, label_width = max(map(len, [*names, "image"])), max(map(len, labels))
    which = "labels" if len(labels) <= LIKELIEST else f"{LIKELIEST} of {len(labels)} labels"
    lines = [f"{'image':<{name_width}}  {which}, likeliest first"]
    for name, row in zip(names, shares, strict=True):
        best = np.argsort(-row, kind="stable")[:LIKELIEST]
        lines.append(f"{name:<{name_width}}" + "".join(f"  {labels[i]:<{label_width}} {row[i]:7.2%}" for i in best))
    return "\n".join(lines)


def embed(options: argparse.Namespace) -> None:
    """Writes the features of a source."""
    _expect_new("--out", options.out)
    if options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size}, expected at least 1")
    source = Source.of(options.source)
    count = source.count()
    model, preprocess = _load(options.model)
    tokenizer = clip_jax.get_tokenizer(options.model) if source.kind == "text" else None
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=options.out.parent) as scratch:
            features, names = encode(Encoder(model, min(options.batch_size, count), tokenizer), preprocess, source, count)
            path = os.path.abspath(os.path.expanduser(options.model))
            name = path if os.path.exists(path) else options.model
            partial = pathlib.Path(scratch) / options.out.name
            Features(features, np.array(names), source.kind, name, source.path).write(partial)
            partial.rename(options.out)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--out {options.out}: cannot be written ({reason}); take another path") from error
    print(f"{options.out}: {count:,} {source.kind}s, {features.shape[1]} numbers each")


def encode(
    encoder: Encoder, preprocess: images.Preprocess, source: Source, count: int
) -> tuple[Float32[np.ndarray, "N E"], list[str]]:
    """The features and names of the first `count` items.  No more than a batch of anything else is in memory."""
    features, names = np.empty((count, encoder.config.embedding), np.float32), []
    # In a file, where lines cannot be drawn over, a line a minute is enough.
    interval = 0.2 if sys.stderr.isatty() else 60
    bar = tqdm.tqdm(total=count, unit=source.kind, dynamic_ncols=True, mininterval=interval)
    # Pillow lets other threads run while it decodes and resamples: two took half of the time of one, on two cores.
    with bar, concurrent.futures.ThreadPoolExecutor() as threads, contextlib.closing(source.items()) as every:
        items = itertools.islice(every, count)
        while batch := [(item, item.read()) for item in itertools.islice(items, encoder.batch_size)]:
            rows = slice(len(names), len(names) + len(batch))
            names += [item.name for item, _ in batch]
            if source.kind == "image":
                decode = lambda item, encoded: preprocess.pixels(images.decode(encoded, item.where), item.where)
                features[rows] = encoder.pixels(np.stack(list(threads.map(decode, *zip(*batch)))))
            else:
                features[rows] = encoder.texts(names[rows], truncate=False)
            bar.update(len(batch))
    if len(names) < count:
        raise UserError(f"{source.path}: {count} items when counted, {len(names)} when read; leave it as it is")
    return features, names


def search(options: argparse.Namespace) -> None:
    """Prints what is nearest to a text, and draws it."""
    if options.top < 1:
        raise UserError(f"--top {options.top}, expected at least 1")
    embedded = Features.read(options.features)
    if options.sheet:
        _expect_new("--sheet", options.sheet)
        if options.sheet.suffix.lower() != ".png":
            raise UserError(f"--sheet {options.sheet}: expected a file that ends in .png")
        if options.top > LARGEST_SHEET:
            raise UserError(f"--top {options.top}, expected at most {LARGEST_SHEET} with --sheet")
        if embedded.kind != "image":
            raise UserError(f"--sheet: {options.features} is of texts, expected one of pictures; leave --sheet out")
    name = options.model or embedded.model
    model, _ = _load(name)
    if model.config.embedding != embedded.features.shape[1]:
        raise UserError(
            f"{options.features}: {embedded.features.shape[1]} numbers each, by {embedded.model}, and {name} makes "
            f"{model.config.embedding}; leave --model out, or embed again"
        )
    encoder = Encoder(model, 1, clip_jax.get_tokenizer(name))
    cosines = embedded.features @ encoder.texts([options.text], truncate=False)[0]
    best = np.argsort(-cosines, kind="stable")[: options.top].tolist()
    if options.sheet:
        from clip_jax.sheet import draw_sheet  # matplotlib takes half a second

        draw_sheet(options.text, embedded, cosines, best, options.sheet)
    print("rank    score  name")
    for rank, i in enumerate(best, 1):
        print(f"{rank:>4}  {cosines[i]:>7.4f}  {one_line(str(embedded.names[i]))}")


def _expect_new(option: str, path: pathlib.Path) -> None:
    if path.exists():
        raise UserError(f"{option} {path}: exists already; take a new path, nothing is overwritten")


class _Parser(argparse.ArgumentParser):
    """Its errors are those of every program here: one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a label that the terminal cannot show is no reason to fail
    run_program(main, sys.argv[1:])
