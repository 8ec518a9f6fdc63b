import dataclasses
import functools
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import PIL.Image
import pytest
from conftest import ROOT
from gallery import COLORS, KEYS, NAMES, ROWS, TEXTS, make_gallery, refused
from vocabulary import write_vocabulary
from weights import SMALL, rich_weights

import clip_jax
from clip_jax import convert
from clip_jax.__main__ import format_table, main, probabilities
from clip_jax.features import Features
from clip_jax.models import CLIP


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    return make_gallery(tmp_path_factory.mktemp("gallery"))


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


def embed(place: pathlib.Path, source: str, out: pathlib.Path, *options: str) -> pathlib.Path:
    main(["embed", str(place / source), "--out", str(out), "--model", str(place / "model"), *options])
    return out


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


def test_the_size_of_a_batch_changes_no_feature_and_nothing_is_compiled_twice(place, features, tmp_path, caplog):
    whole = Features.read(features).features
    for asked, size in ((1, 8), (3, 8), (64, 8)):  # of seven pictures, on eight devices
        caplog.clear()
        with jax.log_compiles():
            found = Features.read(embed(place, "pictures", tmp_path / f"{asked}.npz", f"--batch-size={asked}"))
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


def test_siglip_gives_each_label_a_probability_of_its_own(place, tmp_path, capsys):
    source, labels = str(tmp_path / "siglip"), ["a dog", "two cats", "snow"]
    convert.write("hf", SMALL["siglip"], rich_weights(SMALL["siglip"]), tmp_path / "siglip")
    picture = place / "pictures" / "a.png"
    said = refused("classify", picture, "--labels", "a", "--model", source)
    assert said.startswith(f"{source}/tokenizer.json: cannot get timm/ViT-B-16-SigLIP from the Hugging Face hub")
    write_vocabulary(tmp_path / "siglip")
    model, preprocess = clip_jax.load(source)
    pixels = np.stack([preprocess(PIL.Image.open(place / "pictures" / name)) for name in NAMES])
    images, texts, logits = by_methods(model, pixels, clip_jax.get_tokenizer(source)(labels))
    expected = np.asarray(jax.nn.sigmoid(logits))
    found = probabilities(model, np.asarray(images), np.asarray(texts))
    np.testing.assert_allclose(found, expected, rtol=2.7e-6)  # measured 9.1e-7 of values from 5e-5 to 2e-3
    main(["classify", str(picture), "--labels", *labels, "--model", source])
    row = capsys.readouterr().out.splitlines()[1]
    shares = {label: float(re.search(rf"{label} +([\d.]+)%", row)[1]) / 100 for label in labels}
    np.testing.assert_allclose([shares[label] for label in labels], expected[0], atol=6e-5)  # half of the last digit


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
