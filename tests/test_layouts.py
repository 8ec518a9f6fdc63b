import json

import numpy as np
import pytest
from weights import LAYOUTS, SMALL, rich_weights

from clip_jax.errors import UserError
from clip_jax.models import ARCHITECTURES
from clip_jax.models.architectures import ResNetConfig, SigLIPViTConfig, SmallResNetConfig
from clip_jax.pytorch import configs, hf_configs, layouts, open_clip_configs

EXPRESSIBLE = [(model, layout) for model, names in LAYOUTS.items() for layout in names]


@pytest.mark.parametrize("model, layout", EXPRESSIBLE)
def test_there_and_back_is_the_same_bits(model, layout):
    config, weights = SMALL[model], rich_weights(SMALL[model])
    table = layouts.LAYOUTS[layout](config)
    state = layouts.to_theirs(weights, table)
    back = layouts.to_ours(state, table, config, "here")
    assert back.keys() == weights.keys()
    assert all(back[name].tobytes() == weights[name].tobytes() for name in weights)
    again = layouts.to_theirs(back, table)
    assert all(again[name].tobytes() == state[name].tobytes() and again[name].shape == state[name].shape for name in state)


@pytest.mark.parametrize("name", ["RN50x4", "ViT-B/32", "ViT-H-14", "ViT-B-16-SigLIP", "ViT-SO400M-14-SigLIP2"])
def test_every_table_holds_each_of_our_weights_once(name):
    config = ARCHITECTURES[name]
    tables = [layouts.open_clip_layout]
    if not isinstance(config.vision, ResNetConfig):
        tables.append(layouts.hf_layout)
    if not isinstance(config.vision, SigLIPViTConfig):
        tables.append(layouts.openai_layout)
    for table in tables:
        entries = table(config).entries
        theirs = [name for entry in entries for name in entry.theirs]
        assert sorted(entry.ours for entry in entries) == sorted(layouts.weight_shapes(config))
        assert len(theirs) == len(set(theirs))


def test_what_does_not_fit_is_named_with_its_shape():
    config = SMALL["vit"]
    table = layouts.openai_layout(config)
    state = layouts.to_theirs(rich_weights(config), table)

    def refused(change: dict, remove: tuple = ()) -> str:
        changed = {k: v for k, v in (state | change).items() if k not in remove}
        with pytest.raises(UserError) as error:
            layouts.to_ours(changed, table, config, "weights.pt")
        return str(error.value)

    assert "visual.extra (3,) is unexpected" in refused({"visual.extra": np.zeros(3, np.float32)})
    assert "ln_final.bias (64,) is missing" in refused({}, ("ln_final.bias",))
    assert "visual.proj is (4, 4), expected (128, 32)" in refused({"visual.proj": np.zeros((4, 4), np.float32)})
    assert refused({}, tuple(k for k in state if k.startswith("visual"))).count(" is missing") == 5  # and how many more
    layouts.to_ours(state | {"attn_mask": np.zeros((16, 16), np.float32)}, table, config, "weights.pt")  # benign


def test_what_a_library_cannot_express_is_refused():
    with pytest.raises(UserError, match="transformers has no CLIP with a ResNet tower.*RN50; take --to openai or open_clip"):
        layouts.hf_layout(ARCHITECTURES["RN50"])
    with pytest.raises(UserError, match="openai cannot express SigLIP"):
        layouts.openai_layout(ARCHITECTURES["ViT-B-16-SigLIP"])
    with pytest.raises(UserError, match="no PyTorch library has the image tower of emoji"):
        layouts.open_clip_layout(ARCHITECTURES["emoji"])


@pytest.mark.parametrize("name", [n for n, c in ARCHITECTURES.items() if not isinstance(c.vision, SmallResNetConfig)])
def test_configurations_come_back(name):
    config = ARCHITECTURES[name]
    through_json = lambda document: json.loads(json.dumps(document))
    assert open_clip_configs.open_clip_config(through_json(open_clip_configs.to_open_clip(config)), "here").identity() == config.identity()
    if not isinstance(config.vision, ResNetConfig):
        assert hf_configs.hf_config(*through_json(hf_configs.to_hf(config)), "here").identity() == config.identity()


def test_openais_shapes_tell_the_architecture():
    for name in ("RN50x4", "ViT-B/32", "ViT-L/14@336px"):
        config = ARCHITECTURES[name]
        shapes = layouts.weight_shapes(config)
        empty = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}
        table = layouts.openai_layout(config)
        state = {n: s for e in table.entries for n, s in zip(e.theirs, [e.form.theirs(empty[e.ours])])}
        assert configs.openai_config(state, "here") == config


def test_a_configuration_that_contradicts_itself_or_has_more_than_clip_is_refused():
    document, preprocessing = hf_configs.to_hf(SMALL["vit"])
    document["vision_config"]["hidden_act"] = "gelu"
    with pytest.raises(UserError, match="vision_config.hidden_act is 'gelu' and text_config.hidden_act is 'quick_gelu'"):
        hf_configs.hf_config(document, preprocessing, "config.json")
    with pytest.raises(UserError, match="model_type is 'blip', expected clip, clip_text_model, or siglip"):
        hf_configs.hf_config(document | {"model_type": "blip"}, preprocessing, "config.json")
    coca = open_clip_configs.to_open_clip(SMALL["vit"])
    coca["model_cfg"]["multimodal_cfg"] = {}
    with pytest.raises(UserError, match="multimodal_cfg is not known here"):
        open_clip_configs.open_clip_config(coca, "open_clip_config.json")


def test_a_model_is_built_of_all_its_weights_or_not_at_all():
    config, weights = SMALL["resnet"], rich_weights(SMALL["resnet"])
    model = layouts.build_model(config, weights)
    assert all((array == weights[name]).all() for name, array in layouts.model_weights(model).items())
    del weights["vision/stem/0/norm/mean"]
    with pytest.raises(KeyError):
        layouts.build_model(config, weights)
