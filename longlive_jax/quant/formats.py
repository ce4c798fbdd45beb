"""Number formats: NVFP4, MXFP4 and FP8 as pure functions between arrays. Every one of them is jittable, and works under vmap.

The contraction axis is last. Four-bit formats store E2M1 codes, a sign over 0, .5, 1, 1.5, 2, 3, 4, 6: two codes a byte, the even element in
the low nibble (spec/training.md §3.2).

========  =================  =============================================  ===================
format    block              value                                          bits a value
========  =================  =============================================  ===================
NVFP4     1x16 or 16x16      code * E4M3 block scale * float32 tensor scale  4.5 (as stored here)
MXFP4     1x32               code * E8M0 block scale                        4.25
FP8       a row, or all      E4M3 * float32 scale                           8
========  =================  =============================================  ===================

Rules of NVFP4 say which code the largest value of a block is given: ``static_6`` and ``static_4`` are what they say; ``mse``, ``mae`` and
``abs_max`` try both in every block and keep 4 only where its error is strictly smaller. These three keep block scales at or below 256, so that
the scale of the second try, 1.5 times as large, is still an E4M3 number.

Values that are not finite never pass for numbers: what shares their scale decodes to NaN (see each encoder). ``check_finite`` refuses them by
name before a weight is encoded.

Float32 operations are done in the order of the reference, so that codes and scales agree byte for byte, compiled or not, on a CPU and on a GPU.
Three things that compilers do would prevent it: XLA replaces a division by one number by a product with its reciprocal and 1 / (a / b) by
b / a, GPUs divide to within two units in the last place (``divide`` corrects the one and withstands the other), and XLA drops a cast to E4M3
that is followed by one back, as excess precision (``to_e4m3`` rounds in integers).
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Float8e4m3fn, Float32, Shaped, UInt8

from longlive_jax.config import require

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # values of codes 0..7; codes 8..15 are their negatives
E2M1_MAX = 6.0
E4M3_MAX = 448.0
BLOCK = 16  # values a block scale of NVFP4 covers along the last axis, and along both axes of a square block
MX_BLOCK = 32
STATIC = {"static_6": 6.0, "static_4": 4.0}  # rule -> code of the largest value of a block
CHOOSING = ("mse", "mae", "abs_max")  # "four over six": by the sum of squares, the sum of magnitudes, or the largest magnitude of the error
RULES = (*STATIC, *CHOOSING)
ROW_TILE, COLUMN_TILE = 128, 4  # of the blocked layout of scales
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)  # the published signs of the Hadamard transform
LEAST = 2.0**-100  # an amax below it counts as zero: its scales would leave the range of float32


def check_finite(name, x):
    """Refuse a weight that holds NaN or inf: raises ``ConfigError`` with its name. Runs on the host; ``x`` is any array of numbers."""
    xp = jnp if isinstance(x, jax.Array) else np
    nan, inf = int(xp.sum(xp.isnan(x))), int(xp.sum(xp.isinf(x)))
    require(
        nan + inf == 0,
        f"weight {name} {tuple(x.shape)} holds {nan} NaN and {inf} inf; a scale over them would spoil its whole block, row or tensor; "
        "mend the checkpoint, or leave this weight out of the rules",
    )


def pad_to(x, multiple, axis=-1):
    """``x`` with zeros after its end along ``axis``, up to a multiple of ``multiple``. Zeros encode as zeros and change no scale."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)


def require_multiple(x, axis, block, what):
    size = x.shape[axis] if x.ndim >= -axis else 0
    require(
        x.ndim >= -axis and size % block == 0,
        f"{what}: axis {axis} of shape {tuple(x.shape)} has size {size}, which is no multiple of {block}; "
        f"pad it to {-(-size // block) * block} with pad_to(x, {block}, {axis}), or leave this weight in its own type",
    )


