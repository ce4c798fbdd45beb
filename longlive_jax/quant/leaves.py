"""Kinds of weight: pytrees that stand in for a dense ``[out, in]`` array inside an ``nnx.Param``; ``ops.matmul`` dispatches on the type.

The contraction axis is last in every array, so that a leaf is read as it is stored. A leading layer axis (stacked blocks) goes before all
others of every array, so that a scan over layers slices a leaf like an array. What is not an array is static and compared, never traced.

Quantised values are frozen: the gradient of a product reaches its input, ``Dynamic.weight``, ``LoRA.a`` and ``LoRA.b``, and nothing else.
``jax.grad`` refuses integer leaves, so differentiate with respect to the arrays that are trained and build the leaves inside the step.
"""

import dataclasses
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from longlive_jax.config import require
from longlive_jax.quant.formats import decode_fp8, decode_nvfp4, encode_fp8, encode_nvfp4
from longlive_jax.tree import Leaf

NONE = "none"  # activations that stay as they are
STATIC = ("implementation", "rule", "activations", "recipe", "scaling")  # fields that are no arrays


def weight_leaf(cls):
    """A frozen dataclass that is a pytree."""
    cls = dataclass(frozen=True, kw_only=True, eq=False)(cls)
    arrays, static = fields_of(cls)
    return jax.tree_util.register_dataclass(cls, arrays, static)


def fields_of(leaf):
    """Names of the fields that hold arrays or leaves, and of the static ones, of a leaf or of its class."""
    names = [f.name for f in dataclasses.fields(leaf)]
    return [n for n in names if n not in STATIC], [n for n in names if n in STATIC]


class RowScaled(Leaf):
    """What weights have in common that are ``values [..., out, in]`` times one ``scale [..., out, 1]`` a row."""

    @property
    def shape(self):
        return self.values.shape

    @property
    def dtype(self):
        return jnp.dtype(jnp.float32)

    def cast(self, dtype):
        return self

    def specs(self, spec):
        return dataclasses.replace(self, values=P(*spec), scale=P(*spec[:-1], None))


@weight_leaf
class FP8(RowScaled):
    """W8A8: e4m3 values with one scale a row (spec/inference.md §5); activations get theirs, one a token, at the product."""

    values: jax.Array  # e4m3 [..., out, in]
    scale: jax.Array  # float32 [..., out, 1]
    implementation: str | None = None  # of ops.low_precision; None: automatic

    @classmethod
    def encode(cls, weight, implementation=None):
        values, scale = encode_fp8(weight, -1)
        return cls(values=values, scale=scale, implementation=implementation)

    def dense(self, dtype=jnp.float32):
        return decode_fp8(self.values, self.scale, dtype)


@weight_leaf
class Int8(RowScaled):
    """W8A16: whole numbers in -127..127 with one scale a row, absmax / 127; activations stay as they are."""

    values: jax.Array  # int8 [..., out, in]
    scale: jax.Array  # float32 [..., out, 1]

    @classmethod
    def encode(cls, weight):
        """A row with NaN or inf decodes to NaN."""
        weight = weight.astype(jnp.float32)
        scale = jnp.max(jnp.abs(weight), -1, keepdims=True) / 127
        scale = jnp.where(jnp.isfinite(scale), scale, jnp.nan)
        return cls(values=jnp.round(jnp.where(scale > 0, weight / scale, 0)).astype(jnp.int8), scale=scale)

    def dense(self, dtype=jnp.float32):
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


