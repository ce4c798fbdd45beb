"""Rows to FP8 as a Mosaic GPU kernel: one pass over memory, the row in registers between its largest magnitude and its values.

The reference is ``quant.formats.encode_fp8(x, -1)``, which XLA compiles to two passes over the input. Numbers are the same bit for bit: the
largest magnitude does not depend on an order, ``divide`` is correctly rounded, and the hardware's conversion rounds like ``to_e4m3``. Where
a row holds NaN or inf, its scale and its values are NaN.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.config import require
from longlive_jax.kernels.nvfp4 import call
from longlive_jax.quant.formats import E4M3_MAX, LEAST, divide

VECTOR = 8  # values a thread takes at a time: 16 bytes
WARP, WARPGROUP = 32 * VECTOR, 128 * VECTOR
NARROW, WIDE = 4096, 16384  # columns that a warp holds in registers, and a warpgroup
ROWS = plgpu.Layout.TILED(plgpu.Tiling(((4, WARP), (VECTOR,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)  # a warp a row


def fits(x):
    """Whether the kernel takes ``x``: bfloat16 ``[..., K]``, K a multiple of 256 up to 4,096 or of 1,024 up to 16,384."""
    k = x.shape[-1] if x.ndim else 0
    return x.dtype == jnp.bfloat16 and x.size > 0 and (k % WARP == 0 if k <= NARROW else k % WARPGROUP == 0 and k <= WIDE)


def quantise_rows(x):
    """``encode_fp8(x, -1)`` by the kernel: bfloat16 ``[..., K]`` -> E4M3 values ``[..., K]``, float32 scales ``[..., 1]``.

    Raises ``ConfigError`` for what does not fit. Narrow rows are taken four at a time: another number of them costs a copy of ``x``.
    """
    require(
        fits(x),
        f"the FP8 quantise kernel takes bfloat16 of [..., K], K a multiple of {WARP} up to {NARROW} or of {WARPGROUP} up to {WIDE}, "
        f"not {x.dtype} {tuple(x.shape)}; use quant.formats.encode_fp8",
    )
    k = x.shape[-1]
    outputs = (((k,), jnp.float8_e4m3fn), ((), jnp.float32))
    tile = 4 if k <= NARROW else 1
    values, scales = call(quantise_tile, (x.reshape(-1, k),), (), outputs, tile, tile, barriers=True)
    return values.reshape(x.shape), scales.reshape(*x.shape[:-1], 1)


def quantise_tile(index, rows, operands, outputs):
    """Four narrow rows, a warp each, or one wide row."""
    (x_ref,), (values_ref, scales_ref) = operands, outputs
    k = x_ref.shape[-1]
    place, layout = (rows, ROWS) if k <= NARROW else (index, plgpu.Layout.WG_STRIDED((k,), VECTOR))
    x = plgpu.load(x_ref.at[place], layout=layout, optimized=False)
    scale, factor = factors(jnp.max(jnp.abs(x), -1).astype(jnp.float32))
    factor = plgpu.layout_cast(lax.broadcast_in_dim(factor, x.shape, tuple(range(factor.ndim))), layout)
    values_ref[place] = (x.astype(jnp.float32) * factor).astype(jnp.float8_e4m3fn)
    scales_ref[place] = scale


def factors(amax):
    """The scale of a row, and what its values are multiplied by, from its largest magnitude in float32."""
    scale = jnp.where(amax < LEAST, 0.0, divide(amax, E4M3_MAX))
    scale = jnp.where(amax < jnp.inf, scale, jnp.nan)
    return scale, jnp.where(scale == 0, 0.0, divide(jnp.ones_like(scale), scale))
