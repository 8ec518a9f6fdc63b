"""The compiled programs that a trace holds: of what kind each instruction is, and where in the source it comes from.

Sources of the fields' numbers: openxla/xla `third_party/tsl/tsl/profiler/protobuf/xplane.proto`, `xla/service/hlo.proto`,
`xla/xla_data.proto`.
"""

import dataclasses
import linecache
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

PRODUCTS, ATTENTION, ELEMENTWISE = "matrix products, convolutions", "attention, without its projections", "elementwise"
REDUCTIONS, COLLECTIVES, COPIES = "reductions", "collectives", "copies and transfers"
CUSTOM, OTHER = "custom calls", "other"
OPTIMIZER = "optimizer, and what else"
KINDS = (PRODUCTS, ATTENTION, ELEMENTWISE, REDUCTIONS, COLLECTIVES, COPIES, CUSTOM, OTHER)

# Opcodes of HLO.  What is in none of these sets works on elements, one by one.
CONTROL = {"while", "conditional", "call"}  # what they call is measured
ENCLOSING = {"fusion", "call", "async-start", "async-update", "async-done"}  # are of the kind of what is in them
KIND_OF = (  # the first that is there counts
    (PRODUCTS, {"dot", "convolution", "ragged-dot"}),
    (COLLECTIVES, {"all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "collective-broadcast"}),
    (OTHER, {"gather", "scatter", "sort", "select-and-scatter", "rng", "rng-bit-generator", "fft", "topk", "infeed", "outfeed"}),
    (REDUCTIONS, {"reduce", "reduce-window"}),
)
# A fusion of these alone moves elements.
MOVING = {"copy", "transpose", "reshape", "bitcast", "broadcast", "iota", "slice", "dynamic-slice", "dynamic-update-slice"}
MOVING |= {"concatenate", "pad", "reverse", "parameter", "constant", "tuple", "get-tuple-element", "partition-id", "replica-id"}
# Names of kernels and of custom calls.
KERNELS = (
    (ATTENTION, "fmha|flash|sdpa|attention"),
    (COLLECTIVES, "nccl|rccl|all.?gather|all.?reduce|reduce.?scatter|permute"),
    (PRODUCTS, "gemm|matmul|nvjet|cutlass|xmma|conv|dot"),
    (COPIES, "memcpy|memset|copy|transpose"),
    (REDUCTIONS, "reduce"),
    (ELEMENTWISE, "fusion"),
)


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction of a compiled program, or a kernel that belongs to none."""

    name: str
    kind: str
    part: str  # of the step: a tower, forward or backward
    place: str  # the modules around it, and the line


@dataclasses.dataclass(frozen=True)
class _Frame:
    file: str
    function: str
    line: int


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where in the source instructions come from."""

    tower: str  # or the loss, or neither
    place: str
    attends: bool  # in the products and the softmax between query, key and value


class Programs:
    """The compiled programs of a trace, each read when it is first asked for."""

    def __init__(self, trace: bytes):
        """From the bytes of an `xplane.pb`."""
        self.modules: dict[int, bytes] = {}
        self.read: dict[int, dict[str, Operation | None]] = {}
        for plane in (plane for number, plane in _fields(trace) if number == 1):
            if next((name for number, name in _fields(plane) if number == 2), b"") != b"/host:metadata":
                continue
            for entry in (dict(_fields(value))[2] for number, value in _fields(plane) if number == 4):
                name = dict(_fields(entry))[2].decode()  # such as jit_train_step(2)
                for proto in (dict(_fields(stat)).get(6) for number, stat in _fields(entry) if number == 5):
                    if proto:
                        self.modules[int(name.rpartition("(")[2].rstrip(")"))] = dict(_fields(proto))[1]

    def operation(self, name: str, stats: dict[str, Any]) -> Operation | None:
        """What an event is, by its instruction or by its name alone; None if it only encloses others."""
        called = name.split(" = ")[0].lstrip("%")  # on a TPU the name is the whole instruction
        instruction, program = stats.get("hlo_op", called), stats.get("program_id")
        belongs = "hlo_op" in stats or name != called
        for number in [program] if program in self.modules else self.modules if belongs else ():
            if number not in self.read:
                self.read[number] = _instructions(self.modules[number])
            found = self.read[number]
            # A kernel with a name of its own is work, also where its instruction only encloses others.
            if instruction in found and (found[instruction] or instruction == called):
                return found[instruction]
        return Operation(name, _kind_of_kernel(name), "outside of programs", "")


def _instructions(module: bytes) -> dict[str, Operation | None]:
    fields = list(_fields(module))
    program = dict(fields)[1].decode()
    sources = _sources(next((value for number, value in fields if number == 17), b""))
    computations = {}
    for number, value in fields:
        if number == 3:
            parts = list(_fields(value))
            computations[dict(parts)[5]] = [list(_fields(part)) for n, part in parts if n == 2]
    return {
        dict(instruction)[1].decode(): _read_instruction(instruction, computations, sources, program)
        for instructions in computations.values()
        for instruction in instructions
    }


def _read_instruction(instruction: list, computations: dict, sources: dict[int, _Source], program: str) -> Operation | None:
    fields = dict(instruction)
    metadata = dict(_fields(fields.get(7, b"")))
    path, source = metadata.get(2, b"").decode(), sources.get(metadata.get(15, 0))
    opcode = fields[2].decode()
    if opcode in CONTROL:
        return None
    kind = _kind(_opcodes(instruction, computations), fields.get(28, b"").decode())
    if kind not in (COLLECTIVES, COPIES) and source and source.attends:
        kind = ATTENTION
    part = _part(path, source) if "train_step" in program else "other programs"
    return Operation(fields[1].decode(), kind, part, source.place if source else "")


def _opcodes(instruction: list, computations: dict) -> set[str]:
    fields = dict(instruction)
    opcode = fields[2].decode()
    if opcode not in ENCLOSING:
        return {opcode.removesuffix("-start").removesuffix("-done")}
    called = _numbers(value for number, value in instruction if number == 38)
    return {opcode for number in called for inner in computations[number] for opcode in _opcodes(inner, computations)}


def _kind(opcodes: set[str], target: str) -> str:
    if "custom-call" in opcodes:
        return _kind_of_kernel(target, CUSTOM)
    for kind, members in KIND_OF:
        if opcodes & members:
            return kind
    return COPIES if opcodes <= MOVING else ELEMENTWISE


def _sources(index: bytes) -> dict[int, _Source]:
    """The sources of a program, by the numbers of their stack frames."""
    fields = list(_fields(index))
    files, functions = ([value.decode() for number, value in fields if number == n] for n in (1, 2))
    places = [dict(_fields(value)) for number, value in fields if number == 3]
    places = [_Frame(files[p[1] - 1], functions[p[2] - 1], p.get(3, 0)) for p in places]
    frames = [dict(_fields(value)) for number, value in fields if number == 4]
    found = {}
    for number in range(1, len(frames) + 1):
        stack, at = [], number
        while at:
            stack.append(places[frames[at - 1][1] - 1])
            at = frames[at - 1].get(2, 0)
        found[number] = _source(stack[::-1])
    return found


def _source(stack: list[_Frame]) -> _Source:
    called = {frame.function.rpartition(".")[2] for frame in stack}
    tower = "image tower" if "encode_image" in called else "text tower" if "encode_text" in called else ""
    if not tower and any(frame.file.endswith("losses.py") for frame in stack):
        tower = "loss"
    attends = any("dot_product_attention" in linecache.getline(frame.file, frame.line) for frame in stack)
    return _Source(tower, _place(stack), attends)


def _place(stack: list[_Frame]) -> str:
    """The classes around it and the last line of this package, as in BasicBlock/ConvolutionNorm convolution.py:104."""
    own = [frame for frame in stack if f"{os.sep}clip_jax{os.sep}" in frame.file] or stack
    modules = [name for frame in own if (name := frame.function.split(".")[0])[:1].isupper() and name != "CLIP"]
    modules = [name for i, name in enumerate(modules) if modules[i - 1 : i] != [name]]
    while modules.count(modules[0]) > 1 if modules else False:  # a function that is shared has the stack of its first call too
        modules = modules[modules.index(modules[0], 1) :]
    return f"{'/'.join(modules)} {os.path.basename(own[-1].file)}:{own[-1].line}".strip()


def _part(path: str, source: _Source | None) -> str:
    if source is None:
        return "not told by the compiler"
    if not source.tower:
        return OPTIMIZER
    return f"{source.tower}, {'again, for remat' if 'rematted' in path else 'backward' if 'transpose(' in path else 'forward'}"


def _kind_of_kernel(name: str, otherwise: str = OTHER) -> str:
    return next((kind for kind, pattern in KERNELS if re.search(pattern, name.lower())), otherwise)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message of Protocol Buffers, by number."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        if tag & 7 == 0:
            value, at = _varint(data, at)
        else:
            size, at = _varint(data, at) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], at)
            value, at = data[at : at + size], at + size
        yield tag >> 3, value


def _numbers(values: Iterable[int | bytes]) -> list[int]:
    """A repeated number, packed or not."""
    found = []
    for value in values:
        at = 0
        while isinstance(value, bytes) and at < len(value):
            number, at = _varint(value, at)
            found.append(number)
        if isinstance(value, int):
            found.append(value)
    return found