@weight_leaf
class NVFP4(Leaf):
    """Four-bit values in blocks of 16 along the contraction (spec/inference.md §4): W4A4, or W4A16 where ``activations`` is ``"none"``."""

    codes: jax.Array  # uint8 [..., out, in/2], the even element in the low nibble
    scales: jax.Array  # e4m3 [..., out, in/16]
    scale: jax.Array  # float32 [...], one a matrix
    rule: str = "mse"  # by which the scales were chosen; decoding does not depend on it
    activations: str = "mse"  # the rule of the activations, or "none"
    implementation: str | None = None

    @classmethod
    def encode(cls, weight, rule="mse", activations="mse", implementation=None):
        encode = lambda w: encode_nvfp4(w, rule)
        for _ in weight.shape[:-2]:
            encode = jax.vmap(encode)
        codes, scales, scale = encode(weight)
        return cls(codes=codes, scales=scales, scale=scale, rule=rule, activations=activations, implementation=implementation)

    @property
    def shape(self):
        return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])

    @property
    def dtype(self):
        return jnp.dtype(jnp.float32)

    def dense(self, dtype=jnp.float32):
        decode = lambda codes, scales, scale: decode_nvfp4(codes, scales, scale, dtype)
        for _ in self.codes.shape[:-2]:
            decode = jax.vmap(decode)
        return decode(self.codes, self.scales, self.scale)

    def cast(self, dtype):
        return self

    def specs(self, spec):
        return dataclasses.replace(self, codes=P(*spec), scales=P(*spec), scale=P(*spec[:-2]))


@dataclass(frozen=True)
class Recipe:
    """How a layer is trained in NVFP4 (spec/training.md §3.4): rules of the three quantisers, and what each GEMM does. The default is AR's."""

    weights: str = "static_6"
    activations: str = "mse"
    gradients: str = "mse"
    square: bool = True  # 16 x 16 blocks of the weight, so that the transposed weight has the same values
    stochastic: bool = True  # rounding of the gradients
    hadamard: bool = True  # rotation of both operands of the weight's gradient along the tokens
    implementation: str | None = None


AR, DMD = Recipe(), Recipe(weights="mse")


@weight_leaf
class Dynamic(Leaf):
    """Low-precision training: the weight itself, quantised at every product, forward and backward.

    ``seed`` decides the stochastic rounding: one per layer and step, set by ``quant.rewrite.seeded``.
    """

    weight: jax.Array  # [..., out, in], the master or its copy in the dtype of the step
    seed: jax.Array  # uint32 [...]
    recipe: Recipe = AR

    @classmethod
    def encode(cls, weight, recipe=AR):
        return cls(weight=weight, seed=jnp.zeros(weight.shape[:-2], jnp.uint32), recipe=recipe)

    @property
    def shape(self):
        return self.weight.shape

    @property
    def dtype(self):
        return self.weight.dtype

    def dense(self, dtype=None):
        return self.weight.astype(dtype or self.dtype)

    def cast(self, dtype):
        return dataclasses.replace(self, weight=self.weight.astype(dtype))

    def specs(self, spec):
        return dataclasses.replace(self, weight=P(*spec), seed=P(*spec[:-2]))


@weight_leaf
class LoRA(Leaf):
    """``base + scaling · b a`` (spec/training.md §4.2) over any kind of weight; ``scaling = alpha / rank``."""

    base: object  # [..., out, in], an array or a leaf
    a: jax.Array  # [..., rank, in]
    b: jax.Array  # [..., out, rank]
    scaling: float = 1.0

    @property
    def shape(self):
        return self.base.shape

    @property
    def rank(self):
        return self.a.shape[-2]

    @property
    def dtype(self):
        return self.base.dtype

    def dense(self, dtype=None):
        """The sum is taken in float32 (or wider)."""
        wide = jnp.promote_types(jnp.float32, self.dtype)
        return (dense(self.base, wide) + self.delta(wide)).astype(dtype or self.dtype)

    def delta(self, dtype=jnp.float32):
        """``scaling · b a`` ``[..., out, in]``."""
        return self.scaling * jnp.matmul(self.b.astype(dtype), self.a.astype(dtype), precision=jax.lax.Precision.HIGHEST)

    def cast(self, dtype):
        base = self.base.cast(dtype) if isinstance(self.base, Leaf) else self.base.astype(dtype)
        return dataclasses.replace(self, base=base, a=self.a.astype(dtype), b=self.b.astype(dtype))

    def specs(self, spec):
        lead = spec[:-2]
        a, b = P(*lead, None, spec[-1]), P(*lead, spec[-2], None)
        return dataclasses.replace(self, base=leaf_specs(self.base, P(*spec)), a=a, b=b)


