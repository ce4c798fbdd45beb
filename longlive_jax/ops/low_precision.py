"""Products with quantised weights: W8A8 in FP8, W8A16 in int8, W4A4 and W4A16 in NVFP4, and NVFP4 training with all three GEMMs in four bits.

Operands are multiplied as codes times block scales, exact in bfloat16; scales of a row, a token or a tensor are applied to the product, in
float32 and fused with its rounding, so that the GEMM itself writes the activations' dtype. ``emulated`` decodes first and has the same numbers
up to the order of accumulation. The ``scaled_matmul`` path compiles for Blackwell and was never run on one, nor was ``tcgen05``, the package's
own kernel, which only its name chooses.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.extend.backend
import jax.numpy as jnp

from longlive_jax import kernels
from longlive_jax.config import require
from longlive_jax.ops.dispatch import announce, capability
from longlive_jax.quant.formats import BLOCK, as_float4, decode_nvfp4, encode_fp8, encode_nvfp4, hadamard, largest_magnitude, tensor_scale
from longlive_jax.quant.leaves import NONE
from longlive_jax.sharding import axis_size, local

EMULATED, TCGEN05 = "emulated", "tcgen05"
ACTIVATIONS = {"gelu": jax.nn.gelu, "silu": jax.nn.silu}  # the first in its tanh form
NATIVE = {  # operation -> its implementation in hardware, the least compute capability, the hardware's name
    "fp8 product": ("native", 8.9, "an Ada, Hopper or later GPU"),
    "nvfp4 product": ("scaled_matmul", 10.0, "a Blackwell GPU"),
}


def chosen(operation, implementation=None):
    """The implementation of ``operation`` to run on the default device: the named one, else the hardware's where it exists.

    Raises ``ConfigError`` for a name that is not known, or that this device cannot run.
    """
    native, least, hardware = NATIVE[operation]
    device = jax.extend.backend.get_default_device()
    real = capability(device) >= least
    if implementation is None:
        name = native if real else EMULATED
        announce(operation, name, device.device_kind)
        return name
    require(
        implementation in (native, EMULATED),
        f"{operation} has no implementation {implementation!r}; use {native!r} or {EMULATED!r}, or None to choose automatically",
    )
    require(
        implementation == EMULATED or real,
        f"{operation} by {native!r} needs {hardware} (compute capability {least} or higher), and this is {device.device_kind}; "
        f"use {EMULATED!r}, or None, which emulates here",
    )
    return implementation


def dot(x, w, dtype, lead=0):
    """``x [..., in]`` times the transpose of ``w [out, in]`` in ``dtype``; the first ``lead`` axes of both are summed over too."""
    axes = lambda y: (*range(lead), y.ndim - 1)
    return jax.lax.dot_general(x, w, ((axes(x), axes(w)), ((), ())), preferred_element_type=dtype)


def wide(dtype):
    """The dtype that a product with unscaled operands is written in: the activations', but none of bfloat16's range or less."""
    return jnp.promote_types(dtype, jnp.bfloat16)


def through_dense(w, g):
    """The input's gradient, by the values that ``w`` stands for: rounding of the activations counts as the identity."""
    return jax.lax.dot_general(g, w.dense(g.dtype), (((g.ndim - 1,), (0,)), ((), ())))


# ---- FP8 -----------------------------------------------------------------------------------------------------------------------------------


def encode_rows(x):
    """``encode_fp8(x, -1)``, by the kernel where that runs."""
    by_reference = kernels.chosen(kernels.FP8_ROWS, None) == kernels.REFERENCE
    return encode_fp8(x, -1) if by_reference else encode_shards(x)


@jax.jit  # so that calls on one array compile to one kernel: bytes of kernels that are traced apart differ
def encode_shards(x):
    """The kernel on the local shard."""
    names = shard(x)
    return local(kernels.quantise_rows, (names,), (names, names))(x)


