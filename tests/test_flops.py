import dataclasses
import math
from unittest.mock import Mock

import jax
import numpy as np
import pytest

from clip_jax import plan
from clip_jax.config import default_config
from clip_jax.errors import UserError
from clip_jax.flops import block_flops, image_flops, loss_flops, pair_flops, peak_flops, step_flops, text_flops
from clip_jax.models.architectures import ARCHITECTURES, CLIPConfig, ResNetConfig, TextConfig, ViTConfig
from clip_jax.sharding import make_mesh
from clip_jax.step import abstract_model, make_train_step

# All 16 blocks take ten seconds to differentiate.
FEW_BLOCKS = dataclasses.replace(ARCHITECTURES["RN50"], name="RN20", vision=ResNetConfig(224, (1, 2, 1, 1), 64, 32))
GROUPS = {8: 16, 2: 32}  # rows of a batch by the length that their texts are cut to


def make_config(model: CLIPConfig, groups: dict[int, int] = GROUPS):
    config = default_config()
    config.model = type(config)(model.to_dict())
    config.loss.kind = "softmax" if model.initial_logit_bias is None else "sigmoid"
    config.batch_size = sum(groups)
    return config


def batch_shapes(config, groups: dict[int, int] = GROUPS) -> dict:
    """What the step takes."""
    side = config.model.vision.image_size
    array = lambda *shape, dtype=np.int32: jax.ShapeDtypeStruct(shape, dtype)
    return {
        "image": array(config.batch_size, side, side, 3, dtype=np.uint8),
        "tokens": tuple(array(rows, min(length, config.model.text.context_length)) for rows, length in groups.items()),
        "place": array(config.batch_size),
    }


