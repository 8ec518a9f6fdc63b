import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from test_step import TEXT, VIT, batch, config

from clip_jax import sharding
from clip_jax import step as train_step
from clip_jax.about import check_same_run
from clip_jax.checkpoint import Checkpoints
from clip_jax.config import validate
from clip_jax.errors import UserError
from clip_jax.models import ARCHITECTURES
from clip_jax.models.architectures import ViTConfig
from clip_jax.models.blocks import separate, stacked
from clip_jax.optimizer import decayed, make_optimizer, make_schedule
from clip_jax.sharding import make_mesh, put_batch
from clip_jax.step import abstract_model, make_train_step, split_model
from clip_jax.tokenizer import vocabulary_sha256

OPTIMIZERS = ("adamw", "lion", "lamb", "sgd")
STEPS = 5
TINY = dataclasses.replace(  # of which a step is soon compiled
    VIT, vision=ViTConfig(16, 8, width=32, layers=1, heads=1), text=dataclasses.replace(TEXT, width=32, layers=1, heads=1)
)


def named(name: str, mu_dtype: str = "float32", **mesh):
    c = config(TINY, **mesh)
    c.optimizer.name, c.optimizer.mu_dtype = name, mu_dtype
    return c


def small_tree(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (6, 4), "bias": (4,), "logit_scale": ()}
    return {name: np.asarray(rng.normal(size=shape), np.float32) for name, shape in shapes.items()}


def ours(c) -> dict[str, np.ndarray]:
    """The small tree after five updates."""
    optimizer, schedule, params = make_optimizer(c), make_schedule(c), small_tree(0)
    state = optimizer.init(params)
    for step in range(STEPS):
        updates, state = optimizer.update(small_tree(1 + step), state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda update: -schedule(step) * update, updates))
    return jax.tree.map(np.asarray, params)


def by_the_papers(c) -> dict[str, np.ndarray]:
    """The same in float64, written as in the papers named in optimizer.py."""
    o, schedule = c.optimizer, make_schedule(c)
    params = {name: x.astype(np.float64) for name, x in small_tree(0).items()}
    m, v = ({name: np.zeros_like(x) for name, x in params.items()} for _ in range(2))
    for t in range(1, STEPS + 1):
        gradients = {name: x.astype(np.float64) for name, x in small_tree(t).items()}
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        for name, x in params.items():
            g = gradients[name] * min(1, o.gradient_clip / norm)
            match o.name:
                case "adamw" | "lamb":
                    m[name], v[name] = o.b1 * m[name] + (1 - o.b1) * g, o.b2 * v[name] + (1 - o.b2) * g**2
                    update = m[name] / (1 - o.b1**t) / (np.sqrt(v[name] / (1 - o.b2**t)) + o.eps)
                case "lion":
                    update = np.sign(o.b1 * m[name] + (1 - o.b1) * g)
                    m[name] = o.b2 * m[name] + (1 - o.b2) * g
                case "sgd":
                    m[name] = update = o.b1 * m[name] + g
            if x.ndim >= 2:
                update = update + o.weight_decay * x
            if o.name == "lamb":
                update = update * np.linalg.norm(x) / np.linalg.norm(update)
            params[name] = x - float(schedule(t - 1)) * update
    return params


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_five_updates_are_those_of_the_paper_in_float64(name):
    c = named(name)
    c.optimizer.learning_rate = 0.1
    found, expected, begun = ours(c), by_the_papers(c), small_tree(0)
    for leaf, array in expected.items():
        assert np.abs(array - begun[leaf]).max() > 0.09
        np.testing.assert_allclose(found[leaf], array, rtol=0, atol=1.2e-6)  # measured 4.4e-7, of changes of 0.10 to 0.70


