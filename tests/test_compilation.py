"""Compiled programs are kept, and where."""

import subprocess
import sys

import pytest
from conftest import ROOT

CODE = """
import jax, jax.numpy as jnp
from clip_jax.compilation import keep_compiled
keep_compiled()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))
print(jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.parametrize("variable, folder", [(None, "clip_jax"), ("elsewhere", "elsewhere"), ("", None)])
def test_programs_are_kept(variable, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    if variable is not None:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / variable) if variable else "")
    printed = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    if folder is None:
        assert not list(tmp_path.iterdir()) and printed.strip() in ("", "None")
    else:
        assert [path.name for path in tmp_path.iterdir()] == [folder] and any(tmp_path.rglob("jit*"))
