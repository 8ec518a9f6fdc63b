import gzip
import hashlib
import json
import pathlib
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from clip_jax.errors import UserError
from clip_jax.pytorch import files

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture
def archive(tmp_path):
    """Unpacks one of the archives that PyTorch wrote."""

    def unpack(name: str) -> pathlib.Path:
        path = tmp_path / name
        path.write_bytes(gzip.decompress((GOLDEN / f"{name}.gz").read_bytes()))
        return path

    return unpack


@pytest.mark.parametrize("name, prefix", [("torchscript.pt", ""), ("training.pt", "module.")])
def test_what_pytorch_wrote_is_read_without_it(name, prefix, archive):
    state, _ = files.read_state_dict(archive(name))
    expected = json.loads((GOLDEN / "archives.json").read_text())
    assert {k.removeprefix(prefix): hashlib.sha256(v.tobytes()).hexdigest() for k, v in state.items()} == expected
    assert {v.dtype for v in state.values()} == {np.dtype("float16"), np.dtype("int64")}


class _Code:
    """What a malicious file would hold: unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def zipped(path: pathlib.Path, content: bytes) -> pathlib.Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", content)
    return path


def test_a_pickle_with_code_in_it_is_refused_and_not_executed(tmp_path):
    trace = tmp_path / "executed"
    evil = zipped(tmp_path / "evil.pt", pickle.dumps({"state_dict": _Code(trace)}))
    with pytest.raises(UserError, match=r"^\S+/evil.pt: refused: the pickle asks for"):
        files.read_state_dict(evil)
    assert not trace.exists()
    pickle.loads(pickle.dumps(_Code(trace)))
    assert trace.exists()  # it would have been


@pytest.mark.parametrize("module, name", [("os", "system"), ("builtins", "eval"), ("torch", "load"), ("torch.jit._pickle", "build_")])
def test_only_tensors_and_containers_are_known(module, name, tmp_path):
    call = b"c" + module.encode() + b"\n" + name.encode() + b"\n" + b"(S'echo'\ntR."
    with pytest.raises(UserError, match=rf"^\S+/evil.bin: refused: the pickle asks for {module}.{name}"):
        files.read_state_dict(zipped(tmp_path / "evil.bin", call))


def test_what_is_no_archive_or_not_whole_is_named(tmp_path, archive):
    whole = archive("torchscript.pt").read_bytes()
    cut = tmp_path / "cut.pt"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut.pt: expected a whole zip archive .* found \d+ bytes starting with b'PK"):
        files.read_state_dict(cut)
    with pytest.raises(UserError, match="odd.pt: expected a state dict or a TorchScript module, found list"):
        files.read_state_dict(zipped(tmp_path / "odd.pt", pickle.dumps([1, 2])))
    with pytest.raises(UserError, match="weights.txt: expected a file that ends in .safetensors"):
        files.read_state_dict(tmp_path / "weights.txt")
    bad = tmp_path / "cut.safetensors"
    bad.write_bytes(safetensors.numpy.save({"a": np.zeros(100)})[:-8])
    with pytest.raises(UserError, match="cut.safetensors: expected a whole safetensors file"):
        files.read_state_dict(bad)


def test_a_tensor_beyond_its_data_is_refused(tmp_path):
    def write(path, size):
        # PyTorch's own opcodes: _rebuild_tensor_v2(storage, 0, size, stride, False, OrderedDict())
        stored = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
        shape = b"K\x00K" + bytes([size]) + b"\x85K\x01\x85\x89ccollections\nOrderedDict\n)R"
        content = b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n(" + stored + shape + b"tRs."
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", content)
            file.writestr("archive/data/0", np.arange(4, dtype=np.float32).tobytes())
        return path

    state, _ = files.read_state_dict(write(tmp_path / "right.pt", 4))
    assert state["a"].tolist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"^\S+/wrong.pt: a tensor of shape \(5,\) does not fit into its 4 values"):
        files.read_state_dict(write(tmp_path / "wrong.pt", 5))


def test_safetensors_keep_types_shapes_and_what_they_say_of_themselves(tmp_path):
    state = {
        "scalar": np.array(3.5, np.float32),
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "brain": np.arange(4).astype(ml_dtypes.bfloat16),
        "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    }
    files.write_safetensors(tmp_path / "a.safetensors", state, {"about": "this"})
    found, about = files.read_state_dict(tmp_path / "a.safetensors")
    assert about["about"] == "this"
    for name, array in state.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape and (found[name] == array).all()


def test_shards_are_one_state_and_a_missing_one_is_named(tmp_path):
    parts = {"one.safetensors": {"a": np.ones(2)}, "two.safetensors": {"b": np.zeros(3)}}
    for file, part in parts.items():
        files.write_safetensors(tmp_path / file, part, {})
    index = tmp_path / "model.safetensors.index.json"
    places = {"a": "one.safetensors", "b": "two.safetensors"}
    index.write_text(json.dumps({"weight_map": places}))
    state, _ = files.read_state_dict(index)
    assert set(state) == {"a", "b"}
    index.write_text(json.dumps({"weight_map": places | {"c": "two.safetensors"}}))
    with pytest.raises(UserError, match="c is listed in two.safetensors but is not in it"):
        files.read_state_dict(index)
    index.write_text(json.dumps({"weight_map": {"a": "../one.safetensors"}}))
    with pytest.raises(UserError, match="is not a file beside it"):
        files.read_state_dict(index)
    (tmp_path / "two.safetensors").unlink()
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(UserError, match="two.safetensors: missing; model.safetensors.index.json lists it"):
        files.read_state_dict(index)
