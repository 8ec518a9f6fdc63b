"""Training's pictures: decoded fast, seen through a random affine map, and recoloured.

A JPEG that is larger than needed is decoded at a half, a quarter or an eighth (libjpeg-turbo's scaled
inverse transforms), and one bilinear warp does crop, rotation, zoom and shift together.  The result is
not Pillow's pixel for pixel; evaluation takes the exact path of images.py.
"""

import dataclasses
import math
from collections.abc import Sequence

import cv2
import numpy as np
import PIL.Image
import simplejpeg
from jaxtyping import Float, Float32, UInt8

from clip_jax import images
from clip_jax.errors import UserError

cv2.setNumThreads(1)  # batches are made in threads of their own, and OpenCV's would stand in their way

DRAWS = 23  # random numbers, from 0 to 1, that one view takes
REDUCTIONS = (8, 4, 2)  # the fast scales of libjpeg-turbo
BLUR_FROM = 1.4  # pixels of the picture to one of the view, from which on bilinear sampling alone would alias

Picture = UInt8[np.ndarray, "H W C"]  # RGB, or premultiplied RGBA
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


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

    def __post_init__(self):
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise UserError(f"config.data.augment.crop_scale is {self.crop_scale}, expected two shares, 0 < first <= second <= 1")
        if not 0 < self.zoom[0] <= self.zoom[1]:
            raise UserError(f"config.data.augment.zoom is {self.zoom}, expected two factors, 0 < first <= second")

    @property
    def moves(self) -> bool:
        """Whether a view may show what is beyond the picture."""
        return bool(self.rotate or self.shift or self.stretch or self.zoom != (1.0, 1.0))


