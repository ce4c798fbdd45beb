"""What stands between two products of a block: residual, LayerNorm, gain and bias or modulation."""

import functools

import jax
import jax.numpy as jnp

from longlive_jax import kernels
from longlive_jax.ops.low_precision import Rows, shard
from longlive_jax.quant.leaves import FP8
from longlive_jax.sharding import constrain, local

RESIDUAL = ("batch", "frames", None, None)  # [B,F,T,D]


def layer_norm(x, eps=1e-6):
    """LayerNorm without gain or bias over the last axis."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)).astype(x.dtype)


def normed(readers, x, multiplier, addend, eps, y=None, gate=None):
    """``x + y * gate`` and, of it, ``layer_norm(..) * multiplier + addend`` as the weights ``readers`` take it, both ``[B,F,T,D]``.

    x, y: ``[B,F,T,D]``; no ``gate``: ``x + y``; no ``y``: ``x``. multiplier, addend, gate: ``[B,F,1,D]`` or ``[D]``. Where all readers are FP8
    and the kernel runs, the second result is ``Rows``, and gradients are those of these expressions: rounding counts as the identity.
    """
    total = x if y is None else constrain(x + (y if gate is None else y * gate), *RESIDUAL)
    dense = layer_norm(total, eps) * multiplier + addend
    if not by_kernel(readers, x):
        return total, dense
    made, values, scale = norm_shards(*jax.lax.stop_gradient((x, multiplier, addend, y, gate)), eps)
    return instead(made, total), Rows(values, scale, dense)


def by_kernel(readers, x):
    """Whether the kernel runs: on Hopper, in bfloat16, for sizes that fit."""
    if not all(isinstance(w, FP8) for w in readers) or kernels.chosen(kernels.FP8_NORM, None) == kernels.REFERENCE:
        return False
    from longlive_jax.kernels import norm

    return norm.fits(x)


@functools.partial(jax.jit, static_argnums=5)  # one kernel for all layers
def norm_shards(x, multiplier, addend, y, gate, eps):
    """The kernel on the local shard."""
    from longlive_jax.kernels import norm

    names = shard(x)
    by_frame = lambda a: names if a is not None and a.ndim == x.ndim else ()
    body = lambda x, multiplier, addend, y, gate: norm.norm_rows(x, multiplier, addend, eps, y, gate)
    inputs = names, by_frame(multiplier), by_frame(addend), names, by_frame(gate)
    return local(body, inputs, (names,) * 3)(x, multiplier, addend, y, gate)


@jax.custom_vjp
def instead(made, plain):
    """``made``, with the gradient of ``plain``, which is not computed for the value alone."""
    return made


instead.defvjp(lambda made, plain: (made, None), lambda _, g: (None, g))
