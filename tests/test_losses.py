import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from clip_jax import losses
from clip_jax.losses import clip_loss, ring_clip_loss, ring_siglip_loss, siglip_loss

pytestmark = pytest.mark.usefixtures("strict_promotion")


def features(seed: int, batch: int = 64, width: int = 32) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((batch, width))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def reference(images: np.ndarray, texts: np.ndarray, scale: float) -> float:
    """Figure 3 of the paper, in float64."""
    logits = scale * images @ texts.T
    cross_entropy = lambda rows: np.mean(np.log(np.exp(rows).sum(1)) - np.diag(rows))
    return (cross_entropy(logits) + cross_entropy(logits.T)) / 2


def test_equals_the_paper_in_float64():
    images, texts = features(0), features(1)
    for scale in (1.0, 14.3, 100.0):
        loss = clip_loss(jnp.float32(images), jnp.float32(texts), jnp.float32(scale))
        # Measured: relative error 1.3e-7 at a loss of 39.
        np.testing.assert_allclose(loss, reference(images, texts, scale), rtol=3.9e-7)


def test_gradient_equals_finite_differences_of_the_paper():
    images, texts, scale, h = features(0), features(1), 14.3, 1e-6
    gradients = jax.grad(clip_loss, argnums=(0, 1, 2))(jnp.float32(images), jnp.float32(texts), jnp.float32(scale))
    rng = np.random.default_rng(2)
    for i, gradient in enumerate(gradients):
        arguments = [images, texts, np.float64(scale)]
        direction = rng.standard_normal(np.shape(arguments[i]))
        up, down = ([*arguments[:i], arguments[i] + sign * h * direction, *arguments[i + 1 :]] for sign in (1, -1))
        expected = (reference(*up) - reference(*down)) / (2 * h)
        # Measured: error at most 1.4e-7 of derivatives of -0.79, -0.03 and 0.25.
        np.testing.assert_allclose(np.sum(np.asarray(gradient) * direction), expected, atol=4.2e-7, rtol=0)


def test_chance_is_the_logarithm_of_the_batch():
    same = jnp.ones((8, 4), jnp.float32) / 2
    np.testing.assert_allclose(clip_loss(same, same, jnp.float32(50.0)), np.log(8), atol=1.4e-6)  # measured 4.7e-7 under logits of 50


def test_pairs_in_order_lose_nothing_at_high_scale():
    eye = jnp.eye(8, dtype=jnp.float32)
    assert clip_loss(eye, eye, jnp.float32(100.0)) < 1e-6
    assert clip_loss(eye, eye[::-1], jnp.float32(100.0)) > 50


# The ring form, against float64 and against the plain form.
AXES = ("data", "fsdp")
SCALE, BIAS = 20.0, -3.0
PLAIN = {"clip": clip_loss, "siglip": siglip_loss}
RING = {"clip": ring_clip_loss, "siglip": ring_siglip_loss}


