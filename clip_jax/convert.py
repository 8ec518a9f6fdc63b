"""Weights from one layout to another.

    python -m clip_jax.convert SOURCE TARGET --to {orbax,openai,open_clip,hf,diffusers-text-encoder} [--verify]

SOURCE is whatever `clip_jax.load` takes.  TARGET is a new folder, or for openai a new file that ends in .pt.
Values are moved and never computed with, so a round trip gives the same bits.
"""

import argparse
import dataclasses
import json
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Sequence

import jax
import numpy as np

from clip_jax import pretrained
from clip_jax.checkpoint import save_model
from clip_jax.errors import UserError, run_program
from clip_jax.models import CLIP, CLIPConfig
from clip_jax.pytorch import configs, files, hf_configs, layouts, open_clip_configs, originals
from clip_jax.pytorch.layouts import Weights
from clip_jax.tokenizer import hf_tokenizer_files

TARGETS = ("orbax", *layouts.LAYOUTS)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m clip_jax.convert", description=__doc__.split("\n")[0])
    parser.add_argument("source", help="a workdir, a PyTorch file or folder, or a name of clip_jax.available_models()")
    parser.add_argument("target", type=pathlib.Path, help="a new folder, or a new .pt file for openai")
    parser.add_argument("--to", required=True, choices=TARGETS)
    parser.add_argument("--image-size", type=int, help="interpolate the position embedding to this resolution")
    parser.add_argument("--context-length", type=int, help="interpolate the position embedding to so many tokens")
    parser.add_argument("--verify", action="store_true", help="read the result again, run both, and report the differences")
    options = parser.parse_args(arguments)

    source = pretrained.locate(options.source)
    config, weights, layout = pretrained.read(source)
    config, weights = pretrained.resize(config, weights, options.image_size, options.context_length)
    write(options.to, config, weights, options.target, _vocabulary(config, source))
    count = sum(array.size for array in weights.values())
    print(f"{source} ({layout}, {config.name}, {count:,} numbers) -> {options.target} ({options.to})")
    if options.verify:
        resized = options.image_size or options.context_length
        print(verify(config, weights, {options.target: options.to} | ({} if resized else {source: layout})))


def write(
    target: str, config: CLIPConfig, weights: Weights, path: pathlib.Path, vocabulary: Sequence[pathlib.Path] = ()
) -> None:
    """Writes a model as `target`, and copies the files of SigLIP's vocabulary beside it.

    What is there already is never touched, and a failure leaves nothing.
    """
    if target not in TARGETS:
        raise UserError(f"target {target!r}, expected one of {', '.join(TARGETS)}")
    if path.exists():
        raise UserError(f"{path}: exists already; take a new path, nothing is overwritten")
    if target == "openai" and path.suffix not in files.PICKLES:
        raise UserError(f"{path}: expected a file that ends in .pt for the layout openai")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            partial = pathlib.Path(scratch) / path.name
            WRITERS[target](config, weights, partial)
            for file in vocabulary:
                shutil.copyfile(file, partial / file.name)
            partial.rename(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); take another path") from error


def _vocabulary(config: CLIPConfig, source: pretrained.Path) -> list[pathlib.Path]:
    """SigLIP's files, if they can be had: weights are of use without them."""
    try:
        return [] if config.tokenizer == "openai" else pretrained.tokenizer_files(config, source)
    except UserError as error:
        print(f"The result will be without its vocabulary, and take token ids only. {error}", file=sys.stderr)
        return []


def _write_orbax(config: CLIPConfig, weights: Weights, path: pathlib.Path) -> None:
    save_model(path, layouts.build_model(config, weights))


def _write_openai(config: CLIPConfig, weights: Weights, path: pathlib.Path) -> None:
    state = layouts.to_theirs(weights, layouts.openai_layout(config))
    sizes = (
        ("input_resolution", config.vision.image_size),
        ("context_length", config.text.context_length),
        ("vocab_size", config.text.vocabulary_size),
    )
    state |= {name: np.array(size) for name, size in sizes}
    _expect_same(config, configs.openai_config(state, str(path)), "openai")
    files.write_pickle(path, state)


def _write_open_clip(config: CLIPConfig, weights: Weights, path: pathlib.Path) -> None:
    layout, document = layouts.open_clip_layout(config), open_clip_configs.to_open_clip(config)
    _expect_same(config, open_clip_configs.open_clip_config(document, str(path)), "open_clip")
    path.mkdir()
    _write_json(path / pretrained.OPEN_CLIP_CONFIG, document)
    _write_safetensors(path / pretrained.OPEN_CLIP_WEIGHTS[0], layouts.to_theirs(weights, layout), config)


