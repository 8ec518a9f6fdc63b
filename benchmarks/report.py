"""Makes docs/performance.md from benchmarks/results/*.json and benchmarks/notes.md.

    python benchmarks/report.py

Every number in a table is from a file there; what is said about them, what was tried, and why a goal is missed is in notes.md.
"""

import json
import pathlib
import statistics
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS, NOTES = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "notes.md"
TITLES = {
    "train_step": "The train step",
    "encode": "Embedding",
    "classifier": "Building a classifier",
    "loss": "The loss",
    "attention": "Attention",
    "data": "The input pipeline",
    "startup": "Before the first step",
    "checkpoint": "Saving a checkpoint",
}
HEAD = """# Performance

Made by `python benchmarks/report.py` from `benchmarks/results/*.json`, which hold every raw number; each table is one file.

The sides of a benchmark are processes of one tree that take turns, A B C A B C; times are medians over the rounds, with the least and the
most.  "Plain product" is the share of the FLOPs a second that one large product of two square matrices reaches in the same framework and
type on that machine.  FLOPs are model FLOPs: what is saved exactly is not credited, and captions count with their own lengths.  Memory is
the largest that the process had on a CPU, and that the allocator gave on a GPU.
"""
COLUMNS = "| | median, ms | least to most | a second | GFLOP/s | plain product | peak memory, MiB |\n|---|---|---|---|---|---|---|"


def page(records: list[dict[str, Any]], notes: str) -> str:
    """The whole text."""
    parts = [HEAD]
    if notes:
        parts.append(notes.strip() + "\n")
    for benchmark, title in TITLES.items():
        found = sorted((r for r in records if r["benchmark"] == benchmark), key=lambda r: r["variant"])
        if found:
            parts += [f"## {title}\n", *map(section, found)]
    return "\n".join(parts)


def section(record: dict[str, Any]) -> str:
    """One record: its table, its ratios, and what it was measured on."""
    machine, versions = record["machine"], record["versions"]
    kinds = {s["device"]["kind"] for s in record["sides"].values() if s.get("device")} - {"cpu"}
    where = " and ".join(sorted(kinds)) or " ".join(filter(None, (machine["cpu"], machine["vectors"])))
    libraries = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    facts = [f"batch {record['batch']:,}" if record.get("batch") else "", record.get("dtype") or "", f"{record['rounds']} rounds"]
    lines = [f"### {record['variant']}: {', '.join(filter(None, facts))}\n", COLUMNS]
    lines += [row(name, lane, record["unit"]) for name, lane in record["lanes"].items()]
    lines.append("")
    for pair, ratio in record["ratios"].items():
        first, _, second = pair.partition(" : ")
        lines.append(f"- {first}: **{ratio['ratio']:.2f} times** the speed of {second} ({ratio['least']:.2f} to {ratio['most']:.2f})")
    lines += [f"- Left out: {what}, {why}" for what, why in record["missing"].items()]
    captions = next((s["facts"]["captions"] for s in record["sides"].values() if "captions" in s.get("facts", {})), None)
    if captions:
        lines.append(f"- Real captions: {captions['law']}; mean {captions['mean_tokens']:.1f}, longest {captions['longest']}")
    for side, about in record["sides"].items():
        for fact, seconds in about.get("facts", {}).items():
            if fact.startswith("until_") and seconds:
                median, said = statistics.median(seconds), fact.replace("_", " ")
                lines.append(f"- {side}: {said} {median:.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")
                if fact == "until_next_step":  # which is what training waits for
                    others = {name: lane["median"] / median for name, lane in record["lanes"].items() if lane["side"] != side}
                    lines += [f"- {side}, {said}: **{ratio:.2f} times** the speed of {name}" for name, ratio in others.items()]
    lines += [f"- {agreed(record['agreement'])}"] if record.get("agreement") else []
    lines += [f"- {note[0].upper()}{note[1:]}" for note in record.get("notes", ())]
    dirty = " with changes" if record["dirty"] else ""
    lines.append(
        f"\n`{record['command']}`, {record['date'][:10]}, commit {record['commit'][:9]}{dirty}; {where}, {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB; {libraries}\n"
    )
    return "\n".join(lines)


def row(name: str, lane: dict[str, Any], unit: str) -> str:
    number = lambda value, form: "" if value is None else format(value, form)
    rate = number(lane["items_per_second"], ",.4g" if (lane["items_per_second"] or 0) < 1000 else ",.0f")
    flops = lane["flops_per_second"] and lane["flops_per_second"] / 1e9
    cells = [name, f"{lane['median'] * 1e3:,.2f}", f"{lane['least'] * 1e3:,.2f} to {lane['most'] * 1e3:,.2f}"]
    cells += [f"{rate} {unit}" if rate else "", number(flops, ",.0f"), number(lane["share_of_product"], ".0%")]
    cells.append(f"{lane['peak_memory'] / 2**20:,.0f}" if lane["peak_memory"] else "")
    return f"| {' | '.join(cells)} |"


def agreed(agreement: dict[str, Any]) -> str:
    """What the sides were found to have in common."""
    said = []
    for side, found in agreement.items():
        if isinstance(found, dict):
            values = {kind: max(v) if isinstance(v, list) else v for kind, v in found.items()}
            names = {"full": "losses of the first steps, full captions", "real": "first loss, real captions"}
            said += [f"{side}'s {names.get(kind, kind)} {value:.1e}" for kind, value in values.items()]
    return "Agreement with ours, relative: " + ("; ".join(said) or "nothing to compare with")


def made() -> str:
    """The page of what is there now."""
    records = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]
    records = [record for record in records if record.get("benchmark") in TITLES]
    return page(records, NOTES.read_text() if NOTES.exists() else "")


if __name__ == "__main__":
    PAGE.write_text(made())
    print(f"{PAGE.relative_to(ROOT)}: {len(PAGE.read_text().splitlines())} lines", file=sys.stderr)