def require_rule(rule, rules=RULES):
    require(rule in rules, f"rule={rule!r} is not one of {', '.join(rules)}; use one of them")


def divide(a, b):
    """``a / b`` for b > 0, correctly rounded also where a device divides to within two units in the last place.

    The guard of ``b`` keeps it from becoming a reciprocal, and, where it is a product, from being contracted into the terms of ``refine``.
    """
    b = jnp.maximum(jnp.where(jnp.abs(a) < -1, 1.0, jnp.float32(b)), jnp.finfo(jnp.float32).tiny)
    return refine(a / b, a, b)


def refine(q, a, b, inverse=None):
    """The nearest float32 to ``a / b`` from a ``q`` near it, by the remainder, whose terms are exact: products of 12 bits by 12.

    inverse: a number near 1 / b, where one is at hand.
    """
    q1, b1 = (as_float((as_bits(y) + 0x800) & jnp.uint32(0xFFFFF000)) for y in (q, b))
    q2, b2 = q - q1, b - b1
    rest = a - q1 * b1 - q1 * b2 - q2 * b1 - q2 * b2
    more = rest / b if inverse is None else rest * inverse
    return jnp.where(jnp.abs(rest) <= jnp.abs(a) * 2.0**-20, q + more, q)  # not where a term overflowed, or was flushed to zero


as_float = lambda x: jax.lax.bitcast_convert_type(x, jnp.float32)
as_bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.uint32)


def largest_magnitude(x, axis=None, keepdims=False):
    """Of float32, NaN where there is one: by its bits, because XLA's largest of 1,024 and more floats on a CPU forgets NaN."""
    return as_float(jnp.max(as_bits(jnp.abs(x)), axis, keepdims=keepdims, initial=0))


# ---- E4M3 ----------------------------------------------------------------------------------------------------------------------------------


def code_e4m3(x):
    """Bits of the nearest E4M3, ties to even, of a float32 that is not negative, as uint32; 448 where it is larger, any number where NaN."""
    x = jnp.minimum(x, E4M3_MAX)
    bits = as_bits(x)
    near = as_bits(x + 2.0**14) - as_bits(jnp.float32(2.0**14))  # subnormal: multiples of 2**-9
    far = (bits + 0x7FFFF + (bits >> 20 & 1) >> 20) - (120 << 3)
    return jnp.where(x < 2.0**-6, near, far)


def value_e4m3(code):
    """Float32 value of E4M3 bits 0..0x7F in a uint32; NaN for 0x7F."""
    value = jnp.where(code < 8, code.astype(jnp.int32).astype(jnp.float32) * 2.0**-9, as_float((code << 20) + (120 << 23)))
    return jnp.where(code == 0x7F, jnp.nan, value)


def to_e4m3(x: Float32[Array, "..."]) -> Float8e4m3fn[Array, "..."]:
    """The nearest E4M3, ties to even; magnitudes past 448 saturate, NaN stays. Unlike a cast, no compiler takes it for excess precision."""
    bits = jnp.where(jnp.isnan(x), 0x7F, code_e4m3(jnp.abs(x)) | as_bits(x) >> 31 << 7)
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint8), jnp.float8_e4m3fn)


# ---- E2M1 ----------------------------------------------------------------------------------------------------------------------------------


def round_e2m1(y: Float[Array, "..."], key=None) -> UInt8[Array, "..."]:
    """Codes 0..15 of ``y``, one a byte: to nearest with ties to the even code, or stochastic with a ``jax.random`` key.

    Magnitudes past 6, inf too, saturate; NaN gives code 0. A negative value that rounds to zero keeps its sign (code 8); -0.0 does not.
    Stochastic rounding goes up with the probability of the distance from the lower neighbour, so its mean is ``y`` for |y| <= 6.
    """
    a = jnp.minimum(jnp.abs(y.astype(jnp.float32)), E2M1_MAX)
    steps = jnp.where(a < 2, 2 * a, jnp.where(a < 4, a, a / 2))  # magnitude in units of the local spacing
    if key is None:
        whole = jnp.round(steps)
    else:
        whole = jnp.floor(steps)
        whole += jax.random.uniform(key, y.shape) < steps - whole
    code = whole + jnp.where(a < 2, 0, jnp.where(a < 4, 2, 4))
    code = jnp.where(jnp.isnan(a), 0, code).astype(jnp.uint8)
    return code | jnp.where(y < 0, 8, 0).astype(jnp.uint8)


