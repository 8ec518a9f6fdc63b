"""Pictures on their way in: decoding, and the exact path of evaluation; augment.py has the fast one of training.

Both are on the host and end in uint8; `normalize` follows on the device, so that a batch travels as
bytes, a quarter of its float32 size.
"""

import dataclasses
import io
import math
import re

import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import Array, Float, Float32, UInt8

from clip_jax.errors import BadSample, UserError
from clip_jax.models import CLIPConfig

WHITE = (255, 255, 255)
MAX_PIXELS = 178_956_970  # Pillow's own limit, at 3 bytes half a gigabyte


def decode(encoded: bytes, where: str) -> PIL.Image.Image:
    """A picture from the bytes of its file; `where` names it in errors."""
    try:
        image = PIL.Image.open(io.BytesIO(encoded))
        check_size(*image.size, where)
        image.load()
    except BadSample:
        raise
    except PIL.Image.DecompressionBombError as error:
        raise BadSample("too large", f"{where}: too many pixels ({str(error).rstrip('.')}); make it smaller, or remove it") from error
    except (OSError, SyntaxError, ValueError) as error:
        kind = "an empty file" if not encoded else f"{len(encoded)} bytes starting with {encoded[:8]!r}"
        said = re.sub(r" <_io.BytesIO object at \w+>", "", str(error))
        message = f"{where}: expected a picture that Pillow can decode, found {kind} ({said}); mend or remove this record"
        raise BadSample("undecodable", message) from error
    return image


def check_size(width: int, height: int, where: str) -> None:
    """Refuses a picture that would fill the memory."""
    if width * height > MAX_PIXELS:
        message = f"{where}: {width} x {height} pixels, expected at most {MAX_PIXELS:,} in all; make it smaller, or remove it"
        raise BadSample("too large", message)


def has_alpha(image: PIL.Image.Image) -> bool:
    """Whether parts of the picture may be transparent."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def on_background(image: PIL.Image.Image, color: tuple[int, int, int] = WHITE) -> PIL.Image.Image:
    """An RGB picture whose transparent parts show `color`."""
    if not has_alpha(image):
        return image.convert("RGB")
    canvas = PIL.Image.new("RGBA", image.size, (*color, 255))
    return PIL.Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """The evaluation path of a model: a picture of any size and mode to the input of its image tower."""

    size: int  # pixels a side
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: str = "shortest"  # or "squash"
    interpolation: str = "bicubic"  # or "bilinear"

    @classmethod
    def of(cls, config: CLIPConfig) -> "Preprocess":
        """That of a model."""
        return cls(config.vision.image_size, config.image_mean, config.image_std, config.resize, config.interpolation)

    def __call__(self, image: PIL.Image.Image) -> Float32[np.ndarray, "S S 3"]:
        """(pixels / 255 - mean) / std."""
        pixels = self.pixels(image).astype(np.float32) / np.float32(255)
        return (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)

    def pixels(self, image: PIL.Image.Image, where: str = "picture") -> UInt8[np.ndarray, "S S 3"]:
        """Resized, cropped to the centre, then RGB.

        Pixel for pixel what openai/CLIP `clip.py:_transform` does: antialiased, the long side truncated, the
        crop's offset rounded half to even, the conversion to RGB last, and no turning by EXIF.  "squash" takes
        both sides to `size` instead, as SigLIP does.

        Raises:
          UserError: the picture, which `where` names, is so thin that it would fill the memory.
        """
        resample = {"bicubic": PIL.Image.BICUBIC, "bilinear": PIL.Image.BILINEAR}[self.interpolation]
        (width, height), size = image.size, self.size
        if self.resize == "squash":
            sides = size, size
        elif width <= height:
            sides = size, int(size * height / width)
        else:
            sides = int(size * width / height), size
        # A line of 60,000 x 1 would be 13,440,000 x 224 before it is cropped.
        pixels, limit = math.prod(sides), PIL.Image.MAX_IMAGE_PIXELS
        if limit and pixels > 2 * limit:
            raise UserError(
                f"{where}: {width} x {height} is too thin, {pixels:,} pixels when its short side is {size}, "
                f"expected at most {2 * limit:,}; crop or remove it"
            )
        resized = image.resize(sides, resample)
        left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
        return np.asarray(resized.crop((left, top, left + size, top + size)).convert("RGB"))


def normalize(
    images: UInt8[Array, "B H W 3"], mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Float[Array, "B H W 3"]:
    """(images / 255 - mean) / std, in float32, on the device."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) / 255 - mean[None, None, None]) / std[None, None, None]