def decode(encoded: bytes, where: str, size: int = 0) -> Picture:
    """A picture from the bytes of its file; `where` names it in errors.

    A JPEG may come smaller than it is, with `size` pixels at least on its shorter side; 0 asks for all.
    """
    if encoded[:2] == b"\xff\xd8":
        try:
            height, width, colors, _ = simplejpeg.decode_jpeg_header(encoded)
        except ValueError:
            colors = "unknown"
        if colors in ("YCbCr", "RGB", "Gray"):
            images.check_size(width, height, where)
            reduction = next((n for n in REDUCTIONS if size and min(height, width) >= n * size), 1)
            smallest = {"min_height": -(-height // reduction), "min_width": -(-width // reduction)}
            try:
                return simplejpeg.decode_jpeg(encoded, fastdct=reduction > 1, fastupsample=reduction > 1, **smallest)
            except ValueError:
                pass  # Pillow may know it all the same; if not, it says why.
    image = images.decode(encoded, where)
    return np.asarray(premultiplied(image) if images.has_alpha(image) else image.convert("RGB"))


def premultiplied(image: PIL.Image.Image) -> PIL.Image.Image:
    """RGBa, the mode that resampling leaves without dark seams."""
    return image if image.mode == "RGBa" else image.convert("RGBA").convert("RGBa")


def decoded_size(size: int, strength: Augmentation) -> int:
    """Pixels that the shorter side of a picture must keep, so that no crop of it is enlarged that need not be."""
    return size if strength.crop_scale == (1.0, 1.0) else math.ceil(size / math.sqrt(strength.crop_scale[0] * 3 / 4))


def augment(
    picture: Picture, size: int, strength: Augmentation, draws: Float32[np.ndarray, "23"]
) -> UInt8[np.ndarray, "S S 3"]:
    """A view of the picture, `size` pixels a side, as the random numbers `draws` say."""
    draws = draws.tolist()
    color = [255 * draw for draw in draws[4:7]] if draws[7] < strength.background_rate else [255.0] * 3
    box = _crop_box(picture.shape[1], picture.shape[0], strength.crop_scale, draws[:4])
    matrix = _affine(size, strength, draws[8:13])
    transparent, recolored = picture.shape[2] == 4, draws[13] < strength.color_rate
    fill = (0,) * 4 if transparent else color
    view = _warp(picture, box, size, matrix, fill if transparent or strength.moves else None)
    if not transparent and not recolored:
        return view
    colors = _color_map(strength, draws[14:21]) if recolored else np.eye(3, 4)
    if transparent:  # What shows is the picture and, where it is clear, the background.
        background = colors[:, :3] @ color
        colors = np.column_stack([colors[:, :3], background / -255, colors[:, 3] + background])
    levels = view.astype(np.float32)
    seen = cv2.transform(levels, colors)
    if recolored and strength.light:
        light = _light(size, strength.light * draws[21], 2 * math.pi * draws[22])
        seen += cv2.merge([light * levels[:, :, 3] / 255 if transparent else light] * 3)
    return np.clip(np.rint(seen, out=seen), 0, 255, out=seen).astype(np.uint8)


def _crop_box(width: int, height: int, scale: tuple[float, float], draws: list[float]) -> Box:
    """RandomResizedCrop: a share of the area, its aspect ratio changed by up to 4/3; or the whole picture."""
    if scale == (1.0, 1.0):
        return 0.0, 0.0, float(width), float(height)
    area = (scale[0] + (scale[1] - scale[0]) * draws[0]) * width * height
    ratio = (3 / 4) ** (1 - 2 * draws[1])
    crop_width, crop_height = min(math.sqrt(area * ratio), width), min(math.sqrt(area / ratio), height)
    left, top = draws[2] * (width - crop_width), draws[3] * (height - crop_height)
    return left, top, left + crop_width, top + crop_height


def _affine(size: int, strength: Augmentation, draws: list[float]) -> Float[np.ndarray, "2 3"]:
    """Rotation, zoom, stretch and shift about the centre, from places in the view to places in an upright one."""
    if not strength.moves:
        return np.eye(2, 3)
    angle = math.radians(strength.rotate) * (2 * draws[0] - 1)
    zoom = strength.zoom[0] * (strength.zoom[1] / strength.zoom[0]) ** draws[1]
    stretch = math.exp(strength.stretch * (draws[2] - 0.5))
    half = size / 2
    x = half + size * strength.shift * (2 * draws[3] - 1)
    y = half + size * strength.shift * (2 * draws[4] - 1)
    cosine, sine = math.cos(angle) / zoom, math.sin(angle) / zoom
    a, b, d, e = cosine * stretch, -sine / stretch, sine * stretch, cosine / stretch
    return np.array([[a, b, half - a * x - b * y], [d, e, half - d * x - e * y]])


def _warp(
    picture: Picture, box: Box, size: int, matrix: Float[np.ndarray, "2 3"], fill: Sequence | None
) -> UInt8[np.ndarray, "S S C"]:
    """What `matrix` shows of the box, in one bilinear warp; beyond the picture `fill`, or else its edge goes on."""
    left, top, right, bottom = box
    matrix = matrix * np.array([[(right - left) / size], [(bottom - top) / size]])
    matrix[:, 2] += left, top
    # Bilinear sampling sees two pixels each way: what is larger is averaged first, over whole numbers of pixels ...
    ratio = math.sqrt(abs(matrix[0, 0] * matrix[1, 1] - matrix[0, 1] * matrix[1, 0]))
    factor = min(int(ratio), *picture.shape[:2])
    if factor > 1:
        height, width = picture.shape[0] // factor, picture.shape[1] // factor
        whole = picture[: height * factor, : width * factor]
        picture = cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA)
        matrix, ratio = matrix / factor, ratio / factor
    # A whole number is the centre of a pixel in OpenCV, and its upper left corner here.
    matrix[:, 2] += (matrix[:, 0] + matrix[:, 1]) / 2 - 0.5
    if ratio > BLUR_FROM:  # ... and then over two, which moves it by half a pixel.
        picture = cv2.blur(picture, (2, 2), borderType=cv2.BORDER_REPLICATE)
        matrix[:, 2] += 0.5
    border = cv2.BORDER_REPLICATE if fill is None else cv2.BORDER_CONSTANT
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(picture, matrix, (size, size), flags=flags, borderMode=border, borderValue=fill or 0)


def _color_map(strength: Augmentation, draws: list[float]) -> Float[np.ndarray, "3 4"]:
    """Changes of contrast, of brightness, of hue and of saturation, and what they add."""
    # Hue turns the colours about the axis of greys, saturation is their distance from it.
    angle = math.radians(strength.hue) * (2 * draws[5] - 1)
    saturation = 1 + strength.saturation * (2 * draws[6] - 1)
    along, across = saturation * math.cos(angle), saturation * math.sin(angle) / math.sqrt(3)
    own, before, after = (1 + 2 * along) / 3, (1 - along) / 3 - across, (1 - along) / 3 + across
    turned = (own, before, after), (after, own, before), (before, after, own)
    # Contrast, of all and of each channel, about the middle; brightness.
    gains = [(0.8 + 0.4 * draws[0]) * (0.9 + 0.2 * draw) for draw in draws[2:5]]
    offset = 40 * draws[1] - 20
    return np.array([[*(gain * n for n in row), 128 * (1 - gain) + offset] for gain, row in zip(gains, turned)])


def _light(size: int, amplitude: float, angle: float) -> Float32[np.ndarray, "S S"]:
    """Levels to add to each pixel: a ramp across the view, zero in the middle."""
    ramp = np.linspace(-amplitude, amplitude, size, dtype=np.float32)
    return math.cos(angle) * ramp[None, :] + math.sin(angle) * ramp[:, None]
