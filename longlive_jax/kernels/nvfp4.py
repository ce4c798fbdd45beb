"""NVFP4 quantisation and dequantisation as Mosaic GPU kernels: one pass over memory each, in registers.

The references are ``quant.formats.encode_nvfp4`` and ``decode_nvfp4``. XLA compiles the first to two passes over the input with intermediate
scales in float32, the second to a pass through unpacked codes; here a thread owns one block of 16 values, as eight words of two bfloat16:
the largest magnitude, the scale, the codes and their packing need no other thread.

Every step is integer and float32 arithmetic that any GPU has, so that these kernels run on Hopper and in the interpreter too: Mosaic casts to
and from E2M1 exist on Blackwell alone. Codes and scales are those of the reference bit for bit in the interpreter, except that

- on a GPU Mosaic divides to within two units in the last place, so that what lies on a boundary of rounding may fall to its other side;
- ``mse`` and ``mae`` add up the errors of a block in another order, and blocks whose two tries differ by rounding may choose differently;
- codes of a block that holds NaN or inf are unspecified; its scale is NaN, as in the reference;
- stochastic rounding draws 16 bits a value from a hash of the position and of two words of the key, not from ``jax.random``.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.config import require
from longlive_jax.quant.formats import BLOCK, E4M3_MAX, LEAST, RULES, STATIC, divide, full_scale, pad_to, require_rule, tensor_scale

WORDS = BLOCK // 2  # 32-bit words, of two bfloat16 each, of a block
TILE, LEAST_TILE = 512, 128  # blocks of a program of 128 threads: four a thread, or one where registers are short or blocks are few
# A thread holds whole rows [8 words] of a tile.
LAYOUT = plgpu.Layout.TILED(plgpu.Tiling(((128, WORDS), (32, WORDS))), warp_dims=(-4,), lane_dims=(-2,), vector_dim=-1)

as_float = lambda x: lax.bitcast_convert_type(x, jnp.float32)
as_bits = lambda x: lax.bitcast_convert_type(x, jnp.uint32)


# ---- quantise ------------------------------------------------------------------------------------------------------------------------------


def quantise(x, rule="static_6", *, key=None, amax=None):
    """``encode_nvfp4(x, rule, key=key, amax=amax)`` in 1 x 16 blocks, by the kernel: (packed codes, E4M3 scales, float32 scale).

    x: bfloat16 ``[..., K]``, K a multiple of 16; anything else raises ``ConfigError``. Without ``amax``, XLA reads ``x`` once more for it.
    Blocks are taken 128 at a time: another number of them costs a copy of ``x`` with zeros after its end.
    """
    require_rule(rule, RULES)
    require(
        x.dtype == jnp.bfloat16 and x.ndim >= 1 and x.size > 0 and x.shape[-1] % BLOCK == 0,
        f"the NVFP4 quantise kernel takes bfloat16 of [..., a multiple of {BLOCK}], not {x.dtype} {tuple(x.shape)}; "
        "pad or cast it, or use quant.formats.encode_nvfp4",
    )
    amax = jnp.max(jnp.abs(x)).astype(jnp.float32) if amax is None else jnp.asarray(amax, jnp.float32)
    peak, top = full_scale(rule)
    encode = jnp.where(amax < LEAST, 0.0, peak * top / amax)
    factors = jnp.stack([encode, 1 / encode, divide(amax, peak * top), amax])
    bits = jnp.zeros(4, jnp.uint32) if key is None else jax.random.bits(key, (4,), jnp.uint32)
    words = lax.bitcast_convert_type(x.reshape(-1, WORDS, 2), jnp.uint32)
    codes, scales = call(
        functools.partial(quantise_tile, rule=rule, stochastic=key is not None),
        (words,),
        (factors, bits),
        (((WORDS,), jnp.uint8), ((), jnp.uint8)),
        TILE if rule in STATIC else LEAST_TILE,
    )
    scales = lax.bitcast_convert_type(scales, jnp.float8_e4m3fn)
    lead, columns = x.shape[:-1], x.shape[-1] // BLOCK
    return codes.reshape(*lead, columns * WORDS), scales.reshape(*lead, columns), tensor_scale(amax, rule)


def call(body, arrays, shared, outputs, tile=TILE):
    """Run ``body(tile's index, its rows, refs of all operands, refs of the outputs)`` over tiles of blocks.

    arrays: ``[blocks, ...]``. shared: operands that every tile reads whole. outputs: ``(shape, dtype)`` after the axis of blocks.
    """
    blocks = arrays[0].shape[0]
    tile = tile if blocks % tile == 0 else LEAST_TILE
    operands = [*(pad_to(a, tile, 0) for a in arrays), *shared]
    padded = operands[0].shape[0]

    def kernel(*refs):
        index = lax.axis_index("tile")
        body(index, pl.ds(index * tile, tile), refs[: len(operands)], refs[len(operands) :])

    out = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((padded, *shape), dtype) for shape, dtype in outputs],
        grid=(padded // tile,),
        grid_names=("tile",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(*operands)
    return [y[:blocks] for y in out]


def quantise_tile(index, rows, operands, outputs, *, rule, stochastic):
    words_ref, factors, bits = operands
    codes_ref, scales_ref = outputs
    words = plgpu.load(words_ref.at[rows], layout=LAYOUT, optimized=False)
    pair = as_float(words << 16), as_float(words & jnp.uint32(0xFFFF0000))
    largest = jnp.max(jnp.maximum(jnp.abs(pair[0]), jnp.abs(pair[1])), 1)
    wanted = divide(largest, full_scale(rule)[0]) * factors[0]
    noise = [draw(words.shape, index, bits[2 * i], bits[2 * i + 1]) if stochastic else None for i in range(2)]
    if rule in STATIC:
        scales = e4m3_code(wanted)
        codes = block_codes(pair, e4m3_value(scales), factors[1], noise[0])
    else:
        scales, codes = better(pair, wanted, factors, rule, noise)
    codes_ref[rows] = (codes[0] | codes[1] << 4).astype(jnp.uint8)
    scales_ref[rows] = jnp.where(largest < jnp.inf, scales, jnp.uint32(0x7F)).astype(jnp.uint8)


def better(pair, wanted, factors, rule, noise):
    """Scales and codes of the better of two tries, block by block."""
    tries = []
    for stretch, bits in zip((1.0, 1.5), noise, strict=True):
        scales = e4m3_code(wanted * stretch)
        scale = e4m3_value(scales)
        codes = block_codes(pair, scale, factors[1], bits)
        errors = [decoded(e2m1_value(c), scale, factors, rule) - x for c, x in zip(codes, pair, strict=True)]
        if rule == "mse":
            error = jnp.sum(errors[0] * errors[0] + errors[1] * errors[1], 1)
        elif rule == "mae":
            error = jnp.sum(jnp.abs(errors[0]) + jnp.abs(errors[1]), 1)
        else:
            error = jnp.max(jnp.maximum(jnp.abs(errors[0]), jnp.abs(errors[1])), 1)
        tries.append((scales, codes, error))
    (scales6, codes6, error6), (scales4, codes4, error4) = tries
    four = error4 < error6
    wide = spread(four.astype(jnp.uint32)) > 0
    return jnp.where(four, scales4, scales6), [jnp.where(wide, a, b) for a, b in zip(codes4, codes6, strict=True)]


def decoded(values, scale, factors, rule):
    """What codes stand for, in the reference's order for the rules in which many blocks are ties; ``mse`` spares the division a value."""
    if rule == "mse":
        return values * spread(scale * factors[2])
    return divide(values * spread(scale) * factors[3], math.prod(full_scale(rule)))


def block_codes(pair, scale, inverse, noise):
    """E2M1 codes of both halves of the words, as uint32."""
    factor = spread(jnp.where(scale == 0, 0.0, 1 / (inverse * scale)))
    halves = (None, None) if noise is None else (noise & 0xFFFF, noise >> 16)
    return [e2m1_code(x * factor, r) for x, r in zip(pair, halves, strict=True)]


def spread(x):
    """``[blocks] -> [blocks, WORDS]``"""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (*x.shape, WORDS), (0,)), LAYOUT)


