"""Pictures on their way in: decoding, the exact path of evaluation, and the augmentation of training.

Everything here is on the host and ends in uint8; `normalize` follows on the device, so that a batch
travels as bytes, a quarter of its float32 size.
"""

import dataclasses
import io
import math

import jax.numpy as jnp
import numpy as np
import PIL.Image
from jaxtyping import Array, Float, UInt8

from clip_jax.errors import UserError

WHITE = (255, 255, 255)


def decode(encoded: bytes, where: str) -> PIL.Image.Image:
    """A picture from the bytes of its file; `where` names it in errors."""
    try:
        image = PIL.Image.open(io.BytesIO(encoded))
        image.load()
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        kind = "an empty file" if not encoded else f"{len(encoded)} bytes starting with {encoded[:8]!r}"
        raise UserError(
            f"{where}: expected a picture that Pillow can decode, found {kind} ({error}); mend or remove this record"
        ) from error
    return image


def has_alpha(image: PIL.Image.Image) -> bool:
    """Whether parts of the picture may be transparent."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def on_background(image: PIL.Image.Image, color: tuple[int, int, int] = WHITE) -> PIL.Image.Image:
    """An RGB picture whose transparent parts show `color`."""
    if not has_alpha(image):
        return image.convert("RGB")
    canvas = PIL.Image.new("RGBA", image.size, (*color, 255))
    return PIL.Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")


def preprocess(image: PIL.Image.Image, size: int) -> UInt8[np.ndarray, "S S 3"]:
    """The evaluation path: shortest side to `size`, centre crop, then RGB.

    Pixel for pixel what openai/CLIP `clip.py:_transform` does: bicubic with antialiasing, the long
    side truncated, the crop's offset rounded half to even, and the conversion to RGB last.
    """
    width, height = image.size
    if width <= height:
        resized = image.resize((size, int(size * height / width)), PIL.Image.BICUBIC)
    else:
        resized = image.resize((int(size * width / height), size), PIL.Image.BICUBIC)
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    return np.asarray(resized.crop((left, top, left + size, top + size)).convert("RGB"))


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How far a training picture may stray.  The defaults are open_clip's: a crop and no more."""

    crop_scale: tuple[float, float] = (0.9, 1.0)  # share of the picture's area: RandomResizedCrop
    rotate: float = 0.0  # degrees, either way
    zoom: tuple[float, float] = (1.0, 1.0)
    shift: float = 0.0  # share of the side, either way
    stretch: float = 0.0  # logarithm of the change of the aspect ratio, either way
    color_rate: float = 0.0  # probability of mild changes of contrast, of each channel, and of brightness
    background_rate: float = 0.0  # probability that transparency shows a random colour, not white


def premultiplied(image: PIL.Image.Image) -> PIL.Image.Image:
    """The mode in which `augment` works: RGB, or RGBa, which resampling leaves without dark seams."""
    return image.convert("RGBA").convert("RGBa") if has_alpha(image) and image.mode != "RGBa" else image


def augment(
    image: PIL.Image.Image, size: int, strength: Augmentation, rng: np.random.Generator
) -> UInt8[np.ndarray, "S S 3"]:
    """A random view of a picture, `size` pixels a side."""
    image = premultiplied(image) if has_alpha(image) else image.convert("RGB")
    draws = rng.random(19, np.float32)
    color = 255 * draws[4:7] if draws[7] < strength.background_rate else np.full(3, 255, np.float32)
    image = _random_crop(image, size, strength.crop_scale, draws[0:4].tolist())
    image = _random_affine(image, strength, draws[8:13].tolist(), color)
    # Channels first: arithmetic along rows of three is ten times slower in NumPy.
    planes = np.asarray(image).reshape(size * size, -1).T.astype(np.float32)
    if image.mode == "RGBa":
        planes = planes[:3] + (1 - planes[3] / 255) * color[:, None]
    if draws[13] < strength.color_rate:
        gain = (0.8 + 0.4 * draws[14]) * (0.9 + 0.2 * draws[16:19])
        planes = planes * gain[:, None] + (128 * (1 - gain) + 40 * draws[15] - 20)[:, None]
    return (planes + 0.5).clip(0, 255).astype(np.uint8).T.reshape(size, size, 3)


def _random_crop(image: PIL.Image.Image, size: int, scale: tuple[float, float], draws: list[float]) -> PIL.Image.Image:
    """RandomResizedCrop: a share of the area, the aspect ratio changed by up to 4/3, bicubic."""
    if scale == (1.0, 1.0):
        return image if image.size == (size, size) else image.resize((size, size), PIL.Image.BICUBIC)
    area = (scale[0] + (scale[1] - scale[0]) * draws[0]) * image.width * image.height
    ratio = (3 / 4) ** (1 - 2 * draws[1])
    width = min(math.sqrt(area * ratio), image.width)
    height = min(math.sqrt(area / ratio), image.height)
    left, top = draws[2] * (image.width - width), draws[3] * (image.height - height)
    return image.resize((size, size), PIL.Image.BICUBIC, box=(left, top, left + width, top + height))


def _random_affine(
    image: PIL.Image.Image, strength: Augmentation, draws: list[float], color: np.ndarray
) -> PIL.Image.Image:
    """Rotation, zoom, stretch and shift in one bilinear resampling about the centre."""
    if not (strength.rotate or strength.shift or strength.stretch or strength.zoom != (1.0, 1.0)):
        return image
    angle = math.radians(strength.rotate) * (2 * draws[0] - 1)
    zoom = strength.zoom[0] * (strength.zoom[1] / strength.zoom[0]) ** draws[1]
    stretch = math.exp(strength.stretch * (draws[2] - 0.5))
    half = image.width / 2
    x = half + 2 * half * strength.shift * (2 * draws[3] - 1)
    y = half + 2 * half * strength.shift * (2 * draws[4] - 1)
    # The inverse map, from a pixel of the result to a place in the picture.
    cosine, sine = math.cos(angle) / zoom, math.sin(angle) / zoom
    a, b, c, d = cosine * stretch, -sine / stretch, sine * stretch, cosine / stretch
    matrix = (a, b, half - a * x - b * y, c, d, half - c * x - d * y)
    fill = (0, 0, 0, 0) if image.mode == "RGBa" else tuple(color.astype(int).tolist())
    return image.transform(image.size, PIL.Image.AFFINE, matrix, PIL.Image.BILINEAR, fillcolor=fill)


def normalize(
    images: UInt8[Array, "B H W 3"], mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Float[Array, "B H W 3"]:
    """(images / 255 - mean) / std, in float32, on the device."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) / 255 - mean[None, None, None]) / std[None, None, None]
