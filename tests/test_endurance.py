"""What a run survives, a part at a time; tests/test_survival.py has the whole program."""

import functools
import gc
import math
import os
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoint import equal
from test_step import RESNET, VIT, batch, config

from clip_jax.checkpoint import Checkpoints, load_model
from clip_jax.checkpoint_folders import step_folders
from clip_jax.digest import bit_sum, digests
from clip_jax.errors import UserError
from clip_jax.interruption import Interruption
from clip_jax.optimizer import make_schedule
from clip_jax.recovery import Recovery
from clip_jax.sharding import make_mesh, put_batch
from clip_jax.snapshot import Snapshot
from clip_jax.state import Seen, after_batch, samples_seen, schedule_position, steps_left
from clip_jax.step import init_state, make_train_step

# When one array of a checkpoint cannot be read, Orbax leaves the others to an event loop that it has closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def leftovers():
    """Are collected here, and not in a test of another file."""
    yield
    gc.collect()


@functools.cache
def compiled(model):
    mesh = make_mesh(config(model), jax.devices()[:1])
    return mesh, *make_train_step(config(model), mesh)


class Run:
    """A run on one device, one step at a time."""

    def __init__(self, model=VIT):
        self.mesh, init, self.step, self.abstract = compiled(model)
        self.state = init()

    def go(self) -> dict:
        self.state, metrics = self.step(self.state, put_batch(batch(int(self.state.step)), self.mesh))
        return metrics

    def watched(self, recovery: Recovery) -> None:
        metrics = self.go()
        self.state = recovery.after(self.state, metrics)

    def spoil(self) -> None:
        """Makes the next loss overflow, by a scale of exp(200)."""
        scale = self.state.params["logit_scale"]
        self.state = self.state._replace(params=self.state.params | {"logit_scale": jnp.full_like(scale, 200.0)})


def kept(state) -> tuple:
    return jax.tree.map(np.array, (state.params, state.batch_stats, state.optimizer))


