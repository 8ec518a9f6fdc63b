import math

import jax
import numpy as np
import pytest
from test_step import RESNET, VIT, batch, config

from clip_jax.checkpoint import Checkpoints, load_model
from clip_jax.errors import UserError
from clip_jax.host_copy import host_copy
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


@pytest.mark.parametrize("mesh", [{"data": 1}, {"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["1", "data", "all axes"])
def test_what_is_saved_is_the_state_that_was_given_though_training_goes_on(mesh, tmp_path):
    """The steps after it are given its arrays to write into."""
    devices = jax.devices()[: math.prod(mesh.values())]
    c = config(VIT, **mesh)
    on = make_mesh(c, devices)
    init, step, abstract = make_train_step(c, on)
    state, _ = step(init(), put_batch(batch(0), on))
    checkpoints, expected = Checkpoints(tmp_path, c), jax.tree.map(np.array, state)
    checkpoints.save(state, {})
    for number in (1, 2, 3):
        state, _ = step(state, put_batch(batch(number), on))
    assert not equal(state, expected) and checkpoints.finite()
    checkpoints.close()
    assert equal(Checkpoints(tmp_path, c).restore(abstract)[0], expected)


def test_hosts_hold_one_copy_of_what_devices_repeat():
    mesh = make_mesh(config(data=2, fsdp=2, tensor=2), jax.devices())
    x = np.arange(64 * 12, dtype=np.float32).reshape(64, 12)
    for spec, parts in {(): 8, ("fsdp",): 8, (None, "tensor"): 8, (("data", "fsdp", "tensor"),): 8}.items():
        there = host_copy(jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec))))
        assert (np.asarray(there) == x).all()
        assert len({str(shard.index) for shard in there.addressable_shards}) == parts
    odd = host_copy(jax.device_put(x[:3, :6], jax.NamedSharding(mesh, jax.P())))  # two of its axes divide by two only once
    assert (np.asarray(odd) == x[:3, :6]).all() and len({str(shard.index) for shard in odd.addressable_shards}) == 2
    single = host_copy({"x": jax.device_put(x, jax.devices()[3])})["x"]
    assert (np.asarray(single) == x).all() and single.devices() == {jax.devices()[3]}


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