def counted(jaxpr) -> float:
    """FLOPs of the matrix products and convolutions that are there."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, shapes = equation.primitive.name, [x.aval.shape for x in equation.invars]
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(shapes[0][axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        elif name == "conv_general_dilated":
            features = equation.params["dimension_numbers"].rhs_spec[0]
            total += 2 * math.prod(shapes[1]) / shapes[1][features] * math.prod(equation.outvars[0].aval.shape)
        elif name == "cond":  # one form for each platform; the other has the zeros between strides in its gradient
            total += min(counted(branch.jaxpr) for branch in equation.params["branches"])
        else:
            inside = [getattr(x, "jaxpr", x) for x in equation.params.values() if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
            flops = sum(counted(x) for x in inside)
            assert not (flops and name == "while"), "a loop of unknown length"
            total += flops * equation.params.get("length", 1) if name == "scan" else flops
    return total


def without_last_block_saving(tower: ViTConfig | TextConfig, tokens: int, flops: float) -> float:
    block = lambda queries: block_flops(tower.width, tower.mlp_width, tokens, queries)
    return flops + block(tokens) - block(1)


@pytest.mark.parametrize(
    "model, patch_dropout",
    [
        (ARCHITECTURES["emoji"], 0.0),
        (FEW_BLOCKS, 0.0),
        (ARCHITECTURES["ViT-B/32"], 0.0),
        (ARCHITECTURES["ViT-B/16"], 0.5),
        (ARCHITECTURES["ViT-L/14"], 0.0),
        (ARCHITECTURES["ViT-B-16-SigLIP"], 0.0),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_step_has_these_products_and_no_others(model, patch_dropout):
    config = make_config(dataclasses.replace(model, scan_layers=True))  # which are traced sooner
    config.patch_dropout = patch_dropout
    _, step, state = make_train_step(config, make_mesh(config, jax.devices()[:1]))
    batch = batch_shapes(config)
    found = counted(jax.make_jaxpr(step)(state, batch).jaxpr)
    # The query of SigLIP's attention pool: once a batch, and 4e-6 of it.
    once = 3 * 2 * config.model.vision.width**2 if config.model.vision.pooling == "map" else 0
    assert found == step_flops(config, batch) + once


def test_a_whole_resnet_has_these_products_and_no_others():
    config = ARCHITECTURES["RN50"]
    picture = jax.ShapeDtypeStruct((1, config.vision.image_size, config.vision.image_size, 3), np.float32)
    jaxpr = jax.make_jaxpr(lambda model, picture: model.encode_image(picture))(abstract_model(config), picture)
    assert counted(jaxpr.jaxpr) == image_flops(config)


def test_the_compiled_flops_are_within_three_percent():
    groups = {48: 32}
    text = TextConfig(width=256, layers=1, heads=4, context_length=32, vocabulary_size=256)
    vision = ViTConfig(64, 8, width=256, layers=2, heads=4)
    model = CLIPConfig("small", 256, vision, text, dtype="float32")
    config = make_config(model, groups)
    _, step, state = make_train_step(config, make_mesh(config, jax.devices()[:1]))
    batch = batch_shapes(config, groups)
    compiled = step.lower(state, batch).compile().cost_analysis()["flops"]
    # The compiler counts what is not a product too: normalisation, softmax, GELU, AdamW.  Measured: 1.71 % above.
    assert 1 < compiled / step_flops(config, batch) < 1.03
    # The step does have the savings: without that of the last blocks there would be this much more.
    whole = without_last_block_saving(vision, vision.grid**2 + 1, image_flops(model))
    assert whole / image_flops(model) > 1.5


@pytest.mark.parametrize(
    "name, image, text",
    [
        ("ViT-B/32", 8.8, 6.0),
        ("ViT-B/16", 35.1, 6.0),
        ("ViT-L/14", 162.0, 13.3),
        ("ViT-L/14@336px", 381.9, 13.3),
    ],
)
def test_without_the_savings_they_are_the_published_ones(name, image, text):
    config = ARCHITECTURES[name]
    found = without_last_block_saving(config.vision, config.vision.grid**2 + 1, image_flops(config))
    assert found / 1e9 == pytest.approx(image, abs=0.05)
    assert without_last_block_saving(config.text, 77, text_flops(config, 77)) / 1e9 == pytest.approx(text, abs=0.05)


def test_a_resnets_are_the_published_ones_with_one_query():
    assert image_flops(ARCHITECTURES["RN50"]) / 1e9 == pytest.approx(11.6, abs=0.05)


def test_groups_of_texts_add_up():
    model = ARCHITECTURES["ViT-B/32"]
    config = make_config(model)
    whole = {"tokens": np.zeros((10, 16), np.int32)}
    split = {"tokens": (np.zeros((8, 16), np.int32), np.zeros((2, 16), np.int32))}
    longer = {"tokens": (np.zeros((8, 16), np.int32), np.zeros((2, 77), np.int32))}
    assert step_flops(config, whole) == step_flops(config, split) == 10 * pair_flops(model, 16) + loss_flops(10, 512)
    more = 3 * 2 * (text_flops(model, 77) - text_flops(model, 16))
    assert step_flops(config, longer) - step_flops(config, split) == pytest.approx(more, rel=1e-12)


def test_patches_are_left_out_of_a_vit_alone():
    assert image_flops(ARCHITECTURES["ViT-B/16"], 98) < 0.55 * image_flops(ARCHITECTURES["ViT-B/16"])
    with pytest.raises(UserError, match="ViT-B-16-SigLIP: 98 patches kept, and only a ViT has patches"):
        image_flops(ARCHITECTURES["ViT-B-16-SigLIP"], 98)
    with pytest.raises(UserError, match="a text encoder alone takes no images"):
        image_flops(dataclasses.replace(ARCHITECTURES["ViT-B/16"], vision=None))


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v4", 275e12),
        ("TPU v4 lite", None),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Tesla V100-SXM2-16GB", None),
        ("cpu", None),
    ],
)
def test_the_peak_is_that_of_the_device(kind, peak):
    assert peak_flops(Mock(spec=jax.Device, device_kind=kind)) == peak


def test_the_peaks_are_those_of_the_plan():
    kinds = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
    kinds |= {"a100": "NVIDIA A100-SXM4-80GB", "h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}
    for name, kind in kinds.items():
        assert peak_flops(Mock(spec=jax.Device, device_kind=kind)) == plan.CHIPS[name].flops