@pytest.mark.parametrize("model", [VIT, RESNET], ids=["vit", "resnet"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(model):
    run = Run(model)
    assert int(run.go()["skipped_steps"]) == 0
    run.spoil()
    before = kept(run.state)
    for count in (1, 2):
        metrics = run.go()
        assert not math.isfinite(metrics["gradient_norm"]) and not math.isfinite(metrics["loss"])
        assert equal(kept(run.state), before)
        assert (int(metrics["skipped_steps"]), int(metrics["skipped_in_a_row"])) == (count, count)
    assert int(run.state.step) == 3 and samples_seen(run.state.seen) == 48
    healthy = run.state.params | {"logit_scale": jnp.full_like(run.state.params["logit_scale"], 2.6)}
    run.state = run.state._replace(params=healthy)
    metrics = run.go()
    assert (int(metrics["skipped_steps"]), int(metrics["skipped_in_a_row"])) == (2, 0)
    assert math.isfinite(metrics["loss"]) and not equal(kept(run.state)[0], before[0])


def test_a_run_rolls_back_passes_over_the_data_and_ends_after_so_often(tmp_path):
    c = config(VIT)
    c.nonfinite.in_a_row, c.nonfinite.rollbacks = 3, 1
    run, checkpoints = Run(), Checkpoints(tmp_path, c)
    recovery = Recovery(checkpoints, run.abstract, run.state, c)
    for _ in range(2):
        run.watched(recovery)
    run.state = recovery.save(run.state, {}, 1.0, at_once=False)
    good = kept(run.state)
    run.spoil()
    for _ in range(2):
        run.watched(recovery)
    # Amid skipped steps nothing is saved that a run would come back to.
    run.state = recovery.save(run.state, {}, 1.0, at_once=False)
    assert checkpoints.due(4) and checkpoints.any()
    assert [folder.name for folder in step_folders(checkpoints.folder)] == ["2"]
    run.state = recovery.save(run.state, {}, 1.0, at_once=True)
    for _ in range(2):  # the third in a row, which is known after the next step has started
        run.watched(recovery)
    assert equal(kept(run.state), good)
    state = run.state
    assert int(state.step) == 6 and samples_seen(state.seen) == 96
    assert [int(x) for x in state.mishaps] == [4, 0, 1]
    assert jax.tree.all(jax.tree.map(lambda x, a: x.sharding == a.sharding, state, run.abstract))
    assert int(run.go()["skipped_in_a_row"]) == 0 and run.step._cache_size() == 1
    run.spoil()
    with pytest.raises(UserError, match="step 11: 3 steps in a row .*, and config.nonfinite.rollbacks 1 are used up"):
        for _ in range(9):
            run.watched(recovery)
    checkpoints.close()


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    c = config(VIT)
    run, checkpoints = Run(), Checkpoints(tmp_path, c)
    recovery = Recovery(checkpoints, run.abstract, run.state, c)
    run.go()
    run.state = recovery.save(run.state, {}, 1.0, at_once=False)
    good = kept(run.state)
    run.go()
    projection = run.state.params["text"]["projection"]
    run.state.params["text"]["projection"] = projection.at[3, 5].set(jnp.inf)
    bad = jax.tree.map(jnp.copy, run.state)
    run.state = recovery.save(run.state, {}, 1.0, at_once=False)
    run.watched(recovery)  # while the step after it is under way, the run comes back
    assert equal(kept(run.state), good) and checkpoints.any() and len(step_folders(checkpoints.folder)) == 1
    run.state = recovery.save(bad, {}, 1.0, at_once=True)
    checkpoints.close()
    assert equal(kept(run.state), good) and [f.name for f in step_folders(checkpoints.folder)] == ["2", "1"]


def test_without_a_checkpoint_there_is_no_way_back(tmp_path):
    c = config(VIT)
    c.nonfinite.in_a_row = 1
    run, checkpoints = Run(), Checkpoints(tmp_path, c)
    recovery = Recovery(checkpoints, run.abstract, run.state, c)
    run.spoil()
    run.watched(recovery)
    with pytest.raises(UserError, match="no checkpoint yet to go back to; lower config.optimizer.learning_rate"):
        run.watched(recovery)
    checkpoints.close()


def test_a_digest_sees_every_bit_and_no_mesh():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 24)).astype(np.float32)
    place = np.arange(x.size, dtype=np.uint64).reshape(x.shape)
    expected = int((x.view(np.uint32) * (2 * place + 1)).sum() % 2**32)
    assert int(bit_sum(jnp.asarray(x))[0]) == expected
    for bit in range(32):
        flipped = x.copy()
        flipped.view(np.uint32)[5, 7] ^= np.uint32(1 << bit)
        assert int(bit_sum(jnp.asarray(flipped))[0]) != expected
    moved = x.copy()
    moved[[0, 1]] = x[[1, 0]]
    assert int(bit_sum(jnp.asarray(moved))[0]) != expected
    mesh = make_mesh(config(data=2, fsdp=2, tensor=2), jax.devices())
    for spec in ((), ("data",), ("fsdp", "tensor"), (None, ("data", "fsdp"))):
        there = jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))
        snapshot = Snapshot({"x": there})
        assert snapshot.digests() == digests({"x": there}) == {"x": expected} and snapshot.finite
    for dtype in (jnp.bfloat16, jnp.int32, jnp.uint8):
        assert Snapshot([jnp.ones((3,), dtype), jnp.ones((), dtype)]).finite
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        assert not Snapshot([jnp.ones(3), jnp.array([1.0, bad])]).finite and not Snapshot([jnp.float32(bad)]).finite


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    """A workdir with the checkpoints of steps 1 and 2, and the states that they hold."""
    workdir, c = tmp_path_factory.mktemp("two") / "run", config(VIT)
    run, checkpoints, states = Run(), Checkpoints(workdir, c), {}
    for number in (1, 2):
        run.go()
        checkpoints.save(run.state, {"next_index": number}, 1.0)
        states[number] = jax.tree.map(np.array, run.state)
    checkpoints.close()
    return workdir, states, run.abstract


def copied(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    for file in source.rglob("*"):
        if file.is_file():
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.read_bytes())
    return target


