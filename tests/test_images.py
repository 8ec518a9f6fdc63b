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
