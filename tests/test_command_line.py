import csv
import dataclasses
import functools
import gzip
import io
import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import tarfile
import zlib

import jax
import numpy as np
import PIL.Image
import pytest
from conftest import ROOT
from weights import SMALL, rich_weights

import clip_jax
from clip_jax import convert
from clip_jax.__main__ import format_table, main, probabilities
from clip_jax.errors import UserError
from clip_jax.features import Features
from clip_jax.models import CLIP
from clip_jax.sources import Source

NAMES = ("a.png", "b.jpg", "deep/c.webp", "deep/d.PNG", "deep/er/e.jpeg", "f.png", "g.png")
TEXTS = ("a dog", "two cats, asleep", "naïve 🐕", "a red square", "snow")
KEYS = ["a", "b", "deep/c", "deep/d", "deep/er/e", "f", "g"]
ROWS = [f"pictures/{name}" for name in NAMES]
COLORS = ((200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (30, 200, 200), (200, 30, 200), (90, 90, 90))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A model, and the same pictures in a folder, a tar, two shards, a CSV and a JSONL."""
    place = tmp_path_factory.mktemp("command_line")
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


@pytest.fixture(scope="module", autouse=True)
def load_once():
    """The programs of this file share a model; tests/test_pretrained.py loads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip_jax, "load", functools.cache(clip_jax.load))
        yield


@pytest.fixture(scope="module")
def model(place) -> CLIP:
    return clip_jax.load(str(place / "model"))[0]


@pytest.fixture(scope="module")
def features(place) -> pathlib.Path:
    return embed(place, "pictures", place / "features.npz")


@pytest.fixture(scope="module")
def by_hand(place, model) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of the pictures and of the texts, and logits per image, by the model's own methods."""
    preprocess = clip_jax.images.Preprocess.of(model.config)
    pixels = np.stack([preprocess(PIL.Image.open(place / "pictures" / name)) for name in NAMES])
    return by_methods(model, pixels, clip_jax.tokenize(list(TEXTS), 16))


