"""Reads a compiled program's text (HLO): flops, collectives, and what a turn of a decoding loop reads.

XLA's own cost analysis counts the body of a loop once; here a loop counts as often as it turns. All figures are of one
device's program, the partitioned one.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_BYTES = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4}
_BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
_SHAPE = re.compile(r"(?<![\w%])(pred|bf16|f8\w*|[sufc]\d+)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
# What runs on another core of the chip says so behind its end.
_END = re.compile(r'^\}(?:, execution_thread="[^"]*")?$')
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?[\w.\-]+ = ")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")

Shape = tuple[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: result `shapes` (several of a tuple), `opcode`, `operands` by name and the `attributes` as text."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    root: bool

    @property
    def op_name(self) -> str:
        """Where the instruction comes from in the traced program, such as "jit(step)/while/body/dot_general"."""
        return self.find(r'op_name="([^"]*)"') or ""

    @property
    def index(self) -> int:
        """The element that a get-tuple-element takes."""
        return int(self.attribute("index"))

    def find(self, pattern: str) -> str | None:
        """The first group of a pattern in the attributes; None where it does not match."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else None

    def attribute(self, name: str) -> str:
        """The value of an attribute. Raises ValueError where there is none."""
        value = self.find(rf"\b{name}=%?([\w.\-]+)")
        if value is None:
            raise ValueError(f"{self.opcode} {self.name} has no attribute {name}")
        return value

    def called(self) -> list[str]:
        """Names of the computations that it runs."""
        names = _CALLED.findall(self.attributes)
        for group in _BRANCHES.findall(self.attributes):
            names += [name.strip().lstrip("%") for name in group.split(",")]
        return names


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of one device's program.

    size: bytes of its result, a time. times: how often a run of the program does it. loops: depth of loops around it.
    in_open_loop: inside a loop whose number of turns the program decides as it runs. of_invariant: what it moves is the
    same in every turn of the innermost loop with an open end around it, weights for example. loop: the body of the
    outermost loop with an open end around it, empty where there is none.
    """

    kind: str
    size: int
    times: int
    loops: int
    in_open_loop: bool
    of_invariant: bool
    op_name: str
    loop: str = ""


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a turn of a loop with an open end, outermost of its kind, reads for matmuls and has moved; in bytes.

    weights: operands that are the same in every turn and no attention's. cache: keys and values that are attended to.
    moved: results of collectives, of which there are `collectives`. loop: its body.
    """

    loop: str
    weights: float
    cache: float
    moved: float
    collectives: float


@dataclasses.dataclass(frozen=True)
class Analysis:
    """flops: of one run of one device's program, with `open_turns` turns of loops that end by themselves.

    turns: of each loop with an open end, in the order of the program.
    """

    flops: float
    collectives: tuple[Collective, ...]
    turns: tuple[Turn, ...] = ()


