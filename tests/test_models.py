import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx

from clip_jax.errors import UserError
from clip_jax.models import ARCHITECTURES, CLIP, CLIPConfig
from clip_jax.models.architectures import (
    ResNetConfig,
    SigLIPTextConfig,
    SigLIPViTConfig,
    SmallResNetConfig,
    TextConfig,
    ViTConfig,
)
from clip_jax.models.convolution import InstanceBatchNorm, batch_norm
from clip_jax.models.transformer import Transformer
from clip_jax.pytorch import layouts
from clip_jax.step import abstract_model, split_model

pytestmark = pytest.mark.usefixtures("strict_promotion")

TEXT = TextConfig(width=64, layers=2, heads=2, context_length=16, vocabulary_size=128)
GOLDEN = {
    "vit": CLIPConfig("golden-vit", 32, ViTConfig(32, 8, width=128, layers=2, heads=2), TEXT, dtype="float32"),
    "resnet": CLIPConfig("golden-resnet", 32, ResNetConfig(64, (1, 2, 1, 1), width=8, heads=4), TEXT, dtype="float32"),
}
# Counted from the originals: open_clip 3.3.0 builds them with so many parameters.
PARAMETERS = {
    "RN50": 102_007_137,
    "RN101": 119_688_033,
    "RN50x4": 178_300_601,
    "RN50x16": 290_979_217,
    "RN50x64": 623_258_305,
    "ViT-B/32": 151_277_313,
    "ViT-B/16": 149_620_737,
    "ViT-L/14": 427_616_513,
    "ViT-L/14@336px": 427_944_193,
    "ViT-H-14": 986_109_441,
    "ViT-g-14": 1_366_678_273,
    "ViT-bigG-14": 2_539_567_105,
    "ViT-B-16-SigLIP": 203_155_970,
    "ViT-L-16-SigLIP-256": 652_150_786,
    "ViT-SO400M-14-SigLIP": 877_360_306,
    "ViT-SO400M-14-SigLIP-384": 877_960_498,
    "ViT-B-16-SigLIP-i18n-256": 370_626_050,
    "ViT-B-32-SigLIP2-256": 376_856_066,
    "ViT-gopt-16-SigLIP2-384": 1_871_885_426,
}


def golden_model(kind: str, golden: dict[str, np.ndarray], **changes) -> CLIP:
    config = dataclasses.replace(GOLDEN[kind], **changes)
    weights = {k.removeprefix(f"{kind}/weights/"): v for k, v in golden.items() if k.startswith(f"{kind}/weights/")}
    return layouts.build_model(config, layouts.to_ours(weights, layouts.openai_layout(config), config, kind))


def relative_error(found: jax.Array, expected: np.ndarray) -> float:
    """Largest error over the standard deviation of what is expected."""
    return float(np.abs(np.asarray(found, np.float64) - expected).max() / expected.std())


# Measured, images and texts: 1.2e-6 and 1.9e-6 (vit), 1.1e-6 and 1.5e-6 (resnet).
@pytest.mark.parametrize("kind, tolerance", [("vit", 3.6e-6), ("resnet", 4.3e-6)])
def test_towers_equal_openais_in_float32(kind, tolerance, golden_towers):
    model = golden_model(kind, golden_towers)
    image_error = relative_error(
        model.encode_image(jnp.asarray(golden_towers[f"{kind}/images"], jnp.float32)), golden_towers[f"{kind}/image_features"]
    )
    text_error = relative_error(
        model.encode_text(jnp.asarray(golden_towers[f"{kind}/tokens"], jnp.int32)), golden_towers[f"{kind}/text_features"]
    )
    assert image_error < tolerance and text_error < tolerance, (image_error, text_error)