@jax.jit
def by_methods(model: CLIP, pixels: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    images, texts = model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
    return images, texts, model(pixels, tokens)[0]


def write_csv(file: pathlib.Path, rows: list[dict]) -> None:
    with file.open("w", newline="", encoding="utf-8-sig") as opened:  # as spreadsheets write it
        writer = csv.DictWriter(opened, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def embed(place: pathlib.Path, source: str, out: pathlib.Path, *options: str) -> pathlib.Path:
    main(["embed", str(place / source), "--out", str(out), "--model", str(place / "model"), *options])
    return out


def refused(*arguments: str | pathlib.Path) -> str:
    """The one line that a command ends with."""
    with pytest.raises(UserError) as caught:
        main(list(map(str, arguments)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_same_pictures_from_every_source_have_the_same_bits(place, features, by_hand, tmp_path):
    first = dict(np.load(features))
    assert first["names"].tolist() == list(NAMES) and first["features"].dtype == np.float32
    assert (str(first["kind"]), str(first["model"])) == ("image", str(place / "model"))
    assert str(first["source"]) == str(place / "pictures")
    for source, names in {"all.tar": KEYS, "table.csv": ROWS}.items():
        other = Features.read(embed(place, source, tmp_path / f"{source}.npz"))
        assert (other.features == first["features"]).all(), source
        assert (other.names.tolist(), other.kind, other.source) == (names, "image", str(place / source))
    np.testing.assert_allclose(first["features"], by_hand[0], atol=7.1e-7)  # measured 2.4e-7 of values up to 0.5
    np.testing.assert_allclose(np.linalg.norm(first["features"], axis=1), 1, atol=1.8e-7)  # measured 6e-8


def test_every_source_reads_the_same_bytes(place):
    contents = [(place / "pictures" / name).read_bytes() for name in NAMES]
    sources = {"pictures": NAMES, "all.tar": KEYS, "shard-{08..10}.tar": KEYS, "table.csv": ROWS, "table.jsonl": ROWS}
    for path, names in sources.items():
        source = Source.of(str(place / path))
        assert (source.kind, source.count()) == ("image", 7)
        assert [(item.name, item.read()) for item in source.items()] == list(zip(names, contents)), path
    for path in ("texts.txt", "texts.csv", "texts.jsonl"):
        source = Source.of(str(place / path))
        assert (source.kind, [item.name for item in source.items()]) == ("text", list(TEXTS)), path


def test_the_size_of_a_batch_changes_no_feature_and_nothing_is_compiled_twice(place, features, tmp_path, caplog):
    whole = Features.read(features).features
    for asked, size in ((1, 1), (3, 3), (64, 7)):
        caplog.clear()
        with jax.log_compiles():
            found = Features.read(embed(place, "pictures", tmp_path / f"{size}.npz", f"--batch-size={asked}"))
        compiled = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling jit(encode_images)")]
        assert len(compiled) == 1 and f"uint8[{size},32,32,3]" in compiled[0]
        np.testing.assert_allclose(found.features, whole, atol=7.1e-7)  # measured 2.4e-7 of values up to 0.5


def test_search_ranks_by_cosine(place, features, by_hand, tmp_path, capsys):
    cosines = np.asarray(by_hand[0] @ by_hand[1][3])
    order = np.argsort(-cosines)
    main(["search", TEXTS[3], "--features", str(features), "--top", "3", "--sheet", str(tmp_path / "sheet.png")])
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "rank    score  name"
    assert [line.split(maxsplit=2)[::2] for line in lines] == [[str(n), NAMES[i]] for n, i in enumerate(order[:3], 1)]
    printed = [float(line.split()[1]) for line in lines]
    np.testing.assert_allclose(printed, cosines[order[:3]], atol=6e-5)  # half of the last digit
    # The sheet shows these pictures, the first on the left, and no other.
    sheet = np.asarray(PIL.Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    columns = [np.flatnonzero((abs(sheet - color).max(axis=-1) <= 4).sum(axis=0) > 20) for color in COLORS]
    shown = [i for i in range(len(NAMES)) if len(columns[i])]
    assert sorted(shown, key=lambda i: columns[i].mean()) == order[:3].tolist()


def test_search_among_texts_finds_the_text_itself(place, by_hand, tmp_path, capsys):
    embed(place, "texts.txt", tmp_path / "texts.npz", "--batch-size=2")
    found = Features.read(tmp_path / "texts.npz")
    assert (found.kind, found.names.tolist()) == ("text", list(TEXTS))
    np.testing.assert_allclose(found.features, by_hand[1], atol=6.2e-7)  # measured 2.1e-7 of values up to 0.5
    capsys.readouterr()
    main(["search", TEXTS[2], "--features", str(tmp_path / "texts.npz"), "--top", "99"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(TEXTS) and lines[1] == f"   1   1.0000  {TEXTS[2]}"


def test_classify_prints_the_softmax_of_the_models_logits(place, model, by_hand, capsys):
    images, texts, logits = by_hand
    expected = np.asarray(jax.nn.softmax(logits, axis=-1))
    found = probabilities(model, np.asarray(images), np.asarray(texts))
    np.testing.assert_allclose(found, expected, atol=6e-7)  # measured 2e-7 of values up to 0.83
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-15)  # measured 0
    paths = [str(place / "pictures" / name) for name in NAMES]
    main(["classify", *paths, "--labels", *TEXTS, "--model", str(place / "model")])
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == f"{'image':<{max(map(len, paths))}}  labels, likeliest first"
    for line, path, row in zip(lines, paths, expected, strict=True):
        best = np.argsort(-row)
        found = re.findall(r"  (\S.*?) +([\d.]+)%", line.removeprefix(path))
        assert [label for label, _ in found] == [TEXTS[i] for i in best]
        np.testing.assert_allclose([float(share) for _, share in found], 100 * row[best], atol=0.006)


def test_a_table_shows_the_likeliest_of_many_labels():
    table = format_table(["x.jpg", "two\nlines"], [f"label {i}" for i in range(9)], np.eye(9)[[7, 2]] * 0.9 + 0.01)
    title, one, two = table.splitlines()
    assert title == "image      5 of 9 labels, likeliest first"
    assert one.startswith("x.jpg      label 7  91.00%  label 0   1.00%") and one.count("label") == 5
    assert two.startswith("two lines  label 2  91.00%  label 0   1.00%")


def test_siglip_gives_each_label_a_probability_of_its_own_and_waits_for_its_tokenizer(place, tmp_path):
    convert.write("hf", SMALL["siglip"], rich_weights(SMALL["siglip"]), tmp_path / "siglip")
    model, preprocess = clip_jax.load(str(tmp_path / "siglip"))
    pixels = np.stack([preprocess(PIL.Image.open(place / "pictures" / name)) for name in NAMES])
    tokens = np.random.default_rng(0).integers(0, 128, (3, 16)).astype(np.int32)
    images, texts, logits = by_methods(model, pixels, tokens)
    expected = np.asarray(jax.nn.sigmoid(logits))
    found = probabilities(model, np.asarray(images), np.asarray(texts))
    np.testing.assert_allclose(found, expected, rtol=2.7e-6)  # measured 9.1e-7 of values from 5e-5 to 2e-3
    picture = place / "pictures" / "a.png"
    assert refused("classify", picture, "--labels", "a", "--model", tmp_path / "siglip") == (
        "custom: its tokenizer is 'siglip', and only OpenAI's is there so far; take another model for texts"
    )


def _member(name: str, content: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    return member


def bomb() -> bytes:
    """A PNG that would have a billion pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 40000, 25000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


def test_a_source_that_cannot_be_read_is_named(place, tmp_path):
    def says(name: str, content: bytes) -> str:
        """What `embed` says of a file, or of the folder around it, after its path."""
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
        source = tmp_path / pathlib.Path(name).parts[0]
        message = refused("embed", source, "--out", tmp_path / "out" / "features.npz", "--model", place / "model")
        assert message.startswith(str(source)) and not list(tmp_path.glob("out/*"))
        return message.removeprefix(str(source))

    def tar(content: bytes) -> bytes:
        with tarfile.open(tmp_path / "made.tar", "w") as made:
            for name in ("one.jpg", "two.txt"):
                made.addfile(_member(name, content), io.BytesIO(content))
        return (tmp_path / "made.tar").read_bytes()

    # Sources
    missing = refused("embed", place / "shard-{10..12}.tar", "--out", tmp_path / "out.npz")
    assert missing == f"{place}/shard-11.tar: no such file or folder"
    backwards = refused("embed", "x-{3..1}.tar", "--out", tmp_path / "out.npz")
    assert backwards.endswith("x-{3..1}.tar: {3..1} names nothing, expected the lower number first")
    of = ": expected a folder of pictures, .csv, .jsonl, .tar or .txt, found .parquet"
    assert says("x.parquet", b"") == of
    endings = ".bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp"
    none = f": expected at least one picture, by the endings {endings}; found none"
    assert says("folder/notes.txt", b"none") == none
    assert says("empty.txt", b" \n\n") == ": expected at least one text; found none"

    # Pictures
    cannot = "expected a picture that Pillow can decode, found "
    assert says("broken/a.png", b"hello").startswith(f"/a.png: {cannot}5 bytes starting with b'hello' (")
    half = (place / "pictures" / "a.png").read_bytes()[:900]
    assert says("half/a.png", half).startswith(f"/a.png: {cannot}900 bytes starting with b'\\x89PNG\\r\\n\\x1a\\n' (")
    assert "(Image size (1000000000 pixels) exceeds limit" in says("bomb/a.png", bomb())
    PIL.Image.new("RGB", (1, 200000)).save(thin := io.BytesIO(), "PNG")
    assert says("thin/a.png", thin.getvalue()).startswith("/a.png: 1 x 200000 is too thin, 204,800,000 pixels when")
    assert says("none.tar", tar(b"hello")).startswith(f" member one.jpg: {cannot}5 bytes")

    # Tars
    whole = ": expected a whole tar, not compressed ("
    assert says("text.tar", b"hello").startswith(whole)
    assert says("gz.tar", gzip.compress(tar(b"hello"))).startswith(whole)
    assert says("cut.tar", tar(b"hello" * 999)[:3000]).startswith(whole)
    assert says("cut_header.tar", tar(b"hello")[:1300]) == f"{whole}no header at byte 1024); copy or make it again"
    damaged = bytearray(tar(b"hello"))
    damaged[1030] ^= 1
    assert says("damaged.tar", bytes(damaged)) == f"{whole}no header at byte 1024); copy or make it again"

    # Tables and texts
    fields = ": expected a field image, file, filepath, path with the paths of pictures, or one of texts, "
    assert says("columns.csv", b"id,title\n1,dog\n") == f"{fields}caption or text; found id, title"
    assert says("none.csv", b"") == f"{fields}caption or text; found no row"
    assert says("short.csv", b"id,image\n1\n") == (
        " line 2 field 'image': expected the path of a picture, found None; mend or remove this row"
    )
    assert says("blank.jsonl", b'{"text": "a"}\n{"text": " "}') == (
        " line 2 field 'text': expected a text, found ' '; mend or remove this row"
    )
    assert says("url.csv", b"image\nhttp://x/a.png\n") == (
        " line 2 field 'image': expected the path of a picture, found the address http://x/a.png; download it first"
    )
    assert says("gone.csv", b"image\ngone.png\n") == (
        f" line 2 field 'image', {tmp_path}/gone.png: expected the file of a picture, which cannot be read "
        "(No such file or directory)"
    )
    assert says("nul.jsonl", b'{"image": "a\\u0000"}').endswith("which cannot be read (embedded null byte)")
    assert says("list.jsonl", b"[1, 2]\n") == " line 1: expected a JSON object, found [1, 2]; mend or remove this line"
    assert says("cut.jsonl", b'\n{"image": ') == (
        " line 2: expected a JSON object (Expecting value: line 1 column 11 (char 10)); mend or remove this line"
    )
    assert says("latin.txt", b"caf\xe9").startswith(": expected a .txt in UTF-8, which cannot be read ('utf-8' codec")
    (tmp_path / "long.txt").write_text("a cat\n" + "dog " * 15)
    too_long = refused("embed", tmp_path / "long.txt", "--out", tmp_path / "out.npz", "--model", place / "model")
    assert too_long.startswith("text of 17 tokens, expected at most 16 with both ends: 'dog dog dog")
    assert not list(tmp_path.glob("out*/*")) and not list(tmp_path.glob("tmp*"))


def test_features_that_are_not_ours_are_refused(place, features, tmp_path):
    file = tmp_path / "f.npz"

    def says(**arrays: np.ndarray) -> str:
        """What `search` says of a file of these arrays, or of the file as it is."""
        if arrays:
            np.savez(file, **arrays)
        message = refused("search", "a dog", "--features", file)
        expected = f"{file}: expected what `python -m clip_jax embed` writes, "
        assert message.startswith(expected)
        return message.removeprefix(expected)

    ours = dict(np.load(features))
    assert says() == "which cannot be read (No such file or directory)"
    assert says(x=np.ones(3)) == "found no features, names, kind, model, source among x"
    assert says(**{k: v for k, v in ours.items() if k != "model"}) == (
        "found no model among features, names, kind, source"
    )
    shapes = "float32 features [N, E] and N names, found "
    assert says(**ours | {"names": ours["names"][:3]}) == f"{shapes}float32 [7, 32] and <U14 [3]"
    assert says(**ours | {"features": np.ones((7, 32))}) == f"{shapes}float64 [7, 32] and <U14 [7]"
    assert says(**ours | {"names": ours["names"].astype(object)}).startswith("found no whole .npz (Object arrays")
    whole = features.read_bytes()
    for content in (b"", b"hello", whole[:-50], whole.replace(ours["features"].tobytes()[:8], b"12345678")):
        file.write_bytes(content)
        assert says().startswith("found no whole .npz (")
    with file.open("wb") as opened:
        np.save(opened, np.ones(3))
    assert says().startswith("found no whole .npz (")
    other = Features(np.eye(3, 5, dtype=np.float32), np.array(["a", "b", "c"]), "text", str(place / "model"), "x.txt")
    other.write(tmp_path / "other.npz")
    assert refused("search", "a", "--features", tmp_path / "other.npz") == (
        f"{tmp_path}/other.npz: 5 numbers each, by {place}/model, and {place}/model makes 32; "
        "leave --model out, or embed again"
    )
    assert refused("search", "a", "--features", tmp_path / "other.npz", "--sheet", tmp_path / "new.png") == (
        f"--sheet: {tmp_path}/other.npz is of texts, expected one of pictures; leave --sheet out"
    )


def test_options_are_checked_before_anything_is_loaded(place, features, tmp_path):
    search, new = ("search", "a dog", "--features", features), tmp_path / "new.png"
    assert refused(*search, "--top", 0) == "--top 0, expected at least 1"
    assert refused(*search, "--top", 101, "--sheet", new) == "--top 101, expected at most 100 with --sheet"
    see = "; see python -m clip_jax"
    assert refused(*search, "--top", "x") == f"argument --top: invalid int value: 'x'{see} search --help"
    gif = new.with_suffix(".gif")
    assert refused(*search, "--sheet", gif) == f"--sheet {gif}: expected a file that ends in .png"
    exists = "exists already; take a new path, nothing is overwritten"
    assert refused(*search, "--sheet", place / "all.tar") == f"--sheet {place}/all.tar: {exists}"
    embed, out = ("embed", place / "pictures"), tmp_path / "out.npz"
    assert refused(*embed, "--out", features) == f"--out {features}: {exists}"
    assert refused(*embed, "--out", out, "--batch-size", 0) == "--batch-size 0, expected at least 1"
    assert refused(*embed, "--out", features / "out.npz", "--model", place / "model") == (
        f"--out {features}/out.npz: cannot be written (File exists); take another path"
    )
    picture = place / "pictures" / "a.png"
    assert refused("classify", picture) == f"the following arguments are required: --labels{see} classify --help"
    assert refused("classify", place, "--labels", "a") == (
        f"{place}: expected the file of a picture, which cannot be read (Is a directory)"
    )
    unknown = refused("classify", picture, "--labels", "a", "--model", "ViT-B/33")
    assert unknown.startswith("ViT-B/33: no such file or folder, nor a known model; did you mean ViT-B/32")


def test_a_sheet_is_of_the_pictures_that_were_embedded(place, features, by_hand, tmp_path):
    best = int(np.argmax(np.asarray(by_hand[0] @ by_hand[1][0])))
    others = [f"{place}/pictures/{name}\n" for name in NAMES if name != NAMES[best]]
    (tmp_path / "table.csv").write_text("".join(["file\n", *others]))
    moved = dataclasses.replace(Features.read(features), source=str(tmp_path / "table.csv"))
    moved.write(tmp_path / "moved.npz")
    assert refused("search", TEXTS[0], "--features", tmp_path / "moved.npz", "--sheet", tmp_path / "new.png") == (
        f"--sheet: {tmp_path}/table.csv has changed, expected {NAMES[best]} as its picture number {best + 1}; "
        "restore it, or embed it again"
    )
    assert not (tmp_path / "new.png").exists()


def test_as_a_program(place, features, tmp_path):
    def run(*arguments: str | pathlib.Path) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "clip_jax", *map(str, arguments)]
        environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    wrong = run("embed", place / "pictures", "--out", features)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == f"error: --out {features}: exists already; take a new path, nothing is overwritten\n"
    # A label that the terminal cannot show is shown as far as it can.
    right = run("classify", place / "pictures" / "a.png", "--labels", "a dog", "🐕", "--model", place / "model")
    assert right.returncode == 0 and "  \\U0001f415 " in right.stdout, right.stderr
