"""What a compiled program sends from device to device, read from its HLO."""

import math
import re

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
TYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}


def collective_bytes(hlo: str) -> dict[str, float]:
    """Bytes that one device sends in a compiled program, by the kind of collective, loops counted as often as they run."""
    bodies, entry = _computations(hlo)
    found = dict.fromkeys(COLLECTIVES, 0.0)

    def walk(name: str, times: float) -> None:
        for line in bodies.get(name, ()):
            for kind in COLLECTIVES:
                if re.search(rf" {kind}(-start)?\(", line):
                    found[kind] += times * _sent_bytes(line, kind)
            if loop := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                walk(loop[2], times * _trips(line, bodies.get(loop[1], ())))
            elif called := re.search(r" (?:call|conditional|async-start)\(.*(?:to_apply|calls|branch_computations)=\{?%?([\w.\-]+)", line):
                walk(called[1], times)

    walk(entry, 1.0)
    return {kind: size for kind, size in found.items() if size}


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation of a module, by its name, and the name of the first to run."""
    bodies, entry, current = {}, "", []
    for line in hlo.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith(" "):
            current.append(line)
    return bodies, entry


def _trips(line: str, condition: list[str]) -> int:
    """How often a loop runs: as the compiler notes, or the constant with which its counter is compared."""
    if noted := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(noted[1])
    return max((int(n) for line in condition for n in re.findall(r"constant\((\d+)\)", line)), default=1)


def _sent_bytes(line: str, kind: str) -> float:
    result = line.split(f" {kind}")[0].split(" = ", 1)[1]
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n) * TYPE_BYTES.get(type_, 4)
        for type_, dims in re.findall(r"(pred|[a-z]+\d+)\[([\d,]*)\]", result)
    ]
    # A started collective is a tuple of what goes in and what comes out.
    size = max(sizes, default=0) if f"{kind}-start(" in line else sum(sizes)
    n = _group_size(line)
    # A ring sends all but its own part; what is reduced everywhere goes around twice.
    return float(size) * {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}.get(kind, (n - 1) / n)


def _group_size(line: str) -> int:
    """Devices that take part together, in any of the three ways in which HLO writes it."""
    if table := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(table[1])
    if members := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(members[1].split(","))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    return 2