def value_e2m1(codes: UInt8[Array, "..."]) -> Float32[Array, "..."]:
    """Values of codes, one a byte."""
    magnitude = (codes & 7).astype(jnp.float32)
    magnitude = jnp.where(magnitude < 4, magnitude / 2, jnp.where(magnitude < 6, magnitude - 2, 2 * magnitude - 8))
    return jnp.where(codes > 7, -magnitude, magnitude)


def pack(codes: UInt8[Array, "... K"]) -> UInt8[Array, "... K//2"]:
    """Two codes a byte, the even element in the low nibble. K must be even."""
    require_multiple(codes, -1, 2, "pack")
    pairs = codes.reshape(*codes.shape[:-1], -1, 2)
    return pairs[..., 0] | pairs[..., 1] << 4


def unpack(packed: UInt8[Array, "... K2"]) -> UInt8[Array, "... 2*K2"]:
    """The codes of ``pack``, one a byte."""
    return jnp.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def as_float4(packed: UInt8[Array, "... K2"]) -> Array:
    """The packed codes as ``float4_e2m1fn [..., 2*K2]``, the type that block-scaled products take."""
    return jax.lax.bitcast_convert_type(packed, jnp.float4_e2m1fn).reshape(*packed.shape[:-1], -1)


# ---- NVFP4 ---------------------------------------------------------------------------------------------------------------------------------


def full_scale(rule):
    """(largest code, largest block scale) of a rule; amax is their product times the tensor scale."""
    require_rule(rule)
    return (STATIC[rule], E4M3_MAX) if rule in STATIC else (6.0, 256.0)


def tensor_scale(amax, rule) -> Float32[Array, "..."]:
    """The tensor scale that belongs to a largest magnitude. 0 for an amax below 2**-100, NaN for one that is not finite."""
    peak, top = full_scale(rule)
    amax = jnp.asarray(amax, jnp.float32)
    scale = jnp.where(amax < LEAST, 0.0, divide(amax, peak * top))
    return jnp.where(jnp.isfinite(amax), scale, jnp.nan)


def tensor_amax(scale, rule):
    """The largest magnitude that a tensor scale was made from, on the host, as numpy float32 of the same shape.

    Exact for the amax of a bfloat16 tensor; else one that gives the same scale, within one float32 step of the first.
    """
    peak, top = full_scale(rule)
    scale, full = np.asarray(scale, np.float32), np.float32(peak * top)
    product = scale * full
    short = product.astype(ml_dtypes.bfloat16).astype(np.float32)
    amax = np.nextafter(product, np.float32(0))  # candidates from the last resort to the first
    for better in (np.nextafter(product, np.float32(np.inf)), product, short):
        amax = np.where(better / full == scale, better, amax)
    return amax


