"""What the README shows is what it does."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import PIL.Image
from weights import SMALL, rich_weights

from clip_jax import convert
from clip_jax.records.prepared import Prepared

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(program: str, folder: pathlib.Path) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_the_example_prints_its_output():
    (output,) = [text for text in blocks("text") if text.startswith("[")]
    assert run(blocks("python")[0], ROOT) == output


def test_a_trained_model_classifies_a_picture(tmp_path):
    config = dataclasses.replace(SMALL["vit"], text=dataclasses.replace(SMALL["vit"].text, context_length=77))
    convert.write("open_clip", config, rich_weights(config), tmp_path / "model")
    PIL.Image.new("RGB", (90, 60), (200, 30, 30)).save(tmp_path / "photo.jpg")
    (program,) = [block for block in blocks("python") if "clip_jax.load(" in block]
    output = run(program.replace("ViT-B/32", "model"), tmp_path)
    shares = [float(number) for number in output.strip("[]\n ").split()]
    assert len(shares) == 2 and abs(sum(shares) - 1) < 1e-5


def test_the_builder_makes_a_set_that_training_reads(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(3):
        PIL.Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / f"{i}.jpg")
    (tmp_path / "pairs.csv").write_text("".join(f'{i}.jpg,"a picture, number {i}"\n' for i in range(3)))
    (program,) = [block for block in blocks("python") if "GeneratorBasedBuilder" in block]
    run(program, tmp_path)
    made = Prepared(str(tmp_path / "my_pairs" / "1.0.0"), "train")
    assert sorted(record["caption"] for record in made.read(range(len(made)))) == [f"a picture, number {i}".encode() for i in range(3)]


def test_every_file_of_the_tree_is_there():
    (tree,) = [text for text in blocks("text") if text.startswith("train.py")]
    names = [line.split()[0] for line in tree.splitlines()]
    assert len(names) > 15 and all((ROOT / name).exists() for name in names)


def test_commands_are_each_one_line_that_starts_from_nothing():
    commands = [line for block in blocks("bash") for line in block.splitlines() if "venv " in line]
    assert len(commands) == 2 and all(line.startswith("python3 -m venv .venv && ") for line in commands)
    assert commands[0].endswith("python train.py") and commands[1].endswith("python -m pytest")
