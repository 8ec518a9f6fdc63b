import json
import pathlib

import jax
import numpy as np
import PIL.Image
import pytest
from weights import SMALL, rich_weights

import clip_jax
from clip_jax import convert, pretrained
from clip_jax.errors import UserError
from clip_jax.models import CLIP
from clip_jax.pytorch import files, hf_configs, layouts


def written(model: str, layout: str, tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / f"{model}-{layout}"
    convert.write(layout, SMALL[model], rich_weights(SMALL[model]), path)
    return path


@pytest.mark.parametrize("name, layout", [("vit", "orbax"), ("vit-gelu", "open_clip"), ("vit", "hf"), ("siglip", "hf"), ("resnet", "open_clip")])
def test_load_gives_the_model_and_its_own_preprocessing(name, layout, tmp_path):
    config = SMALL[name]
    model, preprocess = clip_jax.load(written(name, layout, tmp_path))
    assert model.config.identity() == config.identity()
    assert all((array == rich_weights(config)[path]).all() for path, array in layouts.model_weights(model).items())
    pixels = preprocess(PIL.Image.new("RGB", (100, 60), (255, 0, 0)))
    side = config.vision.image_size
    red = [(value - mean) / std for value, mean, std in zip((1, 0, 0), config.image_mean, config.image_std)]
    assert pixels.shape == (side, side, 3) and pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[0, 0], red, rtol=3.3e-7)  # measured 1.1e-7
    tokens = clip_jax.tokenize(["a dog", "a red square"], config.text.context_length) % config.text.vocabulary_size
    per_image, per_text = jax.jit(CLIP.__call__)(model, pixels[None], tokens)
    assert per_image.shape == (1, 2) and per_text.shape == (2, 1)
    tokens_of_image = jax.jit(CLIP.image_tokens)(model, pixels[None])
    assert tokens_of_image.shape[0] == 1 and tokens_of_image.ndim == 3
    states = jax.jit(lambda m, t: m.text_hidden_states(t, layer=-2, final_layer_norm=False))(model, tokens)
    assert states.shape == (2, config.text.context_length, config.text.width)


def test_a_wrong_activation_beside_the_weights_is_refused(tmp_path):
    folder = written("vit", "open_clip", tmp_path)
    file = folder / "open_clip_config.json"
    document = json.loads(file.read_text())
    del document["model_cfg"]["quick_gelu"]
    file.write_text(json.dumps(document))
    with pytest.raises(UserError, match="says activation 'gelu', but these weights were written with 'quick_gelu'"):
        clip_jax.load(folder)
    # OpenAI's own tensors say whose they are as well, in whatever file.
    state = layouts.to_theirs(rich_weights(SMALL["vit"]), layouts.openai_layout(SMALL["vit"]))
    files.write_safetensors(folder / "open_clip_model.safetensors", state | {"input_resolution": np.array(32)}, {})
    with pytest.raises(UserError, match="OpenAI's weights .* says gelu; set quick_gelu to true"):
        clip_jax.load(folder)


def test_openais_tensors_need_no_configuration_and_others_do(tmp_path):
    config = SMALL["vit"]
    state = layouts.to_theirs(rich_weights(config), layouts.openai_layout(config))
    path = tmp_path / "mine.safetensors"
    files.write_safetensors(path, state, {})
    with pytest.raises(UserError, match="mine.safetensors: expected open_clip_config.json beside it, found none"):
        clip_jax.load(path)
    # OpenAI's heads are 64 wide, and so the image tower has two, as here, and the text tower one.
    files.write_safetensors(path, state | {"input_resolution": np.array(32)}, {})
    model, _ = clip_jax.load(path)
    assert (model.config.vision, model.config.text) == (config.vision, config.text)


def test_what_cannot_be_loaded_says_why(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"ViT-B/33: no such file or folder, nor a known model; did you mean ViT-B/32"):
        clip_jax.load("ViT-B/33")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="expected the workdir of a run, or a folder with one of .* found notes.txt"):
        clip_jax.load(tmp_path)
    folder = written("vit", "hf", tmp_path)
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="config.json: not the configuration of a CLIP"):
        clip_jax.load(folder)
    (folder / "config.json").write_text('{"model_type": "blip"}')
    with pytest.raises(UserError, match=r"^\S+/config.json: model_type is 'blip'"):
        clip_jax.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="expected config.json beside it, found none"):
        clip_jax.load(folder)


