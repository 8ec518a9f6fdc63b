"""Where the time of a step goes: a trace of a few steps for the viewer, and a table made from it.

`--config.profile=true` writes `WORKDIR/profile/`; docs/profiling.md tells how to read it.
"""

import collections
import dataclasses
import pathlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Float64

from clip_jax.distributed import is_first
from clip_jax.errors import warn
from clip_jax.traced_programs import (
    ATTENTION,
    COLLECTIVES,
    COPIES,
    ELEMENTWISE,
    KINDS,
    OPTIMIZER,
    PRODUCTS,
    REDUCTIONS,
    Operation,
    Programs,
)

Event = tuple[str, dict[str, Any], float, float]  # name, stats, start and end in nanoseconds

WARM_UP, TRACED = 10, 5  # steps
STEP = "train"  # what the viewer calls a step
WAITS = {"data": "waiting for data", "copy": "copying a batch to the devices"}
HOST = "the host does something else"


class Profile:
    """Traces steps 11 to 15 of those that a run has left; of fewer the last five but one, without the first, which compiles.

    `with Profile(...) as profile: for number in profile.steps(): ...`
    """

    def __init__(self, wanted: bool, workdir: pathlib.Path, start: int, total: int):
        """For the steps after `start` to `total`."""
        several = f"process_{jax.process_index()}" if jax.process_count() > 1 else ""
        self.folder, self.start, self.total = workdir / "profile" / several, start, total
        # The last step of a run saves and ends it, which no other does.
        self.last = start + min(WARM_UP + TRACED, max(2, total - start - 1))
        self.first = max(start + 2, self.last - TRACED + 1)
        self.session = f"steps_{self.first}_to_{self.last}"
        self.wanted, self.running = wanted and self.first <= total, False
        if wanted and not self.wanted:
            warn(f"config.profile: {total - start} steps are left, expected at least 2; nothing is traced")

    def steps(self) -> Iterator[int]:
        """The numbers of the steps."""
        for number in range(self.start + 1, self.total + 1):
            if not (self.wanted and self.first <= number <= self.last):
                yield number
                continue
            if number == self.first:
                self._begin()
            with jax.profiler.StepTraceAnnotation(STEP, step_num=number):
                yield number
                if number == self.last:
                    wait_for_devices()
            if number == self.last:
                self._end()

    def waiting(self, what: str) -> jax.profiler.TraceAnnotation:
        """Names what is inside as waiting for "data" or for its "copy" to the devices."""
        return jax.profiler.TraceAnnotation(WAITS[what])

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if self.running:  # the run ends amid the steps to trace
            if kind is None:
                wait_for_devices()
            self._end(table=kind is None)

    def _begin(self) -> None:
        wait_for_devices()
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # Python's calls would take most of the time and of the file
        options.session_id = self.session
        jax.profiler.start_trace(self.folder, profiler_options=options)
        self.running = True

    def _end(self, table: bool = True) -> None:
        self.running = False
        try:
            jax.profiler.stop_trace()
            if table and is_first():
                file = newest_trace(self.folder, self.session)
                text = format_table(read_trace(file), file)
                (self.folder / "table.txt").write_text(text + "\n")
                print(f"\n{text}")  # below the progress bar
        except (OSError, RuntimeError) as error:  # a full disk: no reason to end a run
            warn(f"{self.folder}: the profile is not written, {error}")


def wait_for_devices() -> None:
    """Until all that was started is done."""
    jax.block_until_ready([array for array in jax.live_arrays() if not array.is_deleted()])


def newest_trace(folder: pathlib.Path, session: str) -> pathlib.Path:
    """The file of this session that was written last: a host may have changed its name."""
    files = (folder / "plugins" / "profile" / session).glob("*.xplane.pb")
    return max(files, key=lambda file: file.stat().st_mtime_ns)


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """The time of the traced steps; seconds are those of one step on one device, and add up to `seconds`.

    Where k operations run at once, each has 1/k of that time.
    """

    steps: list[int]
    seconds: float
    devices: str
    at_once: float  # operations, on average, when there is one
    operations: dict[Operation, float]
    times: dict[Operation, float]  # that each runs
    idle: dict[str, float]  # by what the host did meanwhile

    def by(self, of: Callable[[Operation], str]) -> dict[str, float]:
        """Seconds of operations by `of` them."""
        sums: dict[str, float] = collections.defaultdict(float)
        for operation, seconds in self.operations.items():
            sums[of(operation)] += seconds
        return dict(sums)


