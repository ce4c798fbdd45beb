"""Checkpoints as tables of rows: one row maps one family of foreign tensors to our parameters, in both directions.

``convert`` and ``export`` check names and shapes of everything first, raise one error that lists all that does not fit, and only then read
values, one tensor at a time.
"""

import collections
import functools
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from einops import rearrange

log = logging.getLogger("longlive_jax")

# Source axes -> our axes. Every transform is a permutation of elements, so export returns the bits that convert was given.
TRANSFORMS = {
    "copy": "",
    "gamma4": "c 1 1 1 -> c",
    "gamma3": "c 1 1 -> c",
    "table": "1 n d -> n d",
    "conv5": "o i t h w -> t h w i o",
    "conv4": "o i h w -> h w i o",
    "conv1x1_5": "o i 1 1 1 -> o i",
    "conv1x1_4": "o i 1 1 -> o i",
    "patch": "o i 1 p q -> o (i p q)",  # channel-major patch vectors; export must be told the source shape
}


class ConversionError(ValueError):
    """A checkpoint and a model do not fit. ``problems``: kind of mismatch to the list of everything it befell."""

    LISTED = 40  # of each kind in the message

    def __init__(self, problems):
        self.problems = {kind: lines for kind, lines in problems.items() if lines}
        text = [f"checkpoint and model do not fit: {sum(map(len, self.problems.values()))} problems"]
        for kind, lines in self.problems.items():
            text += [f"{kind} ({len(lines)}):"] + [f"  {line}" for line in lines[: self.LISTED]]
            if len(lines) > self.LISTED:
                text.append(f"  ... and {len(lines) - self.LISTED} more")
        super().__init__("\n".join(text))


@dataclass(frozen=True)
class Row:
    r"""One family of tensors.

    ``source``: regular expression for the whole foreign name, made of literal text (dots escaped) and groups that are not nested, so that it
    can be read backwards, e.g. ``r"blocks\.(\d+)\.norm3\.(weight|bias)"``. ``target``: our dotted parameter path, a template that uses every
    group, e.g. ``r"blocks.\1.norm3.\2"``. ``to``: a name in ``TRANSFORMS``.
    """

    source: str
    target: str
    to: str = "copy"

    def __post_init__(self):
        if self.to not in TRANSFORMS:
            raise ValueError(f"Row.to={self.to!r} is not a transform; use one of {', '.join(TRANSFORMS)}")
        backwards(self)

    def path(self, name):
        """Our path of the foreign ``name``, or None if the row does not match it."""
        match = re.fullmatch(self.source, name)
        return match and match.expand(self.target)

    def name(self, path):
        """The foreign name of our ``path``, or None: the inverse of ``path``."""
        pattern, template = backwards(self)
        match = re.fullmatch(pattern, path)
        return match and match.expand(template)


@functools.cache
def backwards(row):
    """The regular expression for the row's targets and the template of their source names."""
    pieces = re.split(r"(\([^()]*\))", row.source)  # literals at even places, groups at odd ones
    literals, groups = pieces[::2], pieces[1::2]
    if not all(re.fullmatch(r"(?:[\w-]|\\\.)*", text) for text in literals) or any(g.startswith("(?") for g in groups):
        raise ValueError(f"Row.source={row.source!r} cannot be read backwards; use literal text with escaped dots and plain groups, not nested")
    used = re.split(r"\\(\d)", row.target)
    if {int(n) for n in used[1::2]} != set(range(1, len(groups) + 1)):
        raise ValueError(f"Row.target={row.target!r} must use every group of {row.source!r} and no other")
    pattern, seen = re.escape(used[0]), set()
    for n, text in zip(used[1::2], used[2::2]):
        pattern += f"(?P=g{n})" if n in seen else f"(?P<g{n}>{groups[int(n) - 1][1:-1]})"
        pattern += re.escape(text)
        seen.add(n)
    template = "".join(piece.replace(r"\.", ".") if at % 2 == 0 else rf"\g<g{at // 2 + 1}>" for at, piece in enumerate(pieces))
    return pattern, template


def sides(to):
    """Axis names of a transform: the source's, and ours with merged axes as tuples."""
    left, right = TRANSFORMS[to].split(" -> ")
    return left.split(), [tuple(axis.strip("()").split()) for axis in re.findall(r"\([^)]*\)|\S+", right)]


def target_shape(to, shape):
    """The shape that transform ``to`` gives a source of ``shape``, or None if it does not take such a source."""
    if to == "copy":
        return tuple(shape)
    left, right = sides(to)
    if len(left) != len(shape) or any(axis == "1" and n != 1 for axis, n in zip(left, shape)):
        return None
    sizes = dict(zip(left, shape))
    return tuple(math.prod(sizes[axis] for axis in merged) for merged in right)