def encode_nvfp4(
    x: Float[Array, "... K"], rule="static_6", *, square=False, key=None, amax=None
) -> tuple[UInt8[Array, "... K//2"], Float8e4m3fn[Array, "... K//16"], Float32[Array, ""]]:
    """NVFP4 of a tensor: (packed codes, block scales, tensor scale), with value = code * block scale * tensor scale.

    x: any float type; computed in float32. K must be a multiple of 16, else ``ConfigError`` (``pad_to`` gives one).
    rule: one of ``RULES``.
    square: one scale for 16 rows x 16 columns, so that the transpose encodes to the transpose; the last two axes must be multiples of 16.
        Scales are stored repeated over the 16 rows, ``[..., R, K/16]``, as products and the public files want them.
    key: rounds stochastically; a ``jax.random`` key. The two tries of a choosing rule use independent bits.
    amax: largest magnitude to scale for, a scalar; None: that of ``x``. Values past 6 * 448 * tensor scale saturate.

    NaN or inf in ``x`` makes the tensor scale NaN, so that all of it decodes to NaN; where a finite ``amax`` is given, only their blocks. An
    amax below 2**-100 counts as 0, and everything encodes to 0. A block whose scale rounds to 0 encodes to 0.
    """
    require_rule(rule)
    require_multiple(x, -1, BLOCK, f"NVFP4 ({rule})")
    if square:
        require_multiple(x, -2, BLOCK, f"NVFP4 ({rule}) in 16x16 blocks")
    x = x.astype(jnp.float32)
    amax = largest_magnitude(x) if amax is None else jnp.asarray(amax, jnp.float32)
    columns = x.shape[-1] // BLOCK
    blocks = x.reshape(*x.shape[:-2], -1, BLOCK, columns, BLOCK) if square else x.reshape(*x.shape[:-1], columns, BLOCK)
    axes = (-3, -1) if square else (-1,)
    if rule in STATIC:
        codes, scales, _ = quantise_blocks(blocks, axes, rule, amax, 1.0, key)
    else:
        codes, scales = four_over_six(blocks, axes, rule, amax, key)
    if square:
        scales = jnp.broadcast_to(scales, (*scales.shape[:-3], BLOCK, columns, 1))
    return pack(codes.reshape(x.shape)), scales.reshape(*x.shape[:-1], columns), tensor_scale(amax, rule)


def quantise_blocks(blocks, axes, rule, amax, stretch, key):
    """Codes like ``blocks``, E4M3 scales with the ``axes`` of a block kept at size 1, and what they decode to (spec/inference.md §4.5, 1-5)."""
    peak, top = full_scale(rule)
    largest = largest_magnitude(blocks, axes, True)
    encode = jnp.where(amax < LEAST, 0.0, divide(jnp.float32(peak * top), amax))
    wanted = divide(largest, peak) * encode
    if stretch != 1:
        wanted = jnp.minimum(wanted, 2 * E4M3_MAX) * stretch  # saturates alike; keeps a constant encode and stretch from becoming one factor
    scales = to_e4m3(jnp.where(jnp.isfinite(largest), wanted, jnp.nan))
    scale = scales.astype(jnp.float32)
    one = jnp.float32(1)
    y = jnp.where(scale == 0, 0.0, blocks * divide(one, divide(one, encode) * scale))
    codes = round_e2m1(y, key)
    return codes, scales, divide(value_e2m1(codes) * scale * amax, peak * top)


def four_over_six(blocks, axes, rule, amax, key):
    """Codes and scales of the better of two tries, block by block (spec/inference.md §4.5, 6)."""
    keys = (None, None) if key is None else jax.random.split(key)
    codes6, scales6, values6 = quantise_blocks(blocks, axes, rule, amax, 1.0, keys[0])
    codes4, scales4, values4 = quantise_blocks(blocks, axes, rule, amax, 1.5, keys[1])
    measure = {
        "mse": lambda e: jnp.sum(e * e, axes, keepdims=True),
        "mae": lambda e: jnp.sum(jnp.abs(e), axes, keepdims=True),
        "abs_max": lambda e: jnp.max(jnp.abs(e), axes, keepdims=True),
    }[rule]
    four = measure(values4 - blocks) < measure(values6 - blocks)
    return jnp.where(four, codes4, codes6), jnp.where(four, scales4, scales6)