def restored(workdir: pathlib.Path, abstract) -> tuple[int, tuple]:
    checkpoints = Checkpoints(workdir, config(VIT))
    state, position = checkpoints.restore(abstract)
    checkpoints.close()
    return position["next_index"], state


FILES = ("about/metadata", "config/metadata", "data/metadata", "state/_METADATA", "state/manifest.ocdbt", "arrays")


@pytest.mark.parametrize("damage", ["cut", "gone", "flipped"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(name, damage, two_saved, tmp_path, capsys):
    source, states, abstract = two_saved
    workdir = copied(source, tmp_path / "run")
    newest = workdir / "checkpoints" / "2"
    # The largest file holds arrays.
    largest = max((file for file in newest.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    file = largest if name == "arrays" else newest / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    step, state = restored(workdir, abstract)
    said = capsys.readouterr().err
    # A flipped bit of what Orbax writes for itself may leave all that is read of it as it was.
    assert step == 1 or (damage, name) == ("flipped", "state/_METADATA")
    assert equal(state, states[step])
    if step == 1:
        assert f"warning: checkpoint {newest}: passed over, for it is not whole (" in said
        assert sorted(f.name for f in (workdir / "checkpoints").iterdir() if f.is_dir()) == ["1", "2.corrupt"]
    else:
        assert not said


def test_the_model_loads_from_the_newest_whole_checkpoint_alone(two_saved, tmp_path, capsys):
    source, states, abstract = two_saved
    workdir = copied(source, tmp_path / "run")
    flip_arrays(workdir / "checkpoints" / "2")
    model, _ = load_model(workdir)
    assert (np.asarray(model.text.token_embedding[...]) == states[1].params["text"]["token_embedding"]).all()
    assert "checkpoints/2: passed over" in capsys.readouterr().err
    with pytest.raises(UserError, match="checkpoints/2: not whole, and no older one is"):
        load_model(workdir / "checkpoints" / "2")
    assert (workdir / "checkpoints" / "2").is_dir()  # who only reads sets nothing aside
    flip_arrays(workdir / "checkpoints" / "1")
    with pytest.raises(UserError, match="checkpoints/2: not whole, and no older one is"):
        restored(workdir, abstract)


def flip_arrays(checkpoint: pathlib.Path) -> None:
    """A bit here and there, so that every array of every file has one: the model reads a third of them."""
    for file in checkpoint.glob("state/**/d/*"):
        content = bytearray(file.read_bytes())
        for place in range(50, len(content), 200):
            content[place] ^= 4
        file.write_bytes(content)


def test_the_step_of_a_damaged_checkpoint_is_saved_again(two_saved, tmp_path):
    source, states, abstract = two_saved
    c, workdir = config(VIT), copied(source, tmp_path / "run")
    (workdir / "checkpoints" / "2" / "about" / "metadata").unlink()
    checkpoints = Checkpoints(workdir, c)
    state, _ = checkpoints.restore(abstract)
    assert int(state.step) == 1
    checkpoints.save(jax.tree.map(jnp.asarray, states[2]), {"next_index": 2})
    checkpoints.close()
    assert [folder.name for folder in step_folders(checkpoints.folder)] == ["2", "1"]
    assert equal(Checkpoints(workdir, c).restore(abstract)[0], states[2])


@pytest.mark.parametrize(
    "field, value",
    [
        ("seed", 1),
        ("data.split", "test"),
        ("data.sets", ("elsewhere/pairs/2.0.0",)),
        ("data.template_rate", 0.5),
        ("data.augment.rotate", 3.0),
        ("model.text.heads", 4),
    ],
)
def test_a_run_does_not_go_on_as_another(field, value, two_saved, tmp_path):
    source, _, abstract = two_saved
    c = config(VIT)
    *groups, leaf = field.split(".")
    place = c
    for group in groups:
        place = place[group]
    with place.unlocked(), place.ignore_type():
        place[leaf] = value
    with pytest.raises(UserError, match=f"checkpoints/2: it .*, {field} is .* there and .*set config.{field} as it"):
        Checkpoints(copied(source, tmp_path / "run"), c).restore(abstract)


def test_what_is_free_to_change(two_saved, tmp_path):
    source, states, abstract = two_saved
    c = config(VIT, fsdp=2)
    c.batch_size, c.total_steps, c.microbatches, c.patch_dropout, c.log_every = 32, 90, 2, 0.25, 7
    c.optimizer.learning_rate, c.model.remat, c.model.dtype, c.loss.form = 1.0, "full", "bfloat16", "ring"
    c.data.threads, c.data.prefetch, c.checkpoint_minutes, c.nonfinite.rollbacks = 3, 7, 0.0, 9
    state, _ = Checkpoints(copied(source, tmp_path / "run"), c).restore(abstract)
    assert equal(state, states[2])


def test_another_tokenizer_is_refused(two_saved, tmp_path, monkeypatch):
    source, _, abstract = two_saved
    monkeypatch.setattr("clip_jax.about.vocabulary_sha256", lambda: "0123")
    with pytest.raises(UserError, match="its tokenizer's vocabulary has the SHA-256 .*, and this program's 0123"):
        Checkpoints(copied(source, tmp_path / "run"), config(VIT)).restore(abstract)


def test_the_last_the_milestones_and_the_best_are_kept(tmp_path):
    c = config(VIT)
    c.checkpoints_kept, c.milestone_every, c.keep_best, c.checkpoint_every, c.checkpoint_minutes = 2, 4, True, 3, 0.0
    state = Run().state
    losses = [9.0, 8.0, 1.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, math.inf, math.inf]
    for part in (range(1, 7), range(7, 12)):  # two processes, one after the other
        checkpoints = Checkpoints(tmp_path, c)
        for step in part:
            assert checkpoints.due(step) == (step in (3, 4, 6, 8, 9))
            checkpoints.save(state._replace(step=jnp.int32(step)), {}, losses[step - 1])
        checkpoints.close()
    assert [folder.name for folder in step_folders(checkpoints.folder)] == ["11", "10", "8", "4", "3"]


def test_a_checkpoint_is_due_by_the_time(tmp_path):
    c = config(VIT)
    c.checkpoint_every = 10**6
    c.checkpoint_minutes = 1e-9
    checkpoints = Checkpoints(tmp_path, c)
    assert checkpoints.due(1)
    c.checkpoint_minutes = 1e9
    assert not checkpoints.due(1)
    checkpoints.close()


def test_the_schedule_goes_by_samples_exactly():
    c = config()
    c.batch_size, c.total_steps, c.optimizer.warmup_steps = 256, 100, 10
    schedule = make_schedule(c)
    # As many samples in batches of 256, 64 and 384, each run beginning with 256.
    seen = Seen(*map(jnp.int32, (0, 0, 256)))
    positions = {0: 0.0}
    for size in [256] * 3 + [64] * 8 + [384] * 2:
        seen = jax.jit(after_batch, static_argnums=1)(seen, size)
        positions[samples_seen(seen)] = float(schedule_position(seen))
    assert samples_seen(seen) == 768 + 512 + 768
    assert all(position == samples / 256 for samples, position in positions.items())
    np.testing.assert_allclose(float(schedule(schedule_position(seen))), float(schedule(8)), rtol=0)
    assert steps_left(seen, c) == 92
    c.batch_size = 300
    assert steps_left(seen, c) == math.ceil((25_600 - 2048) / 300)
    # Beyond 2^31 samples, and beyond 2^32.
    far = after_batch(Seen(*map(jnp.int32, (10**9, 255, 256))), 2**17 + 3)
    assert samples_seen(far) == 10**9 * 256 + 255 + 2**17 + 3
    assert init_state(c).seen.batch_size == 300


def test_signals_wait_for_the_step_and_are_given_back(capfd):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number in (signal.SIGINT, signal.SIGTERM):
        with Interruption() as interruption:
            assert not interruption.reached(1)
            os.kill(os.getpid(), number)
            assert interruption.reached(1)
            # A second Ctrl-C is the kernel's.
            assert (signal.getsignal(signal.SIGINT) == signal.SIG_DFL) == (number == signal.SIGINT)
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert "Ctrl-C once more ends at once" in capfd.readouterr().err
