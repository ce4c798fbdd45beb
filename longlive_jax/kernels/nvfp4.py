"""NVFP4 quantisation and dequantisation as Mosaic GPU kernels: one pass over memory each, in registers.

The references are ``quant.formats.encode_nvfp4`` and ``decode_nvfp4``. XLA compiles the first to two passes over the input with intermediate
scales in float32, the second to a pass through unpacked codes; here a thread owns one block of 16 values, as eight words of two bfloat16:
the largest magnitude, the scale, the codes and their packing need no other thread.

Every step is integer and float32 arithmetic that any GPU has, so that these kernels run on Hopper and in the interpreter too: Mosaic casts to
and from E2M1 exist on Blackwell alone. Codes and scales are those of the reference bit for bit, except that

- the choosing rules measure the errors of a block otherwise, and blocks whose errors differ by less than 2**-16 of them may choose
  differently: at most 1e-4 of them in normal data, and none whose two tries decode to the same values; with an amax below 2**-80,
  blocks of small scales keep 6;
- codes of a block that holds NaN or inf are unspecified; its scale is NaN, as in the reference;
- stochastic rounding draws 16 bits a value from a hash of the position and of two words of the key, not from ``jax.random``.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.config import require
from longlive_jax.quant import formats
from longlive_jax.quant.formats import BLOCK, LEAST, STATIC, as_bits, as_float, divide, full_scale, refine, value_e4m3

WORDS = BLOCK // 2  # 32-bit words, of two bfloat16 each, of a block
TILE, LEAST_TILE = 512, 128  # blocks of a program of 128 threads: four a thread, or one where registers are short or blocks are few
# A thread holds whole rows [8 words] of a tile.
LAYOUT = plgpu.Layout.TILED(plgpu.Tiling(((128, WORDS), (32, WORDS))), warp_dims=(-4,), lane_dims=(-2,), vector_dim=-1)
# A thread holds half a row: what a warp stores at a time are 512 bytes without gaps.
HALVES = plgpu.Layout.TILED(plgpu.Tiling(((64, WORDS), (16, WORDS), (WORDS // 2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


# ---- quantise ------------------------------------------------------------------------------------------------------------------------------


def fits(x):
    """Whether ``quantise`` takes ``x``: bfloat16 ``[..., K]``, K a multiple of 16."""
    return x.dtype == jnp.bfloat16 and x.ndim >= 1 and x.size > 0 and x.shape[-1] % BLOCK == 0


def quantise(x, rule="static_6", *, key=None, amax=None):
    """``encode_nvfp4(x, rule, key=key, amax=amax)`` in 1 x 16 blocks, by the kernel: (packed codes, E4M3 scales, float32 scale).

    x: bfloat16 ``[..., K]``, K a multiple of 16; anything else raises ``ConfigError``. Without ``amax``, XLA reads ``x`` once more for it.
    Blocks are taken 128 at a time: another number of them costs a copy of ``x`` with zeros after its end.
    """
    formats.require_rule(rule)
    require(
        fits(x),
        f"the NVFP4 quantise kernel takes bfloat16 of [..., a multiple of {BLOCK}], not {x.dtype} {tuple(x.shape)}; "
        "pad or cast it, or use quant.formats.encode_nvfp4",
    )
    amax = formats.largest_magnitude(x.astype(jnp.float32)) if amax is None else jnp.asarray(amax, jnp.float32)
    peak, top = full_scale(rule)
    one = jnp.float32(1)
    encode = jnp.where(amax < LEAST, 0.0, divide(one * peak * top, amax))
    short = as_float((as_bits(divide(amax, peak * top)) + 8) & jnp.uint32(0xFFFFFFF0))  # 20 bits: a block scale times it is exact
    factors = jnp.stack([encode, divide(one, encode), short])
    bits = () if key is None else (jax.random.bits(key, (4,), jnp.uint32),)
    words = lax.bitcast_convert_type(x.reshape(-1, WORDS, 2), jnp.uint32)
    codes, scales = call(
        functools.partial(quantise_tile, rule=rule),
        (words,),
        (factors, *bits),
        (((WORDS,), jnp.uint8), ((), jnp.uint8)),
        TILE if rule in STATIC else LEAST_TILE,
    )
    scales = lax.bitcast_convert_type(scales, jnp.float8_e4m3fn)
    lead, columns = x.shape[:-1], x.shape[-1] // BLOCK
    return codes.reshape(*lead, columns * WORDS), scales.reshape(*lead, columns), formats.tensor_scale(amax, rule)


def call(body, arrays, shared, outputs, tile=TILE, least=LEAST_TILE, barriers=False):
    """Run ``body(tile's index, its rows, refs of all operands, refs of the outputs)`` over tiles of ``tile`` blocks, or of ``least``.

    arrays: ``[blocks, ...]``, padded with zeros to a multiple of ``least``. shared: operands that every tile reads whole. outputs:
    ``(shape, dtype)`` after the axis of blocks. barriers: around every store, where threads share more than what they read.
    """
    blocks = arrays[0].shape[0]
    tile = tile if blocks % tile == 0 else least
    operands = [*(formats.pad_to(a, tile, 0) for a in arrays), *shared]
    padded = operands[0].shape[0]

    def kernel(*refs):
        index = lax.axis_index("tile")
        body(index, pl.ds(index * tile, tile), refs[: len(operands)], refs[len(operands) :])

    out = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((padded, *shape), dtype) for shape, dtype in outputs],
        grid=(padded // tile,),
        grid_names=("tile",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=not barriers),
    )(*operands)
    return [y[:blocks] for y in out]


def quantise_tile(index, rows, operands, outputs, *, rule):
    words_ref, factors, *bits = operands
    codes_ref, scales_ref = outputs
    words = plgpu.load(words_ref.at[rows], layout=LAYOUT, optimized=False)
    pair = as_float(words << 16), as_float(words & jnp.uint32(0xFFFF0000))
    largest = jnp.max(jnp.maximum(jnp.abs(pair[0]), jnp.abs(pair[1])), 1)
    wanted = over(largest, full_scale(rule)[0]) * factors[0]
    stochastic = bool(bits)
    noise = [draw(words.shape, index, bits[0][2 * i], bits[0][2 * i + 1]) if stochastic else None for i in range(2)]
    (scale, scale_code), bits16 = near_e4m3(wanted), noise[0]
    if rule in STATIC:
        factor = divide(jnp.ones_like(scale), factors[1] * scale)
    else:
        scale4, scale_code4 = near_e4m3(wanted * 1.5)
        both = [jnp.maximum(s, 2.0**-9) for s in (scale, scale4)]
        inverse = 1 / (both[0] * both[1])  # one division for the two
        inverse, inverse4 = (s * inverse * factors[0] for s in reversed(both))
        less = 1 - 2.0**-16  # what the rounding of the tensor scale makes of equal errors
        error6 = error(pair, scale * factors[2], inverse, rule, noise[0])
        four = error(pair, scale4 * factors[2], inverse4, rule, noise[1]) < error6 * less
        scale, inverse = jnp.where(four, scale4, scale), jnp.where(four, inverse4, inverse)
        scale_code = jnp.where(four, scale_code4, scale_code)
        factor = refine(inverse, jnp.ones_like(scale), jnp.maximum(factors[1] * scale, 2.0**-126), inverse)
        bits16 = jnp.where(spread(four.astype(jnp.uint32)) > 0, noise[1], noise[0]) if stochastic else None
    factor = spread(jnp.where(scale == 0, 0.0, factor))
    limit = spread(jnp.where(scale == 0, -jnp.inf, 0.0))
    low, high = (code(jnp.abs(x), factor, r, x < limit) for x, r in zip(pair, halves(bits16), strict=True))
    codes_ref[rows] = (low + (high << 4)).astype(jnp.uint8)
    scales_ref[rows] = jnp.where(largest < jnp.inf, scale_code, jnp.uint32(0x7F)).astype(jnp.uint8)


def error(pair, scale, inverse, rule, noise):
    """The error of a try by ``rule``, with the scale of a code and about its inverse; with random ``noise`` if it rounds so.

    Scales are exact: two tries that decode a value alike have the same error of it, whether products are contracted or not. What lies between
    two codes may get either of them.
    """
    magnitudes, inverse = [jnp.abs(x) for x in pair], spread(inverse)
    if noise is None:
        values, scale = [near_e2m1(m, inverse) for m in magnitudes], scale * 2.0**24
    else:
        values = [e2m1_value(code(m, inverse, r)) for m, r in zip(magnitudes, halves(noise), strict=True)]
    errors = [jnp.abs(v * spread(scale) - m) for v, m in zip(values, magnitudes, strict=True)]
    if rule == "abs_max":
        return jnp.max(jnp.maximum(*errors), 1)
    first, second = (jnp.sum(e * e if rule == "mse" else e, 1) for e in errors)
    return first + second


def halves(noise):
    return (None, None) if noise is None else (noise & 0xFFFF, noise >> 16)


def spread(x, layout=LAYOUT):
    """``[blocks] -> [blocks, WORDS]``"""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (*x.shape, WORDS), (0,)), layout)


# ---- number formats in 32-bit arithmetic ---------------------------------------------------------------------------------------------------


def over(a, peak):
    """``a / peak`` for 4 or 6, correctly rounded: the remainder's differences are exact."""
    q = a * jnp.float32(1 / peak)
    return q if peak == 4 else q + (a - 4 * q - 2 * q) * jnp.float32(1 / peak)


def near_e4m3(x):
    """The E4M3 next to x >= 0, up to 448: its value, NaN for NaN, and in the last byte of a uint32 its code."""
    x = jnp.minimum(x, formats.E4M3_MAX)
    power = as_bits(jnp.maximum(x, 2.0**-6)) & 0x7F800000
    shift = as_float(power) * 2.0**20  # in whose sum with x the last bit is the spacing
    return x + shift - shift, as_bits(x + shift) + (power >> 20) - (121 << 3)


def near_e2m1(magnitude, inverse):
    """2**-24 times an E2M1 value next to y, ``magnitude * inverse``, without its code; past 6 it saturates.

    The last bit of 1 / 3 + (y / 2.08714)**2 / 6, which y is added to, is half of 2**-24; all of it from y = 2.08714 on; twice that from double
    that y on. The two are between codes, and 1e-4 from all y of bfloat16 values and amax: near them the sum may have another power of two.
    """
    most = 6.0**0.5 * 2.08714  # 5.11: more is rounded to 6 as well
    part = saturate(magnitude * (inverse * (1 / most)))
    shift = part * part + 1 / 3
    return part * (most * 2.0**-24) + shift - shift


def code(magnitude, factor, noise=None, negative=False):
    """In the last byte of a uint32, the E2M1 code next to a, ``magnitude * factor``, ties to even, with the sign; past 6 it saturates.

    An eighth of the code is the least of three lines, in float32 from 2**20 on, whose last bit is an eighth; a one is the sign. The third,
    where a is 8 at most, is 6 + a / 10, a tenth without its last bit: contracted, as on GPUs, it is 6.5 between 5 and the next float32.
    No line holds a itself, a rounded product that must not be contracted. noise: 16 random bits in a uint32; then stochastic, upwards if
    noise / 2**16 >= 1 - remainder, in float32 from 2**4 on, of whose last bits 16 are the remainder; the third is 4 + a / 2, a fourth 7.
    """
    if noise is None:
        base, a = 2.0**20, saturate(magnitude * (factor * 0.125))
        lines = a * 2 + base, a + (base + 0.25), a * float.fromhex("0x1.999998p-4") + (base + 0.75)
    else:
        base, a = 2.0**4, magnitude * factor
        lines = a * 0.25 + base, a * 0.125 + (base + 0.25), a * 0.0625 + (base + 0.5), jnp.full_like(a, base + 0.875)
    eighths = as_float(functools.reduce(jnp.minimum, map(as_bits, lines))) + jnp.where(negative, 1.0, 0.0)
    return as_bits(eighths) if noise is None else as_bits(eighths) - as_bits(jnp.float32(base)) + noise >> 16


def saturate(x):
    """``x >= 0`` up to 1, NaN too: two selects, which become a part of the multiplication that made x."""
    x = jnp.where(x < 1, x, 1.0)
    return jnp.where(x > 0, x, 0.0)


def e2m1_value(code):
    """``formats.value_e2m1`` of uint32 codes 0..15."""
    shifted = as_float(((code & 7) << 22) + (126 << 23))  # right from code 2 on; 0.5 and 0.75 for codes 0 and 1
    magnitude = jnp.where(shifted < 1, 2 * shifted - 1, shifted)
    return as_float(as_bits(magnitude) | (code & 8) << 28)


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
    codes = plgpu.load(codes_ref.at[rows], layout=HALVES, optimized=False).astype(jnp.uint32)
    bits = plgpu.load(scales_ref.at[rows], layout=HALVES.reduce(1), optimized=False).astype(jnp.uint32)
    value = value_e4m3(bits & 0x7F)
    scale = spread(as_float(as_bits(value) | (bits & 0x80) << 24), HALVES)
    half = lambda c: bfloat16_bits(e2m1_value(c) * scale * tensor[0])
    outputs[0][rows] = half(codes & 15) | half(codes >> 4) << 16


def bfloat16_bits(x):
    return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
