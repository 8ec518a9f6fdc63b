"""A folder of pictures, with a text beside each, or the name of its folder for a caption."""

import os
import pathlib
from collections.abc import Sequence

from clip_jax.errors import BadSample, UserError
from clip_jax.files import read_ranges
from clip_jax.records import PICTURES, Place, Record, unreadable


def has_pictures(folder: pathlib.Path) -> bool:
    return any(True for _ in _pictures(folder))


class Folder:
    """The pictures below a folder, by path.

    Fields: `image`; `caption`, from the file of the same name that ends in .txt; `folder`, the name of the folder that
    the picture is in; `name`, its own.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder, self.broken = folder, []
        self.paths = sorted(_pictures(folder))

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Sequence[int]) -> list[Record | BadSample]:
        paths = [self.folder / self.paths[i] for i in indices]
        encoded = read_ranges([(str(path), 0, None) for path in paths])
        return [
            unreadable(self.place(i), data) if isinstance(data, Exception) else self._record(path, data)
            for i, path, data in zip(indices, paths, encoded)
        ]

    def _record(self, path: pathlib.Path, encoded: bytes) -> Record:
        record = {"image": encoded, "folder": path.parent.name, "name": path.stem}
        text = path.with_suffix(".txt")
        return record | {"caption": text.read_bytes()} if text.is_file() else record

    def place(self, index: int) -> Place:
        return Place(str(self.folder), self.paths[index])


def _pictures(folder: pathlib.Path):
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error

    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if name.rpartition(".")[2].lower() in PICTURES and not name.startswith("."):
                yield pathlib.Path(place, name).relative_to(folder).as_posix()
