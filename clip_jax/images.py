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
from jaxtyping import Array, Float, Float32, UInt8

from clip_jax.errors import UserError
from clip_jax.models import CLIPConfig

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


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How far a training picture may stray.  The defaults are open_clip's: a crop and no more."""

    crop_scale: tuple[float, float] = (0.9, 1.0)  # share of the picture's area: RandomResizedCrop
    rotate: float = 0.0  # degrees, either way
    zoom: tuple[float, float] = (1.0, 1.0)
    shift: float = 0.0  # share of the side, either way
    stretch: float = 0.0  # logarithm of the change of the aspect ratio, either way
    color_rate: float = 0.0  # probability of mild changes of contrast, of each channel, of brightness, and of:
    hue: float = 0.0  # degrees, either way
    saturation: float = 0.0  # share, either way
    light: float = 0.0  # levels, of 255, by which one side may be lit and the opposite one be in the shade
    background_rate: float = 0.0  # probability that transparency shows a random colour, not white


def premultiplied(image: PIL.Image.Image) -> PIL.Image.Image:
    """RGBa, the mode that resampling leaves without dark seams."""
    return image if image.mode == "RGBa" else image.convert("RGBA").convert("RGBa")


def augmentation_draws(batch: int, rng: np.random.Generator) -> Float32[np.ndarray, "B 23"]:
    """The random numbers, from 0 to 1, of which `augment` makes its choices."""
    return rng.random((batch, 23), np.float32)


def augment(
    pictures: list[PIL.Image.Image], size: int, strength: Augmentation, draws: Float32[np.ndarray, "B 23"]
) -> UInt8[np.ndarray, "B S S 3"]:
    """A random view of each picture, `size` pixels a side.

    Pillow resamples one picture after the other; all else is arithmetic on the whole batch.
    """
    transparent = any(map(has_alpha, pictures))
    colors = np.where(draws[:, 7:8] < strength.background_rate, 255 * draws[:, 4:7], np.float32(255))
    matrices = _affine_matrices(size, strength, draws[:, 8:13].astype(float))
    pixels = np.empty((len(pictures), size, size, 4 if transparent else 3), np.uint8)
    for row, picture in enumerate(pictures):
        view = premultiplied(picture) if transparent else picture.convert("RGB")
        view = _random_crop(view, size, strength.crop_scale, draws[row, 0:4].tolist())
        if matrices is not None:
            fill = (0, 0, 0, 0) if transparent else tuple(colors[row].astype(int).tolist())
            view = view.transform((size, size), PIL.Image.AFFINE, matrices[row], PIL.Image.BILINEAR, fillcolor=fill)
        pixels[row] = view
    if not transparent and not strength.color_rate:
        return pixels
    matrix, offset = _color_maps(strength, draws[:, 13:21])
    if transparent:  # What shows is the picture and, where it is clear, the background.
        background = matrix @ colors[:, :, None]
        matrix, offset = np.concatenate([matrix, -background / 255], axis=2), offset + background
    planes = pixels.reshape(len(pictures), size * size, -1).swapaxes(1, 2).astype(np.float32)
    seen = matrix @ planes + (offset + 0.5)
    if strength.light:
        light = _light(size, strength, draws[:, [13, 21, 22]])
        seen += light * (planes[:, 3:] / 255) if transparent else light
    return seen.clip(0, 255, out=seen).astype(np.uint8).swapaxes(1, 2).reshape(len(pictures), size, size, 3)


def _color_maps(
    strength: Augmentation, draws: Float32[np.ndarray, "B 8"]
) -> tuple[Float32[np.ndarray, "B 3 3"], Float32[np.ndarray, "B 3 1"]]:
    """For each picture the matrix and the offset that change its colours, or leave them."""
    identity, grey = np.eye(3, dtype=np.float32), np.full((3, 3), 1 / 3, np.float32)
    around_grey = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], np.float32) / math.sqrt(3)
    # Contrast, of all and of each channel, about the middle; brightness.
    gain = (0.8 + 0.4 * draws[:, 1, None]) * (0.9 + 0.2 * draws[:, 3:6])
    offset = 128 * (1 - gain) + 40 * draws[:, 2, None] - 20
    # Hue turns the colours about the axis of greys, saturation is their distance from it.
    angle = math.radians(strength.hue) * (2 * draws[:, 6] - 1)
    saturation = 1 + strength.saturation * (2 * draws[:, 7] - 1)
    along, across = (saturation * np.cos(angle))[:, None, None], (saturation * np.sin(angle))[:, None, None]
    matrix = gain[:, :, None] * (grey + along * (identity - grey) + across * around_grey)
    changed = (draws[:, 0] < strength.color_rate)[:, None, None]
    return np.where(changed, matrix, identity), np.where(changed, offset[:, :, None], np.float32(0))


def _light(size: int, strength: Augmentation, draws: Float32[np.ndarray, "B 3"]) -> Float32[np.ndarray, "B 1 P"]:
    """Levels to add to each pixel: a ramp across those pictures whose colours change, zero in the middle."""
    amplitude = np.where(draws[:, 0] < strength.color_rate, strength.light * draws[:, 1], np.float32(0))
    angle = 2 * np.pi * draws[:, 2]
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    along_x, along_y = amplitude * np.cos(angle), amplitude * np.sin(angle)
    levels = along_x[:, None, None] * ramp[None, None, :] + along_y[:, None, None] * ramp[None, :, None]
    return levels.reshape(len(draws), 1, size * size)


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


def _affine_matrices(size: int, strength: Augmentation, draws: Float[np.ndarray, "B 5"]) -> list[list[float]] | None:
    """Rotation, zoom, stretch and shift about the centre, as Pillow wants them; None where there are none.

    A matrix (a, b, c, d, e, f) is the inverse map: the pixel (x, y) of the result shows the place
    (a x + b y + c, d x + e y + f) of the picture.
    """
    if not (strength.rotate or strength.shift or strength.stretch or strength.zoom != (1.0, 1.0)):
        return None
    angle = math.radians(strength.rotate) * (2 * draws[:, 0] - 1)
    zoom = strength.zoom[0] * (strength.zoom[1] / strength.zoom[0]) ** draws[:, 1]
    stretch = np.exp(strength.stretch * (draws[:, 2] - 0.5))
    half = size / 2
    x = half + size * strength.shift * (2 * draws[:, 3] - 1)
    y = half + size * strength.shift * (2 * draws[:, 4] - 1)
    cosine, sine = np.cos(angle) / zoom, np.sin(angle) / zoom
    a, b, d, e = cosine * stretch, -sine / stretch, sine * stretch, cosine / stretch
    return np.stack([a, b, half - a * x - b * y, d, e, half - d * x - e * y], axis=1).tolist()


def normalize(
    images: UInt8[Array, "B H W 3"], mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Float[Array, "B H W 3"]:
    """(images / 255 - mean) / std, in float32, on the device."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) / 255 - mean[None, None, None]) / std[None, None, None]
