"""How the benchmarks measure: every side has a process of its own, all of one tree, and they take turns.

A script names its sides, functions that import what they need, build it and return a `Side`:

    if __name__ == "__main__":
        serve({"ours": ours, "torch": theirs})  # ends here in a process that `take_turns` started
        main(...)

`take_turns` starts the sides, lets each prepare and warm up, and then asks lane after lane (what a side does, such as the
step on full and on real captions), A B C A B C, for the seconds of so many pieces of work.  Its record has every raw number,
and is written after each round, so that a run which is cut short leaves what it had.  The protocol is a line of JSON each way.

OUR_PYTHON=PATH, another environment's interpreter, runs the side `ours`, where the newest JAX and PyTorch are not to be had for one
Python.  The record's command then begins with it, by its version alone, and the record's versions are those of that environment.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from records import Record, lane_name, summarize, versions

# OpenMP's threads look for work for up to 200 ms before they sleep; so long a turn waits for those of the one before.
SETTLE = 0.3
REPEATS = 5  # of the plain product, of which the fastest counts: it is a limit
PRODUCT = {"cpu": 2048, "gpu": 8192, "tpu": 8192}  # rows of its square matrices


class OutOfMemory(RuntimeError):
    """A side has not the memory for its work."""


@dataclasses.dataclass
class Side:
    """What one process does when it is asked."""

    lanes: dict[str, Callable[[], dict | None]]  # one piece of work each, whose end need not be waited for
    finish: Callable[[], Any]  # waits for that end
    framework: str  # "jax" or "torch"; "" for neither
    dtype: str = "float32"
    facts: dict = dataclasses.field(default_factory=dict)  # for the other side to agree with, or for the record
    rest: Callable[[], Any] = lambda: None  # after a turn: gives back what the others need


def serve(sides: dict[str, Callable[[dict], Side]]) -> None:
    """Answers the process that started this one, and ends it; returns where nobody did."""
    if sys.argv[1:2] != ["--side"]:
        return
    import stand_ins

    name, options = sys.argv[2], json.loads(sys.argv[3])
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not disturb the protocol
    answer = lambda **values: print(json.dumps(values), file=channel, flush=True)
    stands = stand_ins.install()
    try:
        start = time.perf_counter()
        side = sides[name](options)
        device = _device(side.framework)
        answer(seconds=time.perf_counter() - start, lanes=list(side.lanes), device=device, stand_ins=stands, versions=versions())
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] == "go":
                _forget_peak(side.framework, device)
                seconds = _timed(side, side.lanes[command["lane"]], command["count"])
                memory = _peak_memory(side.framework, device)
                side.rest()
                answer(seconds=seconds, memory=memory)
            elif command["do"] == "product":
                answer(rate=_product_rate(side.framework, side.dtype, command["size"] or PRODUCT[device["platform"]]))
            elif command["do"] == "facts":
                answer(facts=side.facts)
    except ModuleNotFoundError as error:
        answer(missing=f"{error.name}: not installed")
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        answer(out_of_memory=str(error).splitlines()[0][:200])
    os._exit(0)  # some libraries hang or crash in their farewells


def _timed(side: Side, lane: Callable[[], dict | None], count: int) -> float:
    """Seconds of one piece of work; a lane that knows better which part of its time counts says so."""
    start, said = time.perf_counter(), []
    for _ in range(count):
        said.append(lane())
    side.finish()
    elapsed = time.perf_counter() - start
    return (sum(one["seconds"] for one in said) if said[0] else elapsed) / count


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(w in str(error) for w in ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory"))


def _device(framework: str) -> dict:
    """The device that a framework takes by itself."""
    if framework == "jax":
        import jax

        device = jax.devices()[0]
        return {"platform": device.platform, "kind": device.device_kind}
    if framework == "torch":
        import torch

        if torch.cuda.is_available():
            return {"platform": "gpu", "kind": torch.cuda.get_device_name()}
    return {"platform": "cpu", "kind": "cpu"}


def _forget_peak(framework: str, device: dict) -> None:
    """Begins to look for the peak anew, where that can be done: not with JAX's allocator on a GPU."""
    if device["platform"] == "cpu":
        try:
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass
    elif framework == "torch":
        import torch

        torch.cuda.reset_peak_memory_stats()


def _peak_memory(framework: str, device: dict) -> int:
    """Bytes: of the process on a CPU, of the allocator elsewhere."""
    if device["platform"] == "cpu":
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    if framework == "jax":
        import jax

        return int((jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0))
    import torch

    return int(torch.cuda.max_memory_allocated())


def _product_rate(framework: str, dtype: str, size: int) -> float:
    """FLOPs a second of a plain product of two square matrices of random numbers; 0 where there is no framework."""
    if framework == "jax":
        import jax
        import jax.numpy as jnp

        a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.dtype(dtype)) for i in (0, 1))
        product, wait = jax.jit(lambda a, b: a @ b), jax.block_until_ready
    elif framework == "torch":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        product, wait = torch.matmul, lambda c: torch.cuda.synchronize() if device == "cuda" else None
    else:
        return 0.0
    wait(product(a, b))
    count, best = max(1, int(2e13 / (2 * size**3))) if _device(framework)["platform"] != "cpu" else 1, math.inf
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(count):
            c = product(a, b)
        wait(c)
        best = min(best, (time.perf_counter() - start) / count)
    return 2 * size**3 / best


