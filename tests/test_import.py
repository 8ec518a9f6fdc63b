"""`import clip_jax` is quick, for it waits for nothing that it may not need."""

import subprocess
import sys

from conftest import ROOT

import clip_jax


def test_importing_waits_for_no_jax():
    code = "import sys, clip_jax; dir(clip_jax); print([name for name in ('jax', 'flax', 'orbax', 'tensorflow', 'torch') if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


def test_what_is_promised_is_there():
    names = {"load", "available_models", "get_tokenizer", "tokenize", "__version__"}
    assert names <= set(dir(clip_jax)) and all(getattr(clip_jax, name) for name in names)
    assert not hasattr(clip_jax, "lod")