def test_hidden_states_equal_openais(golden_towers):
    model = golden_model("vit", golden_towers)
    tokens = jnp.asarray(golden_towers["vit/tokens"], jnp.int32)
    last = jax.jit(CLIP.text_hidden_states)(model, tokens)
    assert relative_error(last, golden_towers["vit/text_last"]) < 5e-6  # measured 1.7e-6
    penultimate = model.text_hidden_states(tokens, layer=-2, final_layer_norm=False)
    assert relative_error(penultimate, golden_towers["vit/text_penultimate"]) < 5e-6  # measured 1.6e-6
    assert (model.text_hidden_states(tokens, layer=1, final_layer_norm=False) == penultimate).all()
    images = jnp.asarray(golden_towers["vit/images"], jnp.float32)
    assert model.image_tokens(images).shape == (4, 17, 128)
    with pytest.raises(UserError, match="layer 3, expected -3 to 2 of a transformer of 2 blocks"):
        model.image_tokens(images, layer=3)
    resnet = golden_model("resnet", golden_towers)
    images = jnp.asarray(golden_towers["resnet/images"], jnp.float32)
    assert resnet.image_tokens(images).shape == (4, 4, 256)
    with pytest.raises(UserError, match="expected -1: a ResNet gives its last map"):
        resnet.image_tokens(images, layer=-2)


def test_siglip_equals_transformers_in_float32():
    golden = dict(np.load(ROOT / "tests" / "golden" / "siglip.npz"))
    config = CLIPConfig(
        "golden-siglip",
        64,
        SigLIPViTConfig(36, 8, width=64, layers=1, heads=2, mlp_ratio=239.5 / 64),
        SigLIPTextConfig(32, 2, 2, context_length=16, vocabulary_size=128, mlp_ratio=119.5 / 32),
        activation="gelu_tanh",
        layer_norm_eps=1e-6,
        initial_logit_bias=-10.0,
        tokenizer="siglip",
        dtype="float32",
    )
    state = {name.removeprefix("weights/"): array for name, array in golden.items() if name.startswith("weights/")}
    model = layouts.build_model(config, layouts.to_ours(state, layouts.hf_layout(config), config, "siglip.npz"))
    images, tokens = jnp.asarray(golden["images"], jnp.float32), jnp.asarray(golden["tokens"], jnp.int32)
    found = {
        "image_features": model.encode_image(images),
        "text_features": model.encode_text(tokens),
        "logits_per_image": model(images, tokens)[0],
        "text_last": model.text_hidden_states(tokens),
        "text_penultimate": model.text_hidden_states(tokens, layer=-2, final_layer_norm=False),
        "image_last": model.image_tokens(images),
    }
    errors = {name: relative_error(array, golden[name]) for name, array in found.items()}
    assert errors.pop("logits_per_image") < 7.1e-6  # measured 2.4e-6
    assert max(errors.values()) < 4.7e-6, errors  # measured 1.6e-6


def test_bfloat16_stays_near_float32(golden_towers):
    model = golden_model("vit", golden_towers, dtype="bfloat16")
    with jax.numpy_dtype_promotion("standard"):  # jax.nn.dot_product_attention mixes types inside
        features = model.encode_image(jnp.asarray(golden_towers["vit/images"], jnp.float32))
    assert features.dtype == jnp.float32
    error = relative_error(features, golden_towers["vit/image_features"])
    assert 1e-4 < error < 0.047, error  # measured 0.0157; bfloat16 has 8 bits: were the error smaller, it would not be in use


def test_convolution_as_matrix_product_equals_the_convolution():
    from clip_jax.models.convolution import ConvolutionNorm

    rng = np.random.default_rng(0)
    for size, stride, side in ((3, 1, 8), (3, 2, 8), (1, 1, 8), (1, 2, 8), (3, 2, 6)):
        layer = ConvolutionNorm(5, 7, size, stride, rngs=nnx.Rngs(0))
        x = jnp.asarray(rng.standard_normal((2, side, side, 5)), jnp.float32)
        kernel = layer.kernel[...]
        expected = np.asarray(layer._as_convolution(x, kernel))
        assert relative_error(layer._as_matrix_product(x, kernel), expected) < 2.3e-6  # measured 7.8e-7


