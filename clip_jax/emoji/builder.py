"""Makes the embedded emoji data set from its public source packages.

Maintenance only; nothing at run time imports this file.  To make the set again:

    pip install -e '.[emoji-builder]'
    python -m clip_jax.emoji.builder          # needs npm, for `npm pack`

The result is one TFDS data set, `emoji`, with one configuration per vendor, each in a folder of its
own beside this file (`noto/1.0.0`, `openmoji/1.0.0`, ...) together with its licence, so that the
share-alike pictures of OpenMoji stay apart from the others.  The bytes are stored in ArrayRecord
files, encoded as WebP, and neither making nor reading them needs TensorFlow.

Every record is one picture of one emoji by one vendor:

    image      WebP, 64 x 64, with alpha; what is drawn reaches to one pixel from the edge
    label      0..1910, the class: an emoji that all of Noto, Twemoji and OpenMoji draw
    codepoints the emoji's code points, upper case, without FE0F: the key that aligns the vendors
    name       the Unicode CLDR short name
    keywords   further words for it, also from CLDR
    subgroup   Unicode's subgroup, such as `animal-bird`

Two things are split off, and the names of the splits say so:

* Fluent is the test vendor, and has no split `train`.
* A tenth of every subgroup is held out of training from every vendor.
"""

import argparse
import functools
import hashlib
import io
import json
import pathlib
import re
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
from collections.abc import Iterator

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

HERE = pathlib.Path(__file__).parent
PICTURE_SIZE = 64
HELD_OUT_SHARE = 0.1

# Where the names come from, and the two vendors whose pictures come as PNG files of 64 pixels.
NAMES = "emojibase-data@17.0.0"
ICON_NAMES = "@iconify-json/noto@1.2.9"
VENDORS = {
    # vendor: (package, split, citation)
    "noto": ("emoji-datasource-google@16.0.0", "train", "Noto Emoji, Google, Apache-2.0"),
    "twemoji": (
        "emoji-datasource-twitter@16.0.0",
        "train",
        "Twemoji, Twitter and contributors, CC-BY-4.0",
    ),
    "openmoji": ("openmoji@17.0.0", "train", "OpenMoji, HfG Schwaebisch Gmuend, CC-BY-SA-4.0"),
    "noto_v1": ("@iconify-json/noto-v1@1.2.5", "train", "Noto Emoji (first design), Apache-2.0"),
    "emojitwo": ("@iconify-json/emojione@1.2.3", "train", "EmojiTwo (EmojiOne 2.3), CC-BY-4.0"),
    "fxemoji": ("@iconify-json/fxemoji@1.2.2", "train", "Firefox OS Emoji, Mozilla, Apache-2.0"),
    "fluent": (
        "@iconify-json/fluent-emoji-flat@1.2.6",
        "test",
        "Fluent Emoji (flat), Microsoft, MIT",
    ),
}


