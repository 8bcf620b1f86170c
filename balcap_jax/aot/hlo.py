"""Reads a compiled program's text (HLO): floating-point operations, and collectives inside and outside loops.

XLA's own cost analysis counts the body of a loop once; here a loop counts as often as it turns. All figures are of one
device's program, the partitioned one.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_BYTES = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4}
_BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
_SHAPE = re.compile(r"(?<![\w%])(pred|bf16|f8\w*|[sufc]\d+)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
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
    def size(self) -> int:
        """Bytes of the result."""
        return sum(_bytes(shape) for shape in self.shapes)

    @property
    def op_name(self) -> str:
        """Where the instruction comes from in the traced program, such as "jit(step)/while/body/dot_general"."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self) -> list[str]:
        """Names of the computations that it runs."""
        names = _CALLED.findall(self.attributes)
        for group in _BRANCHES.findall(self.attributes):
            names += [name.strip().lstrip("%") for name in group.split(",")]
        return names


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of one device's program.

    size: bytes of its result, a time. times: how often a run of the program does it. loops: depth of loops around it.
    in_open_loop: inside a loop whose number of turns the program decides as it runs. of_invariant: what it moves is the
    same in every turn of the innermost loop with an open end around it, weights for example.
    """

    kind: str
    size: int
    times: int
    loops: int
    in_open_loop: bool
    of_invariant: bool
    op_name: str


@dataclasses.dataclass(frozen=True)
class Analysis:
    """flops: of one run of one device's program, with `open_turns` turns of loops that end by themselves."""

    flops: float
    collectives: tuple[Collective, ...]


