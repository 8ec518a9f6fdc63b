"""What a run reports while it runs: a progress bar, `metrics.jsonl`, and TensorBoard events."""

import collections
import contextlib
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import tensorboardX
import tqdm

from clip_jax.errors import UserError
from clip_jax.flops import peak_flops


class MetricsLog:
    """The records of a run in its workdir.

    A logged step has `step`, `samples_seen`, `loss` (of that step), `lr`, and since the last logged step
    `samples_per_second`, `samples_per_second_per_device` and `tflops_per_device`, of a device's model FLOPs, and where its peak is
    known `mfu`, the share of that (0 to 1; flops.py has both); `data_wait` and `copy_wait` (shares
    of the time, 0 to 1, without a batch and on its way to the devices) and the `bottleneck`: read, decode, host-to-device or
    compute; and what else the step measures.  A number that is not finite is null.  Of several processes one `writes`.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        start: int,
        seen: int,
        total: int,
        batch_size: int,
        log_every: int,
        writes: bool,
        devices: Sequence[jax.Device],
    ):
        """A log from step `start`, before which `seen` samples were seen, to step `total`, of all `devices` that take them."""
        self.batch_size, self.log_every, self.total, self.writes = batch_size, log_every, total, writes
        self.devices, self.peak = len(devices), peak_flops(devices[0])
        self.in_flight, self.losses = None, []
        self.seen_before_first = seen - start * batch_size
        self.waited, self.made = collections.Counter(), collections.Counter()
        self.since, self.since_step, self.last_step, self.flops = time.perf_counter(), start, start, 0.0
        self.measured: dict[str, float] = {}
        if not writes:
            return
        self.file = workdir / "metrics.jsonl"
        workdir.mkdir(parents=True, exist_ok=True)
        # A run that was killed has logged steps after its last checkpoint; they are taken again.
        kept = [record for record in read_metrics(self.file) if record["step"] <= start]
        # Beside the file, and then in its place, so that no moment is bad to be killed in.
        beside = self.file.with_suffix(".new")
        beside.write_text("".join(json.dumps(record) + "\n" for record in kept))
        beside.replace(self.file)
        self.events = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)
        # In a file, where lines cannot be drawn over, a line a minute is enough.
        interval = 0.2 if sys.stderr.isatty() else 60
        self.bar = tqdm.tqdm(initial=start, total=total, unit="step", dynamic_ncols=True, mininterval=interval)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_) -> None:
        if self.writes:
            self.bar.close()
            self.events.close()

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Counts the time inside as waiting for "data" or for its "copy" to the devices."""
        start = time.perf_counter()
        yield
        self.waited[what] += time.perf_counter() - start

    def record(self, step: int, metrics: dict[str, jax.Array], making: Mapping[str, float], flops: float) -> None:
        """Takes the metrics of the step just started; writes them down if it is one to log.

        Args:
          making: seconds that it took so far to "read" and to "decode" what the batches are made of.
          flops: model FLOPs of this step on all devices, which vary with the length of the texts.
        """
        # One step may be under way while the next batch is made; further ahead the times would lie.
        jax.block_until_ready(self.in_flight)
        self._keep_loss()
        self.in_flight = metrics
        self.last_step, self.flops = step, self.flops + flops
        if not self.writes:
            return
        self.bar.update()
        if step % self.log_every and step != self.total:
            return
        values = {name: value.item() for name, value in metrics.items()}
        elapsed = time.perf_counter() - self.since
        samples_per_second = (step - self.since_step) * self.batch_size / elapsed
        flops_per_device = self.flops / elapsed / self.devices
        record = {
            "step": step,
            "samples_seen": self.seen_before_first + step * self.batch_size,
            "loss": values.pop("loss"),
            "lr": values.pop("lr"),
            "samples_per_second": samples_per_second,
            "samples_per_second_per_device": samples_per_second / self.devices,
            "tflops_per_device": flops_per_device / 1e12,
            **({"mfu": flops_per_device / self.peak} if self.peak else {}),
            "data_wait": self.waited["data"] / elapsed,
            "copy_wait": self.waited["copy"] / elapsed,
            **values,
            **self.measured,
        }
        self.measured = {}
        bottleneck = _bottleneck(record["data_wait"], record["copy_wait"], collections.Counter(making) - self.made)
        self.waited, self.made = collections.Counter(), collections.Counter(making)
        self.since, self.since_step, self.flops = time.perf_counter(), step, 0.0
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
        try:
            with self.file.open("a") as file:
                file.write(json.dumps(finite | {"bottleneck": bottleneck}) + "\n")
        except OSError as error:
            raise UserError(
                f"{self.file}: cannot be written, {error.strerror}; make room, and the same command goes on after the "
                "last checkpoint"
            ) from error
        for name, value in record.items():
            if name != "step":
                self.events.add_scalar(name, value, step)
        speed = f"{samples_per_second:.0f} samples/s"
        if self.devices > 1:
            speed += f", {samples_per_second / self.devices:.0f} a device"
        if self.peak:
            speed += f", MFU {record['mfu']:.1%}"
        self.bar.set_postfix_str(
            f"loss {record['loss']:.3f} (chance {math.log(self.batch_size):.2f}), {speed}, "
            f"data wait {record['data_wait']:.0%}, bottleneck {bottleneck}",
            refresh=False,
        )

    def measured_now(self, metrics: Mapping[str, float]) -> None:
        """Metrics of an evaluation, which go with the next step that is logged; the time that it took is no step's."""
        self.measured = dict(metrics)
        # The steps before it go with their time, or those after it would seem to have made them too.
        self.since, self.since_step, self.flops = time.perf_counter(), self.last_step, 0.0
        self.waited = collections.Counter()

    def mean_loss(self) -> float:
        """The mean loss of the steps since this was last asked, without those skipped; infinite if all were."""
        self._keep_loss()
        self.in_flight, losses, self.losses = None, [loss for loss in self.losses if math.isfinite(loss)], []
        return math.fsum(losses) / len(losses) if losses else math.inf

    def _keep_loss(self) -> None:
        if self.in_flight:
            self.losses.append(float(self.in_flight["loss"]))


def _bottleneck(data_wait: float, copy_wait: float, making: Mapping[str, float]) -> str:
    """What a run waits for most, if that is a twentieth of its time; or else compute."""
    if max(data_wait, copy_wait) < 0.05:
        return "compute"
    return "host-to-device" if copy_wait > data_wait else max(("read", "decode"), key=lambda what: making.get(what, 0.0))


def read_metrics(file: pathlib.Path) -> list[dict]:
    """The records of a `metrics.jsonl`, none if there is no such file; a half-written last line is left out."""
    if not file.is_file():
        return []
    lines = file.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]
