"""GPU kernels (Pallas, Mosaic), each beside the plain JAX that it implements; what to run is chosen here.

Strict by name: ``"kernel"`` on hardware without it raises. By None the ``AUTOMATIC`` kernels run on Hopper, else the references. A kernel is
one program on one device: where arrays are sharded, call it inside ``sharding.local``. Mosaic takes seconds to import, so that happens where a
kernel is chosen.
"""

import jax
import jax.extend.backend
import jax.numpy as jnp

from longlive_jax.config import require
from longlive_jax.ops.dispatch import capability, choose
from longlive_jax.quant.formats import decode_nvfp4, encode_fp8, encode_nvfp4

KERNEL, REFERENCE = "kernel", "reference"
FP8_ROWS, FP8_NORM, FP8_PRODUCT = "fp8 quantise kernel", "fp8 norm kernel", "fp8 product kernel"
NVFP4_BLOCKS, NVFP4_VALUES, ATTENTION = "nvfp4 quantise kernel", "nvfp4 dequantise kernel", "attention kernel"
AUTOMATIC = {FP8_ROWS, FP8_NORM, FP8_PRODUCT, NVFP4_BLOCKS, NVFP4_VALUES, ATTENTION}  # run by None on Hopper, where they were measured
HARDWARE = {  # operation -> compute capabilities, from and below; the hardware's name
    FP8_ROWS: (9.0, 10.0, "a Hopper GPU"),
    FP8_NORM: (9.0, 10.0, "a Hopper GPU"),
    FP8_PRODUCT: (9.0, 10.0, "a Hopper GPU"),
    ATTENTION: (9.0, 10.0, "a Hopper GPU"),
    NVFP4_BLOCKS: (9.0, 11.0, "a Hopper or Blackwell GPU"),
    NVFP4_VALUES: (9.0, 11.0, "a Hopper or Blackwell GPU"),
    "nvfp4 matmul kernel": (10.0, 11.0, "a Blackwell GPU with tcgen05"),
}


def chosen(operation, implementation):
    """``KERNEL`` or ``REFERENCE``: the named one, by None the reference, or on Hopper the kernel where it is ``AUTOMATIC``.

    Raises ``ConfigError`` for a kernel that the default device cannot run, ``ValueError`` for a name that is not known.
    """
    least, below, hardware = HARDWARE[operation]
    device = jax.extend.backend.get_default_device()
    real = least <= capability(device) < below
    if operation not in AUTOMATIC or not 9 <= capability(device) < 10:
        implementation = implementation or REFERENCE
    name = choose(operation, implementation, (KERNEL, REFERENCE), lambda platform: KERNEL if real else REFERENCE)
    require(
        name == REFERENCE or real,
        f"{operation} needs {hardware}, and this is {device.device_kind}; use {REFERENCE!r} or None",
    )
    return name


def quantise_rows(x, implementation=None):
    """``encode_fp8`` by row: x ``[..., K]`` -> E4M3 values ``[..., K]``, float32 scales ``[..., 1]``.

    By None, sizes that the kernel does not take go to the reference.
    """
    if chosen(FP8_ROWS, implementation) == KERNEL:
        from longlive_jax.kernels import fp8

        if implementation == KERNEL or fp8.fits(x):
            return fp8.quantise_rows(x)
    return encode_fp8(x, -1)


def quantise(x, rule="static_6", *, key=None, amax=None, implementation=None):
    """``encode_nvfp4`` in 1 x 16 blocks: x ``[..., K]`` -> packed codes ``[..., K/2]``, scales ``[..., K/16]``, scale ``[]``.

    By None, arrays that the kernel does not take go to the reference.
    """
    if chosen(NVFP4_BLOCKS, implementation) == KERNEL:
        from longlive_jax.kernels import nvfp4

        if implementation == KERNEL or nvfp4.fits(x):
            return nvfp4.quantise(x, rule, key=key, amax=amax)
    return encode_nvfp4(x, rule, key=key, amax=amax)


def dequantise(codes, scales, scale, implementation=None):
    """``decode_nvfp4`` to bfloat16: ``[..., K/2]``, ``[..., K/16]``, ``[]`` -> ``[..., K]``."""
    if chosen(NVFP4_VALUES, implementation) == KERNEL:
        from longlive_jax.kernels import nvfp4

        return nvfp4.dequantise(codes, scales, scale)
    return decode_nvfp4(codes, scales, scale, jnp.bfloat16)


def matmul(a, b, implementation=None):
    """``a [rows, in]`` times the transpose of ``b [out, in]``, both ``(codes, scales, scale)`` of NVFP4 -> bfloat16 ``[rows, out]``."""
    if chosen("nvfp4 matmul kernel", implementation) == KERNEL:
        from longlive_jax.kernels import blackwell

        return blackwell.matmul(a, b)
    return multiply(a, b)


def multiply(a, b):
    """The reference of ``matmul``: codes times block scales, exact in bfloat16, summed in float32, scaled, rounded to bfloat16."""
    one = jnp.float32(1)
    x, w = (decode_nvfp4(*y[:2], one, jnp.bfloat16) for y in (a, b))
    y = jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return (y * (a[2] * b[2])).astype(jnp.bfloat16)
