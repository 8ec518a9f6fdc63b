import dataclasses
import shutil
from unittest import mock

import jax
import numpy as np
import pytest
from test_optimizer import towards_a_half
from test_step import RESNET, VIT, config
from weights import rich_weights

import clip_jax.figures
import clip_jax.step
import train
from clip_jax import sharding
from clip_jax.checkpoint import load_model, save_model
from clip_jax.errors import UserError
from clip_jax.initial import trained_state
from clip_jax.metrics import read_metrics
from clip_jax.models import ARCHITECTURES, CLIPConfig
from clip_jax.models.architectures import ViTConfig
from clip_jax.models.blocks import separate
from clip_jax.pytorch.layouts import build_model
from clip_jax.sharding import make_mesh
from clip_jax.step import make_train_step, model_of, split_model

SMALL = dataclasses.replace(VIT, vision=ViTConfig(16, 8, width=64, layers=1, heads=2))
LARGE = dataclasses.replace(  # four times the patches and twice the tokens, computed otherwise
    SMALL,
    name="large",
    vision=dataclasses.replace(SMALL.vision, image_size=32),
    text=dataclasses.replace(SMALL.text, context_length=16),
    scan_layers=True,
    remat="full",
)
MESHES = pytest.mark.parametrize("mesh", [{"data": 1}, {"data": 4, "fsdp": 2}], ids=["1 device", "8 devices"])


def begun(model: CLIPConfig, name, mesh: dict[str, int]):
    """The state of a run that begins with these weights, and the abstract one."""
    c = config(model, **mesh)
    c.initialize = str(name)
    _, _, abstract = make_train_step(c, make_mesh(c, jax.devices()[: np.prod(list(mesh.values()))]))
    return trained_state(c, abstract), abstract


def same(found, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@MESHES
def test_a_run_begins_with_a_model_of_a_lower_resolution(mesh, monkeypatch, tmp_path):
    monkeypatch.setattr(sharding, "SHARD_FROM", 2**10)  # or this model would lie whole on every device
    save_model(tmp_path, build_model(SMALL, rich_weights(SMALL)))
    state, abstract = begun(LARGE, tmp_path, mesh)

    model, _ = clip_jax.load(tmp_path, image_size=32, context_length=16)
    _, params, _ = split_model(model)
    same(separate(state.params), params)
    assert state.params["vision"]["position_embedding"].shape == (17, 64)
    assert state.params["text"]["position_embedding"].shape == (16, 64)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    unrolled = config(dataclasses.replace(LARGE, scan_layers=False, remat="none"))
    here = jax.device_put((state.params, state.batch_stats), jax.devices()[0])
    same(model_of(here, unrolled).image_tokens(images), model.image_tokens(images))

    assert int(state.step) == 0 and int(state.seen.batch_size) == 16
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves((state.optimizer, state.mishaps, state.seen._replace(batch_size=0))))
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), abstract
    )
    kernel = state.params["text"]["transformer"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.shape == (2, 64, 256)  # both blocks
    assert kernel.addressable_shards[0].data.size == kernel.size // mesh.get("fsdp", 1)


def test_statistics_of_batch_norm_come_along(tmp_path):
    weights = rich_weights(RESNET)
    save_model(tmp_path, build_model(RESNET, weights))
    state, _ = begun(RESNET, tmp_path, {"data": 4, "fsdp": 2})
    norm = state.batch_stats["vision"]["stem"]["norm"]
    assert np.abs(weights["vision/stem/norm/mean"]).max() > 0.01
    same(norm["mean"], weights["vision/stem/norm/mean"])
    same(norm["var"], weights["vision/stem/norm/var"])
    same(state.params["logit_scale"], weights["logit_scale"])


def test_another_architecture_is_refused_by_field(tmp_path):
    save_model(tmp_path, build_model(SMALL, rich_weights(SMALL)))
    wide = dataclasses.replace(SMALL, vision=dataclasses.replace(SMALL.vision, width=128), activation="gelu")
    message = (
        "config.initialize=.*: it holds another architecture, model.vision.width is 64 there and 128 in the configuration, .*"
        "model.activation is 'quick_gelu' there and 'gelu' in the configuration; set config.model.vision.width"
    )
    with pytest.raises(UserError, match=message):
        begun(wide, tmp_path, {"data": 1})
    with pytest.raises(UserError, match="model.vision.channels is None there"):
        begun(RESNET, tmp_path, {"data": 1})
    with pytest.raises(UserError, match="nowhere: no such file or folder, nor a known model"):
        begun(SMALL, "nowhere", {"data": 1})


TINY = ["--config=configs/vit_b32.py", "--config.model=emoji-vit", "--config.model.dtype=float32", "--config.model.vision.layers=1"]
TINY += ["--config.data.sets=synthetic:64:40x40", "--config.batch_size=16", "--config.optimizer.warmup_steps=1"]
TINY += ["--config.total_steps=4", "--config.log_every=1", "--config.checkpoint_every=2", "--config.mesh.fsdp=2"]


def test_a_run_that_goes_on_does_not_ask_for_it_again(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(clip_jax.step, "whole_batch", towards_a_half)
    for name in ("Measurement", "write_results", "format_table"):  # the evaluation at the end
        monkeypatch.setattr(train, name, mock.MagicMock(**{"return_value.of.return_value": []}))
    monkeypatch.setattr(clip_jax.figures, "draw_figures", lambda *_: None)
    monkeypatch.setattr(train, "make_mesh", lambda config, devices: make_mesh(config, devices[:2]))  # eight take longer
    emoji = ARCHITECTURES["emoji-vit"]
    low = dataclasses.replace(emoji, vision=dataclasses.replace(emoji.vision, layers=1, image_size=16))
    save_model(tmp_path / "low", build_model(low, rich_weights(low)))
    command = [*TINY, f"--workdir={tmp_path / 'high'}", f"--config.initialize={tmp_path / 'low'}"]
    train.main(command)
    assert f"high: beginning with the parameters of {tmp_path / 'low'}" in capsys.readouterr().out
    whole, (expected, _) = read_metrics(tmp_path / "high" / "metrics.jsonl"), load_model(tmp_path / "high")

    shutil.rmtree(tmp_path / "low")
    shutil.rmtree(tmp_path / "high" / "checkpoints" / "4")
    train.main(command)
    said = capsys.readouterr().out
    assert "high: going on after step 2" in said and "beginning" not in said
    rows = lambda records: [[r[name] for name in ("step", "loss", "lr", "gradient_norm", "logit_scale")] for r in records]
    assert rows(read_metrics(tmp_path / "high" / "metrics.jsonl")) == rows(whole) and len(whole) == 4
    same(split_model(load_model(tmp_path / "high")[0])[1:], split_model(expected)[1:])
