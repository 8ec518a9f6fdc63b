"""Where checkpoints lie: WORKDIR/checkpoints/STEP, here or in a bucket."""

import os
import pathlib

import orbax.checkpoint as ocp
from etils import epath

from clip_jax.errors import UserError
from clip_jax.files import filesystem, is_local


def location(path: str | os.PathLike) -> epath.Path:
    """An absolute path here, or one in a bucket."""
    name = os.fspath(path)
    if is_local(name):
        return epath.Path(pathlib.Path(name).expanduser().resolve())
    if not name.startswith("gs://"):
        raise UserError(
            f"{name}: checkpoints are read and written here, on a file system that all hosts share, or at gs://BUCKET/PATH; "
            f"Orbax, which does it, knows no {name.partition('://')[0]}://; docs/endurance.md says what to do"
        )
    filesystem(name)  # whose library may be missing
    return epath.Path(name)


def step_folders(folder: epath.Path) -> list[epath.Path]:
    """The folders of checkpoints that were written to their end, the newest first, whole or not."""
    steps = [path for path in _listed(folder) if path.name.isdigit() and ocp.utils.is_checkpoint_finalized(path)]
    return sorted(steps, key=lambda path: int(path.name), reverse=True)


def half_written(folder: epath.Path) -> list[epath.Path]:
    """Folders that have another name until they are whole, or in a bucket no mark yet that they are."""
    found = [path for path in _listed(folder) if path.name.isdigit() or ".orbax-checkpoint-tmp" in path.name]
    return sorted(path for path in found if not ocp.utils.is_checkpoint_finalized(path))


def _listed(folder: epath.Path) -> list[epath.Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def workdir_of(folder: epath.Path) -> epath.Path:
    """The workdir of a path that is one, or its folder `checkpoints`, or a step in there."""
    checkpoints = folder.parent if folder.name.isdigit() else folder
    return checkpoints.parent if checkpoints.name == "checkpoints" else folder
