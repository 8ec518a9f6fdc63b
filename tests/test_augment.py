import io

import numpy as np
import PIL.Image
import pytest

from clip_jax import augment as training
from clip_jax.augment import Augmentation
from clip_jax.errors import BadSample

STILL = Augmentation(crop_scale=(1.0, 1.0))


def gradient(width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, x * 0 + 7], -1).astype(np.uint8)


def photo(width: int, height: int, seed: int = 0) -> PIL.Image.Image:
    """Noise of all sizes, smooth as a photograph is."""
    rng, total = np.random.default_rng(seed), np.zeros((height, width, 3))
    for size in (2, 5, 12, 30, 75):
        coarse = PIL.Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
        total += np.asarray(coarse.resize((width, height), PIL.Image.BICUBIC), float) / size**0.7
    return PIL.Image.fromarray((255 * (total - total.min()) / np.ptp(total)).astype(np.uint8))


def encoded(image: PIL.Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def augment(pictures: list[np.ndarray], size: int, strength: Augmentation, seed: int = 0) -> np.ndarray:
    draws = np.random.default_rng(seed).random((len(pictures), training.DRAWS), np.float32)
    return np.stack([training.augment(picture, size, strength, row) for picture, row in zip(pictures, draws)])


def test_without_strength_a_training_picture_is_the_picture():
    image = gradient(32, 32)
    found = augment([image, image[::-1].copy()], 32, STILL)
    assert (found == np.stack([image, image[::-1]])).all()


@pytest.mark.parametrize("width, height", [(256, 192), (341, 256), (500, 375), (1024, 768), (2048, 1536), (60, 45)])
def test_the_fast_path_is_near_pillows_exact_one(width, height):
    image, size, strength = photo(width, height), 224, Augmentation()
    draws = np.random.default_rng(1).random(training.DRAWS, np.float32)
    fast = training.augment(training.decode(encoded(image, quality=92), "here", size), size, strength, draws)
    whole = PIL.Image.open(io.BytesIO(encoded(image, quality=92)))
    box = training._crop_box(width, height, strength.crop_scale, draws[:4].tolist())
    exact = np.asarray(whole.resize((size, size), PIL.Image.BICUBIC, box=box)).astype(int)
    error = np.abs(fast - exact)
    assert exact.std() > 25 and error.mean() < 1.2 and error.max() < 30, (error.mean(), error.max())


def test_a_jpeg_is_decoded_no_larger_than_it_must_be_and_other_pictures_whole():
    image = photo(1000, 760)
    shape = lambda data, size: training.decode(data, "here", size).shape
    assert shape(encoded(image), 0) == (760, 1000, 3)
    assert shape(encoded(image), 224) == (380, 500, 3) and shape(encoded(image), 190) == (190, 250, 3)
    assert shape(encoded(image.convert("L")), 95) == (95, 125, 3)
    assert shape(encoded(image, "PNG"), 95) == (760, 1000, 3)
    assert shape(encoded(image.convert("CMYK")), 95) == (760, 1000, 3)


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8\xff\xe0", encoded(photo(64, 48))[:-400]])
def test_what_cannot_be_decoded_is_a_bad_sample(data):
    with pytest.raises(BadSample, match=f"here: expected a picture .*{len(data) or 'empty'}") as bad:
        training.decode(data, "here", 32)
    assert bad.value.reason == "undecodable"


def test_a_picture_that_would_fill_the_memory_is_refused_before_it_is_decoded():
    header = bytearray(encoded(photo(64, 48)))
    place = header.index(b"\xff\xc0")  # the frame: marker, length, precision, height, width
    header[place + 5 : place + 9] = (60_000).to_bytes(2, "big") * 2
    with pytest.raises(BadSample, match="60000 x 60000 pixels, expected at most") as bad:
        training.decode(bytes(header), "here", 32)
    assert bad.value.reason == "too large"


def test_transparency_shows_white_or_a_drawn_colour():
    clear = np.zeros((16, 16, 4), np.uint8)
    assert (augment([clear], 16, STILL) == 255).all()
    always = Augmentation((1.0, 1.0), background_rate=1.0)
    colored = augment([clear, clear], 16, always).reshape(2, -1, 3)
    assert (colored == colored[:, :1]).all() and (colored[0] != colored[1]).any() and (colored != 255).any()


def test_an_opaque_picture_is_treated_as_one_with_an_alpha_of_255():
    turn = Augmentation((1.0, 1.0), rotate=30.0, background_rate=1.0, color_rate=1.0)
    opaque = gradient(40, 40)
    with_alpha = np.concatenate([opaque, np.full((40, 40, 1), 255, np.uint8)], axis=2)
    alone, beside = augment([opaque], 32, turn)[0].astype(int), augment([with_alpha], 32, turn)[0].astype(int)
    assert abs(alone - beside).max() <= 2 and alone.std() > 30  # measured 1: the background's colour is whole in RGB


def test_hue_turns_about_grey_and_saturation_spreads_from_it():
    grey, red = np.full((32, 16, 3), 90, np.uint8), np.zeros((32, 16, 3), np.uint8) + np.uint8([180, 60, 60])
    picture = np.concatenate([grey, red], axis=1)
    turned = augment([picture] * 64, 32, Augmentation((1.0, 1.0), color_rate=1.0, hue=120.0))
    plain = augment([picture] * 64, 32, Augmentation((1.0, 1.0), color_rate=1.0))
    hues = lambda batch: (batch[:, 16, 24].argmax(-1), batch[:, 16, 8].astype(int))
    assert set(hues(turned)[0].tolist()) == {0, 1, 2} and set(hues(plain)[0].tolist()) == {0}
    assert abs(hues(turned)[1] - hues(plain)[1]).max() <= 1  # grey has no hue
    spread = augment([picture] * 64, 32, Augmentation((1.0, 1.0), color_rate=1.0, saturation=0.5))
    distance = lambda batch: np.ptp(batch[:, 16, 24].astype(float), axis=-1)
    ratio = distance(spread) / distance(plain)
    assert ratio.min() < 0.7 and ratio.max() > 1.3 and 0.45 < ratio.min() and ratio.max() < 1.55


def test_light_falls_from_one_side_on_what_is_drawn_and_not_on_its_background():
    drawn = np.full((32, 32, 4), (128, 128, 128, 255), np.uint8)
    drawn[:4] = 0
    found, plain = (
        augment([drawn] * 64, 32, Augmentation((1.0, 1.0), color_rate=1.0, light=light)).astype(int) for light in (60.0, 0.0)
    )
    change = found - plain
    assert (change[:, :4] == 0).all()
    corners = change[:, 4:].reshape(64, -1)
    assert 40 < corners.max() < 60 * 2**0.5 + 1 and abs(change[:, 15:17, 15:17]).max() <= 6  # measured 3: nearly none in the middle


def test_augmentation_is_a_function_of_its_draws():
    strong = Augmentation((0.5, 1.0), 15.0, (0.8, 1.3), 0.1, 0.2, 1.0, 0.5)
    image = gradient(40, 30)
    once, again, other = (augment([image], 32, strong, seed) for seed in (0, 0, 1))
    assert once.shape == (1, 32, 32, 3) and (once == again).all() and (once != other).any()
