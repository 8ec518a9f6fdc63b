"""A profiled run, and traces whose times are known."""

import functools
import json
import pathlib
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData

import clip_jax.figures
import train
from clip_jax.config import load_config
from clip_jax.profile import HOST, WAITS, Breakdown, Profile, advice, format_table, newest_trace, read_trace, share_time
from clip_jax.sharding import make_mesh
from clip_jax.step import make_train_step
from clip_jax.traced_programs import ATTENTION, COLLECTIVES, COPIES, ELEMENTWISE, OTHER, PRODUCTS

# A model of little else than matrix products.
CONFIG = f"""
from clip_jax.config import architecture, default_config

def get_config():
    config = default_config()
    config.batch_size, config.total_steps, config.log_every, config.optimizer.warmup_steps = 16, 16, 1, 2
    config.model = architecture("ViT-B/32")
    config.model.dtype, config.model.embedding = "float32", 64
    vision = config.model.vision
    vision.image_size, vision.patch_size, vision.width, vision.layers, vision.heads = 32, 8, 256, 2, 4
    vision.mlp_ratio, text = 1.0, config.model.text
    text.width, text.layers, text.heads, text.context_length = 16, 1, 1, 8
    config.data.sets = ({str(pathlib.Path(clip_jax.__file__).parent / "emoji" / "twemoji" / "1.0.0")!r},)
    config.data.caption = ("name",)
    return config
"""


