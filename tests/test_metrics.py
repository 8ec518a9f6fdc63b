import json
import time

import jax
import jax.numpy as jnp
import pytest

from clip_jax.metrics import MetricsLog, read_metrics


@pytest.mark.parametrize(
    "waits, making, expected",
    [
        ({}, {"read": 9.0, "decode": 1.0}, "compute"),
        ({"data": 0.2}, {"read": 0.3, "decode": 0.1}, "read"),
        ({"data": 0.2}, {"read": 0.1, "decode": 0.3}, "decode"),
        ({"data": 0.1, "copy": 0.3}, {"read": 0.1, "decode": 0.3}, "host-to-device"),
    ],
)
def test_the_bottleneck_is_what_was_waited_for(waits, making, expected, tmp_path):
    metrics = {"loss": jnp.float32(1), "lr": jnp.float32(1e-3)}
    with MetricsLog(tmp_path, 0, 0, 2, batch_size=4, log_every=1, writes=True, devices=jax.devices()) as log:
        log.record(1, metrics, {"read": 5.0, "decode": 5.0}, 0.0)  # what was before does not count
        time.sleep(0.01 if waits else 0.3)
        for what, seconds in waits.items():
            with log.waiting(what):
                time.sleep(seconds)
        log.record(2, metrics, {name: 5.0 + seconds for name, seconds in making.items()}, 0.0)
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["bottleneck"] == expected
    for what in ("data", "copy"):
        assert (last[f"{what}_wait"] > 0.1) == (what in waits)


@pytest.mark.parametrize("peak", [1e12, None])
def test_flops_are_those_of_the_steps_that_are_timed(peak, tmp_path, monkeypatch):
    monkeypatch.setattr("clip_jax.metrics.peak_flops", lambda device: peak)
    metrics = {"loss": jnp.float32(1), "lr": jnp.float32(1e-3)}
    with MetricsLog(tmp_path, 0, 0, 6, batch_size=4, log_every=2, writes=True, devices=jax.devices()) as log:
        for step, flops in enumerate([1e9, 3e9, 5e9, 7e9, 9e9], 1):
            log.record(step, metrics, {}, flops)
        log.measured_now({"emoji/acc1": 0.5})  # the fifth step and its time go with it
        log.record(6, metrics, {}, 11e9)
        shown = log.bar.postfix
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [2, 4, 6]
    for record, a_sample in zip(records, [4e9 / 8, 12e9 / 8, 11e9 / 4], strict=True):
        speed, each = record["samples_per_second"], record["samples_per_second_per_device"]
        assert each == speed / len(jax.devices())
        assert record["tflops_per_device"] == pytest.approx(each * a_sample / 1e12, rel=1e-12)
        assert record.get("mfu") == (pytest.approx(record["tflops_per_device"] * 1e12 / peak, rel=1e-12) if peak else None)
    assert f"{speed:.0f} samples/s, {each:.0f} a device" in shown
    assert (f"MFU {records[-1]['mfu']:.1%}" in shown) if peak else "MFU" not in shown


def test_a_half_written_line_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + '\n{"st')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]
