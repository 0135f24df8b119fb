"""Integer arithmetic of a Triton kernel, followed from its arguments to its addresses by intervals, in the text of its TTIR.

What a kernel adds to a pointer, and where a bulk copy begins, must not have passed through 32 bits that were too few for it.
"""

import re
from typing import NamedTuple

# An offset of 32 bits, in elements, has to be below this whatever the arguments are: that of a tile, or of a row.
SMALL = 2**24
OPERATION = re.compile(r'^\s*(?:(%[\w.]+)(?::(\d+))? = )?"?([a-z_]+\.[\w.]+)"?(.*)$')
NAME = re.compile(r"%[\w.]+(?:#\d+)?")
POINTERS_OF_OFFSETS = ("cu_q_ptr", "cu_k_ptr")  # which hold places in tensors whose sizes the launcher checks


class Value(NamedTuple):
    low: int
    high: int
    faults: frozenset = frozenset()  # operations on its way that may not have fitted
    root: str = ""  # of a pointer: the argument that it comes from


def faults_of(text: str, names: list[str], limits: dict[str, int]) -> list[str]:
    """The address arithmetic that may not fit, each as its line and why.

    An operation on 32 bits is a fault if its exact result may be no number of 32 bits, and an address or the place of a bulk
    copy depends on it. So is an offset of 32 bits, to a pointer, that is not SMALL.

    Args:
        text: a module with one function.
        names: of its arguments that are not compile-time constants. Numbers are 0 to 2^31 - 1, but for strides, which are any.
        limits: name -> the largest number that a launcher passes, of those of which it passes less.
    """
    carried: dict[int, frozenset] = {}
    while True:  # until loops carry no more faults around
        walk = _Walk(names, limits, carried)
        for number, line in enumerate(text.splitlines()):
            walk.line(number, line)
        if walk.carried == carried:
            return sorted(walk.found)
        carried = walk.carried


def bits_of(kind: str) -> int | None:
    """Of the integers of a type; None if it is of something else."""
    match = re.search(r"(?:^|x)i(\d+)>?$", kind.strip())
    return int(match[1]) if match else None