class Program:
    """The computations of an HLO module's text."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] | None = None
        for line in _whole_lines(text):
            if header := _HEADER.match(line):
                current = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
            elif line == "}":
                current = None
            elif current is not None and " = " in line:
                instruction = _parse(line)
                current[instruction.name] = instruction
        if not self.entry:
            raise ValueError("the text holds no ENTRY computation; it is no HLO module")

    def analyse(self, open_turns: int = 1) -> Analysis:
        """Flops and collectives; loops that end by themselves count `open_turns` turns."""
        collectives: dict[tuple, Collective] = {}
        flops = self._walk(self.entry, 1, 0, False, frozenset(), open_turns, collectives)
        return Analysis(flops, tuple(collectives.values()))

    def turns(self, loop: Instruction, computation: Mapping[str, Instruction]) -> int | None:
        """How often a `while` of `computation` turns, by its counter; None where something else may end it."""
        found = re.search(r'known_trip_count[^}]*?"n":"?(\d+)', loop.attributes)
        if found:
            return int(found[1])
        condition, body = (self.computations[_attribute(loop, part)] for part in ("condition", "body"))
        compared = next(instruction for instruction in condition.values() if instruction.root)
        if compared.opcode == "fusion":  # The comparison alone, or it is no counter's.
            compared = dataclasses.replace(self._root(compared.called()[0]), operands=compared.operands)
        if compared.opcode != "compare" or "direction=LT" not in compared.attributes:
            return None
        counters = [condition[name] for name in compared.operands if condition[name].opcode == "get-tuple-element"]
        bounds = [_constant(condition, name) for name in compared.operands]
        bounds = [bound for bound in bounds if bound is not None]
        if len(counters) != 1 or len(bounds) != 1:
            return None
        index = int(_attribute(counters[0], "index"))
        first, step = self._first(computation, loop.operands[0], index), self._step(body, index)
        return -(-(bounds[0] - first) // step)

    def _first(self, computation: Mapping[str, Instruction], state: str, index: int) -> int:
        """What element `index` of a loop's first state holds; 0 where that is not written in `computation`."""
        made = computation[state]
        value = _constant(computation, made.operands[index]) if made.opcode == "tuple" else None
        return value or 0

    def _step(self, body: Mapping[str, Instruction], index: int) -> int:
        """By how much a turn raises element `index`."""
        root = next(instruction for instruction in body.values() if instruction.root)
        name, step = root.operands[index], 0
        while (instruction := body[name]).opcode in ("copy", "add", "fusion"):
            if instruction.opcode == "copy":
                name = instruction.operands[0]
                continue
            added, within = instruction, body
            if instruction.opcode == "fusion":
                within = self.computations[instruction.called()[0]]
                added = next(inner for inner in within.values() if inner.root)
            amounts = [_constant(within, operand) for operand in added.operands]
            step += next((amount for amount in amounts if amount is not None), 0)
            name = next(
                (name for name in instruction.operands if name in body and _constant(body, name) is None), root.name
            )
        return step or 1

    def _root(self, name: str) -> Instruction:
        return next(instruction for instruction in self.computations[name].values() if instruction.root)

    def _walk(
        self,
        name: str,
        times: int,
        loops: int,
        in_open_loop: bool,
        invariant: frozenset[int],
        open_turns: int,
        collectives: dict[tuple, Collective],
    ) -> float:
        """Flops of a computation, run `times` times; elements `invariant` of its parameter never change."""
        computation, flops = self.computations[name], 0.0
        fixed = self._fixed(computation, invariant)
        for instruction in computation.values():
            opcode = instruction.opcode.removesuffix("-start")
            if opcode in COLLECTIVES:
                channel = re.search(r"channel_id=(\d+)", instruction.attributes)
                # The parts of one that runs beside other work are instructions of their own on the same channel.
                key = (channel[1] if channel else f"{name}/{instruction.name}",)
                moved = bool(instruction.operands) and all(operand in fixed for operand in instruction.operands)
                found = Collective(
                    opcode, _moved(instruction), times, loops, in_open_loop, moved and in_open_loop, instruction.op_name
                )
                known = collectives.get(key)
                collectives[key] = max(known, found, key=lambda c: (c.of_invariant, c.size)) if known else found
            elif opcode in ("dot", "convolution"):
                flops += times * _matmul_flops(instruction, computation)
            elif opcode == "while":
                turns = self.turns(instruction, computation)
                body = _attribute(instruction, "body")
                if turns is not None and in_open_loop:
                    inside = self._kept(body, self._elements(computation, instruction.operands[0], fixed))
                else:
                    inside = self._unchanged(body)
                flops += self._walk(
                    body,
                    times * (open_turns if turns is None else turns),
                    loops + 1,
                    in_open_loop or turns is None,
                    inside,
                    open_turns,
                    collectives,
                )
            elif opcode == "conditional":
                branches = [
                    self._walk(branch, times, loops, in_open_loop, frozenset(), open_turns, collectives)
                    for branch in instruction.called()
                ]
                flops += max(branches, default=0.0)
            elif opcode == "custom-call":
                flops += times * _kernel_flops(instruction, computation)
            elif opcode in ("fusion", "call", "async"):
                for called in instruction.called():
                    moved = self._parameters(called, instruction, fixed)
                    flops += self._walk_called(called, times, loops, in_open_loop, moved, open_turns, collectives)
        return flops

    def _walk_called(self, name, times, loops, in_open_loop, moved, open_turns, collectives) -> float:
        """As `_walk`, of a computation with one parameter per operand, of which those in `moved` never change."""
        saved = self.computations[name]
        marked = {
            key: dataclasses.replace(instruction, opcode="constant", arguments="")
            if instruction.opcode == "parameter" and key in moved
            else instruction
            for key, instruction in saved.items()
        }
        self.computations[name] = marked
        try:
            return self._walk(name, times, loops, in_open_loop, frozenset(), open_turns, collectives)
        finally:
            self.computations[name] = saved

    def _parameters(self, called: str, instruction: Instruction, fixed: set[str]) -> set[str]:
        """Names of the parameters of `called` whose operand is in `fixed`."""
        numbers = {
            key: int(inner.arguments)
            for key, inner in self.computations[called].items()
            if inner.opcode == "parameter" and inner.arguments.isdecimal()
        }
        operands = instruction.operands
        return {key for key, number in numbers.items() if number < len(operands) and operands[number] in fixed}

    def _unchanged(self, body: str) -> frozenset[int]:
        """Elements of a loop's state that its body hands on as they came."""
        computation, root = self.computations[body], self._root(body)
        if root.opcode != "tuple":
            return frozenset()
        parameters = {name for name, instruction in computation.items() if instruction.opcode == "parameter"}

        def is_itself(name: str, index: int) -> bool:
            instruction = computation[self._origin(computation, name)]
            return (
                instruction.opcode == "get-tuple-element"
                and instruction.operands[0] in parameters
                and int(_attribute(instruction, "index")) == index
            )

        return frozenset(index for index, name in enumerate(root.operands) if is_itself(name, index))

    def _origin(self, computation: Mapping[str, Instruction], name: str) -> str:
        """Where a value comes from that was only copied, or handed through a loop that leaves it as it is."""
        while True:
            instruction = computation[name]
            if instruction.opcode == "copy":
                name = instruction.operands[0]
                continue
            if instruction.opcode != "get-tuple-element":
                return name
            loop, index = computation[instruction.operands[0]], int(_attribute(instruction, "index"))
            if loop.opcode != "while" or index not in self._unchanged(_attribute(loop, "body")):
                return name
            state = computation[loop.operands[0]]
            if state.opcode != "tuple":
                return name
            name = state.operands[index]

    def _kept(self, body: str, elements: frozenset[int]) -> frozenset[int]:
        """Those of a loop's `elements`, fixed before it, that also follow from fixed ones alone after each turn.

        A weight that is passed around between devices, piece by piece, changes in every turn and is still that weight.
        """
        computation, root = self.computations[body], self._root(body)
        while root.opcode == "tuple":
            fixed = self._fixed(computation, elements)
            kept = frozenset(index for index in elements if root.operands[index] in fixed)
            if kept == elements:
                return kept
            elements = kept
        return frozenset()

    def _elements(self, computation: Mapping[str, Instruction], name: str, fixed: set[str]) -> frozenset[int]:
        """Indices of the tuple `name` whose elements are in `fixed`."""
        made = computation[name]
        while made.opcode in ("copy", "opt-barrier"):
            made = computation[made.operands[0]]
        if made.opcode != "tuple":
            return frozenset()
        return frozenset(index for index, operand in enumerate(made.operands) if operand in fixed)

    def _fixed(self, computation: Mapping[str, Instruction], invariant: frozenset[int]) -> set[str]:
        """Instructions whose value follows from invariant elements alone; which part of one is taken may vary."""
        fixed: set[str] = set()
        for name in computation:
            instruction = computation[self._origin(computation, name)]
            if instruction.opcode == "get-tuple-element":
                source = computation[instruction.operands[0]]
                if source.opcode == "parameter" and int(_attribute(instruction, "index")) in invariant:
                    fixed.add(name)
            elif instruction.opcode in ("constant", "iota"):
                fixed.add(name)
            elif instruction.opcode not in ("parameter", "while", "conditional", "tuple") and instruction.operands:
                arrays = [
                    operand
                    for operand in instruction.operands
                    if operand not in computation or any(dims for _, dims in computation[operand].shapes)
                ]
                # What follows from scalars alone (a counter, say) is no weight.
                if arrays and all(operand in fixed for operand in arrays):
                    fixed.add(name)
        return fixed