def source_shape(to, shape):
    """The source shape from which transform ``to`` makes ``shape``, or None if that is not determined by it."""
    if to == "copy":
        return tuple(shape)
    left, right = sides(to)
    if len(right) != len(shape) or any(len(merged) != 1 for merged in right):
        return None
    sizes = {"1": 1} | {merged[0]: n for merged, n in zip(right, shape)}
    return tuple(sizes[axis] for axis in left)


def apply(to, x):
    """Foreign array to our layout."""
    return x if to == "copy" else rearrange(x, TRANSFORMS[to])


def invert(to, x, shape):
    """Our array back to the foreign layout of ``shape``."""
    if to == "copy":
        return x
    left, right = TRANSFORMS[to].split(" -> ")
    sizes = {axis: n for axis, n in zip(left.split(), shape) if axis != "1"}
    return rearrange(x, f"{right} -> {left}", **sizes)


def plan(table, tensors, shapes, ignored=()):
    """Our path -> (foreign name, transform) for every parameter; reads no values. Arguments and errors as ``convert``."""
    problems, jobs, dropped = collections.defaultdict(list), {}, collections.Counter()
    for name in tensors:
        rows = [(row.path(name), row.to) for row in table]
        rows = [(path, to) for path, to in rows if path is not None]
        reasons = [reason for pattern, reason in ignored if re.fullmatch(pattern, name)]
        if len(rows) + len(reasons) != 1:
            kind = "sources that no row matches" if not rows + reasons else "sources that several rows match"
            problems[kind].append(name + "".join(f" -> {path}" for path, _ in rows))
        elif reasons:
            dropped[reasons[0]] += 1
        elif rows[0][0] not in shapes:
            problems["sources whose target the model lacks"].append(f"{name} -> {rows[0][0]}")
        elif rows[0][0] in jobs:
            problems["targets given twice"].append(f"{rows[0][0]} by {jobs[rows[0][0]][0]} and {name}")
        else:
            path, to = rows[0]
            jobs[path] = (name, to)
            check_shape(problems, name, tensors[name].shape, to, path, shapes[path].shape)
    problems["targets without a source"] += [path for path in shapes if path not in jobs]
    if any(problems.values()):
        raise ConversionError(problems)
    for reason, count in dropped.items():
        log.info("%d tensors ignored: %s", count, reason)
    return {path: jobs[path] for path in shapes}


def read(tensors, name, to, dtype=None):
    """One tensor in our layout."""
    return np.asarray(apply(to, np.asarray(tensors[name])), dtype, order="C")


def convert(table, tensors, shapes, ignored=(), dtype=None, place=None):
    """Foreign ``tensors`` (name to array) as our parameters (dotted path to array).

    ``tensors`` may be lazy: its values need ``shape`` and are read, one at a time, only after everything fits.
    ``shapes``: every parameter of the model, path to anything with a ``shape`` (``tree.flat_params`` of an abstract module).
    ``ignored``: pairs (regular expression, reason) for tensors that have no place in the model. ``dtype``: of the result; None keeps the
    file's. ``place(path, array)``: what to keep of each array, e.g. its copy on the devices.

    Raises ``ConversionError`` unless each source matches exactly one row or reason, each target is filled once, and all shapes agree.
    """
    out = {}
    for path, (name, to) in plan(table, tensors, shapes, ignored).items():
        x = read(tensors, name, to, dtype)
        out[path] = x if place is None else place(path, x)
    return out


def check_shape(problems, name, shape, to, path, expected):
    found = target_shape(to, shape)
    if found != tuple(expected):
        became = "does not suit" if found is None else f"becomes {found} by"
        problems["wrong shapes"].append(f"{name} {tuple(shape)} {became} {to!r}; {path} is {tuple(expected)}")


def plan_export(table, params, shapes: Mapping = {}):
    """Foreign name -> (our path, transform, foreign shape); reads no values. Arguments and errors as ``export``."""
    problems, jobs = collections.defaultdict(list), {}
    for path, x in params.items():
        rows = [(row.name(path), row.to) for row in table]
        rows = [(name, to) for name, to in rows if name is not None]
        if len(rows) != 1:
            problems["parameters that no row makes" if not rows else "parameters that several rows make"].append(path)
            continue
        name, to = rows[0]
        shape = tuple(shapes[name]) if name in shapes else source_shape(to, x.shape)
        if shape is None:
            problems["parameters whose foreign shape must be given"].append(f"{path} -> {name}")
            continue
        jobs[name] = (path, to, shape)
        check_shape(problems, name, shape, to, path, x.shape)
    if any(problems.values()):
        raise ConversionError(problems)
    return jobs


def export(table, params, shapes: Mapping = {}):
    """Our ``params`` (dotted path to array) under their foreign names and layouts: bit for bit what ``convert`` was given.

    ``shapes``: foreign name to foreign shape, for transforms that do not determine it (``patch``).
    Raises ``ConversionError`` unless every parameter matches exactly one row and has a known shape.
    """
    jobs = plan_export(table, params, shapes)
    return {name: np.asarray(invert(to, np.asarray(params[path]), shape), order="C") for name, (path, to, shape) in jobs.items()}
