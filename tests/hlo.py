"""Reading compiled programs: which instructions an HLO text holds, on what shapes and from which part of the model."""

import math
import re
from collections import Counter
from typing import NamedTuple

COLLECTIVES = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute", "collective-broadcast")

INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (.+?) ([a-z][a-z0-9-]*)\(")
SHAPE = re.compile(r"[a-z]\w*\[([\d,]*)\]")
PATH = re.compile(r'op_name="([^"]*)"')


class Op(NamedTuple):
    """One instruction. An asynchronous pair counts once, under the name of the operation; a loop's body counts once."""

    kind: str  # HLO opcode
    shapes: tuple[tuple[int, ...], ...]  # results; of an asynchronous start also its operands
    path: str  # scopes of the traced function, "" where the compiler made the instruction

    @property
    def size(self):
        """Elements of the largest result."""
        return max((math.prod(s) for s in self.shapes), default=0)


def operations(text):
    """Every instruction of an HLO text, those inside fusions and loop bodies included."""
    for line in text.splitlines():
        found = INSTRUCTION.match(line)
        if found is None or found[2].endswith("-done"):
            continue
        shapes = tuple(tuple(int(n) for n in s.split(",") if n) for s in SHAPE.findall(found[1]))
        path = PATH.search(line)
        yield Op(found[2].removesuffix("-start"), shapes, path[1] if path else "")


def collectives(text):
    """The communicating instructions."""
    return [op for op in operations(text) if op.kind in COLLECTIVES]


def counts(ops):
    """How many of each kind."""
    return Counter(op.kind for op in ops)


def of(ops, kind, within=""):
    """The instructions of a kind whose path holds ``within``."""
    return [op for op in ops if op.kind == kind and within in op.path]


def large(text, size):
    """Instructions, apart from tuples, whose result has at least ``size`` elements."""
    return [op for op in operations(text) if op.size >= size and len(op.shapes) == 1]


DENSE = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (?:bf16|f16|f32|f8\w+|s8|u8)\[")


def dense(text, sizes):
    """Instructions whose result is an array of a byte or more an element, with one of these ``sizes`` in elements."""
    return [op for line in text.splitlines() if DENSE.match(line) for op in operations(line) if op.size in sizes]
