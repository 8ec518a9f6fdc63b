"""A sheet of the pictures that were found for a text."""

import contextlib
import pathlib
import warnings

import numpy as np
import PIL.Image
from jaxtyping import Float32
from matplotlib.figure import Figure

from clip_jax import images
from clip_jax.errors import UserError
from clip_jax.features import Features, one_line
from clip_jax.sources import Source

COLUMNS = 5


def draw_sheet(
    text: str, embedded: Features, cosines: Float32[np.ndarray, "N"], chosen: list[int], file: pathlib.Path
) -> None:
    """The chosen pictures in their order, each with its cosine and name, read again from their source."""
    columns = min(len(chosen), COLUMNS)
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(max(1.7 * columns, 4), 2 * rows + 0.4), layout="constrained")
    # Names are not formulas, whatever dollars they hold.
    figure.suptitle(one_line(text)[:80], size=11, parse_math=False)
    for place, (i, picture) in enumerate(zip(chosen, _read_again(embedded, chosen)), 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(np.asarray(picture))
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        name = one_line(str(embedded.names[i]))
        name = name if len(name) <= 24 else f"…{name[-23:]}"
        axes.set_xlabel(f"{cosines[i]:.4f}\n{name}", size=7, parse_math=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # an empty box says it
            figure.savefig(file, dpi=120)
    except OSError as error:
        raise UserError(f"--sheet {file}: cannot be written ({error.strerror or error}); take another path") from error


def _read_again(embedded: Features, chosen: list[int]) -> list[PIL.Image.Image]:
    """Some of the pictures, small."""
    found = dict.fromkeys(chosen)
    with contextlib.closing(Source.of(embedded.source).items()) as items:
        for i, item in zip(range(max(chosen) + 1), items):
            if i in found and item.name == embedded.names[i]:
                found[i] = images.on_background(images.decode(item.read(), item.where))
                found[i].thumbnail((300, 300))
    for i, picture in found.items():
        if picture is None:
            raise UserError(
                f"--sheet: {embedded.source} has changed, expected {embedded.names[i]} as its picture number {i + 1}; "
                "restore it, or embed it again"
            )
    return list(found.values())
