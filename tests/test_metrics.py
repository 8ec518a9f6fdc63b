import json
import time

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
    with MetricsLog(tmp_path, 0, 0, 2, batch_size=4, log_every=1, writes=True) as log:
        log.record(1, metrics, {"read": 5.0, "decode": 5.0})  # what was before does not count
        time.sleep(0.01 if waits else 0.3)
        for what, seconds in waits.items():
            with log.waiting(what):
                time.sleep(seconds)
        log.record(2, metrics, {name: 5.0 + seconds for name, seconds in making.items()})
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["bottleneck"] == expected
    for what in ("data", "copy"):
        assert (last[f"{what}_wait"] > 0.1) == (what in waits)


def test_a_half_written_line_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + '\n{"st')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]