# ---- number formats in 32-bit arithmetic ---------------------------------------------------------------------------------------------------


def e2m1_code(y, noise=None):
    """``formats.round_e2m1`` as uint32; with ``noise``, 16 random bits in a uint32, stochastic: upwards if noise / 2**16 >= 1 - remainder."""
    a = jnp.minimum(jnp.abs(y), 6.0)
    bits = as_bits(a)
    if noise is None:
        near = as_bits(a + 2.0**22) - as_bits(jnp.float32(2.0**22))  # there the spacing of float32 is 0.5
        far = bits + 0x1FFFFF + (bits >> 22 & 1)
    else:
        near = (a * 2.0**17).astype(jnp.int32).astype(jnp.uint32) + noise >> 16
        far = bits + (noise << 6)
    far = (far >> 22) - 252  # exponent and one bit of mantissa; 1.0 has code 2
    return jnp.where(a < 2, near, far) | jnp.where(y < 0, jnp.uint32(8), jnp.uint32(0))


def e2m1_value(code):
    """``formats.value_e2m1`` of uint32 codes 0..15."""
    shifted = as_float(((code & 7) << 22) + (126 << 23))  # right from code 2 on; 0.5 and 0.75 for codes 0 and 1
    magnitude = jnp.where(shifted < 1, 2 * shifted - 1, shifted)
    return as_float(as_bits(magnitude) | (code & 8) << 28)


