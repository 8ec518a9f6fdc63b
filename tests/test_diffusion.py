import dataclasses

import jax
import numpy as np
import pytest
from weights import SMALL, rich_weights

from clip_jax import available_models, diffusion
from clip_jax.errors import UserError
from clip_jax.pytorch import hf_configs, layouts

PROMPTS = ["a photo of an astronaut", ""]


@pytest.fixture(scope="module")
def model():
    return layouts.build_model(SMALL["vit"], rich_weights(SMALL["vit"]))


def test_every_encoder_is_a_model_that_can_be_loaded():
    assert {preset.model for preset in diffusion.TEXT_ENCODERS.values()} <= set(available_models())


def test_padding_is_the_pipelines_and_pooling_stays_at_the_first_end(model):
    first, second = diffusion.prompt_tokens(PROMPTS, "sd1", 16), diffusion.prompt_tokens(PROMPTS, "sd2", 16)
    assert (first[0, 7:] == 49407).all() and (second[0, 7:] == 0).all() and (first[:, :2] == second[:, :2]).all()
    _, pooled = diffusion.encode_prompts(model, PROMPTS, "sd3-1")
    np.testing.assert_allclose(pooled, model.encode_text(second), atol=2.1e-6)  # measured 7.0e-7 of values up to 2.7
    assert diffusion.prompt_tokens(["dog " * 100], "sd1").shape == (1, 77)


def test_layer_norm_and_clip_skip_are_the_presets(model):
    tokens = diffusion.prompt_tokens(PROMPTS, "sd1", 16)
    for encoder, skip, layer, norm in (("sd1", 0, 2, True), ("sd1", 1, 1, True), ("sdxl-1", 0, 1, False), ("sdxl-1", 1, 0, False)):
        found, _ = diffusion.encode_prompts(model, PROMPTS, encoder, skip)
        expected = model.text_hidden_states(tokens, layer, norm)
        np.testing.assert_allclose(found, expected, atol=4e-6, err_msg=encoder)  # measured 1.4e-6 of values up to 3.6
    assert found.shape == (2, 16, 64)


def test_a_text_encoder_alone_is_enough(model):
    whole, weights = SMALL["vit"], rich_weights(SMALL["vit"])
    states, pooled = diffusion.encode_prompts(model, PROMPTS, "sd1")
    for embedding in (0, whole.embedding):
        config = dataclasses.replace(hf_configs.text_encoder_config(whole), embedding=embedding)
        alone = layouts.build_model(config, weights)
        found, features = diffusion.encode_prompts(alone, PROMPTS, "sd1")
        assert (found == states).all() and (features is None if not embedding else (features == pooled).all())


def test_one_compilation_for_many_prompts(model, caplog):
    diffusion.encode_prompts(model, PROMPTS, "sd2", 1)
    with jax.log_compiles():
        diffusion.encode_prompts(model, ["another prompt", "and one more"], "sd2", 1)
    assert not [record for record in caplog.records if "Compiling" in record.getMessage()]


def test_an_unknown_encoder_is_named():
    with pytest.raises(UserError, match="no text encoder 'sdxl'; did you mean sdxl-2 or sdxl-1"):
        diffusion.prompt_tokens(PROMPTS, "sdxl")