def decode_nvfp4(
    codes: UInt8[Array, "... K2"], scales: Float8e4m3fn[Array, "... K2//8"], scale: Float32[Array, ""], dtype=jnp.float32
) -> Float[Array, "... 2*K2"]:
    """Values ``[..., 2*K2]`` of ``encode_nvfp4``: computed in float32, rounded once to ``dtype``. A NaN scale gives NaN in what it covers."""
    values = value_e2m1(unpack(codes)).reshape(*scales.shape, BLOCK) * scales.astype(jnp.float32)[..., None]
    return (values.reshape(*codes.shape[:-1], -1) * scale).astype(dtype)


# ---- layout of scales, Hadamard ------------------------------------------------------------------------------------------------------------


def swizzle(scales: Array) -> Array:
    """Scales ``[..., R, C]`` in the blocked order of the hardware, ``[..., R' * C']`` with R' and C' padded by zeros to 128 and 4.

    512-element tiles of 128 rows x 4 columns, row of tiles by row of tiles; in a tile, row r and column c stand at
    (r % 32) * 16 + r // 32 * 4 + c (spec/inference.md §4.6).
    """
    scales = pad_to(pad_to(scales, COLUMN_TILE), ROW_TILE, -2)
    *lead, rows, columns = scales.shape
    tiles = scales.reshape(*lead, rows // ROW_TILE, 4, 32, columns // COLUMN_TILE, COLUMN_TILE)
    n = len(lead)
    return tiles.transpose(*range(n), n, n + 3, n + 2, n + 1, n + 4).reshape(*lead, rows * columns)


def unswizzle(blocked: Array, rows, columns) -> Array:
    """The first ``rows`` x ``columns`` of scales ``[..., R' * C']`` that ``swizzle`` made; ``ConfigError`` when their number is not right."""
    padded_rows, padded_columns = -(-rows // ROW_TILE) * ROW_TILE, -(-columns // COLUMN_TILE) * COLUMN_TILE
    require(
        blocked.ndim >= 1 and blocked.shape[-1] == padded_rows * padded_columns,
        f"blocked scales of shape {tuple(blocked.shape)} cannot be those of {rows} x {columns}, which are {padded_rows * padded_columns} long "
        "(rows padded to 128, columns to 4); give the sizes that they were made for",
    )
    lead = blocked.shape[:-1]
    tiles = blocked.reshape(*lead, padded_rows // ROW_TILE, padded_columns // COLUMN_TILE, 32, 4, COLUMN_TILE)
    n = len(lead)
    natural = tiles.transpose(*range(n), n, n + 3, n + 2, n + 1, n + 4).reshape(*lead, padded_rows, padded_columns)
    return natural[..., :rows, :columns]


def hadamard_matrix():
    """Orthogonal float32 ``[16, 16]``: diagonal of the published signs times the Sylvester matrix / 4. Its entries are exact in bfloat16."""
    sylvester = np.ones((1, 1), np.float32)
    for _ in range(4):
        sylvester = np.block([[sylvester, sylvester], [sylvester, -sylvester]])
    return np.asarray(SIGNS, np.float32)[:, None] * sylvester / 4


def hadamard(x: Float[Array, "... K"], inverse=False) -> Float[Array, "... K"]:
    """Every 16 consecutive values of the last axis, as a row, times ``hadamard_matrix`` (its transpose for the inverse), in the dtype of ``x``.

    Products over the axis of two transformed operands are those of the originals. Raises ``ConfigError`` when K is no multiple of 16.
    """
    require_multiple(x, -1, BLOCK, "Hadamard transform")
    matrix = hadamard_matrix().T if inverse else hadamard_matrix()
    groups = x.reshape(*x.shape[:-1], -1, BLOCK)
    out = jnp.matmul(groups, jnp.asarray(matrix, x.dtype), precision="highest", preferred_element_type=jnp.float32)
    return out.reshape(x.shape).astype(x.dtype)


# ---- MXFP4 ---------------------------------------------------------------------------------------------------------------------------------


def encode_mxfp4(x: Float[Array, "... K"], rule="static_6", *, key=None) -> tuple[UInt8[Array, "... K//2"], Shaped[Array, "... K//32"]]:
    """MXFP4 of a tensor: (packed codes, block scales), with value = code * block scale, a power of two rounded up so that nothing saturates.

    K must be a multiple of 32, else ``ConfigError`` (``pad_to`` gives one). ``rule``: ``static_6`` or ``static_4``. ``key``: as ``round_e2m1``.
    NaN or inf makes the scale of its block NaN. A block with no magnitude above peak * 2**-127 encodes to 0.
    """
    require_rule(rule, tuple(STATIC))
    require_multiple(x, -1, MX_BLOCK, f"MXFP4 ({rule})")
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, MX_BLOCK)
    largest = jnp.max(jnp.abs(blocks), -1)
    # The least e with largest <= peak * 2**e: 6 = 1.5 * 2**2 and 4 = 1 * 2**2, so a larger mantissa carries into the exponent.
    carry = {"static_6": 0x3FFFFF, "static_4": 0x7FFFFF}[rule]
    exponent = jnp.maximum((jax.lax.bitcast_convert_type(largest, jnp.int32) + carry >> 23) - 2, 0)
    scale = jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)[..., None]
    codes = round_e2m1(jnp.where(scale == 0, 0.0, blocks / scale), key)
    exponent = jnp.where(jnp.isfinite(largest), exponent, 255).astype(jnp.uint8)
    return pack(codes.reshape(x.shape)), jax.lax.bitcast_convert_type(exponent, jnp.float8_e8m0fnu)


def decode_mxfp4(codes: UInt8[Array, "... K2"], scales: Shaped[Array, "... K2//16"], dtype=jnp.float32) -> Float[Array, "... 2*K2"]:
    """Values ``[..., 2*K2]`` of ``encode_mxfp4``, exact in float32. A NaN scale gives a block of NaN."""
    values = value_e2m1(unpack(codes)).reshape(*scales.shape, MX_BLOCK) * scales.astype(jnp.float32)[..., None]
    return values.reshape(*codes.shape[:-1], -1).astype(dtype)


# ---- FP8 -----------------------------------------------------------------------------------------------------------------------------------


def encode_fp8(x: Float[Array, "..."], axis=-1, *, amax=None) -> tuple[Float8e4m3fn[Array, "..."], Float32[Array, "..."]]:
    """FP8 E4M3: (values like ``x``, scale), with value = values * scale and scale = amax / 448 (spec/inference.md §5).

    axis: -1 gives one scale a row, ``[..., 1]``; any axis, or several, is kept at size 1 alike. None gives one scale ``[]`` for the tensor.
    amax: largest magnitude to scale for, shaped like the scale; None: that of ``x``. Values past it saturate at 448.

    NaN or inf makes its scale NaN, so that all that shares it decodes to NaN; where a finite ``amax`` is given, inf saturates and NaN stays NaN
    in its place. An amax below 2**-100 counts as 0: scale 0, values 0.
    """
    x = x.astype(jnp.float32)
    amax = largest_magnitude(x, axis, axis is not None) if amax is None else jnp.asarray(amax, jnp.float32)
    scale = jnp.where(amax < LEAST, 0.0, divide(amax, E4M3_MAX))
    scale = jnp.where(jnp.isfinite(amax), scale, jnp.nan)
    reciprocal = jnp.where(scale == 0, 0.0, divide(jnp.float32(1), scale))
    return to_e4m3(x * reciprocal), scale


def decode_fp8(values: Float8e4m3fn[Array, "..."], scale: Float32[Array, "..."], dtype=jnp.float32) -> Float[Array, "..."]:
    """Values of ``encode_fp8``: the product is taken in float32 and rounded once to ``dtype``."""
    return (values.astype(jnp.float32) * scale).astype(dtype)