def shard(x):
    """Logical names of the axes that a kernel's input is split by: of samples, and of frames in ``[B,F,T,D]``, as far as they divide."""
    axes = ("batch", "frames") if x.ndim > 3 else ("batch",) if x.ndim > 1 else ()
    names = tuple(name if size % axis_size(name) == 0 else None for name, size in zip(axes, x.shape))
    return names + (None,) * (x.ndim - len(names))


class Rows(NamedTuple):
    """Activations that were rounded to FP8 where they were made. Gradients go through ``dense``, which is not computed for values alone."""

    values: jax.Array  # e4m3 [..., in]
    scale: jax.Array  # float32 [..., 1]
    dense: jax.Array  # [..., in], what they stand for, in the dtype of the activations


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def fp8_product(w, x, bias=None, activation=None):
    """``activation(x [..., in]`` with the ``FP8`` weight ``w [out, in]`` ``+ bias)`` -> ``[..., out]``: one scale a row of ``x``.

    ``x``: an array, which is rounded here, or ``Rows``.
    """
    values, scale, x = x if isinstance(x, Rows) else (*encode_rows(x), x)
    implementation = chosen("fp8 product", w.implementation)
    if implementation != EMULATED and by_hopper(w, x, activation):
        return product_shards((values, scale), (w.values, w.scale), bias, activation)
    weight = w.values
    if implementation == EMULATED:
        values, weight = values.astype(wide(x.dtype)), weight.astype(wide(x.dtype))
    y = dot(values, weight, wide(x.dtype))
    return finish((y.astype(jnp.float32) * scale * w.scale[..., 0]).astype(x.dtype), bias, activation)


def finish(y, bias, activation):
    """``activation(y + bias)``; each may be None."""
    y = y if bias is None else y + bias.astype(y.dtype)
    return y if activation is None else ACTIVATIONS[activation](y)


def fp8_forward(w, x, bias, activation):
    y, back = jax.vjp(lambda y, bias: finish(y, bias, activation), fp8_product(w, x), bias)
    return y, (w, back, () if isinstance(x, Rows) else None)


def fp8_backward(activation, kept, g):
    w, back, rounded = kept
    g, bias = back(g)
    dx = through_dense(w, g)
    return None, dx if rounded is None else Rows(None, None, dx), bias


fp8_product.defvjp(fp8_forward, fp8_backward)


def fp8_rows(w, x, bias=None, activation=None):
    """``fp8_product`` as ``Rows`` for a product that follows, with scales from ``largest``: a kernel that makes them writes nothing else.

    E4M3 is as precise over 15 binades, so that a scale well above a row's largest magnitude costs nothing (docs/low_precision.md).
    """
    x = x if isinstance(x, Rows) else Rows(*encode_rows(jax.lax.stop_gradient(x)), x)
    dense = fp8_product(w, x, bias, activation)
    w, x, bias, y = jax.lax.stop_gradient((w, x, bias, dense))
    values, scale = encode_fp8(y, -1, amax=largest(w, x, bias))
    if chosen("fp8 product", w.implementation) != EMULATED and by_hopper(w, x.dense, activation):
        values = product_shards(x[:2], (w.values, w.scale), bias, activation, scale)
    return Rows(values, scale, dense)


def largest(w, x, bias):
    """``[..., 1]``, what no magnitude in a row of a product exceeds, nor one of ``ACTIVATIONS`` of it: x, ``Rows``.

    Hölder's inequality: the sum of a row's magnitudes times the largest weight, which follows from the scales, without reading the weight.
    """
    total = jnp.sum(jnp.abs(x.values.astype(jnp.float32)), -1, keepdims=True) * x.scale
    columns = (w.scale[..., 0],) if bias is None else (w.scale[..., 0], bias.astype(jnp.float32))
    slope, *offset = largest_magnitude(jnp.stack(columns), -1)  # one reduction
    return sum(offset, total * (float(jnp.finfo(w.values.dtype).max) * slope))


