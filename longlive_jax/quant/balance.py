"""Powers of two moved between the weights of an attention, so that its keys and values lie in the middle of E4M3's range.

The function of the model does not change, not by a bit in binary floating point: queries take what keys give, the output projection what values
give. E4M3 holds 2**-6 to 448 with three bits of mantissa; keys of about 1 leave room for outliers of a few hundred. Values of about ``VALUES``
do for those of a hundred times as much, and their means over a whole window, down to 1 / 168 of them, are numbers of all three bits too.
"""

import dataclasses
import math

import jax.numpy as jnp

from longlive_jax.config import require
from longlive_jax.quant.leaves import NVFP4, LoRA, RowScaled, dense
from longlive_jax.tree import Leaf, flat_params, with_params

VALUES = 4.0


def balance(model):
    """``model`` with keys of magnitudes of about 1 and values of about ``VALUES``, by what norms and projections let expect of unit inputs."""
    params = flat_params(model)
    for name in self_attentions(params):
        rms = lambda path: math.sqrt(float(jnp.mean(jnp.square(dense(params[path], jnp.float32)))))
        k = power(math.sqrt(rms(name + "norm_q.weight") / rms(name + "norm_k.weight")))
        v = power(VALUES / (rms(name + "v.weight") * math.sqrt(params[name + "v.weight"].shape[-1])))
        for path, factor in (("norm_k.weight", k), ("norm_q.weight", 1 / k), ("v.weight", v), ("v.bias", v), ("o.weight", 1 / v)):
            params[name + path] = times(params[name + path], factor, name + path)
    return with_params(model, params)


def self_attentions(params):
    """Prefixes ``blocks.0.self_attn.``, ... of the self-attentions among dotted paths."""
    return [path.removesuffix("norm_k.weight") for path in params if path.endswith("self_attn.norm_k.weight")]


def power(x):
    """The power of two nearest to ``x > 0`` by ratio."""
    return 2.0 ** round(math.log2(x))


def times(w, factor, name):
    """A weight of any frozen kind, or an adapter over one, times a power of two."""
    if isinstance(w, LoRA):
        return dataclasses.replace(w, base=times(w.base, factor, name), b=w.b * factor)
    if isinstance(w, RowScaled | NVFP4):
        return dataclasses.replace(w, scale=w.scale * factor)
    require(not isinstance(w, Leaf), f"{name} is a {type(w).__name__}, which cannot be scaled; stream with weights of another kind")
    return w * jnp.asarray(factor, w.dtype)