def _write_hf(config: CLIPConfig, weights: Weights, path: pathlib.Path) -> None:
    layout = layouts.hf_layout(config)
    document, preprocessing = hf_configs.to_hf(config)
    _expect_same(config, hf_configs.hf_config(document, preprocessing, str(path)), "hf")
    path.mkdir()
    _write_json(path / pretrained.HF_CONFIG, document)
    _write_json(path / pretrained.HF_PREPROCESSING, preprocessing)
    _write_safetensors(path / pretrained.HF_WEIGHTS[0], layouts.to_theirs(weights, layout), config)
    if config.tokenizer == "openai":
        for name, text in hf_tokenizer_files(config.text.context_length).items():
            (path / name).write_text(text, encoding="utf-8")


def _write_text_encoder(config: CLIPConfig, weights: Weights, path: pathlib.Path) -> None:
    state = layouts.to_theirs(weights, layouts.text_encoder_layout(config))
    config = hf_configs.text_encoder_config(config)
    path.mkdir()
    _write_json(path / pretrained.HF_CONFIG, hf_configs.to_hf_text_encoder(config))
    _write_safetensors(path / pretrained.HF_WEIGHTS[0], state, config)


WRITERS = {
    "orbax": _write_orbax,
    "openai": _write_openai,
    "open_clip": _write_open_clip,
    "hf": _write_hf,
    "diffusers-text-encoder": _write_text_encoder,
}


def _write_json(path: pathlib.Path, document: dict) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")


def _write_safetensors(path: pathlib.Path, state: files.StateDict, config: CLIPConfig) -> None:
    files.write_safetensors(path, state, {pretrained.CONFIG_IN_HEADER: json.dumps(config.to_dict())})


def _expect_same(config: CLIPConfig, back: CLIPConfig, target: str) -> None:
    """Refuses a target whose configuration cannot say all that ours says."""
    theirs = back.identity()
    for name, ours in config.identity().items():
        if ours != theirs[name]:
            raise UserError(f"{target} cannot express {config.name}: its {name} would come back as {theirs[name]!r}, not {ours!r}")


def verify(config: CLIPConfig, weights: Weights, places: dict[pathlib.Path, str]) -> str:
    """A report: whether each place holds exactly these weights, and how far the original PyTorch code,
    where it is installed, is from ours on random pictures and texts, in units of the features' deviation.

    Raises:
      UserError: a place holds other weights.
    """
    model = layouts.build_model(dataclasses.replace(config, dtype="float32"), weights)
    images, tokens = sample_inputs(config)
    ours = {
        "images": config.vision and jax.jit(CLIP.encode_image)(model, images),
        "texts": config.embedding and jax.jit(CLIP.encode_text)(model, tokens),
        "hidden states": jax.jit(CLIP.text_hidden_states)(model, tokens),
    }
    lines = []
    for path, layout in places.items():
        found = pretrained.read(path)[1]
        different = [name for name in found if not np.array_equal(found[name], weights[name])]
        if different:
            raise UserError(f"{path}: {len(different)} of {len(found)} tensors differ from the source, the first is {different[0]}")
        line = f"{path} ({layout}): {len(found)} tensors, all bits equal"
        if layout == "orbax":
            lines.append(line)
            continue
        try:
            theirs = originals.features(layout, config, layouts.to_theirs(weights, layouts.LAYOUTS[layout](config)), images, tokens)
        except ImportError as error:
            lines.append(f"{line}; not run in PyTorch: {error}")
            continue
        errors = (
            f"{what} {np.abs(np.asarray(ours[what], np.float64) - array).max() / array.std():.1e}"
            for what, array in theirs.items()
        )
        lines.append(f"{line}; against PyTorch: {', '.join(errors)}")
    return "\n".join(lines)


def sample_inputs(config: CLIPConfig, count: int = 4) -> tuple[jax.Array, jax.Array]:
    """Random pictures, normalised, and tokens with their EOT at different places."""
    rng = np.random.default_rng(0)
    vocabulary, length = config.text.vocabulary_size, config.text.context_length
    side = config.vision.image_size if config.vision else 1
    images = rng.standard_normal((count, side, side, 3), np.float32)
    tokens = rng.integers(1, vocabulary - 2, (count, length)).astype(np.int32)
    for row, end in enumerate(np.linspace(2, length - 1, count).astype(int)):
        tokens[row, 0], tokens[row, end], tokens[row, end + 1 :] = vocabulary - 2, vocabulary - 1, 0
    return jax.numpy.asarray(images), jax.numpy.asarray(tokens)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