@pytest.mark.parametrize("mu_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_stay_where_the_gradient_is_not_finite(name, mu_dtype):
    optimizer, params = make_optimizer(named(name, mu_dtype)), small_tree(0)
    _, state = optimizer.update(small_tree(1), optimizer.init(params), params)
    bad = small_tree(2) | {"bias": np.float32([1, np.nan, np.inf, 0])}
    _, kept = jax.jit(optimizer.update)(bad, state, params, finite=np.bool_(False))
    _, moved = jax.jit(optimizer.update)(small_tree(2), state, params, finite=np.bool_(True))
    jax.tree.map(np.testing.assert_array_equal, kept, state)
    assert not np.array_equal(jax.tree.leaves(moved)[-1], jax.tree.leaves(state)[-1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stacked_blocks_move_as_each_by_itself(name):
    optimizer = make_optimizer(named(name))
    blocks = lambda seed: {"transformer": {"blocks": {i: small_tree(10 * seed + i) for i in range(3)}}}
    one_step = lambda params, gradients: optimizer.update(gradients, optimizer.init(params), params)[0]
    apart, together = one_step(blocks(1), blocks(2)), one_step(stacked(blocks(1)), stacked(blocks(2)))
    jax.tree.map(np.testing.assert_array_equal, separate(together), apart)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_update_of_stacked_blocks_does_not_grow_with_depth(name):
    def operations(layers: int) -> int:
        optimizer, params = make_optimizer(named(name)), {"transformer": {"blocks": {i: small_tree(i) for i in range(layers)}}}
        params = stacked(params)
        return jax.jit(optimizer.update).lower(params, optimizer.init(params), params).as_text().count(" = ")

    assert operations(48) == operations(4)  # of lamb 426; taken apart they were 821 and 7,043


def test_a_gradient_clip_of_1e9_clips_nothing():
    c = named("sgd")
    c.optimizer.gradient_clip, c.optimizer.weight_decay = 1e9, 0.0
    optimizer, params = make_optimizer(c), small_tree(0)
    gradients = jax.tree.map(lambda gradient: 1e6 * gradient, small_tree(1))
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, updates, gradients)


def test_adamw_is_optaxs():
    c = named("adamw")
    o, schedule = c.optimizer, make_schedule(c)
    theirs = optax.chain(
        optax.clip_by_global_norm(o.gradient_clip),
        optax.adamw(schedule, o.b1, o.b2, o.eps, weight_decay=o.weight_decay, mask=decayed),
    )
    params = small_tree(0)
    state = theirs.init(params)
    for step in range(STEPS):
        updates, state = theirs.update(small_tree(1 + step), state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, ours(c), jax.tree.map(np.asarray, params))


@pytest.mark.pytorch
def test_adamw_is_pytorchs():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed; tests/pytorch.txt lists what this needs")
    c = named("adamw")
    c.optimizer.learning_rate = 0.1
    o, schedule = c.optimizer, make_schedule(c)
    params = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in small_tree(0).items()}
    groups = [{"params": [params["kernel"]], "weight_decay": o.weight_decay}]
    groups += [{"params": [params["bias"], params["logit_scale"]], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, betas=(o.b1, o.b2), eps=o.eps)
    for step in range(STEPS):
        for name, gradient in small_tree(1 + step).items():
            params[name].grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_(params.values(), o.gradient_clip)
        for group in theirs.param_groups:
            group["lr"] = float(schedule(step))
        theirs.step()
    for name, array in ours(c).items():
        np.testing.assert_allclose(array, params[name].detach().numpy(), rtol=0, atol=2e-6)  # measured 7.2e-7, of changes of 0.13 to 0.52


def zeros(abstract, batch_size: int):
    """A state to begin with, without the time that it takes to compile a random one; logit_scale is 1."""
    state = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), abstract)
    place = lambda value, like: jax.device_put(value, like.sharding)
    seen = state.seen._replace(batch_size=place(np.int32(batch_size), state.seen.batch_size))
    return state._replace(seen=seen, params=state.params | {"logit_scale": place(np.float32(1), state.params["logit_scale"])})


