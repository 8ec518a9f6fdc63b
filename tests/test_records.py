import io
import json
import pathlib
import tarfile

import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
from sets import FIELDS, captions, check_five, config_of, every, good, jpeg, tar

from clip_jax.data import TrainingBatches
from clip_jax.errors import UserError
from clip_jax.files import expand
from clip_jax.records import open_records
from clip_jax.records.tables import Delimited


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


