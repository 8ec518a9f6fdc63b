import jax
import numpy as np
import pytest
from test_step import RESNET, VIT, batch, config

from clip_jax.checkpoint import Checkpoints, load_model
from clip_jax.errors import UserError
from clip_jax.sharding import make_mesh, put_batch
from clip_jax.step import make_train_step


def trained(c, devices, steps: int = 2):
    mesh = make_mesh(c, devices)
    init, step, abstract = make_train_step(c, mesh)
    state = init()
    for number in range(steps):
        state, _ = step(state, put_batch(batch(number), mesh))
    return state, abstract


def equal(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b))


@pytest.mark.parametrize("model", [VIT, RESNET], ids=["vit", "resnet"])
def test_a_state_comes_back_to_the_bit_also_on_another_mesh(model, tmp_path):
    state, abstract = trained(config(model, data=2, fsdp=4), jax.devices())
    checkpoints = Checkpoints(tmp_path, config(model))
    checkpoints.save(state, {"next_index": 2})
    checkpoints.close()
    _, one_device = trained(config(model), jax.devices()[:1], steps=0)
    for target in (abstract, one_device):
        checkpoints = Checkpoints(tmp_path, config(model))
        found, position = checkpoints.restore(target)
        assert equal(found, state) and position == {"next_index": 2} and int(found.step) == 2
        assert jax.tree.all(jax.tree.map(lambda x, a: x.sharding == a.sharding, found, target))
        checkpoints.close()


def test_the_model_loads_without_optimizer_state(tmp_path):
    state, _ = trained(config(RESNET), jax.devices()[:1])
    checkpoints = Checkpoints(tmp_path, config(RESNET))
    checkpoints.save(state, {})
    checkpoints.close()
    for place in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "2"):
        model, saved = load_model(place)
        assert model.config == RESNET and saved["batch_size"] == 16
        assert (np.asarray(model.text.token_embedding[...]) == np.asarray(state.params["text"]["token_embedding"])).all()
        mean = state.batch_stats["vision"]["stem"]["norm"]["mean"]
        assert (np.asarray(model.vision.stem.norm.mean[...]) == np.asarray(mean)).all()


def test_another_architecture_is_refused_by_field(tmp_path):
    state, _ = trained(config(VIT), jax.devices()[:1], steps=0)
    checkpoints = Checkpoints(tmp_path, config(VIT))
    checkpoints.save(state, {})
    checkpoints.close()
    _, abstract = trained(config(RESNET), jax.devices()[:1], steps=0)
    with pytest.raises(UserError, match="another architecture, model.name is 'test-vit' there and 'test-resnet'"):
        Checkpoints(tmp_path, config(RESNET)).restore(abstract)
    changed = config(VIT)
    changed.model.activation = "gelu"
    with pytest.raises(UserError, match="model.activation is 'quick_gelu' there and 'gelu' in the configuration"):
        Checkpoints(tmp_path, changed).restore(abstract)


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match="found no such folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="found no folder checkpoints in it"):
        load_model(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="found no checkpoint there; the steps are none"):
        load_model(tmp_path)