def _whole(bits: int) -> tuple[int, int]:
    return (0, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _quotient(a: Value, b: Value) -> tuple[int, int]:
    if b.low < 0:
        most = max(abs(a.low), abs(a.high))
        return -most, most
    divisors = max(b.low, 1), max(b.high, 1)  # nothing is divided by zero
    ends = [abs(x) // y * (1 if x >= 0 else -1) for x in (a.low, a.high) for y in divisors]
    return min(ends), max(ends)


def _remainder(a: Value, b: Value) -> tuple[int, int]:
    most = min(max(abs(b.low), abs(b.high)) - 1, max(abs(a.low), abs(a.high)))
    return (0 if a.low >= 0 else -most), (max(0, most) if a.high > 0 else 0)


def _products(a: Value, b: Value) -> tuple[int, int]:
    ends = [x * y for x in (a.low, a.high) for y in (b.low, b.high)]
    return min(ends), max(ends)


EXACT = {
    "arith.addi": lambda a, b: (a.low + b.low, a.high + b.high),
    "arith.subi": lambda a, b: (a.low - b.high, a.high - b.low),
    "arith.muli": _products,
    "arith.divsi": _quotient,
    "arith.remsi": _remainder,
    "arith.minsi": lambda a, b: (min(a.low, b.low), min(a.high, b.high)),
    "arith.maxsi": lambda a, b: (max(a.low, b.low), max(a.high, b.high)),
    "arith.shrsi": lambda a, b: (a.low >> max(b.low, 0), a.high >> max(b.low, 0)) if a.low >= 0 else (a.low, a.high),
    "arith.shli": lambda a, b: _products(a, Value(2 ** max(b.low, 0), 2 ** min(max(b.high, 0), 64))),
    "arith.extsi": lambda a: (a.low, a.high),
    "arith.trunci": lambda a: (a.low, a.high),
}  # fmt: skip
UNSIGNED = {f"arith.{name}ui": f"arith.{name}si" for name in ("div", "rem", "shr", "ext", "min", "max")}
SAME = (
    "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "tt.join", "tt.split", "tt.unsplat",
    "ttg.convert_layout", "arith.select", "tt.addptr", "tt.bitcast", "tt.advance",
)  # fmt: skip


class Region(NamedTuple):
    number: int  # of its first line
    operation: str
    result: str | None = None
    kinds: tuple = ()  # of results
    faults: frozenset = frozenset()


def _kinds(line: str) -> tuple[str, ...]:
    """The types of the results of a loop or a branch, in its first line."""
    listed = line.rpartition(" -> (")[2].rpartition(")")[0] if " -> (" in line else ""
    return tuple(kind.strip() for kind in re.split(r",(?![^<]*>)", listed) if kind.strip())


class _Walk:
    def __init__(self, names, limits, carried):
        self.names, self.limits, self.before = names, limits, carried
        self.values: dict[str, Value] = {}
        self.found: set[str] = set()
        self.carried: dict[int, frozenset] = {}
        self.regions: list[Region] = []  # that are open

    def value(self, name: str) -> Value:
        return self.values[name] if name in self.values else Value(*_whole(64))

    def line(self, number: int, line: str) -> None:
        match = OPERATION.match(line)
        if line.lstrip().startswith("}"):
            self.close(line)
        elif "tt.func" in line:
            self.arguments(line)
            self.regions.append(Region(number, "tt.func"))
        elif match is None:
            if line.rstrip().endswith("{"):
                self.regions.append(Region(number, ""))
            elif line.lstrip().startswith("^"):
                self.block(line)
        else:
            result, _, operation, rest = match.groups()
            if line.rstrip().endswith("{"):
                self.open(number, line, result, operation, rest)
            elif operation == "scf.yield":
                number = self.regions[-1].number
                self.carried[number] = self.carried.get(number, frozenset()) | self.faults_in(rest.partition(" : ")[0])
            else:
                self.operation(line, result, operation, rest)

    def faults_in(self, operands: str) -> frozenset:
        return frozenset().union(*(self.value(name).faults for name in NAME.findall(operands)))

    def block(self, line: str) -> None:
        for name, kind in re.findall(r"(%[\w.]+): ([^,)]+)", line):
            self.values[name] = Value(*_whole(bits_of(kind) or 64))

    def open(self, number: int, line: str, result: str | None, operation: str, rest: str) -> None:
        """The first line of an operation with regions: a loop, a branch, a reduction."""
        kinds = _kinds(line) if operation.startswith("scf.") else ()
        around = self.before.get(number, frozenset())
        if operation == "scf.for":
            index, begin, stop = re.match(r"\s*(?:unsigned )?(%[\w.]+) = (\S+) to (\S+) step", rest).groups()
            begin, stop = self.value(begin), self.value(stop)
            self.values[index] = Value(begin.low, max(begin.high, stop.high - 1), begin.faults | stop.faults)
            names = re.findall(r"(%[\w.]+) = (%[\w.#]+)", rest.partition("iter_args")[2])
            for (name, first), kind in zip(names, kinds, strict=True):
                first = self.value(first)
                self.values[name] = Value(*_whole(bits_of(kind) or 64), first.faults | around, first.root)
            around |= self.faults_in(" ".join(first for _, first in names))
        else:
            around |= self.faults_in(rest)
            self.block(line)
        self.regions.append(Region(number, operation, result, kinds, around))

    def close(self, line: str) -> None:
        region = self.regions.pop()
        if "else" in line:
            self.regions.append(region)
        elif region.result:
            faults = region.faults | self.carried.get(region.number, frozenset())
            kinds = region.kinds or (line.rpartition(" -> ")[2],)
            for place, kind in enumerate(kinds):
                name = region.result if len(kinds) == 1 else f"{region.result}#{place}"
                self.values[name] = Value(*_whole(bits_of(kind) or 64), faults)

    def arguments(self, line: str) -> None:
        arguments = re.findall(r"(%[\w.]+): ([^{,)]+)", line)
        names = iter(self.names)
        place = 0
        while place < len(arguments):
            argument, kind = arguments[place]
            name, bits = next(names), bits_of(kind)
            place += 1
            if "tensordesc" in kind:  # followed by sizes and strides
                place += 2 * len(re.findall(r"\d+x", kind))
            low, high = _whole(bits or 64)
            if not name.startswith("stride_"):
                low, high = 0, min(high, self.limits.get(name, high))
            self.values[argument] = Value(low, high, root=name)
        assert next(names, None) is None, "the kernel has fewer arguments than names"

    def operation(self, line: str, result: str | None, operation: str, rest: str) -> None:
        operands, _, kinds = rest.rpartition(" : ")
        places = [self.value(name) for name in NAME.findall(operands)]
        if operation == "tt.addptr":
            self.address(line, places[1], kinds.rpartition(", ")[2])
        elif operation.startswith(("tt.descriptor", "tt.experimental_descriptor")):
            for name in NAME.findall(operands[operands.find("[") : operands.find("]")]):
                self.found |= {f"{fault} (begin of a bulk copy)" for fault in self.value(name).faults}
        if result is None:
            return
        kind = re.split(r" -> | to ", kinds)[-1]
        if operation == "tt.load":  # of whose operands alone the types are told
            kind = re.sub(r"!tt\.ptr<([^>]+)>", r"\1", kind)
        self.values[result] = self.computed(line.strip(), operation, operands, places, bits_of(kind))

    def computed(self, line: str, operation: str, operands: str, places: list[Value], bits: int | None) -> Value:
        faults = frozenset().union(*(place.faults for place in places)) if places else frozenset()
        root = places[0].root if places else ""
        if operation in SAME:
            chosen = places[1:] if operation == "arith.select" else places
            low, high = min(place.low for place in chosen), max(place.high for place in chosen)
            if operation == "tt.bitcast" and bits is not None:  # of a float: any number of so many bits
                low, high = max(low, _whole(bits)[0]), min(high, _whole(bits)[1])
            return Value(low, high, faults, chosen[0].root)
        if bits is None:
            return Value(*_whole(64))
        if operation == "tt.load" or operation.startswith("tt.atomic"):
            low, high = _whole(bits)
            return Value(0, self.limits[root]) if root in POINTERS_OF_OFFSETS else Value(low, high)
        if operation == "arith.constant":
            found = re.match(r"\s*(?:dense<)?(-?\d+)>?", operands)
            return Value(int(found[1]), int(found[1])) if found else Value(*_whole(bits))
        if operation == "tt.make_range":
            end, start = (int(re.search(rf"{name} = (\d+)", operands)[1]) for name in ("end", "start"))
            return Value(start, end - 1)
        if operation in ("tt.get_program_id", "tt.get_num_programs"):
            return Value(0, 2**31 - 1)
        if operation == "arith.andi" and any(place.low >= 0 for place in places):
            return Value(0, min(place.high for place in places if place.low >= 0), faults)
        if operation in UNSIGNED and all(place.low >= 0 for place in places):
            operation = UNSIGNED[operation]
        if operation not in EXACT:
            return Value(*_whole(bits), faults)
        low, high = EXACT[operation](*places)
        least, most = _whole(bits)
        if low < least or high > most:
            if bits <= 32:
                faults |= {f"{line}: {low} to {high} in {bits} bits"}
            low, high = least, most
        return Value(low, high, faults)

    def address(self, line: str, offset: Value, kind: str) -> None:
        self.found |= offset.faults
        if bits_of(kind) <= 32 and not -SMALL < offset.low <= offset.high < SMALL:
            self.found.add(f"{line.strip()}: {offset.low} to {offset.high} as an offset of {bits_of(kind)} bits")
