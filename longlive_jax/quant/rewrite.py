"""Putting kinds of weight in place: ``rewrite(params, rules)`` over dotted paths, with a size report, and named rule sets.

    params, report = rewrite(flat_params(model), RULE_SETS["w4a4"])
    model = with_params(model, params)

Training rewrites inside the step, where the master weights are cast: ``seeded(rewrite(params, RULE_SETS["train_ar"])[0], key of the step)``.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from longlive_jax.config import ConfigError, require
from longlive_jax.quant.formats import BLOCK, RULES, check_finite
from longlive_jax.quant.leaves import AR, DMD, FP8, NONE, NVFP4, Dynamic, Int8, LoRA, nbytes
from longlive_jax.tree import Leaf


@dataclass(frozen=True)
class Kind:
    """A kind of weight as rules name it. ``encode``: dense ``[..., out, in]`` -> leaf; ``divides``: the axes that 16 must divide."""

    name: str
    encode: Callable
    divides: tuple[str, ...] = ("in",)


def fp8(implementation=None):
    """W8A8 (spec/inference.md §5)."""
    return Kind("fp8", lambda w: FP8.encode(w, implementation), ("out", "in"))


def w4a4(rule="mse", activations=None, implementation=None):
    """Four-bit weights by ``rule`` and four-bit activations by theirs, by default the same."""
    return Kind("w4a4", lambda w: NVFP4.encode(w, rule, activations or rule, implementation))


def w4a16(rule="mse"):
    """Four-bit weights, activations as they are."""
    return Kind("w4a16", lambda w: NVFP4.encode(w, rule, NONE))


def dynamic(recipe=AR):
    """Training in NVFP4; the weight stays what the optimizer gave."""
    return Kind("dynamic", lambda w: Dynamic.encode(w, recipe), ("out", "in"))


DENSE = Kind("dense", lambda w: w, ())
KINDS = {"dense": DENSE, "fp8": fp8(), "int8": Kind("int8", Int8.encode, ()), "w4a4": w4a4(), "w4a16": w4a16(), "dynamic": dynamic()}
KINDS |= {f"{name}_{rule}": make(rule) for rule in RULES for name, make in (("w4a4", w4a4), ("w4a16", w4a16))}

# The published exclusion (spec/inference.md §4.1): ten linears a block in, 300 of the 5B model; six small ones and the patch matrix out.
BLOCK_LINEARS = (r"blocks\.(\d+\.)?(self|cross)_attn\.[qkvo]\.weight", r"blocks\.(\d+\.)?ffn\.(up|down)\.weight")
KEPT = (
    r"(text|time)_embedding\.(up|down)\.weight",
    r"time_projection\.weight",
    r"head\.head\.weight",
    r"patch_embedding\.weight",
)


def published(kind):
    """Rules that make the block linears ``kind`` and keep what the public source keeps."""
    return tuple((pattern, kind) for pattern in BLOCK_LINEARS) + tuple((pattern, "dense") for pattern in KEPT)


RULE_SETS = {name: published(name) for name in ("fp8", "int8", "w4a4", "w4a16")}
RULE_SETS |= {"train_ar": published(dynamic(AR)), "train_dmd": published(dynamic(DMD))}


@dataclass(frozen=True)
class Report:
    """What a rewrite did. ``rows``: kind -> (weights, bytes before, bytes after); ``other`` counts what no rule made anything else."""

    rows: dict

    @property
    def before(self):
        return sum(row[1] for row in self.rows.values())

    @property
    def after(self):
        return sum(row[2] for row in self.rows.values())

    def __str__(self):
        rows = [*self.rows.items(), ("all", (sum(row[0] for row in self.rows.values()), self.before, self.after))]
        return "\n".join(f"{kind:>8} {n:5} weights {before / 2**20:10.3f} -> {after / 2**20:10.3f} MiB" for kind, (n, before, after) in rows)


def rewrite(params, rules):
    """``params`` (dotted path -> weight) with the kinds that ``rules`` name, and a ``Report``.

    ``rules``: ordered (regular expression over the whole path, a name in ``KINDS`` or a ``Kind``); the first that matches decides, and a
    weight that none matches stays. Of an adapted weight the base is rewritten. Weights may be abstract, or traced inside a step.

    Raises ``ConfigError`` for a rule that matches nothing, an unknown kind, a weight that is quantised already or has no two axes, an axis
    that 16 does not divide, and for NaN or inf, naming the weight.
    """
    out, rows = dict(params), {}
    for path, kind in match(params, [(pattern, named(kind)) for pattern, kind in rules]).items():
        if kind != DENSE:
            out[path] = encode(path, params[path], kind)
            count(rows, kind.name, params[path], out[path])
    for path in params:
        if out[path] is params[path]:
            count(rows, "other", params[path], out[path])
    return out, Report(rows)


def count(rows, name, before, after):
    n, b, a = rows.get(name, (0, 0, 0))
    rows[name] = n + 1, b + nbytes(before), a + nbytes(after)


def named(kind):
    """The ``Kind`` called ``kind``."""
    if isinstance(kind, Kind):
        return kind
    if kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, n=1)
        raise ConfigError(f"unknown kind of weight {kind!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(KINDS)}"))
    return KINDS[kind]


def match(params, rules):
    """Path -> what the first matching rule says, for every path that one matches. Raises ``ConfigError`` for a rule that matches none."""
    out = {}
    for path in params:
        found = next((value for pattern, value in rules if re.fullmatch(pattern, path)), None)
        if found is not None:
            out[path] = found
    for pattern, _ in rules:
        if not any(re.fullmatch(pattern, path) for path in params):
            near = difflib.get_close_matches(pattern.replace("\\", ""), params, n=3, cutoff=0.3)
            raise ConfigError(f"the rule {pattern!r} matches no weight; near it are {', '.join(near) or 'none'}")
    return out


def encode(path, weight, kind):
    """One weight as ``kind``, checked; of a ``LoRA`` its base."""
    if isinstance(weight, LoRA):
        return dataclasses.replace(weight, base=encode(f"{path} (base)", weight.base, kind))
    require(not isinstance(weight, Leaf), f"{path} is {type(weight).__name__} already; rewrite the dense weights")
    require(weight.ndim >= 2, f"{path} has shape {tuple(weight.shape)}: only matrices [out, in] can be {kind.name}; mend the rule")
    for axis, size in zip(("out", "in"), weight.shape[-2:]):
        ok = axis not in kind.divides or size % BLOCK == 0
        require(ok, f"{path} has {size} along {axis!r}: {kind.name} needs a multiple of {BLOCK}; keep it dense by a rule ahead of this one")
    if isinstance(weight, jax.ShapeDtypeStruct):
        return jax.eval_shape(kind.encode, weight)
    if isinstance(weight, jax.core.Tracer):
        return kind.encode(weight)
    check_finite(path, weight)
    return jax.jit(kind.encode)(weight)


def seeded(params, key):
    """``params`` in which every ``Dynamic`` weight (of a stack: every layer) has its own seed from ``key``: once a step, with its key."""

    def of(i, weight):
        if isinstance(weight, LoRA):
            return dataclasses.replace(weight, base=of(i, weight.base))
        if not isinstance(weight, Dynamic):
            return weight
        bits = jax.random.bits(jax.random.fold_in(key, i), weight.shape[:-2], jnp.uint32)
        return dataclasses.replace(weight, seed=bits)

    return {path: of(i, weight) for i, (path, weight) in enumerate(params.items())}
