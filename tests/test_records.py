import concurrent.futures
import gzip
import io
import json
import os
import pathlib
import tarfile
import time
import zlib

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
from sets import picture

from clip_jax.config import default_config
from clip_jax.data import TrainingBatches, training_batches
from clip_jax.errors import BadSample, UserError
from clip_jax.files import expand
from clip_jax.health import Health, Report, read_ledger
from clip_jax.records import Place, open_records
from clip_jax.records.tables import Delimited
from clip_jax.tokenizer import decode

FIELDS = ("image", "caption")
Members = list[tuple[str, bytes]]


def jpeg(seed: int, kind: str = "JPEG", size: int = 40) -> bytes:
    file = io.BytesIO()
    PIL.Image.open(io.BytesIO(picture(seed, size))).save(file, kind)
    return file.getvalue()


def tar(path: pathlib.Path, members: Members) -> str:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as file:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return str(path)


def good(names: list[str]) -> Members:
    return [(f"{name}.{end}", data) for i, name in enumerate(names) for end, data in (("jpg", jpeg(i)), ("txt", name.encode()))]


def config_of(*sets: str, batch: int = 4, **data):
    config = default_config()
    config.batch_size, config.model.vision.image_size = batch, 32
    config.model.vision.patch_size, config.model.text.context_length = 8, 32
    config.data.update({"sets": sets, "threads": 0, "prefetch": 0} | data)
    return config


def captions(tokens: np.ndarray) -> list[str]:
    return [decode([i for i in row[1:].tolist() if i not in (0, 49407)]).strip() for row in tokens]


def every(records) -> list:
    return records.read(range(len(records)))


# What a good set gives.


def check_five(records) -> None:
    assert len(records) == 5
    assert [record["image"] for record in every(records)] == [jpeg(i) for i in range(5)]
    as_text = lambda caption: caption.decode() if isinstance(caption, bytes) else caption
    assert [as_text(record["caption"]) for record in every(records)] == [f"number {i}" for i in range(5)]
    assert records.broken == []
    assert [record["image"] for record in records.read([3, 1])] == [jpeg(3), jpeg(1)]


@pytest.fixture
def files(tmp_path) -> pathlib.Path:
    (tmp_path / "pictures").mkdir()
    for i in range(5):
        (tmp_path / "pictures" / f"{i}.jpg").write_bytes(jpeg(i))
    return tmp_path


def test_tars(tmp_path):
    tar(tmp_path / "a-000.tar", good(["number 0", "number 1", "number 2"]))
    shifted = [("./deep/er/number 3.jpg", jpeg(3)), ("./deep/er/number 3.txt", b"number 3")]
    long = "x" * 150
    tar(tmp_path / "a-001.tar", [*shifted, (f"{long}.json", b'{"caption": "number 4"}'), (f"{long}.JPG", jpeg(4))])
    for _ in range(2):  # made, and read again
        records = open_records(str(tmp_path / "a-{000..001}.tar"), "train", FIELDS)
        check_five(records)
        assert str(records.place(3)) == f"{tmp_path}/a-001.tar sample deep/er/number 3"
        assert records.place(4).key == f"sample {long}"
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [".clip_jax_index"]


def test_a_tar_that_was_written_anew_is_indexed_anew(tmp_path):
    path = tar(tmp_path / "a.tar", good(["one", "two"]))
    assert len(open_records(path, "train", FIELDS)) == 2
    tar(tmp_path / "a.tar", good(["one", "two", "three"]))
    assert len(open_records(path, "train", FIELDS)) == 3


def test_an_index_that_cannot_be_read_is_made_again(tmp_path, capfd):
    path = tar(tmp_path / "a.tar", good(["one", "two"]))
    for broken in ("index.json", "offsets.npy"):
        open_records(path, "train", FIELDS)
        (folder,) = (tmp_path / ".clip_jax_index").iterdir()
        (folder / broken).write_bytes(b"{")
        assert len(open_records(path, "train", FIELDS)) == 2
        assert "made again, for it cannot be read" in capfd.readouterr().err


