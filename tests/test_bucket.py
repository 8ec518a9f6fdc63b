"""Checkpoints and data at gs://, on a server on this machine."""

import fsspec
import jax
import numpy as np
import pytest
import servers
from etils import epath
from sets import FIELDS, check_five, config_of, good, tar
from test_checkpoint import equal
from test_endurance import VIT, Run, config

import clip_jax
from clip_jax.checkpoint import Checkpoints, load_model
from clip_jax.checkpoint_folders import step_folders
from clip_jax.data import TrainingBatches
from clip_jax.errors import UserError
from clip_jax.records import open_records

# gcsfs's own; and when one array cannot be read, Orbax leaves the others to an event loop that it has closed.
ignored = ("ignore:Sending a large body:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
pytestmark = [pytest.mark.filterwarnings(warning) for warning in ignored]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory) -> str:
    with servers.gcs(tmp_path_factory.mktemp("home")):
        yield f"gs://{servers.BUCKET}"


def test_tars_at_gs(bucket, tmp_path):
    path = tar(tmp_path / "a.tar", good([f"number {i}" for i in range(5)]))
    epath.Path(f"{bucket}/a.tar").write_bytes((tmp_path / "a.tar").read_bytes())
    check_five(open_records(f"{bucket}/*.tar", "train", FIELDS))
    remote, local = (TrainingBatches(config_of(place))[2] for place in (f"{bucket}/a.tar", path))
    assert (remote["image"] == local["image"]).all() and (remote["tokens"] == local["tokens"]).all()


def test_checkpoints_at_gs(bucket, tmp_path, capsys):
    c = config(VIT)
    c.unlock().bucket = f"{bucket}/runs/b32"
    run, checkpoints, states = Run(), Checkpoints(tmp_path, c), {}
    assert not checkpoints.any()
    for number in (1, 2, 3):
        run.go()
        checkpoints.save(run.state, {"next": number}, float(number))
        states[number] = jax.tree.map(np.array, run.state)
    checkpoints.close()
    folder = epath.Path(f"{bucket}/runs/b32/checkpoints")
    assert [path.name for path in step_folders(folder)] == ["3", "2", "1"]
    (folder / "3" / "commit_success.txt").unlink()  # as if a kill had come before it
    for name in (files := fsspec.filesystem("gs")).find(str(folder / "2" / "state")):
        if "/d/" in name:
            epath.Path(f"gs://{name}").write_bytes(bytes(byte ^ 4 for byte in files.cat(name)))

    checkpoints = Checkpoints(tmp_path, c)
    assert checkpoints.any()
    state, position = checkpoints.restore(run.abstract)
    checkpoints.close()
    said = capsys.readouterr().err
    assert position == {"next": 1} and equal(state, states[1])
    assert f"checkpoint {folder}/3: half-written, removed" in said and f"checkpoint {folder}/2: passed over" in said
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2.corrupt"]
    for read, path in ((load_model, f"{bucket}/runs/b32/checkpoints/1"), (clip_jax.load, f"{bucket}/runs/b32")):
        model, _ = read(path)
        assert (np.asarray(model.text.token_embedding[...]) == states[1].params["text"]["token_embedding"]).all()
    with pytest.raises(UserError, match=f"{bucket}/none: expected the bucket of a run"):
        clip_jax.load(f"{bucket}/none")


def test_what_orbax_does_not_know_is_named(tmp_path):
    c = config(VIT)
    c.unlock().bucket = "s3://pairs/run"
    with pytest.raises(UserError, match="s3://pairs/run: .* gs://BUCKET/PATH; Orbax, which does it, knows no s3://"):
        Checkpoints(tmp_path, c)
    with pytest.raises(UserError, match="knows no s3://"):
        clip_jax.load("s3://pairs/run")
