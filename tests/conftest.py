"""Strict numerics on eight virtual CPU devices, with shapes checked on every public function."""

import os

# Before JAX starts: sharding is tested on a laptop, and no accelerator is looked for.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Most of the time of these tests is compilation, a third of which is optimisation that they do not need.  The programs
# that tests start as processes are compiled as their users' are.
if "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"

import pathlib
import sys
import tempfile

import jax
import jaxtyping
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# The annotations of shapes and types are checked at every call.
jaxtyping.install_import_hook("clip_jax", "beartype.beartype")

# The files that take longest are begun first, so that in the end neither process is left alone with one.
LONGEST = ("test_train", "test_survival", "test_distributed", "test_step", "test_lengths", "test_blocks", "test_bucket", "test_checkpoint")


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_configure(config):
    """What one of the processes compiled, those of the tests and those that they start, the others need not."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="compiled")
        config.add_cleanup(folder.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name


ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture
def strict_promotion():
    """No implicit change of type.  Not for tests of the step: Optax mixes types in its bias correction."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def golden_towers() -> dict[str, np.ndarray]:
    """Random weights, inputs and features of OpenAI's PyTorch model (tests/golden/make_golden.py)."""
    return dict(np.load(ROOT / "tests" / "golden" / "towers.npz"))


@pytest.fixture
def files(tmp_path) -> pathlib.Path:
    """A folder with five pictures, pictures/0.jpg to 4.jpg."""
    from sets import jpeg

    (tmp_path / "pictures").mkdir()
    for i in range(5):
        (tmp_path / "pictures" / f"{i}.jpg").write_bytes(jpeg(i))
    return tmp_path


@pytest.fixture(scope="module")
def builder():
    """CLIP_benchmark's reader."""
    pytest.importorskip("clip_benchmark", reason="needs clip_benchmark: pip install --no-deps clip_benchmark==1.6.2 webdataset")
    from without_gpu import torchvision_without_gpu

    operators = torchvision_without_gpu()
    from clip_benchmark.datasets import builder

    yield builder
    del operators