def read_trace(file: pathlib.Path) -> Breakdown:
    """Where the time went in the annotated steps of a trace, the `xplane.pb` of one host."""
    lines, programs = _lines(file), Programs(file.read_bytes())
    host = [event for plane, _, events in lines for event in events if plane == "/host:CPU"]
    steps = {stats["step_num"]: (start, end) for name, stats, start, end in host if name == STEP}
    window = min(start for start, _ in steps.values()), max(end for _, end in steps.values())
    waits = {what: [(start, end) for name, _, start, end in host if name == what] for what in WAITS.values()}

    on_devices = collections.defaultdict(list)
    for plane, line, events in lines:
        if plane.startswith("/device:") and (line.startswith("Stream") or line == "XLA Ops"):  # of a GPU; of a TPU
            on_devices[plane] += events
    timelines = [events for events in on_devices.values() if events] or [_on_host(host)]
    devices = f"{len(timelines)} x {jax.local_devices()[0].device_kind}" if any(on_devices.values()) else "cpu"
    per_step = 1e-9 / len(steps) / len(timelines)
    seconds, times = collections.Counter(), collections.Counter()
    idle, wall, at_once = collections.Counter(), 0.0, []
    for events in timelines:
        found = [programs.operation(name, stats) for name, stats, _, _ in events]
        kept = [i for i, operation in enumerate(found) if operation is not None]
        spans = np.array([events[i][2:] for i in kept], np.float64).reshape(-1, 2)
        shared, waited, length, together = share_time(spans, window, waits)
        for i, own in zip(kept, shared, strict=True):
            seconds[found[i]] += float(own) * per_step
            times[found[i]] += 1 / len(steps) / len(timelines)
        for what, nanoseconds in waited.items():
            idle[what] += nanoseconds * per_step
        wall += length * per_step
        at_once.append(together)
    return Breakdown(sorted(steps), wall, devices, float(np.mean(at_once)), dict(seconds), dict(times), dict(idle))


def share_time(
    spans: Float64[np.ndarray, "N 2"], window: tuple[float, float], waits: dict[str, list[tuple[float, float]]]
) -> tuple[Float64[np.ndarray, "N"], dict[str, float], float, float]:
    """Divides the time among spans, 1/k of it to each where there are k, and what is left by the waits in it.

    Args:
      spans: start and end of each operation.
      window: start and end of what is divided, at least.
      waits: spans of the host by name, none of which overlap.

    Returns:
      time of each span; idle time by name, HOST where there was no wait; all time, the sum of both; how many
      spans there are at once, where there is one.
    """
    count = len(spans)
    at = np.concatenate([spans[:, 0], spans[:, 1], np.float64(window)])
    change = np.concatenate([np.ones(count), -np.ones(count), np.zeros(2)])
    order = np.argsort(at, kind="stable")
    ordered = at[order]
    length, running = np.diff(ordered), np.cumsum(change[order])[:-1]
    share = np.divide(1, running, out=np.zeros_like(running), where=running > 0)
    until = np.empty_like(at)  # the time that one span would have, were it there from the start
    until[order] = np.concatenate([[0.0], np.cumsum(length * share)])
    idle_until = np.concatenate([[0.0], np.cumsum(length * (running == 0))])
    idle_at = lambda moment: float(np.interp(moment, ordered, idle_until))
    idle = {what: sum((idle_at(end) - idle_at(start) for start, end in spans), 0.0) for what, spans in waits.items()}
    idle[HOST] = float(idle_until[-1]) - sum(idle.values())
    busy = float(length[running > 0].sum())
    return until[count:-2] - until[:count], idle, float(length.sum()), float((length * running).sum()) / max(busy, 1.0)


