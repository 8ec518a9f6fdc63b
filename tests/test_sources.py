import gc
import gzip
import io
import pathlib
import struct
import tarfile
import zlib

import PIL.Image
import pytest
from gallery import KEYS, NAMES, ROWS, TEXTS, make_gallery, refused

from clip_jax.sources import Source


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    return make_gallery(tmp_path_factory.mktemp("gallery"))


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
    gc.collect()  # which warns of a file that was left open, and every warning is an error
