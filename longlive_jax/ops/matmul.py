"""One matrix product for every kind of weight: ``matmul(w, x)`` dispatches on the type of ``w``.

Weights are ``[out, in]``: the contraction axis is last, so that a low-precision leaf is read as it is stored.
"""

import functools

import jax


@functools.singledispatch
def matmul(w, x):
    """``x [..., in]`` times the transpose of ``w [out, in]`` -> ``[..., out]``, accumulated in float32, in the dtype of ``x``."""
    return jax.lax.dot_general(x, w.astype(x.dtype), (((x.ndim - 1,), (w.ndim - 1,)), ((), ())))