def _lines(file: pathlib.Path) -> list[tuple[str, str, list[Event]]]:
    """Plane, line and events of a trace."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.13, for types that jaxlib makes on the way
        trace = jax.profiler.ProfileData.from_file(str(file))
        read = lambda e: (e.name, dict(e.stats), e.start_ns, e.end_ns)
        return [
            (plane.name, line.name, [read(e) for e in line.events if not e.name.startswith("Threadpool")])
            for plane in trace.planes
            for line in plane.lines
        ]


def _on_host(events: list[Event]) -> list[Event]:
    """What XLA ran on the CPU's threads.  An operation that goes on on others ends with an event of its own."""
    ends = {stats.get("_c"): end for name, stats, _, end in events if name.startswith("end: ")}
    found = [event for event in events if "hlo_op" in event[1]]
    return [(name, stats, start, max(end, ends.get(stats.get("_p"), 0.0))) for name, stats, start, end in found]


def format_table(found: Breakdown, file: pathlib.Path) -> str:
    """The table that people read: kinds of operations, parts of the step, the ten longest operations, and what to do."""
    row = lambda name, seconds: f"{name:<44}{1e3 * seconds:>10.2f}{seconds / found.seconds:>9.1%}"
    steps = f"steps {found.steps[0]} to {found.steps[-1]}"
    lines = [f"{steps.capitalize()}: {1e3 * found.seconds:.2f} ms each, on {found.devices}, jax {jax.__version__}; the trace is {file}", ""]
    lines.append(f"{'where the time goes':<44}{'ms a step':>10}{'share':>9}")
    kinds = found.by(lambda operation: operation.kind)
    lines += [row(kind, kinds[kind]) for kind in KINDS if kind in kinds]
    lines += [row(f"nothing runs: {what}", seconds) for what, seconds in found.idle.items()]
    lines += [row("all", found.seconds), ""]
    lines.append(f"{'of the operations, by the part of the step':<44}{'ms a step':>10}{'share':>9}")
    parts = found.by(lambda operation: operation.part)
    lines += [row(part, parts[part]) for part in sorted(parts, key=parts.__getitem__, reverse=True)]
    lines += ["", f"{'the ten longest operations':<44}{'ms a step':>10}{'share':>9}{'times':>7}  what and where"]
    for operation in sorted(found.operations, key=found.operations.__getitem__, reverse=True)[:10]:
        what = "; ".join(filter(None, (operation.kind.split(",")[0], operation.part, operation.place)))
        lines.append(f"{row(operation.name[:43], found.operations[operation])}{found.times[operation]:>7.3g}  {what}")
    lines += ["", f"While any operation ran, {found.at_once:.2f} did on average; where k ran at once each has 1/k of the time, so that all"]
    lines += ["shares are of the time on the clock and add up to 100 %."]
    if found.devices == "cpu":
        lines += ["On a CPU an operation lasts longer where others take its core: threads that make batches, other programs."]
    return "\n".join(lines + ["", *advice(found)])


def advice(found: Breakdown) -> list[str]:
    """What to try first, by what takes much of the time."""
    share = {kind: seconds / found.seconds for kind, seconds in found.by(lambda operation: operation.kind).items()}
    share |= {part: seconds / found.seconds for part, seconds in found.by(lambda operation: operation.part).items()}
    share |= {what: seconds / found.seconds for what, seconds in found.idle.items()}
    of = lambda *kinds: sum(share.get(kind, 0.0) for kind in kinds)
    device = "config.model.dtype=bfloat16 where the device has it"
    rules = (
        (of(WAITS["data"]), 0.05, "Batches come too slowly: see bottleneck in metrics.jsonl; config.data.workers, threads; docs/data.md"),
        (of(WAITS["copy"]), 0.05, "The devices wait for batches on their way: a faster link, more hosts, or a smaller image_size"),
        (of(HOST), 0.1, "The devices wait for the host: it compiled, saved or measured in these steps, or the batch is too small"),
        (of(COLLECTIVES), 0.25, "Much communication: a smaller config.mesh.fsdp or tensor, or a larger batch; docs/scaling.md"),
        (of(OPTIMIZER), 0.25, "The optimizer's part is the same for any batch: take a larger one, or divide it by config.mesh.fsdp"),
        (of(ELEMENTWISE, REDUCTIONS, COPIES), 0.5, f"More is moved than multiplied: {device}, or a wider model"),
        (of(PRODUCTS, ATTENTION), 0.5, f"Mostly products, the model's own work: {device}, less remat, patch_dropout, more devices"),
    )
    return [f"{text}." for value, least, text in rules if value >= least]