class Program:
    """The computations of an HLO module's text."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] | None = None
        for line in _joined_lines(text):
            if header := _HEADER.match(line):
                current = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
            elif _END.match(line):
                current = None
            elif current is not None and " = " in line:
                instruction = _parse(line)
                current[instruction.name] = instruction
        if not self.entry:
            raise ValueError("the text holds no ENTRY computation; it is no HLO module")

    def analyse(self, open_turns: int = 1, inner_turns: int = 1) -> Analysis:
        """Flops, collectives and reads; loops that end by themselves count `open_turns` turns.

        Of several in one computation, as the stages of a rollout are, the first takes all turns and the others none: so
        it is where nothing ends early. A loop of that kind inside another counts `inner_turns` turns.
        """
        walk = _Walk(self, open_turns, inner_turns)
        flops, *_ = walk.costs(self.entry, {})
        collectives = tuple(walk.collectives.values())
        turns = []
        for loop, (count, (_, weights, cache)) in walk.open_loops.items():
            inside = [moved for moved in collectives if moved.loop == loop]
            moved = sum(moved.size * moved.times for moved in inside) / count
            turns.append(Turn(loop, weights / count, cache / count, moved, sum(x.times for x in inside) / count))
        return Analysis(float(flops), collectives, tuple(turns))

    def turns(self, loop: Instruction, computation: Computation) -> int | None:
        """How often a `while` of `computation` turns, by its counter; None where something else may end it."""
        if known := loop.find(r'known_trip_count[^}]*?"n":"?(\d+)'):
            return int(known)
        condition = self.computations[loop.attribute("condition")]
        compare = self.root(loop.attribute("condition"))
        if compare.opcode == "fusion":  # The comparison alone, or it is no counter's.
            compare = dataclasses.replace(self.root(compare.called()[0]), operands=compare.operands)
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            return None
        counters = [condition[name] for name in compare.operands if condition[name].opcode == "get-tuple-element"]
        bounds = [value for name in compare.operands if (value := _constant(condition, name)) is not None]
        if len(counters) != 1 or len(bounds) != 1:
            return None
        index, state = counters[0].index, computation[loop.operands[0]]
        # A first value that is not written in `computation` counts as 0.
        first = (_constant(computation, state.operands[index]) or 0) if state.opcode == "tuple" else 0
        return -(-(bounds[0] - first) // self._step(loop.attribute("body"), index))

    def _step(self, body: str, index: int) -> int:
        """By how much a turn raises element `index` of the loop's state."""
        computation, root = self.computations[body], self.root(body)
        name, step = root.operands[index], 0
        while (instruction := computation[name]).opcode in ("copy", "add", "fusion"):
            if instruction.opcode == "copy":
                name = instruction.operands[0]
                continue
            add, scope = instruction, computation
            if instruction.opcode == "fusion":
                (called,) = instruction.called()[:1]
                add, scope = self.root(called), self.computations[called]
            amounts = [_constant(scope, operand) for operand in add.operands]
            step += next((amount for amount in amounts if amount is not None), 0)
            operands = [name for name in instruction.operands if name in computation]
            name = next((name for name in operands if _constant(computation, name) is None), root.name)
        return step or 1

    def root(self, name: str) -> Instruction:
        """The instruction whose result is that of a computation."""
        return next(instruction for instruction in self.computations[name].values() if instruction.root)

    def flow(self, name: str, parameters: Mapping[int, Any]) -> dict[str, Any]:
        """What is known of each instruction's value, where `parameters` says it of the parameters by number.

        False: it may vary. True: it follows from invariant values alone; which part of one is taken may vary. Any other
        object is one value, handed on as it came. The elements of a tuple are known each.
        """
        computation, known = self.computations[name], {}
        for key, instruction in computation.items():
            operands = [known.get(operand, False) for operand in instruction.operands]
            match instruction.opcode:
                case "parameter":
                    value = parameters.get(int(instruction.arguments), False)
                case "constant" | "iota":
                    value = True
                case "copy" | "opt-barrier":
                    value = operands[0]
                case "tuple":
                    value = tuple(operands)
                case "get-tuple-element":
                    elements = operands[0] if isinstance(operands[0], tuple) else ()
                    value = elements[instruction.index] if instruction.index < len(elements) else False
                case "while":
                    state = operands[0] if isinstance(operands[0], tuple) else ()
                    same = self.unchanged(instruction.attribute("body"))
                    value = tuple(before if is_same else False for before, is_same in zip(state, same, strict=False))
                case "conditional":
                    value = False
                case _:
                    # What follows from scalars alone (a counter, say) is no weight.
                    arrays = [
                        value
                        for operand, value in zip(instruction.operands, operands, strict=True)
                        if operand not in computation or any(dims for _, dims in computation[operand].shapes)
                    ]
                    value = bool(arrays) and all(map(_is_invariant, arrays))
            known[key] = value
        return known

    def unchanged(self, body: str) -> tuple[bool, ...]:
        """Of each element of a loop's state, whether its body hands it on as it came; () where that is not known."""
        root = self.root(body)
        if root.opcode != "tuple":
            return ()
        state = tuple(object() for _ in root.operands)
        result = self.flow(body, {0: state})[root.name]
        return tuple(after is before for before, after in zip(state, result, strict=True))

    def invariant(self, body: str, state: Any) -> tuple[bool, ...]:
        """Of each element of a loop's `state`, whether it is invariant before the loop and after each turn.

        A weight that is passed around between devices, piece by piece, changes in every turn and is still that weight.
        """
        root = self.root(body)
        if root.opcode != "tuple" or not isinstance(state, tuple):
            return ()
        before, elements = None, tuple(map(_is_invariant, state))
        while elements != before:
            before, result = elements, self.flow(body, {0: elements})[root.name]
            elements = tuple(was and _is_invariant(now) for was, now in zip(elements, result, strict=True))
        return elements