def ring_mesh(devices: int) -> jax.sharding.Mesh:
    shape = (max(1, devices // 2), min(devices, 2))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:devices])


def in_float64(kind: str, images: np.ndarray, texts: np.ndarray, groups: np.ndarray) -> tuple[float, ...]:
    """The loss and its gradients with respect to images, texts, scale and, of the sigmoid, bias."""
    batch, cosines, same = len(images), images @ texts.T, groups[:, None] == groups[None, :]
    if kind == "clip":
        logits = SCALE * cosines
        rows, columns = np.log(np.exp(logits).sum(1)), np.log(np.exp(logits).sum(0))
        target = same / same.sum(1, keepdims=True)
        loss = ((rows + columns) / 2).mean() - (target * logits).sum() / batch
        slope = (np.exp(logits - rows[:, None]) + np.exp(logits - columns[None])) / 2 - target
    else:
        logits, sign = SCALE * cosines + BIAS, np.where(same, -1, 1)
        loss = np.log1p(np.exp(sign * logits)).sum() / batch
        slope = sign / (1 + np.exp(-sign * logits))
    slope /= batch
    gradients = SCALE * slope @ texts, SCALE * slope.T @ images, (slope * cosines).sum()
    return loss, *gradients, *((slope.sum(),) if kind == "siglip" else ())


@pytest.mark.parametrize("grouped", [False, True], ids=["pairs", "groups"])
@pytest.mark.parametrize(
    "devices, batch, rings", [(1, 64, 1), (1, 37, 1), (2, 64, 1), (2, 74, 1), (6, 66, 2), (8, 128, 1), (8, 128, 2), (8, 152, 2)]
)
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_ring_equals_plain_and_float64(kind, devices, batch, rings, grouped, monkeypatch):
    monkeypatch.setitem(losses.BLOCK, "cpu", 16)  # several blocks a device, the last not full
    monkeypatch.setattr(losses, "NEIGHBOURS_BYTES", rings * batch // devices * 32 * 4)
    images, texts = features(3, batch), features(4, batch)
    groups = np.random.default_rng(5).integers(0, batch // 3, batch) if grouped else np.arange(batch)
    arguments = [jnp.float32(x) for x in (images, texts, SCALE, BIAS)][: 4 if kind == "siglip" else 3]
    given = jnp.asarray(groups) if grouped else None
    mesh = ring_mesh(devices)
    forms = {
        "plain": lambda *x: PLAIN[kind](*x, given),
        "ring": lambda *x: RING[kind](*x, given, mesh=mesh, axis=AXES),
    }
    expected = in_float64(kind, images, texts, groups)
    found = {}
    for name, form in forms.items():
        loss, gradients = jax.jit(jax.value_and_grad(form, argnums=tuple(range(len(arguments)))))(*arguments)
        found[name] = [np.asarray(x, np.float64) for x in (loss, *gradients)]
        errors = [np.abs(x - y).max() / np.abs(y).max() for x, y in zip(found[name], expected, strict=True)]
        assert max(errors) < 2e-6, (name, errors)  # measured 7.5e-7 of the largest of each
    errors = [np.abs(x - y).max() / np.abs(y).max() for x, y in zip(found["ring"], found["plain"])]
    assert max(errors) < 1e-6, errors  # measured 9.6e-7: what either is from float64
    # Without gradients it takes another way.
    np.testing.assert_allclose(jax.jit(forms["ring"])(*arguments), found["ring"][0], rtol=5e-7)


def test_the_ring_takes_bfloat16_features_and_gives_such_gradients():
    images, texts = (jnp.asarray(features(seed), jnp.bfloat16) for seed in (0, 1))
    for kind, rest in (("clip", (SCALE,)), ("siglip", (SCALE, BIAS))):
        arguments = images, texts, *map(jnp.float32, rest)
        value_and_gradients = lambda form: jax.value_and_grad(form, argnums=(0, 1))(*arguments)
        loss, gradients = value_and_gradients(lambda *x: RING[kind](*x, mesh=ring_mesh(8), axis=AXES))
        expected, theirs = value_and_gradients(PLAIN[kind])
        assert loss.dtype == jnp.float32 and all(g.dtype == jnp.bfloat16 for g in gradients)
        np.testing.assert_allclose(loss, expected, rtol=5e-7)  # products of bfloat16 are exact in float32
        for one, other in zip(gradients, theirs):
            one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
            assert np.abs(one - other).max() < 1.3e-2 * np.abs(other).max()  # measured 4.4e-3


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_ring_holds_neither_the_matrix_nor_all_features(kind):
    batch, mesh = 1024, ring_mesh(8)
    of_batch = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXES))
    x = jax.ShapeDtypeStruct((batch, 32), jnp.float32, sharding=of_batch)
    scalars = [jax.ShapeDtypeStruct((), jnp.float32)] * (2 if kind == "siglip" else 1)

    def text(form) -> str:
        arguments = tuple(range(2 + len(scalars)))
        return jax.jit(jax.value_and_grad(form, argnums=arguments)).lower(x, x, *scalars).compile().as_text()

    whole = re.compile(rf"f32\[(?:{batch},\d+|\d+,{batch}|{batch // 8},{batch}|{batch},{batch // 8})\]")
    ring = text(lambda *a: RING[kind](*a, mesh=mesh, axis=AXES))
    gathered = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"= f32\[([\d,]+)\]\S* all-gather", ring)]
    assert "collective-permute" in ring and max(gathered) == 2 * batch // 8 * 32  # of two devices, in two rings of four
    assert not whole.search(ring)
    assert whole.search(text(PLAIN[kind]))  # the search finds it where it is