def test_logits_are_scaled_cosines_and_symmetric(golden_towers):
    model = golden_model("vit", golden_towers)
    images = jnp.asarray(golden_towers["vit/images"], jnp.float32)
    tokens = jnp.asarray(golden_towers["vit/tokens"], jnp.int32)
    per_image, per_text = jax.jit(lambda i, t: model(i, t))(images, tokens)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    expected = unit(golden_towers["vit/image_features"]) @ unit(golden_towers["vit/text_features"]).T
    expected *= np.exp(np.float32(golden_towers["vit/weights/logit_scale"]))
    assert relative_error(per_image, expected) < 6.2e-6  # measured 2.1e-6
    assert (per_text == per_image.T).all()


SIGLIP = CLIPConfig("siglip", 64, SigLIPViTConfig(32, 8, width=64, layers=2, heads=2), TEXT, dtype="float32")
SMALL = CLIPConfig("small", 24, SmallResNetConfig(32, (16, 32, 64)), TEXT, dtype="float32")


@pytest.mark.parametrize("config", [*GOLDEN.values(), SIGLIP, SMALL], ids=lambda config: config.name)
def test_pooled_features_are_what_is_projected(config):
    model = CLIP(config, rngs=nnx.Rngs(0))
    model.eval()
    images = np.random.default_rng(0).normal(size=(5, 32, 32, 3)).astype(np.float32)
    images = np.tile(images, (1, 2, 2, 1)) if isinstance(config.vision, ResNetConfig) else images
    pooled, features = model.pooled_image(images), model.encode_image(images)
    match config.vision:
        case SigLIPViTConfig():
            projected = pooled
        case ViTConfig():
            projected = pooled @ model.vision.projection[...]
        case ResNetConfig():
            projected = model.vision.pool.out(pooled)
        case _:
            projected = model.vision.projection(pooled)
    np.testing.assert_array_equal(projected, features)
    assert pooled.dtype == np.float32 and float(jnp.std(features)) > 0.01


def test_text_is_causal_by_gradient(golden_towers):
    text = golden_model("vit", golden_towers).text
    tokens = jnp.asarray(golden_towers["vit/tokens"], jnp.int32)
    used = np.argmax(np.asarray(tokens), axis=1)
    graphdef, state = nnx.split(text)
    params = nnx.to_pure_dict(state)

    def feature(position_embedding, row):
        model = nnx.merge(graphdef, params | {"position_embedding": position_embedding})
        return jnp.sum(jnp.square(model(row[None])))

    # The input at position t is the token's embedding plus the position's: d(feature) / d(either) is the same.
    gradient = jax.vmap(jax.grad(feature), in_axes=(None, 0))(params["position_embedding"], tokens)
    size = np.abs(np.asarray(gradient)).max(axis=-1)
    for row, end in zip(size, used):
        assert (row[: end + 1] > 1e-5).all() and (row[end + 1 :] == 0).all()