KINDS = {kind.__name__: kind for kind in (FP8, Int8, NVFP4, LoRA)}  # what a file may hold


def dense(weight, dtype=None):
    """The array ``[..., out, in]`` that any kind of weight stands for."""
    return weight.dense(dtype) if isinstance(weight, Leaf) else weight.astype(dtype or weight.dtype)


def leaf_specs(leaf, spec):
    """The ``PartitionSpec`` of every array of ``leaf`` from that of the dense weight: values inherit it, scales follow. An array: ``spec``."""
    if not isinstance(leaf, Leaf):
        return spec
    return leaf.specs((*spec, *(None,) * (len(leaf.shape) - len(spec))))


def nbytes(leaf):
    """Bytes of a weight of any kind, abstract ones included."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(leaf))


# ---- as arrays with names, for files -------------------------------------------------------------------------------------------------------


def flatten(params):
    """``(arrays, kinds)`` of a flat dictionary: leaves become arrays named ``path.field``; ``kinds``: path -> JSON record of what they were.

    A ``Dynamic`` weight is a way to train and not a format: it becomes its weight.
    """
    arrays, kinds = {}, {}
    for path, leaf in params.items():
        kind = put(arrays, path, leaf)
        if kind is not None:
            kinds[path] = kind
    return arrays, kinds


def put(arrays, path, leaf):
    """Add the arrays of ``leaf`` under ``path`` and return its record, None for an array."""
    if isinstance(leaf, Dynamic):
        leaf = leaf.weight
    if not isinstance(leaf, Leaf):
        arrays[path] = leaf
        return None
    fields, static = fields_of(leaf)
    values = vars(leaf)
    record = {"kind": type(leaf).__name__, **{n: values[n] for n in static if n != "implementation"}}
    if isinstance(leaf, LoRA):
        record["rank"] = leaf.rank
    for name in fields:
        inner = put(arrays, f"{path}.{name}", values[name])
        if inner is not None:
            record[name] = inner
    return record


def abstract_leaf(record, shape):
    """The leaf of a record over a dense weight of ``shape``, with shapes and dtypes in place of arrays."""
    kind, weight = known_kind(record, "a weight"), jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
    if kind is not LoRA:
        options = {n: record[n] for n in fields_of(kind)[1] if n in record}
        return jax.eval_shape(lambda w: kind.encode(w, **options), weight)
    *lead, rows, columns = shape
    base = abstract_leaf(record["base"], shape) if "base" in record else weight
    a, b = ((*lead, record["rank"], columns), (*lead, rows, record["rank"]))
    a, b = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (a, b))
    return LoRA(base=base, a=a, b=b, scaling=record["scaling"])


def known_kind(record, path):
    name = record.get("kind")
    require(name in KINDS, f"{path} is of an unknown kind {name!r}; known are {', '.join(KINDS)}: update the package")
    return KINDS[name]


def unflatten(arrays, kinds):
    """The inverse of ``flatten``. Raises ``ConfigError`` for a kind that is not known or an array that is missing, naming it."""
    arrays = dict(arrays)
    leaves = {path: take(arrays, path, record) for path, record in kinds.items()}
    return arrays | leaves


def take(arrays, path, record):
    """The leaf of ``record`` from ``arrays``, which it leaves."""
    cls = known_kind(record, path)
    fields, static = fields_of(cls)
    values = {}
    for name in fields:
        if name in record:
            values[name] = take(arrays, f"{path}.{name}", record[name])
        else:
            require(f"{path}.{name}" in arrays, f"{path} is recorded as {record['kind']}, but {path}.{name} is missing; copy the file again")
            values[name] = arrays.pop(f"{path}.{name}")
    return cls(**values, **{n: record[n] for n in static if n in record})
