"""Features are the same however they are computed: in parts, cut to their length, after a common prefix, on many devices."""

import dataclasses
import io

import jax
import numpy as np
import PIL.Image
import pytest
from flax import nnx

from clip_jax.config import load_config, model_config
from clip_jax.errors import UserError
from clip_jax.evaluation.classifier import zero_shot_classifier
from clip_jax.evaluation.emoji import EMOJI_TEMPLATES, Emoji, load_emoji
from clip_jax.evaluation.encoder import Encoder
from clip_jax.evaluation.tasks import Measurement
from clip_jax.images import normalize
from clip_jax.models import ARCHITECTURES, CLIP
from clip_jax.tokenizer import tokenize

WORDS = "cat dog horse lighthouse great-white-shark electric guitar toilet paper a b".split()


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> CLIP:
    config = dataclasses.replace(model_config(load_config("configs/emoji.py")), dtype="float32")
    return CLIP(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def names() -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 5))) for _ in range(150)]


def padded(model: CLIP, texts: list[str]) -> np.ndarray:
    return np.asarray(model.encode_text(tokenize(texts, model.config.text.context_length, truncate=True), normalize=True))


def test_texts_cut_to_their_length_are_those_that_are_not(model, names):
    found, expected = Encoder(model, 64, devices=jax.devices()[:1]).texts(names), padded(model, names)
    np.testing.assert_allclose(found, expected, atol=5e-7)  # measured 1.6e-7 of values up to 0.24


@pytest.mark.parametrize("devices", [1, 8])
def test_prompts_after_a_prefix_are_those_that_are_computed_whole(devices, model, names):
    templates = ("a photo of a {}.", "{}", "a {} in a video game, and more and more and more and more words.", "itap of my {}")
    encoder = Encoder(model, 64, devices=jax.devices()[:devices])
    found = encoder.prompts(names, templates)
    expected = np.stack([padded(model, [template.format(name) for name in names]) for template in templates], axis=1)
    np.testing.assert_allclose(found, expected, atol=6.7e-7)  # measured 2.2e-7 of values up to 0.27
    few = encoder.prompts(names[:5], templates)  # too few for a prefix
    np.testing.assert_allclose(few, expected[:5], atol=5e-7)  # measured 1.6e-7


def test_the_classifier_is_the_mean_of_normalised_prompts(model, names):
    classifier = zero_shot_classifier(Encoder(model), names[:9], ("{}", "a picture of {}"))
    prompts = np.stack([padded(model, [template.format(n) for n in names[:9]]) for template in ("{}", "a picture of {}")], 1)
    np.testing.assert_allclose(np.linalg.norm(prompts, axis=-1), 1, atol=1.8e-7)  # measured 6e-8
    np.testing.assert_allclose(classifier, unit(prompts.mean(1)), atol=2.2e-7)  # measured 7.5e-8
    twice, once = Encoder(model).prompts(["cat"], ["a {}, and a {}"]), Encoder(model).texts(["a cat, and a cat"])
    assert (twice[0] == once).all()


def test_pictures_are_the_same_in_any_batch_and_on_any_number_of_devices(model):
    pictures = load_emoji().pictures[:37]
    one = Encoder(model, 16, devices=jax.devices()[:1]).images(pictures)
    assert one.shape == (37, 256)
    for devices, batch in ((1, 64), (2, 16), (8, 10)):
        encoder = Encoder(model, batch, devices=jax.devices()[:devices])
        np.testing.assert_allclose(encoder.images(pictures), one, atol=2.9e-7)  # measured 9.7e-8
        read = encoder.read(37, lambda numbers: [pictures[i] for i in numbers])
        np.testing.assert_allclose(read, one, atol=3.6e-7)  # measured 1.2e-7


def test_matrices_are_rounded_once_and_features_are_the_same(model):
    half = CLIP(dataclasses.replace(ARCHITECTURES["emoji-vit"], dtype="bfloat16"), rngs=nnx.Rngs(0))
    half.text.token_embedding[...] += 1e-3  # is added in float32, and stays so
    encoder = Encoder(half, 8, devices=jax.devices()[:1])
    types = {path[-1]: variable.dtype for path, variable in nnx.to_flat_state(encoder.variables)}
    assert (types["kernel"], types["scale"], types["token_embedding"]) == ("bfloat16", "float32", "float32")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    config = half.config
    expected = jax.jit(lambda x: half.encode_image(normalize(x, config.image_mean, config.image_std), normalize=True))(pixels)
    assert (encoder.pixels(pixels) == np.asarray(expected)).all()
    tokens = tokenize(["a dog"] * 8, config.text.context_length)
    expected = jax.jit(lambda tokens: half.encode_text(tokens, normalize=True))(tokens[:, :4])
    assert (encoder.tokens(tokens) == np.asarray(expected)).all()


def test_pictures_come_as_bytes_or_as_pixels_and_a_broken_one_is_named(model):
    encoder, gray = Encoder(model, 8), np.random.default_rng(0).integers(0, 256, (28, 28, 1), dtype=np.uint8)
    PIL.Image.fromarray(gray[..., 0]).save(file := io.BytesIO(), "PNG")
    found = encoder.read(3, lambda numbers: [[gray, gray.repeat(3, 2), file.getvalue()][i] for i in numbers])
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()
    with pytest.raises(UserError, match="here: picture 1: expected a picture that Pillow can decode, found 5 bytes"):
        encoder.read(2, lambda numbers: [[gray, b"hello"][i] for i in numbers], where="here")


def test_an_untrained_model_is_at_chance(model):
    records = [record for record, _ in Measurement(Encoder(model), "emoji", "random").of("emoji")]
    assert [(r["dataset"], r["task"]) for r in records] == [
        ("emoji_fluent", "zeroshot_classification"),
        ("emoji_held_out", "zeroshot_retrieval"),
    ]
    metrics = records[0]["metrics"] | records[1]["metrics"]
    for name in ("acc1", "acc5", "text_retrieval_recall@1", "image_retrieval_recall@10"):
        chance, count = metrics[f"{name}_chance"], 1595 if name.startswith("acc") else 150
        assert metrics[name] <= chance + 5 * (chance / count) ** 0.5


def test_other_pictures_can_be_measured(model):
    whole = load_emoji("noto_v1", "train")
    assert len(whole.pictures) == 1217 and len(EMOJI_TEMPLATES) == 7
    part = Emoji(whole.pictures[:40], whole.labels[:40], np.arange(20), whole.class_names)
    records = [record for record, _ in Measurement(Encoder(model), "emoji", "random").emoji(part)]
    assert records[1]["metrics"]["text_retrieval_recall@10_chance"] == 0.5
