"""Training data in a bucket and behind http: real servers on this machine, reached as any other."""

import pathlib
import sys

import boto3
import pytest
import servers
from botocore.config import Config
from fsspec.registry import _registry
from sets import FIELDS, captions, check_five, config_of, good, jpeg, tar

from clip_jax.data import TrainingBatches
from clip_jax.errors import BadSample, UserError
from clip_jax.records import open_records

HTTP_SERVER = """
import sys
from aiohttp import web
app = web.Application()
app.router.add_static("/", sys.argv[1])
web.run_app(app, host="127.0.0.1", port=int(sys.argv[2]), print=None)
"""


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A client of an S3 server."""
    with servers.s3(tmp_path_factory.mktemp("home")):
        client = boto3.client("s3", config=Config(retries={"max_attempts": 1}))
        client.create_bucket(Bucket=servers.BUCKET)
        yield client


def upload(client, path: str) -> None:
    client.upload_file(path, servers.BUCKET, pathlib.Path(path).name)


def test_tars_in_a_bucket(bucket, tmp_path):
    upload(bucket, tar(tmp_path / "a-000.tar", good(["number 0", "number 1", "number 2"])))
    upload(bucket, tar(tmp_path / "a-001.tar", [(f"number {i}.{e}", d) for i in (3, 4) for e, d in (("jpg", jpeg(i)), ("txt", f"number {i}".encode()))]))
    for name in ("s3://pairs/a-{000..001}.tar", "s3://pairs/a-*.tar"):
        records = open_records(name, "train", FIELDS)
        check_five(records)
        assert str(records.place(4)) == "s3://pairs/a-001.tar sample number 4"
    remote, local = (TrainingBatches(config_of(f"{place}/a-*.tar"))[2] for place in ("s3://pairs", tmp_path))
    assert (remote["image"] == local["image"]).all() and (remote["tokens"] == local["tokens"]).all()


def test_tables_in_a_bucket_name_pictures_beside_them(bucket, tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
        upload(bucket, str(tmp_path / f"{i}.jpg"))
    (tmp_path / "pairs.csv").write_text("image,caption\n" + "".join(f"{i}.jpg,number {i}\n" for i in range(5)))
    upload(bucket, str(tmp_path / "pairs.csv"))
    check_five(open_records("s3://pairs/pairs.csv", "train", FIELDS))
    # A table here may name pictures there.
    (tmp_path / "far.csv").write_text("image,caption\n" + "".join(f"s3://pairs/{i}.jpg,number {i}\n" for i in range(5)))
    check_five(open_records(str(tmp_path / "far.csv"), "train", FIELDS))


def test_what_is_not_in_the_bucket_is_named(bucket, tmp_path):
    with pytest.raises(UserError, match="s3://pairs/none.tar: expected a file, which cannot be seen .FileNotFoundError"):
        open_records("s3://pairs/none.tar", "train", FIELDS)
    with pytest.raises(UserError, match=r"s3://pairs/none-\*.tar: no file has such a name"):
        open_records("s3://pairs/none-*.tar", "train", FIELDS)
    upload(bucket, tar(tmp_path / "b.tar", good(["one", "two"])))
    records = open_records("s3://pairs/b.tar", "train", FIELDS)
    assert len([record for record in records.read([0, 1]) if isinstance(record, dict)]) == 2
    bucket.delete_object(Bucket="pairs", Key="b.tar")
    gone = records.read([0, 1])
    assert all(isinstance(record, BadSample) and record.reason == "unreadable" for record in gone)
    assert "s3://pairs/b.tar sample one: cannot be read (FileNotFoundError" in str(gone[0])


def test_tars_behind_http(bucket, tmp_path):
    del bucket  # but for its HOME
    tar(tmp_path / "a.tar", good([f"number {i}" for i in range(5)]))
    port = servers.free_port()
    server = servers.started([sys.executable, "-c", HTTP_SERVER, str(tmp_path), str(port)], port)
    try:
        records = open_records(f"http://127.0.0.1:{port}/a.tar", "train", FIELDS)
        check_five(records)
        batch = TrainingBatches(config_of(f"http://127.0.0.1:{port}/a.tar", threads=2))[0]
        assert all(caption.startswith("number") for caption in captions(batch["tokens"]))
    finally:
        server.kill()
        server.wait()
    assert all(isinstance(record, BadSample) for record in records.read([0, 3]))


def test_a_scheme_whose_library_is_missing_says_what_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as Python has it where there is none
    monkeypatch.delitem(_registry, "gs", raising=False)  # which another test may have had
    with pytest.raises(UserError, match=r"gs://bucket/a.tar: no library for gs:// .*pip install 'clip-from-paper-to-pod\[gcs\]'"):
        open_records("gs://bucket/a.tar", "train", FIELDS)
