"""What a benchmark writes down: the machine, versions and commit, every raw number, and what follows from them."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "torch", "open_clip_torch")

Record = dict[str, Any]


def lane_name(side: str, lane: str) -> str:
    """"ours", or "ours, real captions" where a side does several things."""
    return f"{side}, {lane}" if lane else side


def summarize(record: Record) -> None:
    """Medians, rates and ratios, from the raw seconds.

    A lane may have `items` and `flops`, of one piece of work.  A ratio says how many times as fast the first of a pair is, by
    medians, and its range over the rounds.
    """
    for lane in record["lanes"].values():
        items, flops = (record.get(what, {}).get(lane["lane"]) for what in ("items", "flops"))
        median = statistics.median(lane["seconds"])
        lane |= {"median": median, "least": min(lane["seconds"]), "most": max(lane["seconds"]), "peak_memory": max(lane["memory"])}
        side = record["sides"][lane["side"]]
        lane["items_per_second"] = items / median if items else None
        lane["flops_per_second"] = flops / median if flops else None
        rate = side.get("product_rate")
        lane["share_of_product"] = flops / median / rate if flops and rate else None
    lanes, ratios = record["lanes"], {}
    for pair in record.get("pairs", ()):
        if all(name in lanes for name in pair):
            ours, peer = (lanes[name]["seconds"] for name in pair)
            each = [b / a for a, b in zip(ours, peer)]
            ratio = lanes[pair[1]]["median"] / lanes[pair[0]]["median"]
            ratios[" : ".join(pair)] = {"ratio": ratio, "least": min(each), "most": max(each)}
    record["ratios"] = ratios


def new_record(benchmark: str, variant: str, **about: Any) -> Record:
    """What every record begins with.  `variant` tells apart the records of a benchmark, and is part of the file's name."""
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")  # of the suite, one by one
    return {
        "benchmark": benchmark,
        "variant": variant,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD") or os.environ.get("COMMIT", "unknown"),
        "dirty": None if changed is None else bool(changed),
        "command": " ".join(["python", f"benchmarks/{pathlib.Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "machine": machine(),
        "versions": versions(),
        **about,
    }


def machine() -> Record:
    """The processor, what of it this process may use, and the memory; a GPU is named by the sides."""
    lines = dict(_pairs("/proc/cpuinfo")), dict(_pairs("/proc/meminfo"))
    flags = lines[0].get("flags", "").split()
    return {
        "cpu": lines[0].get("model name", platform.processor() or platform.machine()),
        "vectors": next((name for name in ("amx_bf16", "avx512f", "avx2") if name in flags), ""),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": int(lines[1].get("MemTotal", "0").split()[0]) * 1024,
        "system": platform.system(),
    }


def versions() -> dict[str, str | None]:
    """Of this Python and its libraries."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def version(library: str) -> str | None:
    """Of an installed library, without importing it; None if it is not there."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def write(record: Record, folder: pathlib.Path | str = "") -> pathlib.Path:
    """Writes NAME.json, whole or not at all."""
    folder = pathlib.Path(folder or RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{record['benchmark']}-{record['variant']}.json".replace("/", "")
    beside = file.with_suffix(".new")
    beside.write_text(json.dumps(record, indent=1) + "\n")
    beside.replace(file)
    return file


def say(record: Record) -> None:
    """The record for the one who waits."""
    print(f"{record['benchmark']} {record['variant']}: medians of {record['rounds']} rounds of {record.get('count', 1)}")
    for name, lane in record["lanes"].items():
        cells = [f"{lane['median'] * 1e3:12,.2f} ms ({lane['least'] * 1e3:,.2f} to {lane['most'] * 1e3:,.2f})"]
        if lane["items_per_second"]:
            cells.append(f"{lane['items_per_second']:,.1f}/s")
        if lane["flops_per_second"]:
            cells.append(f"{lane['flops_per_second'] / 1e9:,.1f} GFLOP/s")
        if lane["share_of_product"]:
            cells.append(f"{lane['share_of_product']:.0%} of a plain product")
        print(f"  {name:30} {', '.join(cells)}, peak {lane['peak_memory'] / 2**20:,.0f} MiB")
    for pair, ratio in record["ratios"].items():
        print(f"  {pair}: {ratio['ratio']:.2f} times as fast ({ratio['least']:.2f} to {ratio['most']:.2f})")
    for what, reason in record["missing"].items():
        print(f"  left out: {what}, {reason}")
    sys.stdout.flush()


def _pairs(file: str) -> list[tuple[str, str]]:
    path = pathlib.Path(file)
    lines = path.read_text().splitlines() if path.exists() else []
    return [(k.strip(), v.strip()) for k, colon, v in (line.partition(":") for line in lines) if colon]


def _git(*arguments: str) -> str | None:
    try:
        found = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None