class Emoji(tfds.core.GeneratorBasedBuilder):
    """One emoji drawn by several vendors; see this file's first lines."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=vendor) for vendor in VENDORS]

    def __init__(self, *, sources: pathlib.Path, **kwargs):
        self._sources = sources
        self._names = _read_names(sources)
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        package, _, citation = VENDORS[self.builder_config.name]
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Emoji pictures ({citation}; from the npm package {package}) with names "
            f"and keywords from Unicode CLDR (from the npm package {NAMES}).",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(PICTURE_SIZE, PICTURE_SIZE, 4)),
                    "label": tfds.features.ClassLabel(names=[e["name"] for e in self._names]),
                    "codepoints": tfds.features.Text(),
                    "name": tfds.features.Text(),
                    "keywords": tfds.features.Sequence(tfds.features.Text()),
                    "subgroup": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # The packages come from npm, not from an address of ours.
        split = VENDORS[self.builder_config.name][1]
        return {split: self._generate_examples(False), "held_out": self._generate_examples(True)}

    def _generate_examples(self, held_out: bool) -> Iterator[tuple[int, dict]]:
        vendor = self.builder_config.name
        picture = _picture_reader(vendor, self._sources)
        for label, emoji in enumerate(self._names):
            if emoji["held_out"] != held_out or (pixels := picture(emoji)) is None:
                continue
            file = io.BytesIO()
            pixels.save(file, "WEBP", quality=45, alpha_quality=8, method=6)
            file.seek(0)
            fields = ("codepoints", "name", "keywords", "subgroup")
            yield label, {"image": file, "label": label} | {k: emoji[k] for k in fields}


def align(codepoints: str) -> str:
    """The key by which vendors agree: upper case, joined by '-', variation selectors dropped."""
    return "-".join(c for c in codepoints.upper().replace("_", "-").split("-") if c != "FE0F")


@functools.cache
def _read_names(sources: pathlib.Path) -> list[dict]:
    """The classes, in Unicode order: every emoji without skin tone that the three vendors draw."""
    folder = _folder(sources, NAMES) / "en"
    subgroups = {s["order"]: s["key"] for s in json.loads((folder / "messages.json").read_text())["subgroups"]}
    records = [e for e in json.loads((folder / "data.json").read_text()) if "group" in e]
    drawn = [_picture_reader(vendor, sources) for vendor in ("noto", "twemoji", "openmoji")]
    names = []
    for record in sorted(records, key=lambda e: e["order"]):
        emoji = {
            "codepoints": align(record["hexcode"]),
            "name": record["label"],
            "keywords": record.get("tags", []),
            "subgroup": subgroups[record["subgroup"]],
        }
        if all(picture(emoji) is not None for picture in drawn):
            names.append(emoji)
    # A tenth of each subgroup, drawn by hash so that it does not depend on the order; the
    # fractions are carried from subgroup to subgroup, so that the total is a tenth as well.
    carried = 0.0
    for subgroup in dict.fromkeys(e["subgroup"] for e in names):
        members = [e for e in names if e["subgroup"] == subgroup]
        members.sort(key=lambda e: hashlib.sha256(e["codepoints"].encode()).digest())
        carried += HELD_OUT_SHARE * len(members)
        for rank, emoji in enumerate(members):
            emoji["held_out"] = rank < round(carried)
        carried -= round(carried)
    return names


def _picture_reader(vendor: str, sources: pathlib.Path):
    """A function from an emoji to this vendor's picture of it, or None where it draws none."""
    folder = _folder(sources, VENDORS[vendor][0])
    match vendor:
        case "noto" | "twemoji":
            brand = {"noto": "google", "twemoji": "twitter"}[vendor]
            files = {
                align(e["unified"]): folder / "img" / brand / "64" / e["image"]
                for e in json.loads((folder / "emoji.json").read_text())
                if e[f"has_img_{brand}"]
            }
            read = lambda file: PIL.Image.open(file).convert("RGBA")
        case "openmoji":
            files = {align(f.stem): f for f in (folder / "color" / "svg").glob("*.svg")}
            read = lambda file: _render(file.read_text())
        case _:
            # Iconify names its icons.  The older sets have no code points of their own: Firefox's are
            # called by the names of Unicode's characters, the others share Noto's names.
            # (Slugs of CLDR names would not do: "UP! button" and "upwards button".)
            icons = json.loads((folder / "icons.json").read_text())
            aliases = {alias: target["parent"] for alias, target in icons.get("aliases", {}).items()}
            named = lambda name: icons["icons"].get(aliases.get(name, name))
            codes = {}
            if vendor == "fxemoji":
                called = {unicodedata.name(chr(code), ""): code for code in range(0x1FAFF, 0xA0, -1)}
                codes = {f"{code:04X}": re.sub("[^a-z0-9]", "", name.lower()) for name, code in called.items() if name}
            else:
                for source in (_folder(sources, ICON_NAMES), folder):
                    codes |= {align(c): name for c, name in json.loads((source / "chars.json").read_text()).items()}
            files = {c: named(name) for c, name in codes.items() if named(name) is not None}
            read = lambda icon: _render(_svg(icon, icons["width"], icons["height"]))
    return lambda emoji: _framed(read(files[emoji["codepoints"]])) if emoji["codepoints"] in files else None


def _framed(image: PIL.Image.Image) -> PIL.Image.Image:
    """What is drawn, centred, its longer side filling the picture but for one pixel at each end.

    The vendors leave margins of their own (Twemoji none, OpenMoji a fifth), which say nothing of the emoji.
    """
    image = image.convert("RGBa")  # resampling premultiplied colours leaves no seams
    drawn = image.getchannel("a").point(lambda alpha: 255 * (alpha > 16)).getbbox() or (0, 0, *image.size)
    width, height = drawn[2] - drawn[0], drawn[3] - drawn[1]
    side = max(width, height)
    square = PIL.Image.new("RGBa", (side, side))
    square.paste(image.crop(drawn), ((side - width) // 2, (side - height) // 2))
    inner = PICTURE_SIZE - 2
    framed = PIL.Image.new("RGBa", (PICTURE_SIZE, PICTURE_SIZE))
    framed.paste(square.resize((inner, inner), PIL.Image.LANCZOS), (1, 1))
    return framed.convert("RGBA")


def _svg(icon: dict, width: int, height: int) -> str:
    box = f"0 0 {icon.get('width', width)} {icon.get('height', height)}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}">{icon["body"]}</svg>'
    )


@functools.cache
def _render(svg: str) -> PIL.Image.Image:
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=4 * PICTURE_SIZE, height=4 * PICTURE_SIZE)
    return PIL.Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def _folder(sources: pathlib.Path, package: str) -> pathlib.Path:
    """Where a package lies unpacked, fetching it with npm on the first call."""
    folder = sources / package.replace("/", "-").lstrip("@")
    if not folder.exists():
        with tempfile.TemporaryDirectory() as scratch:
            subprocess.run(["npm", "pack", "--silent", package], cwd=scratch, check=True, capture_output=True)
            (archive,) = pathlib.Path(scratch).glob("*.tgz")
            with tarfile.open(archive) as tar:
                tar.extractall(scratch, filter="data")
            shutil.move(pathlib.Path(scratch) / "package", folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sources", type=pathlib.Path, help="where packages are unpacked (default: a temporary folder)")
    parser.add_argument("--output", type=pathlib.Path, default=HERE.parent, help="the folder that will hold emoji/VENDOR/1.0.0")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        sources = args.sources or pathlib.Path(scratch)
        sources.mkdir(parents=True, exist_ok=True)
        for vendor in VENDORS:
            builder = Emoji(sources=sources, config=vendor, data_dir=args.output, file_format="array_record")
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
            counts = {name: split.num_examples for name, split in builder.info.splits.items()}
            print(f"{vendor}: {counts}, {np.round(builder.info.dataset_size / 2**20, 1)} MiB")


if __name__ == "__main__":
    main()
