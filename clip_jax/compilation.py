"""What was compiled once is kept, so that the next run with the same shapes begins at once."""

import hashlib
import os
import pathlib

import jax


def keep_compiled() -> None:
    """Keeps compiled programs in ~/.cache/clip_jax, or where JAX_COMPILATION_CACHE_DIR says; empty, it keeps none.

    Programs are for one processor: those of a home that several machines share lie beside each other.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return  # JAX reads it itself
    cpu = pathlib.Path("/proc/cpuinfo")
    flags = {line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Features", "model name"))} if cpu.is_file() else set()
    machine = hashlib.sha256("\n".join(sorted(flags)).encode()).hexdigest()[:8]
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "clip_jax" / f"compiled-{machine}"
    jax.config.update("jax_compilation_cache_dir", str(cache))
