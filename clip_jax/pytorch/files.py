"""Files of named tensors: safetensors, and PyTorch's zip archives, read without PyTorch.

A `.pt` or `.bin` is a pickle, and a pickle may ask for any function to be called.  The reader here knows
the few names that tensors and containers need, none of which does anything but build them, and refuses
every other name before it is looked up.  A TorchScript archive, as OpenAI published its weights, is such a
file too; its code is never read.
"""

import collections
import json
import math
import pathlib
import pickle
import zipfile
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from clip_jax.errors import UserError

StateDict = dict[str, np.ndarray]

SAFETENSORS = (".safetensors",)
PICKLES = (".pt", ".pth", ".bin", ".ckpt")

SAFETENSORS_TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


def read_state_dict(path: pathlib.Path) -> tuple[StateDict, dict[str, str]]:
    """The tensors of a file, or of a sharded one by its `.index.json`, and what a safetensors file says of itself."""
    if path.name.endswith(".index.json"):
        return _read_shards(path), {}
    if path.suffix in SAFETENSORS:
        return _read_safetensors(path)
    if path.suffix in PICKLES:
        return _read_pickle(path), {}
    raise UserError(f"{path}: expected a file that ends in {', '.join(SAFETENSORS + PICKLES)}, found {path.suffix!r}")


def write_safetensors(path: pathlib.Path, state: StateDict, about: dict[str, str]) -> None:
    """Writes tensors; `about` goes into the header."""
    arrays = {name: np.array(array, order="C") for name, array in state.items()}  # with 0 axes where there are none
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"} | about)


def write_pickle(path: pathlib.Path, state: StateDict) -> None:
    """Writes a state dict as `torch.save` does."""
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path}: a {path.suffix} file is written by PyTorch, which is not installed: pip install torch") from error
    torch.save(collections.OrderedDict((k, torch.from_numpy(np.array(v))) for k, v in state.items()), path)


def _read_safetensors(path: pathlib.Path) -> tuple[StateDict, dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            about = file.metadata() or {}
        parts = safetensors.deserialize(path.read_bytes())
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: expected a whole safetensors file ({error}); copy or download it again") from error
    unknown = [f"{name} of type {part['dtype']}" for name, part in parts if part["dtype"] not in SAFETENSORS_TYPES]
    if unknown:
        raise UserError(f"{path}: expected types {', '.join(SAFETENSORS_TYPES)}, found {unknown[0]}")
    tensors = ((name, np.frombuffer(part["data"], SAFETENSORS_TYPES[part["dtype"]]), part["shape"]) for name, part in parts)
    return {name: tensor.reshape(shape) for name, tensor, shape in tensors}, about


def _read_shards(index: pathlib.Path) -> StateDict:
    try:
        places = json.loads(index.read_text())["weight_map"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{index}: expected JSON with a weight_map ({error!r})") from error
    state: StateDict = {}
    for shard in sorted(set(places.values())):
        if pathlib.PurePath(shard).name != shard:
            raise UserError(f"{index}: shard {shard!r} is not a file beside it")
        if not (index.parent / shard).is_file():
            raise UserError(f"{index.parent / shard}: missing; {index.name} lists it, copy or download it again")
        part, _ = read_state_dict(index.parent / shard)
        twice = sorted(state.keys() & part.keys())
        if twice:
            raise UserError(f"{index.parent / shard}: {twice[0]} is in another shard of {index.name} already")
        state |= part
    for name in places.keys() - state.keys():
        raise UserError(f"{index}: {name} is listed in {places[name]} but is not in it")
    return state


def _read_pickle(path: pathlib.Path) -> StateDict:
    try:
        with zipfile.ZipFile(path) as archive:
            (entry,) = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
            root = entry.removesuffix("data.pkl")
            with archive.open(entry) as stream:
                content = _Unpickler(stream, path, archive, root).load()
    except UserError:
        raise
    except (OSError, zipfile.BadZipFile, EOFError, KeyError, ValueError, IndexError, pickle.UnpicklingError) as error:
        with path.open("rb") as stream:
            start = stream.read(8)
        raise UserError(
            f"{path}: expected a whole zip archive as torch.save has written since PyTorch 1.6, found {path.stat().st_size} "
            f"bytes starting with {start!r} ({error}); copy it again, or save an old file anew with torch.save"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]  # beside the optimizer, as open_clip's training writes it
    state = dict(_tensors(content, ""))
    if not state:
        raise UserError(f"{path}: expected a state dict or a TorchScript module, found {type(content).__name__} without tensors")
    return state


def _tensors(content: Any, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a state dict or of a module's tree, by its dotted name."""
    children = vars(content) if isinstance(content, _Module) else content
    if isinstance(children, dict):
        for name, value in children.items():
            if isinstance(value, np.ndarray):
                yield f"{prefix}{name}", value
            else:
                yield from _tensors(value, f"{prefix}{name}.")


class _Module:
    """A TorchScript object: its attributes and nothing else."""


class _Unpickler(pickle.Unpickler):
    """Builds arrays, containers and attribute bags; knows no other name."""

    def __init__(self, stream, path: pathlib.Path, archive: zipfile.ZipFile, root: str):
        super().__init__(stream)
        self.path, self.archive, self.root = path, archive, root

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, requires_grad, hooks: data
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch.jit._pickle" and name.startswith("build_") and name.endswith("list"):
            return list
        if module == "torch.jit._pickle" and name == "restore_type_tag":
            return lambda value, tag: value
        if module.split(".")[0] == "__torch__":
            return _Module
        raise UserError(
            f"{self.path}: refused: the pickle asks for {module}.{name}, which no tensor needs, and would be executed; "
            "if you trust its author, load it with their code and save the tensors alone, as safetensors"
        )

    def persistent_load(self, reference: tuple) -> np.ndarray:
        _, dtype, key, _, count = reference
        content = self.archive.read(f"{self.root}data/{key}")
        size = int(count) * np.dtype(dtype).itemsize
        if len(content) < size:
            raise UserError(f"{self.path}: tensor data {key} has {len(content)} bytes, expected {size}; copy it again")
        return np.frombuffer(content[:size], dtype)

    def _tensor(self, storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> np.ndarray:
        end = offset + sum((n - 1) * step for n, step in zip(size, stride)) + 1
        if math.prod(size) and not 0 <= offset < end <= len(storage):
            raise UserError(f"{self.path}: a tensor of shape {size} does not fit into its {len(storage)} values")
        strides = [step * storage.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False).copy()