def towards_a_half(loss, encode, params, batch):
    """In place of the towers, which take long to compile: every parameter is drawn to 0.5, as much as the images are light."""
    light = batch["image"].mean() / 128
    distance = lambda params: light * sum(jnp.square(x - 0.5).sum() for x in jax.tree.leaves(params))
    return *jax.value_and_grad(distance)(params), {}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_with_a_bf16_moment_goes_on_to_the_bit_and_skips_what_is_not_finite(name, monkeypatch, tmp_path):
    monkeypatch.setattr(train_step, "whole_batch", towards_a_half)
    monkeypatch.setattr(sharding, "SHARD_FROM", 2**10)  # or this model would lie whole on every device
    c = named(name, "bfloat16", data=2, fsdp=2)
    mesh = make_mesh(c, jax.devices()[:4])
    _, step, abstract = train_step.make_train_step(c, mesh)
    state, losses = zeros(abstract, c.batch_size), []
    for number in range(4):
        if number == 2:
            checkpoints = Checkpoints(tmp_path, c)
            checkpoints.save(state, {})
            kept = jax.tree.map(np.array, state)
            assert checkpoints.any()  # which waits for it
            found, _ = checkpoints.restore(abstract)
            checkpoints.close()
            jax.tree.map(np.testing.assert_array_equal, found, kept)
        state, metrics = step(state, put_batch(batch(number), mesh))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]

    for number in (2, 3):
        found, _ = step(found, put_batch(batch(number), mesh))
    jax.tree.map(np.testing.assert_array_equal, found, state)

    first = state.optimizer[1].trace if name == "sgd" else state.optimizer[1].mu
    for parameter, moment in zip(jax.tree.leaves(state.params), jax.tree.leaves(first), strict=True):
        assert moment.dtype == jnp.bfloat16 and moment.sharding == parameter.sharding and (np.asarray(moment) != 0).any()
    split = first["text"]["transformer"]["blocks"][0]["mlp"]["up"]["kernel"]
    assert split.addressable_shards[0].data.size == split.size // 2

    broken = jax.device_put(jnp.float32(jnp.nan), state.params["logit_scale"].sharding)
    state = state._replace(params=state.params | {"logit_scale": broken})
    before = jax.tree.map(np.array, (state.params, state.optimizer))
    state, metrics = step(state, put_batch(batch(4), mesh))
    assert int(metrics["skipped_steps"]) == 1
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.optimizer), before)
    assert step._cache_size() == 1


@pytest.mark.parametrize("name, moments", [("adamw", 2), ("lion", 1), ("lamb", 2), ("sgd", 1)])
def test_a_bf16_moment_takes_half(name, moments):
    _, params, _ = split_model(abstract_model(ARCHITECTURES["ViT-B/32"]))
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    state, small = (
        jax.eval_shape(make_optimizer(named(name, mu_dtype)).init, params) for mu_dtype in ("float32", "bfloat16")
    )
    count = 0 if name == "sgd" else 4  # bytes, of the number of updates
    assert size(params) == 4 * 151_277_313
    assert size(state) == moments * size(params) + count
    assert size(small) == (moments - 0.5) * size(params) + count


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("name", "adam", "config.optimizer.name is 'adam', expected adamw, lion, lamb, sgd; did you mean adamw"),
        ("name", "lbfgs", "config.optimizer.name is 'lbfgs', expected adamw, lion, lamb, sgd"),
        ("mu_dtype", "float16", "config.optimizer.mu_dtype is 'float16', expected float32, bfloat16; did you mean"),
    ],
)
def test_an_unknown_one_is_refused(field, value, message):
    c = config()
    c.data.sets, c.optimizer[field] = ("somewhere",), value
    with pytest.raises(UserError, match=message):
        validate(c)


def test_a_run_does_not_go_on_with_other_moments(tmp_path):
    c = named("adamw")
    _, _, abstract = make_train_step(c, make_mesh(c, jax.devices()[:1]))
    checkpoints = Checkpoints(tmp_path, c)
    checkpoints.save(zeros(abstract, c.batch_size), {})
    checkpoints.close()
    for field, value, was in (("name", "lion", "adamw"), ("mu_dtype", "bfloat16", "float32")):
        other = named("adamw")
        other.optimizer[field] = value
        _, _, abstract = make_train_step(other, make_mesh(other, jax.devices()[:1]))
        message = f"optimizer.{field} is '{was}' there and '{value}' in the configuration; take another --workdir, or set"
        with pytest.raises(UserError, match=message):
            Checkpoints(tmp_path, other).restore(abstract)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["0"]  # not set aside as broken


def test_a_checkpoint_from_before_there_was_a_choice_is_adamws():
    before = named("adamw").to_dict()
    for field in ("name", "mu_dtype"):
        del before["optimizer"][field]
    about = {"tokenizer_sha256": vocabulary_sha256()}
    check_same_run(epath.Path("there"), before, about, named("adamw"))
    with pytest.raises(UserError, match="optimizer.name is 'adamw' there and 'lamb'"):
        check_same_run(epath.Path("there"), before, about, named("lamb"))