def by_hopper(w, x, activation):
    """Whether the product runs by the package's kernel: on Hopper, in bfloat16, for local sizes that fit.

    Under a mesh, too, where the activations are split over all of its devices: each then needs the whole weight, and one that is sharded is
    gathered, in FP8, as for XLA's product. Where they are not, devices may share a product by the weight's rows, and XLA does that.
    """
    if x.dtype != jnp.bfloat16 or kernels.chosen(kernels.FP8_PRODUCT, None) == kernels.REFERENCE:
        return False
    from longlive_jax.kernels import hopper

    devices, parts = max(jax.sharding.get_abstract_mesh().size, 1), math.prod(axis_size(name) for name in shard(x) if name)
    return devices == parts and activation in hopper.ACTIVATIONS and hopper.fits(x.size // x.shape[-1] // parts, w.values.shape)


@functools.partial(jax.jit, static_argnums=3)  # one kernel for all layers of a size
def product_shards(x, w, bias, activation, rounding=None):
    """The kernel on the local shard of the activations."""
    from longlive_jax.kernels import hopper

    names = shard(x[0])
    body = lambda x, w, bias, rounding: hopper.product(x, w, bias, activation, rounding)
    return local(body, (names, (), (), names), names)(x, w, bias, rounding)


# ---- int8 ----------------------------------------------------------------------------------------------------------------------------------


@jax.custom_vjp
def int8_product(w, x):
    """``x [..., in]`` with the ``Int8`` weight ``w [out, in]`` -> ``[..., out]``; its values are exact in bfloat16."""
    x, values = jax.lax.optimization_barrier((x, w.values))  # widened when its turn comes, not all matrices of a model at once
    y = dot(x, values.astype(x.dtype), wide(x.dtype))
    return (y.astype(jnp.float32) * w.scale[..., 0]).astype(x.dtype)


int8_product.defvjp(lambda w, x: (int8_product(w, x), w), lambda w, g: (None, through_dense(w, g)))


# ---- NVFP4, frozen weight ------------------------------------------------------------------------------------------------------------------


def encode_blocks(x, rule):
    """``encode_nvfp4(x, rule)``, by the kernel where that runs."""
    by_reference = kernels.chosen(kernels.NVFP4_BLOCKS, None) == kernels.REFERENCE
    return encode_nvfp4(x, rule) if by_reference else encode_block_shards(x, rule)


@functools.partial(jax.jit, static_argnums=1)
def encode_block_shards(x, rule):
    """The kernel on the local shard, with the largest magnitude of all of ``x``."""
    names, amax = shard(x), largest_magnitude(x.astype(jnp.float32))
    encode = lambda x, amax: kernels.quantise(x, rule, amax=amax)[:2]
    return *local(encode, (names, ()), (names, names))(x, amax), tensor_scale(amax, rule)


def operand(codes, scales, dtype):
    """Codes times block scales, without the tensor's scale: at most 6 bits of mantissa, exact in ``dtype``."""
    return decode_nvfp4(codes, scales, jnp.float32(1), dtype)


def gemm(a, b, dtype, implementation=None, lead=0):
    """``a [..., in]`` times the transpose of ``b [out, in]``, both ``(codes, scales, scale)``; ``lead`` as in ``dot``."""
    if implementation == TCGEN05:
        return by_kernel(a, b, dtype, lead)
    scale = a[2] * b[2]
    if chosen("nvfp4 product", implementation) == EMULATED:
        y = dot(operand(*a[:2], wide(dtype)), operand(*b[:2], wide(dtype)), wide(dtype), lead)
    else:
        y = scaled(a, b, wide(dtype), lead)
    return (y.astype(jnp.float32) * scale).astype(dtype)


def scaled(a, b, dtype, lead):
    """``gemm`` by the library's block-scaled product, without the tensors' scales."""
    codes = lambda y: matrix(as_float4(y), lead)[None]
    scales = lambda y: matrix(y, lead)[None]
    y = jax.nn.scaled_matmul(codes(a[0]), codes(b[0]), scales(a[1]), scales(b[1]), preferred_element_type=dtype)[0]
    return y if lead else y.reshape(*a[0].shape[:-1], -1)


def by_kernel(a, b, dtype, lead):
    """``gemm`` by the package's kernel for Blackwell, rounded to bfloat16; refuses other hardware and sizes that it does not take."""
    rows = a[0].shape[:-1]
    a, b = ((matrix(y[0], lead), matrix(y[1], lead), y[2]) for y in (a, b))
    y = kernels.matmul(a, b, kernels.KERNEL).astype(dtype)
    return y if lead else y.reshape(*rows, -1)


def matrix(y, lead):
    """An operand's codes or scales as ``[rows, in]``."""
    return jnp.moveaxis(y, -2, 0).reshape(y.shape[-2], -1) if lead else y.reshape(-1, y.shape[-1])


@jax.custom_vjp
def nvfp4_product(w, x):
    """``x [..., in]`` with the ``NVFP4`` weight ``w [out, in]`` -> ``[..., out]``; one amax over all of ``x`` (spec/inference.md §4.2)."""
    if w.activations == NONE:
        y = dot(x, operand(w.codes, w.scales, x.dtype), wide(x.dtype))
        return (y.astype(jnp.float32) * w.scale).astype(x.dtype)
    return gemm(encode_blocks(x, w.activations), (w.codes, w.scales, w.scale), x.dtype, w.implementation)


nvfp4_product.defvjp(lambda w, x: (nvfp4_product(w, x), w), lambda w, g: (None, through_dense(w, g)))


# ---- NVFP4 training ------------------------------------------------------------------------------------------------------------------------


@jax.custom_vjp
def dynamic_product(w, x):
    """``x [..., in]`` with the ``Dynamic`` weight ``w [out, in]``: forward and both gradients in NVFP4 (spec/training.md §3.4).

    The four-bit ``x`` is what is kept for the backward pass; the gradient of the weight is in the weight's dtype, accumulated in float32.
    """
    return forward(w, x)[0]


def forward(w, x):
    recipe = w.recipe
    quantised = encode_blocks(x, recipe.activations)
    weight = encode_nvfp4(w.weight, recipe.weights, square=recipe.square)
    return gemm(quantised, weight, x.dtype, recipe.implementation), (quantised, w)


def backward(kept, g):
    quantised, w = kept
    recipe = w.recipe
    keys = jax.random.split(jax.random.key(w.seed)) if recipe.stochastic else (None, None)
    rotate = hadamard if recipe.hadamard else lambda y: y

    gradient = encode_nvfp4(g, recipe.gradients, key=keys[0])
    weight = encode_nvfp4(w.weight.T, recipe.weights, square=recipe.square)
    dx = gemm(gradient, weight, g.dtype, recipe.implementation)

    inputs = tokens_last(decode_nvfp4(*quantised, g.dtype))
    gradient = encode_nvfp4(rotate(tokens_last(g)), recipe.gradients, key=keys[1])
    inputs = encode_nvfp4(rotate(inputs), recipe.activations)
    dw = gemm(gradient, inputs, jnp.float32, recipe.implementation, lead=g.ndim - 2 if g.shape[-2] % BLOCK == 0 else 0)
    return dataclasses.replace(w, weight=dw.astype(w.weight.dtype), seed=None), dx


dynamic_product.defvjp(forward, backward)


def tokens_last(y):
    """``[..., T, C] -> [..., C, T]``; where 16 does not divide T, all tokens as one axis, with zeros to a multiple of 16: they add nothing."""
    if y.shape[-2] % BLOCK:
        y = y.reshape(-1, y.shape[-1])
        y = jnp.pad(y, ((0, -y.shape[0] % BLOCK), (0, 0)))
    return y.swapaxes(-1, -2)