def test_the_long_name_of_a_folder_is_not_that_of_a_file(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as file:
        folder = tarfile.TarInfo("d" * 120)
        folder.type = tarfile.DIRTYPE
        file.addfile(folder)
        for name, data in good(["one"]):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    records = open_records(str(tmp_path / "a.tar"), "train", FIELDS)
    assert len(records) == 1 and records.place(0).key == "sample one" and isinstance(every(records)[0], dict)


def test_pax_names_of_any_length(tmp_path):
    name = "é" * 120
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as file:
        for end, data in (("jpg", jpeg(0)), ("txt", b"number 0")):
            member = tarfile.TarInfo(f"{name}.{end}")
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    assert open_records(str(tmp_path / "a.tar"), "train", FIELDS).place(0).key == f"sample {name}"


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "parquet-bytes"])
def test_tables(files, kind):
    rows = [{"image": f"pictures/{i}.jpg", "caption": f"number {i}", "width": str(i)} for i in range(5)]
    path = files / f"pairs.{kind.partition('-')[0]}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    elif kind.startswith("parquet"):
        if kind == "parquet-bytes":
            rows = [row | {"image": {"bytes": jpeg(i), "path": None}} for i, row in enumerate(rows)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        separator = {"csv": ",", "tsv": "\t"}[kind]
        path.write_text("\ufeff" + "\r\n".join(separator.join(row) for row in [["image", "caption", "width"], *(r.values() for r in rows)]))
    records = open_records(str(path), "train", FIELDS)
    check_five(records)
    assert records.place(2).shard == str(path) and records.place(2).key in ("row 3", "object 3")


def test_quoted_values_may_hold_separators_quotes_and_line_breaks(files):
    texts = ['a "quoted", long\ncaption', 'a 5" pipe', "plain"]
    rows = ['pictures/0.jpg,"a ""quoted"", long\ncaption"', 'pictures/1.jpg,a 5" pipe', "pictures/2.jpg,plain"]
    (files / "pairs.csv").write_text("image,caption\n" + "\n".join(rows))
    assert [record["caption"] for record in every(open_records(str(files / "pairs.csv"), "train", FIELDS))] == texts


def test_a_quote_that_nobody_closed_costs_its_own_row(tmp_path):
    rows = [f"{i}.jpg,number {i}" for i in range(30_000)]
    rows[5000] = '5000.jpg,"an open quote'
    (tmp_path / "a.csv").write_text("image,caption\n" + "\n".join(rows))
    table = Delimited(str(tmp_path / "a.csv"), ",")
    assert len(table) == 30_000
    assert [table.row(i)["caption"] for i in (0, 1, 4999, 5001, 29_999)] == [f"number {i}" for i in (0, 1, 4999, 5001, 29_999)]


def test_only_line_breaks_break_lines(files):
    odd = "a dog\u2028in\x0bthe\x85snow"
    (files / "pairs.csv").write_text(f"caption,image\n{odd},pictures/0.jpg\n", newline="")
    (record,) = every(open_records(str(files / "pairs.csv"), "train", FIELDS))
    assert record["caption"] == odd


def test_row_groups_of_parquet_are_read_one_by_one(files):
    rows = [{"image": f"pictures/{i}.jpg", "caption": f"number {i}"} for i in range(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), files / "pairs.parquet", row_group_size=2)
    check_five(open_records(str(files / "pairs.parquet"), "train", FIELDS))


def test_one_of_several_caption_fields_is_enough(files):
    rows = [{"image": "pictures/0.jpg", "caption": None, "alt": "the alt"}, {"image": "pictures/1.jpg", "caption": [None, "one"]}]
    (files / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    members = [("2.jpg", jpeg(2)), ("2.json", b'{"caption": null, "alt": "two"}'), ("3.jpg", jpeg(3)), ("3.txt", b"three")]
    sets = [str(files / "pairs.jsonl"), tar(files / "a.tar", members)]
    batch = TrainingBatches(config_of(*sets, caption=("caption", "alt")))[0]
    assert sorted(captions(batch["tokens"])) == ["one", "the alt", "three", "two"] and not batch["report"].bad


def test_a_folder(files):
    for i in range(5):
        (files / "pictures" / f"{i}.txt").write_text(f"number {i}")
    records = open_records(str(files / "pictures"), "train", FIELDS)
    check_five(records)
    assert every(records)[3]["folder"] == "pictures" and records.place(3).key == "3.jpg"


def test_synthetic_pairs():
    records = open_records("synthetic:100:64x48", "train", FIELDS)
    (one, other) = records.read([7, 23])
    assert len(records) == 100 and PIL.Image.open(io.BytesIO(one["image"])).size == (64, 48)
    assert one["image"] == other["image"] and one["caption"] != other["caption"]


def test_patterns_are_a_shells(tmp_path):
    for name in ("a-1.tar", "a-2.tar", "b.tar"):
        (tmp_path / name).write_bytes(b"")
    names = lambda pattern: [pathlib.Path(name).name for name in expand(f"{tmp_path}/{pattern}")]
    assert names("a-*.tar") == ["a-1.tar", "a-2.tar"]
    assert names("{b,a-{08..10}}.tar") == ["b.tar", "a-08.tar", "a-09.tar", "a-10.tar"]
    with pytest.raises(UserError, match=r"c-\*.tar: no file has such a name"):
        names("c-*.tar")


@pytest.mark.parametrize(
    "name, message",
    [
        ("{tmp}/none-{000..002}.tar", "none-000.tar: expected a file, which cannot be seen"),
        ("{tmp}/none.csv", "none.csv: no such file"),
        ("{tmp}/empty.jsonl", "expected at least one row, found none"),
        ("{tmp}/empty.csv", "expected a header with the names of at least two columns"),
        ("{tmp}/empty.tar", "expected at least one sample, found none in 1 shards"),
        ("{tmp}/text.parquet", "expected a Parquet file"),
        ("synthetic:many", "expected synthetic:COUNT"),
        ("gopher://host/a.tar", "no library for gopher://"),
        ("s3://bucket/a.parquette", "expected .tar, .csv, .tsv, .jsonl, .parquet at an address, found .parquette"),
    ],
)
def test_what_is_no_set_is_named(name, message, tmp_path):
    for empty in ("empty.jsonl", "empty.csv", "empty.tar"):
        (tmp_path / empty).write_bytes(b"")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(UserError, match=message):
        open_records(name.replace("{tmp}", str(tmp_path)), "train", FIELDS)


# What a broken one gives: the good samples are seen, the others are in the ledger.


def bomb(kind: str) -> bytes:
    data = bytearray(jpeg(0, kind))
    if kind == "JPEG":
        place = data.index(b"\xff\xc0") + 5
        data[place : place + 4] = (60_000).to_bytes(2, "big") * 2
    else:
        data[16:24] = (60_000).to_bytes(4, "big") * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


JPEG = jpeg(0, size=200)
BROKEN_PICTURES = {
    "jpeg-half": JPEG[: len(JPEG) // 2],
    "jpeg-without-end": JPEG[:-300],
    "jpeg-header-only": JPEG[:100],
    "jpeg-start-only": b"\xff\xd8",
    "jpeg-bomb": bomb("JPEG"),
    "png-bomb": bomb("PNG"),
    "png-half": jpeg(0, "PNG")[:300],
    "png-signature-only": jpeg(0, "PNG")[:8],
    "gif-half": jpeg(0, "GIF")[:200],
    "webp-half": jpeg(0, "WEBP")[:100],
    "bmp-half": jpeg(0, "BMP")[:100],
    "tiff-half": jpeg(0, "TIFF")[:100],
    "nothing": b"",
    "zeros": bytes(1000),
    "noise": np.random.default_rng(0).bytes(1000),
    "text": b"a picture of a cat",
    "html": b"<html><body>404 Not Found</body></html>",
    "json": b'{"error": "forbidden"}',
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "pdf": b"%PDF-1.4\n%%EOF",
    "mp4": b"\0\0\0\x18ftypmp42" + bytes(100),
    "compressed": gzip.compress(JPEG),
}
BROKEN_SAMPLES = {
    "no-caption": [("jpg", JPEG)],
    "no-picture": [("txt", b"a caption")],
    "nothing-known": [("cls", b"3"), ("npy", b"1")],
    "empty-caption": [("jpg", JPEG), ("txt", b"")],
    "blank-caption": [("jpg", JPEG), ("txt", b" \n\t ")],
    "latin-1": [("jpg", JPEG), ("txt", "café".encode("latin-1"))],
    "utf-16": [("jpg", JPEG), ("txt", "caption".encode("utf-16"))],
    "json-broken": [("jpg", JPEG), ("json", b'{"caption": "a')],
    "json-list": [("jpg", JPEG), ("json", b'["caption"]')],
    "json-other": [("jpg", JPEG), ("json", b'{"alt": "a caption"}')],
    "json-null": [("jpg", JPEG), ("json", b'{"caption": ""}')],
    "json-deep": [("jpg", JPEG), ("json", b"[" * 100_000)],
    "json-latin-1": [("jpg", JPEG), ("json", '{"caption": "café"}'.encode("latin-1"))],
    "nested-tar": [("tar", b"ustar" * 200), ("txt", b"a caption")],
    "picture-of-another-name": [("heic", JPEG), ("txt", b"a caption")],
}


def run_over(folder: pathlib.Path, *sets: str, batch: int = 4) -> tuple[set[str], dict[str, str]]:
    """The captions seen in some passes, and the reasons in the ledger, by key."""
    config = config_of(*sets, batch=batch)
    ledger = folder / "skipped.jsonl"
    batches = training_batches(config, health=Health(ledger, max_bad=1.0))
    seen = set()
    for _ in range(6 * (len(batches.source.records) // batch)):  # a pass leaves out what is less than a batch
        seen |= set(captions(next(batches)["tokens"]))
    rows = read_ledger(ledger)
    assert all(row["shard"] in row["message"] for row in rows)
    return seen, {row["key"]: row["reason"] for row in rows}


@pytest.mark.filterwarnings("ignore:Truncated File Read")  # Pillow warns of the TIFF before it refuses it
def test_every_broken_sample_of_a_tar_is_in_the_ledger_and_every_good_one_is_seen(tmp_path):
    names = [f"good {letter}" for letter in "abcdefghijklmnopqrst"]
    members = good(names[:10])
    for name, data in BROKEN_PICTURES.items():
        members += [(f"{name}.jpg", data), (f"{name}.txt", b"a caption")]
    for name, parts in BROKEN_SAMPLES.items():
        members += [(f"{name}.{end}", data) for end, data in parts]
    members += good(names[10:])
    seen, ledger = run_over(tmp_path, tar(tmp_path / "a.tar", members), batch=3)
    assert {f"sample {name}" for name in (*BROKEN_PICTURES, *BROKEN_SAMPLES)} == set(ledger)
    assert set(names) <= seen
    assert ledger["sample png-bomb"] == ledger["sample jpeg-bomb"] == "too large"
    assert ledger["sample no-caption"] == ledger["sample nested-tar"] == "missing field"
    assert ledger["sample latin-1"] == "wrong encoding" and ledger["sample json-deep"] == "bad json"
    assert len(ledger) == 37


def test_broken_tars_lose_only_what_is_broken(tmp_path):
    names = [f"good {letter}" for letter in "abcdefghijklmnop"]
    whole = pathlib.Path(tar(tmp_path / "whole.tar", good(names[:4]))).read_bytes()
    cut = pathlib.Path(tar(tmp_path / "cut.tar", [*good(names[4:8]), ("lost.jpg", JPEG), ("lost.txt", b"lost")]))
    with tarfile.open(cut) as file:
        cut.write_bytes(cut.read_bytes()[: file.getmember("lost.jpg").offset_data + 700])
    damaged = bytearray(pathlib.Path(tar(tmp_path / "damaged.tar", good(names[8:12]))).read_bytes())
    with tarfile.open(tmp_path / "damaged.tar") as file:
        header = file.getmember("good j.jpg").offset
    damaged[header : header + 200] = b"?" * 200
    (tmp_path / "damaged.tar").write_bytes(damaged)
    tar(tmp_path / "twice.tar", [*good(names[12:14]), *good(names[12:13]), *good(names[14:16]), ("good p.txt", b"again")])
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "page.tar").write_text("<html>no such file</html>" * 100)
    (tmp_path / "packed.tar").write_bytes(gzip.compress(whole))
    with tarfile.open(tmp_path / "whole.tar") as file:
        (tmp_path / "short.tar").write_bytes(whole[: file.getmember("good c.jpg").offset])
    (tmp_path / "ragged.tar").write_bytes(whole[: 2 * 512 * 6] + b"x" * 100)
    shards = "{whole,cut,damaged,twice,empty,page,packed,ragged,short}"
    seen, ledger = run_over(tmp_path, f"{tmp_path}/{shards}.tar")
    found = {name for name in names if name in seen}
    assert set(names) - found == {"good j"}
    rows = [(pathlib.Path(row["shard"]).name, row["reason"]) for row in read_ledger(tmp_path / "skipped.jsonl")]
    assert {("cut.tar", "truncated"), ("damaged.tar", "broken tar"), ("twice.tar", "duplicate key")} <= set(rows)
    assert {(f"{name}.tar", "broken tar") for name in ("empty", "page", "packed", "ragged", "short")} <= set(rows)
    assert ("damaged.tar", "missing field") in rows  # what is left of the sample whose picture is lost


def test_broken_rows_of_tables_and_files_of_folders(tmp_path):
    (tmp_path / "p").mkdir()
    for i in range(12):
        (tmp_path / "p" / f"{i}.jpg").write_bytes(jpeg(i))
    (tmp_path / "p" / "folder.jpg").mkdir()
    (tmp_path / "p" / "0.txt").write_text("good 0")
    rows = ["image,caption", "p/1.jpg,good 1", "p/none.jpg,a", "p/2.jpg", "p/3.jpg,a,b", "p/folder.jpg,a", ",a", "p/2.jpg,"]
    (tmp_path / "a.csv").write_bytes("\n".join([*rows, "p/4.jpg,good 4", ""]).encode() + b'p/5.jpg,caf\xe9\np/6.jpg,"never closed\n')
    lines = ['{"image": "p/7.jpg", "caption": "good 7"}', "{broken", "[1]", '{"image": "p/8.jpg"}', '{"image": 3, "caption": "a"}']
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"image": "p/8.jpg", "caption": ["", "good 8"]}']))
    table = {"image": ["p/9.jpg", None, "p/10.jpg", "p/../../etc/none.jpg"], "caption": ["good 9", "a", None, "a"]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    sets = [str(tmp_path / name) for name in ("a.csv", "a.jsonl", "a.parquet", "p")]
    seen, _ = run_over(tmp_path, *sets)
    assert {f"good {i}" for i in (0, 1, 4, 7, 8, 9)} <= seen
    rows = [(pathlib.Path(row["shard"]).name.rstrip(","), row["reason"]) for row in read_ledger(tmp_path / "skipped.jsonl")]
    count = lambda shard: sum(name == shard for name, _ in rows)
    assert (count("a.csv"), count("a.jsonl"), count("a.parquet")) == (7, 4, 3)
    assert count("p") == 11 and ("p", "missing field") in rows  # pictures without a text beside them
    assert {reason for _, reason in rows} == {"unreadable", "bad row", "missing field", "empty caption", "wrong encoding"}


def test_a_file_that_vanishes_costs_its_samples_alone(files):
    rows = [f"pictures/{i}.jpg,number {i}" for i in range(5)]
    (files / "pairs.csv").write_text("\n".join(["image,caption", *rows]))
    config = config_of(str(files / "pairs.csv"), batch=5)
    batches = training_batches(config, health=Health(files / "skipped.jsonl", max_bad=1.0))
    assert len(set(captions(next(batches)["tokens"]))) == 5
    (files / "pictures" / "3.jpg").unlink()
    shown = captions(next(batches)["tokens"])
    assert "number 3" not in shown and len(shown) == 5
    (row,) = read_ledger(files / "skipped.jsonl")
    assert row["reason"] == "unreadable" and "3.jpg" in row["message"] and "FileNotFoundError" in row["message"]


def test_a_line_that_a_kill_left_half_written_is_taken_out_of_the_ledger(tmp_path):
    ledger, bad = tmp_path / "skipped.jsonl", BadSample("undecodable", "here")
    found = [(Place("shard", f"key {i}"), bad.reason, str(bad)) for i in range(3)]
    Health(ledger, 1.0).record(Report(3, found[:2]))
    ledger.write_text(ledger.read_text()[:-20])
    for _ in range(2):
        Health(ledger, 1.0).record(Report(3, found))
        assert sorted(row["key"] for row in read_ledger(ledger)) == ["key 0", "key 1", "key 2"]


def test_a_position_among_other_samples_means_nothing(tmp_path):
    tar(tmp_path / "a-0.tar", good(["one", "two", "three", "four"]))
    batches = training_batches(config_of(f"{tmp_path}/a-*.tar", batch=2))
    next(batches)
    tar(tmp_path / "a-1.tar", good(["five"]))
    with pytest.raises(UserError, match=r"the data sets have \[5\] examples and had \[4\] when the checkpoint was written"):
        training_batches(config_of(f"{tmp_path}/a-*.tar", batch=2)).set_state(batches.get_state())


def test_too_many_bad_samples_stop_the_run_and_none_good_at_once(tmp_path):
    mostly = tar(tmp_path / "a.tar", good([f"good {i}" for i in range(95)]) + [(f"bad {i}.jpg", JPEG) for i in range(5)])
    batches = training_batches(config_of(mostly, batch=50))
    with pytest.raises(UserError, match=r"skipped \d+ samples of 1,0.. \(\d+ missing field\).*: more than the share 0.01 of config.data.max_bad"):
        for _ in range(40):
            next(batches)
    none = tar(tmp_path / "b.tar", [(f"bad {i}.{end}", b"3") for i in range(50) for end in ("jpg", "cls")])
    with pytest.raises(UserError, match="no good sample in 80 .*80 missing field.*no field 'caption'; the fields are cls, image, jpg"):
        next(training_batches(config_of(none, batch=40)))


def test_what_takes_the_place_of_a_bad_sample_is_the_same_for_any_hosts_and_threads(tmp_path):
    members = good([f"good {i}" for i in range(30)]) + [(f"bad {i}.jpg", JPEG) for i in range(10)]
    path = tar(tmp_path / "a.tar", members)
    whole = TrainingBatches(config_of(path, batch=8))[3]
    assert whole["report"].bad
    threads = TrainingBatches(config_of(path, batch=8, threads=3))[3]
    parts = [TrainingBatches(config_of(path, batch=8), rows)[3] for rows in ([0, 1, 4, 5], [2, 3, 6, 7])]
    for name in ("image", "tokens"):
        assert (threads[name] == whole[name]).all()
        assert (parts[0][name] == whole[name][[0, 1, 4, 5]]).all() and (parts[1][name] == whole[name][[2, 3, 6, 7]]).all()


def test_captions_come_from_several_fields_by_weight(tmp_path):
    rows = [json.dumps({"image": "0.jpg", "alt": "the alt", "long": ["the long", "longer"], "none": ""}) for _ in range(8)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    (tmp_path / "0.jpg").write_bytes(JPEG)
    config = config_of(str(tmp_path / "a.jsonl"), batch=8, caption=("alt", "long", "none"), caption_weights=(1.0, 2.0, 5.0))
    batches = TrainingBatches(config)
    shown = [caption for number in range(50) for caption in captions(batches[number]["tokens"])]
    share = lambda text: shown.count(text) / len(shown)
    assert abs(share("the alt") - 1 / 3) < 0.08 and abs(share("longer") - 1 / 3) < 0.08 and set(shown) == {"the alt", "the long", "longer"}
    with pytest.raises(UserError, match="config.data.caption_weights is .* expected a number above zero for each"):
        TrainingBatches(config_of(str(tmp_path / "a.jsonl"), batch=8, caption=("alt", "long"), caption_weights=(1.0,)))


def test_a_mixture_of_sets(tmp_path):
    one, two = (tar(tmp_path / f"{name}.tar", good([f"{name} {i}" for i in range(20)])) for name in ("a", "b"))
    batches = TrainingBatches(config_of(one, two, batch=10, weights=(9.0, 1.0)))
    shown = [caption for number in range(10) for caption in captions(batches[number]["tokens"])]
    assert sum(caption.startswith("b") for caption in shown) == 10


def test_bad_samples_are_told_from_programs_that_need_all(tmp_path):
    bad = BadSample("undecodable", "here: broken")
    assert isinstance(bad, UserError) and bad.reason == "undecodable" and str(bad) == "here: broken"


def test_a_source_that_stalls_is_named(files, capfd):
    (files / "pairs.csv").write_text("\n".join(["image,caption", *(f"pictures/{i}.jpg,number {i}" for i in range(5))]))
    batches = training_batches(config_of(str(files / "pairs.csv"), batch=5, stall_seconds=0.2))
    slow = files / "pictures" / "3.jpg"
    slow.unlink()
    os.mkfifo(slow)  # whoever opens it waits for a writer
    errors = ""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        batch = pool.submit(next, batches)
        while errors.count("no batch for") < 2:
            time.sleep(0.05)
            errors += capfd.readouterr().err
        slow.write_bytes(jpeg(3))
        assert "number 3" in captions(batch.result()["tokens"])
    assert f"host 0: no batch for 0.2 s; it reads {files}/pairs.csv" in errors