def _whole_lines(text: str) -> Iterator[str]:
    """Lines with one instruction each: what a kernel says of itself may hold line breaks."""
    held = ""
    for line in text.splitlines():
        if held and line != "}" and not _INSTRUCTION.match(line):
            held = f"{held} {line}"
            continue
        if held:
            yield held
        held = line if _INSTRUCTION.match(line) else ""
        if not held:
            yield line
    if held:
        yield held


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
    return Instruction(
        left.removeprefix("ROOT ").lstrip("%"), shapes, opcode.strip(), operands, arguments, rest[close + 1 :], root
    )


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if not depth:
            return index
    raise ValueError(f"unbalanced parentheses: {text[:200]}")


def _constant(computation: Mapping[str, Instruction], name: str) -> int | None:
    """The integer that an instruction holds, if it is a constant."""
    instruction = computation[name]
    while instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation[instruction.operands[0]]
    found = re.fullmatch(r"\s*(-?\d+)\s*", instruction.arguments) if instruction.opcode == "constant" else None
    return int(found[1]) if found else None


def _attribute(instruction: Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", instruction.attributes)
    if not found:
        raise ValueError(f"{instruction.opcode} {instruction.name} has no attribute {name}")
    return found[1]


def _bytes(shape: Shape) -> int:
    dtype, dims = shape
    return math.prod(dims) * (1 if dtype.startswith("f8") else _BYTES.get(dtype, 4))


def _matmul_flops(instruction: Instruction, computation: Mapping[str, Instruction]) -> float:
    """2 per multiplication that is not with padding."""
    (_, output), *_ = instruction.shapes
    left, right = (computation[name].shapes[0][1] for name in instruction.operands[:2])
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        axes = [int(axis) for axis in contracted[1].split(",")] if contracted and contracted[1] else []
        return 2.0 * math.prod(output) * math.prod(left[axis] for axis in axes)

    of_left, of_right, of_output = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    flops = 2.0 * right[of_right.index("i")] * output[of_output.index("b")] * output[of_output.index("f")]
    flops /= int(groups[1]) if groups else 1
    for axis, (size, stride, low, dilation, inner) in enumerate(_windows(instruction.attributes)):
        label = str(axis)
        rows = left[of_left.index(label)]
        flops *= _meetings(rows, size, output[of_output.index(label)], stride, low, dilation, inner)
    return flops


def _moved(instruction: Instruction) -> int:
    """Bytes of a collective's result. What one that runs beside other work starts with names its operands before it."""
    count = len(instruction.operands)
    if instruction.opcode.endswith("-start") and len(instruction.shapes) >= 2 * count:
        return sum(map(_bytes, instruction.shapes[count : 2 * count]))
    return instruction.size


def _kernel_flops(instruction: Instruction, computation: Mapping[str, Instruction]) -> float:
    """Flops of a hand-written kernel: what it says of itself, or splash attention's matmuls over whole squares."""
    if found := re.search(r'"flops":"?(\d+)', instruction.attributes):
        return float(found[1])
    found = re.search(r"splash_m[hq]a_(fwd|dkv|dq)", instruction.name)
    if not found:
        return 0.0
    shapes = [computation[name].shapes[0] for name in instruction.operands]
    q, k, *_ = (dims for dtype, dims in shapes if dtype in ("bf16", "f32", "f16") and len(dims) >= 3)
    matmuls = {"fwd": 2, "dkv": 4, "dq": 3}[found[1]]
    return 2.0 * matmuls * math.prod(q) * k[-2]


def _windows(attributes: str) -> Iterator[tuple[int, int, int, int, int]]:
    """(size, stride, low padding, dilation of the left side, of the right side) of each spatial axis."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    parts = dict(part.split("=") for part in found[1].split()) if found and found[1] else {}
    sizes = [int(size) for size in parts.get("size", "").split("x") if size]

    def of(name: str, default: int) -> Sequence[int]:
        return [int(value) for value in parts[name].split("x")] if name in parts else [default] * len(sizes)

    low = [int(pair.split("_")[0]) for pair in parts["pad"].split("x")] if "pad" in parts else [0] * len(sizes)
    yield from zip(sizes, of("stride", 1), low, of("lhs_dilate", 1), of("rhs_dilate", 1), strict=True)


def _meetings(rows: int, size: int, outputs: int, stride: int, low: int, dilation: int, inner: int) -> int:
    """How many pairs (position of the output, of the window) meet an element, not padding or a hole between two."""
    span = (rows - 1) * dilation + 1
    if size == 1 and dilation == 1 and not low and (outputs - 1) * stride < span:
        return outputs
    count = 0
    for output in range(outputs):
        for position in range(size):
            at = output * stride + position * inner - low
            count += 0 <= at < span and at % dilation == 0
    return count