class _Child:
    """A side's process."""

    def __init__(self, script: str, name: str, options: dict, environment: dict[str, str]):
        self.name, self.errors = name, tempfile.TemporaryFile("w+")
        python = os.environ.get("OUR_PYTHON", sys.executable) if name == "ours" else sys.executable
        command = [python, "-W", "ignore", script, "--side", name, json.dumps(options)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=os.environ | environment
        )

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        found = json.loads(line) if line else {"failed": self._last_words()}
        if "out_of_memory" in found:
            raise OutOfMemory(f"{self.name}: {found['out_of_memory']}")
        return found

    def ask(self, **command: Any) -> dict:
        try:
            print(json.dumps(command), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # the answer says why
        return self.answer()

    def _last_words(self) -> str:
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        sys.stderr.write("\n".join(lines[-20:]) + "\n")
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
        return (errors or lines)[-1][:300] if lines else f"ended with status {self.process.wait()}"

    def cpu_seconds(self) -> float:
        """Processor time so far, of all threads."""
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close(), self.errors.close()


def take_turns(
    script: str,
    sides: Sequence[str],
    options: dict,
    record: Record,
    rounds: int,
    turn_seconds: float = 1.0,
    product: int = 0,
    environments: dict[str, dict[str, str]] | None = None,
    after: Callable[[Record], None] = lambda record: None,
    complete: Callable[[Record], None] = lambda record: None,
    last_facts: bool = False,
) -> Record:
    """Measures the sides of a script, and fills their part of the record.

    Args:
      script: its file.
      options: what every side is given.
      turn_seconds: a turn is as many pieces of work as take the fastest lane so long, the same for all.
      product: rows of the plain product's matrices; 0: as PRODUCT says; -1: none is measured.
      environments: variables, by the side.
      after: called with the record after every round.
      complete: called once the sides' facts are there, before the first round; where it ends the program, nothing was written.
      last_facts: ask for the facts again in the end.

    Raises:
      OutOfMemory: a side said so, or could not start for it.
    """
    children: list[_Child] = []
    together = len(os.sched_getaffinity(0)) >= 4 * len(sides)
    record |= {"sides": {}, "lanes": {}, "missing": {}, "rounds": 0}
    try:
        started = {}
        for name in sides:
            child = _Child(script, name, options, (environments or {}).get(name, {}))
            children.append(child)
            started[name] = None if together else child.answer()
        for child in list(children):
            found = started[child.name] or child.answer()
            if "lanes" not in found:
                record["missing"][child.name] = found.get("missing") or found["failed"]
                children.remove(child)
                child.end()
                continue
            about = {"device": found["device"], "stand_ins": found["stand_ins"]}
            record["sides"][child.name] = {"preparation_seconds": found["seconds"]} | about
            if child.name == "ours" and "OUR_PYTHON" in os.environ:
                theirs, mine = record["versions"]["python"], found["versions"]["python"]
                record["versions"] |= {name: value for name, value in found["versions"].items() if value} | {"torch's python": theirs}
                record["command"] = f"OUR_PYTHON=python{mine.rpartition('.')[0]} {record['command']}"
            for lane in found["lanes"]:
                record["lanes"][lane_name(child.name, lane)] = {"side": child.name, "lane": lane, "seconds": [], "memory": []}
        by_name = {child.name: child for child in children}
        fastest = math.inf
        for name, lane in list(record["lanes"].items()):
            child = by_name[lane["side"]]
            tries = [child.ask(do="go", lane=lane["lane"], count=1) for _ in range(2)]  # the first may compile
            if "seconds" not in tries[-1]:
                record["missing"][name] = tries[-1].get("failed") or tries[-1].get("missing")
                del record["lanes"][name]
                continue
            lane["first_seconds"] = tries[0]["seconds"]
            fastest = min(fastest, tries[1]["seconds"])
        if not record["lanes"]:
            sys.exit(f"error: no side can be measured: {record['missing']}")
        count = 1 if turn_seconds <= 0 else max(1, math.ceil(turn_seconds / fastest))
        record["count"] = count
        for name, side in record["sides"].items():
            side["facts"] = by_name[name].ask(do="facts").get("facts", {})
        complete(record)
        for number in range(rounds):
            for name, lane in record["lanes"].items():
                _turn(by_name, lane, count, record["sides"])
            if number == 0 and product >= 0:
                for name, side in record["sides"].items():
                    side["product_rate"] = by_name[name].ask(do="product", size=product).get("rate", 0.0)
            record["rounds"] = number + 1
            summarize(record)
            after(record)
        for name, side in record["sides"].items() if last_facts else ():
            side["facts"] = by_name[name].ask(do="facts")["facts"]
    finally:
        for child in children:
            child.end()
    return record


def _turn(by_name: dict[str, _Child], lane: Record, count: int, sides: Record) -> None:
    time.sleep(SETTLE)
    child, others = by_name[lane["side"]], [c for c in by_name.values() if c.name != lane["side"]]
    before, start = [c.cpu_seconds() for c in others], time.perf_counter()
    found = child.ask(do="go", lane=lane["lane"], count=count)
    elapsed = time.perf_counter() - start
    if "seconds" not in found:
        raise RuntimeError(f"{child.name} ended in the middle: {found.get('failed')}")
    lane["seconds"].append(found["seconds"])
    lane["memory"].append(found["memory"])
    for other, was in zip(others, before, strict=True):
        idle = (other.cpu_seconds() - was) / elapsed
        sides[other.name]["idle_share"] = max(idle, sides[other.name].get("idle_share", 0.0))