@dataclasses.dataclass
class _Walk:
    """Goes through a program as it runs; `collectives` and `open_loops`, {body: (turns, costs)}, are those so far."""

    program: Program
    open_turns: int
    inner_turns: int
    collectives: dict[str, Collective] = dataclasses.field(default_factory=dict)
    open_loops: dict[str, tuple[int, np.ndarray]] = dataclasses.field(default_factory=dict)

    def costs(
        self, name: str, parameters: Mapping[int, Any], times: int = 1, loops: int = 0, open_loop: str = ""
    ) -> np.ndarray:
        """Flops of a computation that runs `times` times inside `loops` loops, and what its matmuls read of weights and
        of caches in a loop with an open end.

        parameters: as for `Program.flow`. open_loop: the body of the outermost loop with an open end around it.
        """
        program, costs = self.program, np.zeros(3)
        computation, known = program.computations[name], program.flow(name, parameters)
        left = self.open_turns
        for instruction in computation.values():
            opcode = instruction.opcode.removesuffix("-start")
            operands = [known.get(operand, False) for operand in instruction.operands]
            if opcode in COLLECTIVES:
                of_invariant = bool(open_loop and operands) and all(map(_is_invariant, operands))
                size, is_open = _collective_bytes(instruction), bool(open_loop)
                collective = Collective(
                    opcode, size, times, loops, is_open, of_invariant, instruction.op_name, open_loop
                )
                # The parts of one that runs beside other work are instructions of their own on the same channel.
                key = instruction.find(r"channel_id=(\d+)") or f"{name}/{instruction.name}"
                part = self.collectives.get(key, collective)
                self.collectives[key] = max(part, collective, key=lambda c: (c.of_invariant, c.size))
            elif opcode in ("dot", "convolution"):
                costs[0] += times * _matmul_flops(instruction, computation)
                if open_loop:
                    costs[1:] += times * np.array(_matmul_reads(instruction, computation, operands))
            elif opcode == "custom-call":
                costs[0] += times * _kernel_flops(instruction, computation)
            elif opcode == "while":
                turns, body = program.turns(instruction, computation), instruction.attribute("body")
                if turns is not None and open_loop:
                    state = program.invariant(body, operands[0])
                else:
                    state = program.unchanged(body)
                is_open = turns is None
                if is_open:
                    turns, left = (self.inner_turns, left) if open_loop else (left, 0)
                count = times * turns
                outermost = open_loop or (body if is_open else "")
                inside = self.costs(body, {0: state}, count, loops + 1, outermost)
                if is_open and not open_loop and count:
                    self.open_loops[body] = (count, inside)
                costs += inside
            elif opcode == "conditional":
                branches = [self.costs(branch, {}, times, loops, open_loop) for branch in instruction.called()]
                costs += np.max(branches, axis=0) if branches else 0.0
            elif opcode in ("fusion", "call", "async"):
                moved = {number: True for number, value in enumerate(operands) if _is_invariant(value)}
                for called in instruction.called():
                    costs += self.costs(called, moved, times, loops, open_loop)
        return costs


def _is_invariant(value: Any) -> bool:
    return value is not False and not isinstance(value, tuple)


def _joined_lines(text: str) -> list[str]:
    """Lines with one instruction each: what a kernel says of itself may hold line breaks."""
    lines: list[str] = []
    for line in text.splitlines():
        if lines and _INSTRUCTION.match(lines[-1]) and not (_END.match(line) or _INSTRUCTION.match(line)):
            lines[-1] += f" {line}"
        else:
            lines.append(line)
    return lines


def _parse(line: str) -> Instruction:
    left, _, right = line.strip().partition(" = ")
    root = left.startswith("ROOT ")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    kind, rest = right[:end], right[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode))
    arguments = rest[len(opcode) + 1 : close]
    shapes = tuple((dtype, tuple(map(int, dims.split(","))) if dims else ()) for dtype, dims in _SHAPE.findall(kind))
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    name = left.removeprefix("ROOT ").lstrip("%")
    return Instruction(name, shapes, opcode.strip(), operands, arguments, rest[close + 1 :], root)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if not depth:
            return index
    raise ValueError(f"unbalanced parentheses: {text[:200]}")