def e4m3_code(x):
    """Bits of the nearest E4M3, ties to even, of a float32 that is not negative, as uint32; 448 where it is larger."""
    x = jnp.minimum(x, E4M3_MAX)
    bits = as_bits(x)
    near = as_bits(x + 2.0**14) - as_bits(jnp.float32(2.0**14))  # subnormal: multiples of 2**-9
    far = (bits + 0x7FFFF + (bits >> 20 & 1) >> 20) - (120 << 3)
    return jnp.where(x < 2.0**-6, near, far)


def e4m3_value(code):
    """Float32 value of E4M3 bits 0..0x7F in a uint32; NaN for 0x7F."""
    value = jnp.where(code < 8, code.astype(jnp.int32).astype(jnp.float32) * 2.0**-9, as_float((code << 20) + (120 << 23)))
    return jnp.where(code == 0x7F, jnp.nan, value)


def draw(shape, index, seed, other):
    """32 bits for every word of a tile: a hash of its position in the tensor and of two words of the key."""
    rows, words = (plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, shape, d), LAYOUT) for d in (0, 1))
    x = ((index * shape[0] + rows) * WORDS + words).astype(jnp.uint32) + seed
    x = (x ^ x >> 16) * jnp.uint32(0x7FEB352D)
    x = (x ^ x >> 15 ^ other) * jnp.uint32(0x846CA68B)
    return x ^ x >> 16


# ---- dequantise ----------------------------------------------------------------------------------------------------------------------------


def dequantise(codes, scales, scale):
    """``decode_nvfp4(codes, scales, scale, bfloat16)`` by the kernel, bit for bit: ``[..., K/2]`` and ``[..., K/16] -> [..., K]``.

    Raises ``ConfigError`` where codes and scales do not belong together.
    """
    require(
        codes.dtype == jnp.uint8
        and scales.dtype == jnp.float8_e4m3fn
        and codes.size > 0
        and codes.shape == (*scales.shape[:-1], scales.shape[-1] * WORDS),
        f"the NVFP4 dequantise kernel takes uint8 [..., K/2] and float8_e4m3fn [..., K/16], not {codes.dtype} {tuple(codes.shape)} and "
        f"{scales.dtype} {tuple(scales.shape)}; encode with quant.formats.encode_nvfp4, or decode with decode_nvfp4",
    )
    bits = lax.bitcast_convert_type(scales.reshape(-1), jnp.uint8)
    tensor = jnp.asarray(scale, jnp.float32).reshape(1)
    (words,) = call(dequantise_tile, (codes.reshape(-1, WORDS), bits), (tensor,), (((WORDS,), jnp.uint32),))
    return lax.bitcast_convert_type(words, jnp.bfloat16).reshape(*codes.shape[:-1], -1)


def dequantise_tile(index, rows, operands, outputs):
    codes_ref, scales_ref, tensor = operands
    codes = plgpu.load(codes_ref.at[rows], layout=LAYOUT, optimized=False).astype(jnp.uint32)
    bits = plgpu.load(scales_ref.at[rows], layout=LAYOUT.reduce(1), optimized=False).astype(jnp.uint32)
    value = e4m3_value(bits & 0x7F)
    scale = spread(as_float(as_bits(value) | (bits & 0x80) << 24))
    half = lambda c: bfloat16_bits(e2m1_value(c) * scale * tensor[0])
    outputs[0][rows] = half(codes & 15) | half(codes >> 4) << 16


def bfloat16_bits(x):
    return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
