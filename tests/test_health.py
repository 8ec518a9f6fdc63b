"""What a broken set gives: the good samples are seen, the others are in the ledger."""

import concurrent.futures
import gzip
import json
import os
import pathlib
import tarfile
import time
import zlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from sets import captions, config_of, good, jpeg, tar

from clip_jax.data import TrainingBatches, training_batches
from clip_jax.errors import BadSample, UserError
from clip_jax.health import Health, Report, read_ledger
from clip_jax.records import Place


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
