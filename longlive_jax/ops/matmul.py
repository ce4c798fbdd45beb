"""One matrix product for every kind of weight: ``matmul(w, x)`` dispatches on the type of ``w``.

Weights are ``[out, in]``: the contraction axis is last, so that a low-precision leaf is read as it is stored.
"""

import functools

import jax

from longlive_jax.ops import low_precision
from longlive_jax.quant.leaves import FP8, NVFP4, Dynamic, Int8, LoRA


@functools.singledispatch
def matmul(w, x):
    """``x [..., in]`` times the transpose of ``w [out, in]`` -> ``[..., out]``, accumulated in float32, in the dtype of ``x``."""
    return jax.lax.dot_general(x, w.astype(x.dtype), (((x.ndim - 1,), (w.ndim - 1,)), ((), ())))


def linear(w, x, bias=None, activation=None, then=None):
    """``activation(matmul(w, x) + bias)``, in FP8 by one kernel where there is one. activation: None, "gelu" (its tanh form) or "silu".

    then: the weight of the linear that alone takes the result. Where both are FP8, it is handed over in FP8, as ``low_precision.Rows``.
    """
    if isinstance(w, FP8):
        product = low_precision.fp8_rows if isinstance(then, FP8) else low_precision.fp8_product
        return product(w, x, bias, activation)
    return low_precision.finish(matmul(w, x), bias, activation)


matmul.register(FP8, low_precision.fp8_product)
matmul.register(Int8, low_precision.int8_product)
matmul.register(NVFP4, low_precision.nvfp4_product)
matmul.register(Dynamic, low_precision.dynamic_product)


@matmul.register(LoRA)
def adapted(w, x):
    """The product of the base, of any kind, and ``scaling`` times that of the low-rank pair in the dtype of ``x``."""
    return matmul(w.base, x) + w.scaling * matmul(w.b, matmul(w.a, x))