def test_hidden_states_are_causal_by_gradient():
    transformer = Transformer(TextConfig(16, 2, 2), GOLDEN["vit"], causal=True, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 6, 16))
    for position in range(6):
        at = jnp.array([position], jnp.int32)
        gradient = jax.grad(lambda x: jnp.sum(jnp.square(transformer(x, at))))(x)
        size = np.abs(np.asarray(gradient[0])).max(axis=-1)
        assert (size[: position + 1] > 1e-6).all() and (size[position + 1 :] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_last_block_at_one_position_equals_the_whole_block(causal):
    transformer = Transformer(TextConfig(32, 1, 4), dataclasses.replace(GOLDEN["vit"], activation="gelu"), causal, rngs=nnx.Rngs(0))
    block = transformer.blocks[0]
    x = jax.random.normal(jax.random.key(0), (5, 7, 32))
    position = jnp.array([0, 3, 6, 2, 6], jnp.int32)

    def whole(x):
        return jnp.take_along_axis(block(x, causal), position[:, None, None], axis=1)[:, 0]

    def at(x):
        return block.at(x, position, causal)

    expected = np.asarray(whole(x))
    assert relative_error(at(x), expected) < 1e-6  # measured 0
    weights = jax.random.normal(jax.random.key(1), expected.shape)
    gradients = [np.asarray(jax.grad(lambda x: jnp.sum(f(x) * weights))(x)) for f in (at, whole)]
    assert relative_error(gradients[0], gradients[1]) < 1.4e-6  # measured 4.6e-7


@pytest.mark.parametrize("name", PARAMETERS)
def test_full_size_architectures_have_as_many_parameters_as_the_originals(name):
    _, params, _ = split_model(abstract_model(ARCHITECTURES[name]))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_survives_json(name):
    import json

    config = ARCHITECTURES[name]
    assert CLIPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "config, changes, message",
    [
        (GOLDEN["vit"].vision, {"image_size": 30}, "image_size 30 is not a multiple of patch_size 8; the nearest is 32"),
        (GOLDEN["vit"].vision, {"image_size": 3}, "image_size 3 is not a multiple of patch_size 8; the nearest is 8"),
        (GOLDEN["resnet"].vision, {"image_size": 10}, "image_size 10 is not a multiple of 32, the strides of 4 stages; the nearest is 32"),
        (GOLDEN["resnet"].vision, {"layers": ()}, r"model.vision.layers is \(\), expected one or more whole numbers of at least 1"),
        (GOLDEN["resnet"].vision, {"layers": (1, 0, 1)}, r"model.vision.layers is \(1, 0, 1\), expected one or more whole numbers"),
        (GOLDEN["resnet"].vision, {"width": 1, "heads": 1}, "model.vision.width is 1, expected at least 2"),
        (SMALL.vision, {"image_size": 23}, "image_size 23 is not a multiple of 8, the strides of 3 channels; the nearest is 24"),
        (SMALL.vision, {"image_size": 0}, "model.vision.image_size is 0, expected at least 1"),
        (SMALL.vision, {"channels": (16, -1)}, r"model.vision.channels is \(16, -1\), expected one or more whole numbers"),
        (SIGLIP.vision, {"image_size": 7}, "model.vision.image_size 7 holds no patch of patch_size 8"),
        (SIGLIP.vision, {"heads": 0}, "model.vision.heads is 0, expected at least 1"),
        (TEXT, {"width": 100, "heads": 3}, "model.text.width 100 is not a multiple of model.text.heads 3"),
        (TEXT, {"vocabulary_size": -1}, "model.text.vocabulary_size is -1, expected at least 1"),
        (TEXT, {"mlp_ratio": -1.0}, "model.text.mlp_ratio is -1.0, expected a ratio that gives an MLP of width 1 or more"),
        (TEXT, {"layers": 0}, "model.text.layers is 0, expected at least 1"),
        (TEXT, {"context_length": 1}, "model.text.context_length is 1, expected at least 2"),
        (ARCHITECTURES["ViT-B/32"], {"activation": "relu"}, "activation is 'relu', expected one of quick_gelu"),
    ],
)
def test_impossible_architectures_are_refused(config, changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config, **changes)


def test_instance_norm_forgets_contrast_and_brightness_and_batch_norm_keeps_them():
    norm = InstanceBatchNorm(8, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (4, 6, 6, 8))
    gain, offset = jnp.array([1.0, 2.0, 3.0, 4.0])[:, None, None, None], jnp.arange(4.0)[:, None, None, None]
    before, after = norm(x), norm(x * gain + offset)
    # Measured 1.4e-3 of values up to 3: epsilon beside a variance of 1.
    assert abs(before - after)[..., :4].max() < 3e-3
    assert abs(before - after)[..., 4:].max() > 1


def test_the_batch_half_is_flax_batch_norm_and_so_are_its_running_statistics():
    ours, flax = InstanceBatchNorm(8, rngs=nnx.Rngs(0)), batch_norm(4, rngs=nnx.Rngs(0))
    x = 3 * jax.random.normal(jax.random.key(0), (4, 6, 6, 8)) + jnp.arange(4.0)[:, None, None, None]
    assert relative_error(ours(x)[..., 4:], np.asarray(flax(x[..., 4:]))) < 2.1e-6  # measured 7.2e-7
    for name in ("mean", "var"):
        assert abs(getattr(ours, name)[...] - getattr(flax, name)[...]).max() < 1.4e-6  # measured 4.8e-7 of values up to 2
    ours.eval(), flax.eval()
    assert relative_error(ours(x)[..., 4:], np.asarray(flax(x[..., 4:]))) < 1.8e-6  # measured 6.3e-7