def _constant(computation: Computation, name: str) -> int | None:
    """The integer that an instruction holds, if it is a constant."""
    instruction = computation[name]
    while instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation[instruction.operands[0]]
    literal = re.fullmatch(r"\s*(-?\d+)\s*", instruction.arguments) if instruction.opcode == "constant" else None
    return int(literal[1]) if literal else None


def _bytes(shapes: tuple[Shape, ...]) -> int:
    return sum(math.prod(dims) * (1 if dtype.startswith("f8") else _BYTES.get(dtype, 4)) for dtype, dims in shapes)


def _collective_bytes(instruction: Instruction) -> int:
    """Bytes of a collective's result. The start of one that runs beside other work names its operands before it."""
    count = len(instruction.operands)
    if instruction.opcode.endswith("-start") and len(instruction.shapes) >= 2 * count:
        return _bytes(instruction.shapes[count : 2 * count])
    return _bytes(instruction.shapes)


def _matmul_flops(instruction: Instruction, computation: Computation) -> float:
    """2 per multiplication that is not with padding."""
    (_, output), *_ = instruction.shapes
    left, right = (computation[name].shapes[0][1] for name in instruction.operands[:2])
    if instruction.opcode == "dot":
        contracted = instruction.find(r"lhs_contracting_dims=\{([\d,]+)\}")
        axes = [int(axis) for axis in contracted.split(",")] if contracted else []
        return 2.0 * math.prod(output) * math.prod(left[axis] for axis in axes)

    of_left, of_right, of_output = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    flops = 2.0 * right[of_right.index("i")] * output[of_output.index("b")] * output[of_output.index("f")]
    flops /= int(instruction.find(r"batch_group_count=(\d+)") or 1)
    window = dict(part.split("=") for part in (instruction.find(r"window=\{([^}]*)\}") or "").split())
    sizes = [int(size) for size in window.get("size", "").split("x") if size]

    def of(name: str, default: int, axis: int) -> int:
        """What the window says of an axis; of its padding the lower one."""
        return int(window[name].split("x")[axis].split("_")[0]) if name in window else default

    for axis, size in enumerate(sizes):
        # Pairs (position of the output, of the window) that meet an element, not padding or a hole between two.
        outputs, holes = output[of_output.index(str(axis))], of("lhs_dilate", 1, axis)
        positions = np.arange(outputs)[:, None] * of("stride", 1, axis) - of("pad", 0, axis)
        positions = positions + np.arange(size) * of("rhs_dilate", 1, axis)
        span = (left[of_left.index(str(axis))] - 1) * holes + 1
        flops *= int(((positions >= 0) & (positions < span) & (positions % holes == 0)).sum())
    return flops


def _matmul_reads(instruction: Instruction, computation: Computation, known: Sequence[Any]) -> tuple[float, float]:
    """Bytes of (weights, caches) among the operands of a matmul; `known`: what `Program.flow` says of each.

    Activations count as neither: a step has few of them, and makes them itself. Attention is told by its scope, which
    is within no layer's own.
    """
    sizes = [_bytes(computation[name].shapes) for name in instruction.operands[:2]]
    same = [size for size, value in zip(sizes, known, strict=False) if _is_invariant(value)]
    if "/attention/" in instruction.op_name and "/Block." not in instruction.op_name:
        return 0.0, max(same or sizes)
    return sum(same), 0.0


def _kernel_flops(instruction: Instruction, computation: Computation) -> float:
    """Flops of a hand-written kernel: what it says of itself, or splash attention's matmuls over whole squares."""
    if stated := instruction.find(r'"flops":"?(\d+)'):
        return float(stated)
    kernel = re.search(r"splash_m[hq]a_(fwd|dkv|dq)", instruction.name)
    if not kernel:
        return 0.0
    shapes = [computation[name].shapes[0] for name in instruction.operands]
    q, k, *_ = (dims for dtype, dims in shapes if dtype in ("bf16", "f32", "f16") and len(dims) >= 3)
    matmuls = {"fwd": 2, "dkv": 4, "dq": 3}[kernel[1]]
    return 2.0 * matmuls * math.prod(q) * k[-2]
