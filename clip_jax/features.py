"""What `python -m clip_jax embed` writes and `search` reads: features, what they are of, and by which model."""

import dataclasses
import pathlib
import re
import zipfile
import zlib

import numpy as np
from jaxtyping import Float32, Shaped

from clip_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of one source, in its order.  `np.load` reads the file without this package."""

    features: Float32[np.ndarray, "N E"]  # of length one
    names: Shaped[np.ndarray, "N"]  # str: the path of a picture, its key in a tar, or the text
    kind: str  # "image" or "text"
    model: str  # a name or a path, as clip_jax.load takes it
    source: str  # where the pictures are, as Source.of takes it

    def write(self, file: pathlib.Path) -> None:
        """Writes an .npz."""
        with file.open("wb") as opened:  # np.savez would add .npz to another name
            np.savez(opened, **vars(self))

    @classmethod
    def read(cls, file: pathlib.Path) -> "Features":
        """Reads an .npz, and checks that it is one of ours."""
        expected = f"{file}: expected what `python -m clip_jax embed` writes"
        names = [field.name for field in dataclasses.fields(cls)]
        try:
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
                present = list(archive)
                arrays = {name: archive[name] for name in names if name in present}
        except OSError as error:
            raise UserError(f"{expected}, which cannot be read ({error.strerror or error})") from error
        except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{expected}, found no whole .npz ({error})") from error
        missing = [name for name in names if name not in present]
        if missing:
            raise UserError(f"{expected}, found no {', '.join(missing)} among {', '.join(present) or 'no arrays'}")
        features, of = arrays.pop("features"), arrays.pop("names")
        if (features.dtype, features.ndim) != (np.float32, 2) or (of.dtype.kind, of.shape) != ("U", features.shape[:1]):
            raise UserError(
                f"{expected}, float32 features [N, E] and N names, found {features.dtype} {list(features.shape)} and "
                f"{of.dtype} {list(of.shape)}"
            )
        return cls(features, of, **{name: str(value) for name, value in arrays.items()})


def one_line(name: str) -> str:
    """A name to be shown: no line breaks, nothing that steers a terminal, nothing that has no encoding."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", " ".join(name.split()))