class NotMeasured:
    """In place of the evaluation, of which no test is here."""

    def __init__(self, *_):
        pass

    def of(self, _):
        return []


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, pathlib.Path]:
    """The workdirs of two runs that differ in `profile` alone."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "small.py").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Measurement", NotMeasured)
        # On conftest's eight devices, which share two cores, most of the time is waiting for each other.
        patch.setattr(train, "make_mesh", lambda config, devices: make_mesh(config, devices[:1]))
        step = functools.cache(lambda mesh: make_train_step(load_config(f"{folder}/small.py"), mesh))  # compiled once
        patch.setattr(train, "make_train_step", lambda config, mesh: step(mesh))
        patch.setattr(clip_jax.figures, "draw_figures", lambda *_: None)
        for profile in ("true", "false"):
            train.main([f"--config={folder}/small.py", f"--workdir={folder / profile}", f"--config.profile={profile}"])
    return {profile: folder / profile for profile in ("true", "false")}


def trace_of(workdir: pathlib.Path) -> pathlib.Path:
    return newest_trace(workdir / "profile", "steps_11_to_15")


@pytest.fixture(scope="module")
def found(runs) -> Breakdown:
    return read_trace(trace_of(runs["true"]))


def test_profiling_changes_no_number(runs):
    rows = {name: [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for name, run in runs.items()}
    values = {name: [(r["step"], r["loss"], r["gradient_norm"]) for r in found] for name, found in rows.items()}
    assert values["true"] == values["false"] and len(values["true"]) == 16
    assert not (runs["false"] / "profile").exists()


def test_the_trace_has_the_steps_that_were_promised(runs):
    file = trace_of(runs["true"])
    assert len(list(file.parent.glob("*.trace.json.gz"))) == 1  # for Perfetto
    with warnings.catch_warnings(action="ignore"):  # nanobind's, which would end the process
        trace = ProfileData.from_file(str(file))
        events = [(e.name, dict(e.stats)) for plane in trace.planes for line in plane.lines for e in line.events]
    assert [stats["step_num"] for name, stats in events if name == "train"] == [11, 12, 13, 14, 15]
    assert all(sum(name == what for name, _ in events) == 5 for what in WAITS.values())
    runs_of_step = {stats["run_id"] for _, stats in events if stats.get("hlo_module") == "jit_train_step"}
    assert len(runs_of_step) == 5  # neither the one before nor the one after


def test_the_table_tells_all_of_the_time(runs, found):
    assert sum(found.operations.values()) + sum(found.idle.values()) == pytest.approx(found.seconds, rel=1e-9)
    assert all(seconds >= 0 for seconds in (*found.operations.values(), *found.idle.values()))
    table = (runs["true"] / "profile" / "table.txt").read_text()
    assert table == format_table(found, trace_of(runs["true"])) + "\n"
    kinds = table.split("\n\n")[1].splitlines()
    shares = [float(re.search(r"([\d.]+)%$", line)[1]) for line in kinds[1:-1]]
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares)) and kinds[-1].endswith("100.0%")
    assert len(table.split("\n\n")[3].splitlines()) == 11


def test_products_and_their_places_are_found(found):
    kinds, parts = found.by(lambda o: o.kind), found.by(lambda o: o.part)
    # How long each takes is the machine's: products had 9 to 43 % of the time.
    assert {PRODUCTS, ATTENTION, ELEMENTWISE, OTHER} <= kinds.keys()  # other: the embedding's gather
    assert {f"{tower}, {way}" for tower in ("image tower", "text tower", "loss") for way in ("forward", "backward")} <= parts.keys()
    # 16 times as wide, with twice the tokens and layers.
    assert parts["image tower, backward"] > parts["text tower, backward"]
    places = {o.place.split(" ")[0] for o in found.operations if o.kind == PRODUCTS}
    assert "ViT/Transformer/Block/MLP/Linear" in places, places
    assert parts.get("outside of programs", 0) == 0


@pytest.mark.parametrize("start, total, expected", [(0, 100, (11, 15)), (50, 100, (61, 65)), (0, 6, (2, 5)), (0, 2, (2, 2)), (0, 1, None)])
def test_shorter_runs_trace_fewer_steps(start, total, expected, tmp_path, capsys):
    profile = Profile(True, tmp_path, start, total)
    assert profile.wanted == (expected is not None) == (not capsys.readouterr().err)
    assert expected in ((profile.first, profile.last), None)
    assert list(Profile(False, tmp_path, start, total).steps()) == list(range(start + 1, total + 1))


def test_a_run_that_stops_amid_the_traced_steps_has_its_table(tmp_path, capsys):
    product = jax.jit(lambda x: x @ x, donate_argnums=0)
    x = jnp.eye(300)
    with Profile(True, tmp_path, 0, 100) as profile:
        for number in profile.steps():
            x = product(x)
            if number == 12:
                break
    found = read_trace(newest_trace(tmp_path / "profile", "steps_11_to_15"))
    kinds = found.by(lambda o: o.kind)
    assert found.steps == [11, 12] and set(found.times.values()) == {1} and set(found.by(lambda o: o.part)) == {"other programs"}
    assert set(kinds) <= {PRODUCTS, COPIES} and kinds[PRODUCTS] > 0.8 * sum(kinds.values())  # 0.94
    assert "Steps 11 to 12: " in capsys.readouterr().out


def test_operations_at_the_same_time_share_it():
    spans = np.float64([[0, 4], [2, 6], [10, 12]])
    own, idle, length, at_once = share_time(spans, (-1.0, 20.0), {"data": [(5.0, 8.0)], "copy": [(13.0, 14.0)]})
    np.testing.assert_array_equal(own, [3, 3, 2])
    assert idle == {"data": 2, "copy": 1, HOST: 21 - 8 - 3}
    assert length == 21 and at_once == 10 / 8


def test_a_trace_of_gpus_is_read(tmp_path):
    """Made by hand after the names that XLA gives: there is no GPU here."""
    kernels = [("nvjet_tst_128x128", 0, 50), ("ncclDevKernel_AllReduce", 60, 10), ("MemcpyH2D", 55, 10), ("loop_add_fusion", 80, 5)]
    names = ["train", "waiting for data", *(name for name, _, _ in kernels)]
    metadata = "".join(f'event_metadata {{ key: {i + 1} value {{ id: {i + 1} name: "{name}" }} }}' for i, name in enumerate(names))
    at = lambda start, length: f"offset_ps: {start * 10**9} duration_ps: {length * 10**9}"
    event = lambda i, start, length, stat="": f"events {{ metadata_id: {i} {at(start, length)} {stat} }}"
    line = lambda name, events: f'lines {{ id: 1 name: "{name}" timestamp_ns: 0 {events} }}'
    step = 'stat_metadata { key: 1 value { id: 1 name: "step_num" } }'
    steps = event(1, 0, 50, "stats { metadata_id: 1 int64_value: 11 }") + event(1, 50, 50, "stats { metadata_id: 1 int64_value: 12 }")
    host = line("python", steps + event(2, 70, 30))
    text = f'planes {{ name: "/host:CPU" {metadata} {step} {host} }}'
    for gpu in range(2):
        first = line("Stream #1(Compute)", "".join(event(i, kernels[i - 3][1], kernels[i - 3][2]) for i in (3, 4, 6)))
        text += f'planes {{ name: "/device:GPU:{gpu}" {metadata} {first} {line("Stream #2(MemcpyH2D)", event(5, 55, 10))} }}'
    file = tmp_path / "gpus.xplane.pb"
    file.write_bytes(ProfileData.text_proto_to_serialized_xspace(text))
    found = read_trace(file)
    assert found.steps == [11, 12] and found.devices.startswith("2 x ") and found.seconds == pytest.approx(0.05)
    milliseconds = {kind: 1e3 * seconds for kind, seconds in found.by(lambda o: o.kind).items()}
    # Half of what was, for each of two steps; 60 to 65 was both a collective and a copy.
    assert milliseconds == pytest.approx({PRODUCTS: 25, COLLECTIVES: 3.75, COPIES: 3.75, ELEMENTWISE: 2.5})
    assert found.idle == pytest.approx({WAITS["data"]: 12.5e-3, WAITS["copy"]: 0, HOST: 2.5e-3})
    assert [line.split(":")[0].split(",")[0] for line in advice(found)] == ["Batches come too slowly", "Mostly products"]
