"""Attention over keys and values that are held as E4M3.

Every step of it is an E4M3 number: queries, keys and values as they are, the softmax numerators times ``NUMERATOR``, and the output, a mean of
values, which therefore fits as they do. ``balance`` in quant/balance.py brings keys and values into the middle of E4M3's range, exactly.

``cudnn`` is cuDNN's kernel for Hopper and newer, which jax wraps in a private module (``jax._src.cudnn``): it is called here alone, and looked
for by version. It has no lengths, so a window that is not full yet is attended to in the dtype of the queries, as everything is on older GPUs.
``reference`` and ``xla`` do the same arithmetic in float32 anywhere.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float8e4m3fn, Int

from longlive_jax.config import ConfigError, require
from longlive_jax.ops.dispatch import capability
from longlive_jax.quant.formats import to_e4m3

NUMERATOR = 256.0  # scale of exp(score - largest), which is at most 1
PRIVATE = "jax._src.cudnn.fused_attention_stablehlo"
TRIED = ("0.11.",)  # versions of jax whose private module is known to work
UNUSED = ("amax_dQ", "amax_dK", "amax_dV", "amax_dP", "descale_o", "descale_dO", "descale_dP", "scale_dQ", "scale_dK", "scale_dV", "scale_dP")


def is_fp8(x):
    return x.dtype == jnp.float8_e4m3fn


def narrow(x, dtype):
    """``x`` in the dtype of a memory; to E4M3 it saturates at 448."""
    return to_e4m3(x.astype(jnp.float32)) if dtype == jnp.float8_e4m3fn else x.astype(dtype)


def attend_fp8(
    q: Float[Array, "B M N Dh"],
    k: Float8e4m3fn[Array, "B K N Dh"],
    v: Float8e4m3fn[Array, "B K N Dh"],
    length: Int[Array, "B"],
    implementation,
    otherwise,
) -> Float[Array, "B M N Dh"]:
    """Softmax attention of ``q`` to the first ``length`` keys, in E4M3; in the dtype of ``q``.

    ``otherwise(k, v)``: attention of ``q`` in its own dtype, for windows that are not full where the kernel has no lengths.
    """
    narrowed = narrow(q, jnp.float8_e4m3fn)
    if implementation != "cudnn":
        return emulated(narrowed, k, v, length).astype(q.dtype)
    if before_hopper():
        return otherwise(k.astype(q.dtype), v.astype(q.dtype))
    kernel = lambda: by_cudnn(narrowed, k, v).astype(q.dtype)
    return jax.lax.cond((length == k.shape[1]).all(), kernel, lambda: otherwise(k.astype(q.dtype), v.astype(q.dtype)))


def before_hopper():
    """A GPU without E4M3 attention: the memory is as small there, and is read in the dtype of the queries."""
    return 0 < capability() < 9


def emulated(q, k, v, length):
    """What the kernel computes, ``[B,M,N,Dh]`` in float32."""
    wide = lambda x: x.astype(jnp.float32)
    scores = jnp.einsum("bmnd,bknd->bnmk", wide(q), wide(k)) / np.sqrt(q.shape[-1])
    seen = jnp.arange(k.shape[1]) < length[:, None]
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    numerators = jnp.exp(scores - scores.max(-1, keepdims=True))
    sums = jnp.moveaxis(numerators.sum(-1), 1, 2)[..., None]
    weighted = jnp.einsum("bnmk,bknd->bmnd", wide(to_e4m3(numerators * NUMERATOR)), wide(v)) / NUMERATOR
    return wide(to_e4m3(weighted / sums))


def by_cudnn(q, k, v):
    """``[B,M,N,Dh]`` in E4M3."""
    library = private()
    number = lambda x: jnp.full((1, 1, 1, 1), x, jnp.float32)
    used = {"descale_q": 1.0, "descale_k": 1.0, "descale_v": 1.0, "scale_s": NUMERATOR, "descale_s": 1 / NUMERATOR, "scale_o": 1.0}
    scales = {name: number(x) for name, x in (used | dict.fromkeys(UNUSED, 1.0)).items()}
    return library.dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, qkv_layout="BTNH", fp8_params=scales, use_fp8=True)[0]


@functools.cache
def private():
    """The private module; raises ``ConfigError`` for a jax that it is not known of."""
    require(
        jax.__version__.startswith(TRIED),
        f"FP8 attention calls a private module of jax {', '.join(v + 'x' for v in TRIED)}, and this is jax {jax.__version__}; "
        "install one of those, or set stream.memory='model'",
    )
    try:
        return importlib.import_module(PRIVATE)
    except ImportError as error:
        raise ConfigError(f"{PRIVATE} is not there ({error}), so there is no FP8 attention; set stream.memory='model'") from error
