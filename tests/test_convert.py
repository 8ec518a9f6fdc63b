import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from weights import LAYOUTS, SMALL, rich_weights

import clip_jax
import eval as program
from clip_jax import convert, pretrained
from clip_jax.errors import UserError
from clip_jax.pytorch import files, hf_configs, layouts

# Without torch there is no .pt to write; tests/test_pytorch.py does that.
EXPRESSIBLE = [(model, layout) for model, names in LAYOUTS.items() for layout in names if layout != "openai"]


@pytest.mark.parametrize("model, layout", EXPRESSIBLE)
def test_round_trips_are_bit_exact(model, layout, tmp_path):
    config, weights = SMALL[model], rich_weights(SMALL[model])
    convert.write("orbax", config, weights, tmp_path / "first")
    convert.main([str(tmp_path / "first"), str(tmp_path / "theirs"), "--to", layout])
    convert.main([str(tmp_path / "theirs"), str(tmp_path / "second"), "--to", "orbax"])
    convert.main([str(tmp_path / "second"), str(tmp_path / "again"), "--to", layout])
    found_config, found, _ = pretrained.read(tmp_path / "second")
    assert found.keys() == weights.keys()
    assert all(found[name].tobytes() == weights[name].tobytes() for name in weights)
    assert found_config.identity() == config.identity()
    for file in sorted((tmp_path / "theirs").iterdir()):
        if file.suffix == ".safetensors":  # the order in the header is a dictionary's
            (one, _), (other, _) = files.read_state_dict(file), files.read_state_dict(tmp_path / "again" / file.name)
            assert one.keys() == other.keys() and all(one[k].tobytes() == other[k].tobytes() for k in one)
        else:
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_between_two_layouts_of_theirs(tmp_path):
    config, weights = SMALL["vit-gelu"], rich_weights(SMALL["vit-gelu"])
    convert.write("hf", config, weights, tmp_path / "hf")
    convert.main([str(tmp_path / "hf"), str(tmp_path / "open_clip"), "--to", "open_clip"])
    document = json.loads((tmp_path / "open_clip" / "open_clip_config.json").read_text())
    assert "quick_gelu" not in document["model_cfg"] and document["preprocess_cfg"]["mean"] == [0.5, 0.5, 0.5]
    assert all((array == weights[name]).all() for name, array in pretrained.read(tmp_path / "open_clip")[1].items())


def test_verify_reports_each_side_and_sees_a_changed_bit(tmp_path, capsys):
    config, weights = SMALL["vit"], rich_weights(SMALL["vit"])
    convert.write("orbax", config, weights, tmp_path / "ours")
    convert.main([str(tmp_path / "ours"), str(tmp_path / "hf"), "--to", "hf", "--verify"])
    report = capsys.readouterr().out
    assert "hf (hf): 62 tensors, all bits equal" in report and "ours (orbax): 62 tensors, all bits equal" in report
    changed = weights | {"text/ln_final/bias": np.nextafter(weights["text/ln_final/bias"], np.float32(9))}
    with pytest.raises(UserError, match="hf: 1 of 62 tensors differ from the source, the first is text/ln_final/bias"):
        convert.verify(config, changed, {tmp_path / "hf": "hf"})


def test_the_text_encoder_of_a_diffusion_pipeline(tmp_path):
    config, weights = SMALL["vit"], rich_weights(SMALL["vit"])
    convert.write("orbax", config, weights, tmp_path / "ours")
    convert.main([str(tmp_path / "ours"), str(tmp_path / "text_encoder"), "--to", "diffusers-text-encoder", "--verify"])
    state, _ = files.read_state_dict(tmp_path / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in state) and len(state) == 2 + 2 * 16 + 2
    document = json.loads((tmp_path / "text_encoder" / "config.json").read_text())
    assert document["architectures"] == ["CLIPTextModel"] and document["hidden_act"] == "quick_gelu"


@pytest.mark.parametrize("projection", [0, 32])
def test_a_text_encoder_alone_is_a_model(projection, tmp_path):
    whole = SMALL["vit"]
    config = dataclasses.replace(hf_configs.text_encoder_config(whole), embedding=projection)
    weights = {name: array for name, array in rich_weights(whole).items() if name.startswith("text/")}
    weights = weights if projection else {k: v for k, v in weights.items() if k != "text/projection"}
    convert.write("orbax", config, weights, tmp_path / "first")
    for source, target, to in (("first", "a", "diffusers-text-encoder"), ("a", "back", "orbax"), ("back", "b", "diffusers-text-encoder")):
        convert.main([str(tmp_path / source), str(tmp_path / target), "--to", to, "--verify"])
    document = json.loads((tmp_path / "a" / "config.json").read_text())
    assert document["architectures"] == ["CLIPTextModelWithProjection" if projection else "CLIPTextModel"]
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == document
    found = pretrained.read(tmp_path / "back")[1]
    assert found.keys() == weights.keys() and all(found[name].tobytes() == weights[name].tobytes() for name in weights)

    model, preprocess = clip_jax.load(tmp_path / "back")
    tokens = clip_jax.get_tokenizer(tmp_path / "back")(["a dog"])
    complete = layouts.build_model(whole, rich_weights(whole))
    assert preprocess is None and (model.text_hidden_states(tokens) == complete.text_hidden_states(tokens)).all()
    if projection:
        assert (model.encode_text(tokens) == complete.encode_text(tokens)).all()
    else:
        with pytest.raises(UserError, match="text-encoder: its text encoder has no projection; take text_hidden_states"):
            model.encode_text(tokens)
    with pytest.raises(UserError, match="text-encoder: a text encoder alone takes no images"):
        model.encode_image(np.zeros((1, 32, 32, 3), np.float32))
    with pytest.raises(UserError, match="image_size 64: text-encoder is a text encoder alone"):
        clip_jax.load(tmp_path / "back", image_size=64)
    with pytest.raises(UserError, match="--checkpoint=.*: a text encoder alone, expected a CLIP"):
        program.main([f"--checkpoint={tmp_path / 'back'}"])
    for target in ("openai", "open_clip", "hf"):
        with pytest.raises(UserError, match=f"text-encoder is a text encoder alone, which {target} cannot express"):
            convert.main([str(tmp_path / "back"), str(tmp_path / "refused.pt"), "--to", target])


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(tmp_path):
    weights = rich_weights(SMALL["resnet"])
    with pytest.raises(UserError, match="transformers has no CLIP with a ResNet tower"):
        convert.write("hf", SMALL["resnet"], weights, tmp_path / "new")
    assert not list(tmp_path.iterdir())
    (tmp_path / "old").mkdir()
    with pytest.raises(UserError, match="old: exists already; take a new path, nothing is overwritten"):
        convert.write("orbax", SMALL["resnet"], weights, tmp_path / "old")
    with pytest.raises(UserError, match="new: expected a file that ends in .pt"):
        convert.write("openai", SMALL["vit"], rich_weights(SMALL["vit"]), tmp_path / "new")


def test_as_a_program(tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "clip_jax.convert", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    wrong = run(str(tmp_path / "nowhere"), str(tmp_path / "target"), "--to", "hf")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "no such file or folder" in wrong.stderr
    convert.write("hf", SMALL["vit"], rich_weights(SMALL["vit"]), tmp_path / "hf")
    right = run(str(tmp_path / "hf"), str(tmp_path / "target"), "--to", "orbax")
    assert right.returncode == 0 and "(hf, custom, " in right.stdout, right.stderr
    assert pathlib.Path(tmp_path / "target" / "checkpoints" / "0").is_dir()
