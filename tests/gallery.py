"""A model and the same pictures from every source, for the tests of the command line and of what it reads."""

import csv
import json
import pathlib
import tarfile

import numpy as np
import PIL.Image
import pytest
from weights import SMALL, rich_weights

from clip_jax import convert
from clip_jax.__main__ import main
from clip_jax.errors import UserError

NAMES = ("a.png", "b.jpg", "deep/c.webp", "deep/d.PNG", "deep/er/e.jpeg", "f.png", "g.png")
TEXTS = ("a dog", "two cats, asleep", "naïve 🐕", "a red square", "snow")
KEYS = ["a", "b", "deep/c", "deep/d", "deep/er/e", "f", "g"]
ROWS = [f"pictures/{name}" for name in NAMES]
COLORS = ((200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (30, 200, 200), (200, 30, 200), (90, 90, 90))


def make_gallery(place: pathlib.Path) -> pathlib.Path:
    """Writes a model, and the same pictures in a folder, a tar, two shards, a CSV and a JSONL."""
    convert.write("orbax", SMALL["vit"], rich_weights(SMALL["vit"]), place / "model")
    rng = np.random.default_rng(0)
    for i, (name, color) in enumerate(zip(NAMES, COLORS)):
        (place / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((40 + 5 * i, 60 - 4 * i, 3), color, np.uint8)
        # A flat centre, by which a picture is known on a sheet, and noise above it.
        pixels[: len(pixels) // 3] = rng.integers(0, 256, (len(pixels) // 3, *pixels.shape[1:]))
        PIL.Image.fromarray(pixels).save(place / "pictures" / name)
    (place / "pictures" / "notes.txt").write_text("not a picture")
    (place / "pictures" / "._a.png").write_text("what a Mac leaves")
    for shard, names in (("all", NAMES), ("shard-08", NAMES[:3]), ("shard-09", ()), ("shard-10", NAMES[3:])):
        with tarfile.open(place / f"{shard}.tar", "w") as tar:
            for name in names:
                tar.add(place / "pictures" / name, f"./{name}" if shard == "all" else name)
                tar.add(place / "pictures" / "notes.txt", str(pathlib.Path(name).with_suffix(".txt")))
    rows = [{"filepath": f"pictures/{name}", "caption": f"number {i}"} for i, name in enumerate(NAMES)]
    write_csv(place / "table.csv", rows)
    (place / "table.jsonl").write_text("".join(json.dumps({"image": row["filepath"]}) + "\n\n" for row in rows))
    (place / "texts.txt").write_text("\n".join(TEXTS[:2]) + "\n\n  " + "\r\n".join(TEXTS[2:]) + "\n", encoding="utf-8")
    write_csv(place / "texts.csv", [{"id": i, "text": text} for i, text in enumerate(TEXTS)])
    (place / "texts.jsonl").write_text("".join(json.dumps({"caption": text}) + "\n" for text in TEXTS))
    return place


def write_csv(file: pathlib.Path, rows: list[dict]) -> None:
    with file.open("w", newline="", encoding="utf-8-sig") as opened:  # as spreadsheets write it
        writer = csv.DictWriter(opened, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def refused(*arguments: str | pathlib.Path) -> str:
    """The one line that a command ends with."""
    with pytest.raises(UserError) as caught:
        main(list(map(str, arguments)))
    assert "\n" not in str(caught.value)
    return str(caught.value)
