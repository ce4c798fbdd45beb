"""Residual, LayerNorm, modulation and rows to FP8 as one Mosaic GPU kernel: a warpgroup holds a row in registers from loads to stores.

The reference is what ``ops.norm.normed`` says, then ``quant.formats.encode_fp8`` by row. Here the residual is rounded to bfloat16 once and the
norm is of what was rounded; nothing else is rounded before E4M3. All arithmetic is float32, the mean before the squares. Where a row holds NaN
or inf, its scale and its values are NaN.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.kernels.fp8 import VECTOR, WARPGROUP, WIDE, factors
from longlive_jax.kernels.nvfp4 import call


def fits(x):
    """Whether the kernel takes ``x``: bfloat16 ``[B,F,T,D]``, D a multiple of 1,024 up to 16,384."""
    return x.ndim == 4 and x.dtype == jnp.bfloat16 and x.size > 0 and x.shape[-1] % WARPGROUP == 0 and x.shape[-1] <= WIDE


def norm_rows(x, multiplier, addend, eps, y=None, gate=None):
    """``x [B,F,T,D]``, and E4M3 values ``[B,F,T,D]`` and float32 scales ``[B,F,T,1]`` of ``layer_norm(x) * multiplier + addend``.

    x must ``fit``. With y ``[B,F,T,D]``, x is ``x + y``, or ``x + y * gate``. multiplier, addend and gate: bfloat16 ``[B,F,1,D]`` or ``[D]``.
    """
    d = x.shape[-1]
    flat = lambda *arrays: tuple(a.reshape(-1, d) for a in arrays if a is not None)
    outputs = ((d,), jnp.float8_e4m3fn), ((), jnp.float32), *(() if y is None else (((d,), jnp.bfloat16),))
    body = functools.partial(norm_row, tokens=x.shape[2], eps=eps)
    values, scale, *total = call(body, flat(x, y), flat(multiplier, addend, gate), outputs, 1, 1, barriers=True)
    return (x if y is None else total[0].reshape(x.shape)), values.reshape(x.shape), scale.reshape(*x.shape[:-1], 1)


def norm_row(row, _, operands, outputs, *, tokens, eps):
    """One row. operands: x, y with a residual, multiplier, addend, the gate if there is one; outputs: values, scale, x with a residual."""
    (values_ref, scale_ref, *total_ref), d = outputs, operands[0].shape[-1]
    x_ref, *y_ref = operands[: 1 + len(total_ref)]
    multiplier, addend, *gate = operands[1 + len(total_ref) :]

    def load(ref, place):
        return plgpu.load(ref.at[place], layout=plgpu.Layout.WG_STRIDED((d,), VECTOR), optimized=False).astype(jnp.float32)

    of_frame = lambda ref: load(ref, 0 if ref.shape[0] == 1 else row // tokens)
    x = load(x_ref, row)
    if y_ref:
        y = load(y_ref[0], row)
        total = (x + (y * of_frame(gate[0]) if gate else y)).astype(jnp.bfloat16)
        total_ref[0][row] = total
        x = total.astype(jnp.float32)
    x = x - jnp.sum(x) * (1 / d)
    x = x * lax.rsqrt(jnp.sum(x * x) * (1 / d) + eps) * of_frame(multiplier) + of_frame(addend)
    scale, factor = factors(jnp.max(jnp.abs(x)))
    values_ref[row] = (x * factor).astype(jnp.float8_e4m3fn)
    scale_ref[row] = scale
