"""Low-rank adapters: put in place by rule, trained alone, merged and taken out again (spec/training.md §4.2, §5.5).

    params = add_lora(flat_params(model), rank=128, key=key)      # over any kind of weight
    adapters, frozen = split(params)                              # the optimizer sees ``adapters`` alone
    model = with_params(model, join(frozen, adapters))            # inside the step

``convert.adapters`` reads and writes the public source's files.
"""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp

from longlive_jax.config import require
from longlive_jax.quant.leaves import LoRA
from longlive_jax.quant.rewrite import BLOCK_LINEARS, match
from longlive_jax.tree import Leaf

INITS = ("kaiming", "gaussian")


def add_lora(params, targets=BLOCK_LINEARS, *, rank, key, alpha=None, init="kaiming", dtype=jnp.float32):
    """``params`` (dotted path -> weight) with a ``LoRA`` over every weight that a pattern of ``targets`` matches.

    ``alpha``: the sum is scaled by ``alpha / rank`` (None: by 1). ``init`` of ``a [rank,in]``: ``"kaiming"``, uniform in ±in**-0.5, or
    ``"gaussian"`` of deviation 1/rank; ``b [out,rank]`` is zero, so that nothing changes before training. The ``a`` of a weight depends on
    ``key`` and its path alone. Raises ``ConfigError`` for a pattern that matches nothing, a rank that is too large, or a second adapter.
    """
    require(init in INITS, f"LoRA init={init!r} is not known; use one of {', '.join(INITS)}")
    require(rank > 0, f"LoRA rank={rank} must be positive")
    out = dict(params)
    for path in match(params, [(pattern, True) for pattern in targets]):
        weight = params[path]
        require(not isinstance(weight, LoRA), f"{path} has an adapter already; merge it first")
        require(weight.ndim >= 2, f"{path} has shape {tuple(weight.shape)}: only matrices [out, in] take an adapter; mend the targets")
        least = min(weight.shape[-2:])
        require(rank <= least, f"LoRA rank={rank} is more than {path} {tuple(weight.shape)} can use; use at most {least}")
        make = functools.partial(adapter, rank=rank, scaling=1.0 if alpha is None else alpha / rank, init=init, dtype=dtype)
        make = functools.partial(make, key=jax.random.fold_in(key, zlib.crc32(path.encode())))
        abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(weight))
        out[path] = jax.eval_shape(make, weight) if abstract else make(weight)
    return out


def adapter(base, *, rank, scaling, init, dtype, key):
    """A fresh ``LoRA`` over ``base [..., out, in]``."""
    *lead, rows, columns = base.shape
    shape = (*lead, rank, columns)
    if init == "kaiming":
        a = jax.random.uniform(key, shape, dtype, -(columns**-0.5), columns**-0.5)
    else:
        a = jax.random.normal(key, shape, dtype) / rank
    return LoRA(base=base, a=a, b=jnp.zeros((*lead, rows, rank), dtype), scaling=scaling)


def split(params):
    """``(adapters, frozen)``: ``path.a`` and ``path.b`` -> array, and ``params`` without them. ``join`` is the inverse."""
    found = {path: leaf for path, leaf in params.items() if isinstance(leaf, LoRA)}
    require(found, "no weight has an adapter; use add_lora first")
    adapters = {f"{path}.{side}": x for path, leaf in found.items() for side, x in (("a", leaf.a), ("b", leaf.b))}
    return adapters, params | {path: dataclasses.replace(leaf, a=None, b=None) for path, leaf in found.items()}


def join(frozen, adapters):
    """``frozen`` with ``adapters`` in their places. Raises ``ConfigError`` listing what is missing or has no place."""
    paths = [path for path, leaf in frozen.items() if isinstance(leaf, LoRA)]
    needed = {f"{path}.{side}" for path in paths for side in "ab"}
    missing, extra = sorted(needed - set(adapters)), sorted(set(adapters) - needed)
    require(
        not missing and not extra,
        f"adapters do not fit: missing {missing[:8]} ({len(missing)}), not known {extra[:8]} ({len(extra)}); use those that split gave",
    )
    put = lambda path: dataclasses.replace(frozen[path], a=adapters[f"{path}.a"], b=adapters[f"{path}.b"])
    return frozen | {path: put(path) for path in paths}


def merge(params):
    """Every adapter added to its dense base, in float32 and rounded once to the base's dtype.

    Raises ``ConfigError`` for a quantised base: merge first, then rewrite, as the public source does.
    """

    def of(path, leaf):
        if not isinstance(leaf, LoRA):
            return leaf
        require(
            not isinstance(leaf.base, Leaf), f"{path} is an adapter over {type(leaf.base).__name__}: merge into the dense weight, then rewrite"
        )
        return leaf.dense()

    return {path: of(path, leaf) for path, leaf in params.items()}


def unmerge(merged, adapted):
    """The adapters of ``adapted`` taken out of ``merged`` weights again: ``LoRA`` leaves over the base, up to rounding."""

    def of(weight, leaf):
        if not isinstance(leaf, LoRA):
            return weight
        return dataclasses.replace(leaf, base=(weight.astype(jnp.float32) - leaf.delta()).astype(weight.dtype))

    missing = sorted(path for path, leaf in adapted.items() if isinstance(leaf, LoRA) and path not in merged)
    require(not missing, f"the merged weights lack {missing[:8]} ({len(missing)}); give the adapters that were merged")
    return {path: of(weight, adapted.get(path)) for path, weight in merged.items()}