def test_another_models_state_is_refused_by_its_tensors(tmp_path):
    folder = written("vit", "open_clip", tmp_path)
    other = layouts.to_theirs(rich_weights(SMALL["resnet"]), layouts.openai_layout(SMALL["resnet"]))
    files.write_safetensors(folder / "open_clip_model.safetensors", other, {})
    with pytest.raises(UserError, match=r"not the weights of custom as open_clip names them: .* and \d+ more"):
        clip_jax.load(folder)


def test_a_known_name_works_offline_when_cached_and_says_how_to_get_it_when_not(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match=r"RN50: cannot get timm/resnet50_clip.openai .* run `hf download timm/resnet50_clip.openai`"):
        clip_jax.load("RN50")
    # The cache as huggingface_hub lays it out.
    monkeypatch.setitem(pretrained.HUB, "small", "us/small")
    repository = tmp_path / "hub" / "models--us--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    convert.write("open_clip", SMALL["vit"], rich_weights(SMALL["vit"]), repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub._snapshot_download.HF_HUB_OFFLINE", True, raising=False)
    path = pretrained.locate("small")
    assert path == repository / "snapshots" / ("0" * 40)
    assert pretrained.read(path)[2] == "open_clip"
    assert pretrained.locate("hf-hub:us/small") == path


def test_every_known_name_is_an_architecture():
    from clip_jax.models import ARCHITECTURES

    assert all(name.split(":")[0] in ARCHITECTURES for name in clip_jax.available_models())


def test_position_embeddings_are_interpolated_for_another_size():
    config, weights = SMALL["vit"], rich_weights(SMALL["vit"])
    same, unchanged = pretrained.resize(config, weights, 32, 16)
    assert same == config and all(unchanged[name] is weights[name] for name in weights)
    # A plane stays a plane, away from the border: interpolation of either kind is exact there.
    y, x = np.mgrid[0:4, 0:4]
    weights["vision/position_embedding"][1:] = (x + 2 * y).reshape(-1, 1)
    weights["text/position_embedding"][:] = np.arange(16)[:, None]
    larger, resized = pretrained.resize(config, weights, 64, 32)
    assert (larger.vision.image_size, larger.text.context_length) == (64, 32)
    grid = resized["vision/position_embedding"][1:].reshape(8, 8, -1)
    yy, xx = (np.mgrid[0:8, 0:8] - 0.5) / 2
    np.testing.assert_array_equal(grid[3:5, 3:5, 0], (xx + 2 * yy)[3:5, 3:5])
    assert (resized["vision/position_embedding"][0] == weights["vision/position_embedding"][0]).all()
    np.testing.assert_array_equal(resized["text/position_embedding"][1:-1, 0], (np.arange(32) - 0.5)[1:-1] / 2)
    assert layouts.build_model(larger, resized).config == larger
    with pytest.raises(UserError, match="small-resnet is a ResNet, made for 64 pixels a side"):
        pretrained.resize(SMALL["resnet"], rich_weights(SMALL["resnet"]), 128, None)
    for wrong, message in (((0, None), "vision.image_size is 0, expected at"), ((None, -1), "text.context_length is -1, expected at")):
        with pytest.raises(UserError, match=message):
            pretrained.resize(config, weights, *wrong)


def test_a_hub_folder_without_preprocessing_warns_whose_is_taken(tmp_path):
    folder = written("vit", "hf", tmp_path)
    (folder / "preprocessor_config.json").unlink()
    with pytest.warns(UserWarning, match="no preprocessor_config.json beside it; taking the mean and std of clip's authors"):
        clip_jax.load(folder)
    assert hf_configs.to_hf(SMALL["vit"])[1]["image_mean"] == list(SMALL["vit"].image_mean)
