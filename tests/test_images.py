import dataclasses

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from clip_jax import images
from clip_jax.errors import UserError
from clip_jax.models import ARCHITECTURES


def gradient(width: int, height: int) -> PIL.Image.Image:
    y, x = np.mgrid[:height, :width]
    return PIL.Image.fromarray(np.stack([x * 255 // width, y * 255 // height, x * 0 + 7], -1).astype(np.uint8))


def openai(size: int) -> images.Preprocess:
    return dataclasses.replace(images.Preprocess.of(ARCHITECTURES["ViT-B/32"]), size=size)


@pytest.mark.parametrize("width, height", [(50, 37), (37, 50), (35, 32), (64, 64), (10, 13)])
def test_evaluation_crops_the_centre_as_openai_does(width, height):
    # clip.py:_transform by way of torchvision: resize the short side, then round((n - size) / 2).
    size, image = 32, gradient(width, height)
    short, long = sorted((width, height))
    new_long = int(size * long / short)
    shape = (size, new_long) if width <= height else (new_long, size)
    offset = round((new_long - size) / 2)
    box = (0, offset, size, offset + size) if width <= height else (offset, 0, offset + size, size)
    expected = np.asarray(image.resize(shape, PIL.Image.BICUBIC).crop(box))
    assert (openai(size).pixels(image) == expected).all()


def test_siglip_squashes_instead_of_cropping():
    wide, siglip = gradient(50, 30), images.Preprocess.of(ARCHITECTURES["ViT-B-16-SigLIP"])
    found = dataclasses.replace(siglip, size=32).pixels(wide)
    assert (found == np.asarray(wide.resize((32, 32), PIL.Image.BICUBIC))).all()
    assert siglip(wide).min() >= -1 and siglip(wide).max() <= 1  # its mean and deviation are 0.5


def test_model_input_is_what_the_device_would_have_normalised():
    preprocess = openai(32)
    pixels = preprocess.pixels(gradient(50, 37))
    on_device = images.normalize(jnp.asarray(pixels[None]), preprocess.mean, preprocess.std)[0]
    np.testing.assert_allclose(preprocess(gradient(50, 37)), np.asarray(on_device), atol=7.2e-7)  # measured 2.4e-7 of 2.2


def augment(pictures: list[PIL.Image.Image], size: int, strength: images.Augmentation, seed: int = 0) -> np.ndarray:
    draws = images.augmentation_draws(len(pictures), np.random.default_rng(seed))
    return images.augment(pictures, size, strength, draws)


def test_without_strength_a_training_picture_is_the_picture():
    still = images.Augmentation(crop_scale=(1.0, 1.0))
    image = gradient(32, 32)
    found = augment([image, image.rotate(90)], 32, still)
    assert (found == np.stack([image, image.rotate(90)])).all()


def test_transparency_shows_white_or_a_drawn_colour():
    clear = PIL.Image.new("RGBA", (16, 16), (200, 0, 0, 0))
    still = images.Augmentation(crop_scale=(1.0, 1.0))
    assert (augment([clear], 16, still) == 255).all()
    always = images.Augmentation((1.0, 1.0), background_rate=1.0)
    colored = augment([clear, clear], 16, always).reshape(2, -1, 3)
    assert (colored == colored[:, :1]).all() and (colored[0] != colored[1]).any() and (colored != 255).any()


def test_an_opaque_picture_is_treated_alike_beside_a_transparent_one():
    turn = images.Augmentation((0.5, 1.0), rotate=30.0, background_rate=1.0, color_rate=1.0)
    opaque, clear = gradient(40, 40), PIL.Image.new("RGBA", (40, 40))
    alone = augment([opaque], 32, turn)[0].astype(int)
    beside = augment([opaque, clear], 32, turn)[0].astype(int)
    assert abs(alone - beside).max() <= 1 and alone.std() > 30  # measured 1: the background's colour is whole in RGB


def test_hue_turns_about_grey_and_saturation_spreads_from_it():
    grey, red = np.full((16, 16, 3), 90, np.uint8), np.zeros((16, 16, 3), np.uint8) + np.uint8([180, 60, 60])
    picture = PIL.Image.fromarray(np.concatenate([grey, red], axis=1))
    turned = augment([picture] * 64, 32, images.Augmentation((1.0, 1.0), color_rate=1.0, hue=120.0))
    plain = augment([picture] * 64, 32, images.Augmentation((1.0, 1.0), color_rate=1.0))
    hues = lambda batch: (batch[:, 16, 24].argmax(-1), batch[:, 16, 8].astype(int))
    assert set(hues(turned)[0].tolist()) == {0, 1, 2} and set(hues(plain)[0].tolist()) == {0}
    assert abs(hues(turned)[1] - hues(plain)[1]).max() <= 1  # grey has no hue
    spread = augment([picture] * 64, 32, images.Augmentation((1.0, 1.0), color_rate=1.0, saturation=0.5))
    distance = lambda batch: np.ptp(batch[:, 16, 24].astype(float), axis=-1)
    ratio = distance(spread) / distance(plain)
    assert ratio.min() < 0.7 and ratio.max() > 1.3 and 0.45 < ratio.min() and ratio.max() < 1.55


def test_light_falls_from_one_side_on_what_is_drawn_and_not_on_its_background():
    drawn = PIL.Image.new("RGBA", (32, 32), (128, 128, 128, 255))
    drawn.paste((0, 0, 0, 0), (0, 0, 32, 4))
    lit = images.Augmentation((1.0, 1.0), color_rate=1.0, light=60.0)
    found, plain = (
        augment([drawn] * 64, 32, strength).astype(int)
        for strength in (lit, images.Augmentation((1.0, 1.0), color_rate=1.0))
    )
    change = found - plain
    assert (change[:, :4] == 0).all()
    corners = change[:, 4:].reshape(64, -1)
    assert 40 < corners.max() < 60 * 2**0.5 + 1 and abs(change[:, 15:17, 15:17]).max() <= 6  # measured 3: nearly none in the middle


def test_augmentation_is_a_function_of_its_generator():
    strong = images.Augmentation((0.5, 1.0), 15.0, (0.8, 1.3), 0.1, 0.2, 1.0, 0.5)
    image = gradient(40, 30)
    once, again, other = (augment([image], 32, strong, seed) for seed in (0, 0, 1))
    assert once.shape == (1, 32, 32, 3) and (once == again).all() and (once != other).any()


def test_normalize_is_openais():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    expected = (pixels / 255 - np.array(mean)) / np.array(std)
    found = np.asarray(images.normalize(jnp.asarray(pixels), mean, std))
    np.testing.assert_allclose(found, expected, atol=1.2e-6)  # measured 4.2e-7 of values up to 2.2


def test_what_is_no_picture_is_named():
    with pytest.raises(UserError, match="here: expected a picture .* found 5 bytes starting with b'hello'"):
        images.decode(b"hello", "here")
    with pytest.raises(UserError, match="here: .* found an empty file"):
        images.decode(b"", "here")
