"""Attention as dense calls. Queries that see the same frames form one call, so a library kernel runs at full rate without a mask.

Implementations: ``reference`` (one masked float32 softmax), ``xla`` and ``cudnn`` (planned dense calls), and ``flash``, which is cuDNN but for
windows that are full: the package's kernel for Hopper takes these where they fit.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from longlive_jax import kernels
from longlive_jax.ops.dispatch import choose
from longlive_jax.ops.fp8_attention import attend_fp8, is_fp8
from longlive_jax.sharding import vary_like

KNOWN = ("reference", "xla", "cudnn", "flash")
MANY = 1 << 18  # scores a head, about 1 MB


def pick(implementation, dtype):
    """Named, or on a GPU for 16-bit inputs cuDNN, with the kernel for Hopper on one, and XLA elsewhere. Raises for a kernel that cannot run."""
    if implementation == "flash":
        kernels.chosen(kernels.ATTENTION, kernels.KERNEL)
    on_gpu = lambda: "cudnn" if kernels.chosen(kernels.ATTENTION, None) == kernels.REFERENCE else "flash"
    return choose("attention", implementation, KNOWN, lambda p: on_gpu() if p in ("gpu", "cuda") and dtype.itemsize == 2 else "xla")


def attend(
    q: Float[Array, "B Fq Tq N Dh"],
    k: Float[Array, "B Fk Tk N Dh"],
    v: Float[Array, "B Fk Tk N Dh"],
    visible,
    implementation=None,
) -> Float[Array, "B Fq Tq N Dh"]:
    """Softmax attention in which frame i of ``q`` sees frame j of ``k`` where ``visible[i,j]`` (numpy bool, known at trace time).

    Raises ``ValueError`` for a query frame that sees nothing.
    """
    visible = np.asarray(visible)
    if visible.shape != (q.shape[1], k.shape[1]):
        raise ValueError(
            f"visible has shape {visible.shape} and there are {q.shape[1]} query and {k.shape[1]} key frames; build it from the same frames"
        )
    if not visible.any(1).all():
        raise ValueError(f"query frames {np.flatnonzero(~visible.any(1)).tolist()} see no key frame; softmax over nothing is undefined")
    name = pick(implementation, q.dtype)
    if name == "reference":
        return masked(q, k, v, visible)
    outputs = {}
    for (n_rows, _), groups in plan(visible).items():
        stack = lambda x, part: jnp.concatenate([take(x, g[part]) for g in groups])  # noqa: B023
        y = dense(flat(stack(q, 0)), flat(stack(k, 1)), flat(stack(v, 1)), name)
        y = y.reshape(len(groups), q.shape[0], n_rows, *q.shape[2:])
        for piece, (rows, _) in zip(y, groups, strict=True):
            outputs.update({row: (piece, j) for j, row in enumerate(rows)})
    return gather(outputs, q.shape[1])


def attend_filled(
    q: Float[Array, "B F T N Dh"],
    k: Float[Array, "B S T N Dh"],
    v: Float[Array, "B S T N Dh"],
    count: Int[Array, "B"],
    implementation=None,
) -> Float[Array, "B F T N Dh"]:
    """Every query sees the first ``count`` frames of the slots ``k``, ``v``: a length, never a mask. E4M3 slots: ops/fp8_attention.py.

    Chosen by a conditional: cuDNN takes an eighth longer when it reads a length, so full slots, which a stream soon has and keeps, go without.
    XLA takes the same time whatever the length, so a stream's first chunk, which fills as many slots as it has frames, reads these alone.
    """
    name = pick(implementation, q.dtype)
    length = count.astype(jnp.int32) * k.shape[2]
    if is_fp8(k):
        otherwise = lambda k, v: dense(flat(q), k, v, name, length)
        return attend_fp8(flat(q), flat(k), flat(v), length, library(name), otherwise).reshape(q.shape)
    if name == "reference":
        seen = jnp.arange(k.shape[1])[None] < count[:, None]
        return masked(q, k, v, seen[:, None])
    own, slots = q.shape[1], k.shape[1]
    call = lambda frames, *length: dense(flat(q), flat(k[:, :frames]), flat(v[:, :frames]), name, *length).reshape(q.shape)
    some = lambda: call(slots, length)
    if library(name) == "cudnn":
        by_kernel = lambda: whole(flat(q), flat(k), flat(v)).reshape(q.shape)
        full = by_kernel if has_kernel(name, flat(q), flat(k)) else lambda: call(slots)
        return jax.lax.cond((count == slots).all(), full, some)
    if own * q.shape[2] * slots * k.shape[2] >= MANY:
        return jax.lax.cond(count.max() <= own, lambda: call(own, length), some)
    return some()


def dense(q, k, v, implementation, length=None):
    """One dense call, ``[B,tokens,N,Dh]``; ``length [B]`` counts the valid keys."""
    implementation = library(implementation)
    queries = None if length is None or implementation == "xla" else jnp.full_like(length, q.shape[1])
    return jax.nn.dot_product_attention(q, k, v, query_seq_lengths=queries, key_value_seq_lengths=length, implementation=implementation)


def library(name):
    """Whose dense calls an implementation makes."""
    return "cudnn" if name == "flash" else name


def has_kernel(name, q, k):
    """Whether an implementation attends ``q [B,M,N,Dh]`` to all of ``k [B,K,N,Dh]`` by the kernel for Hopper."""
    if name != "flash":
        return False
    from longlive_jax.kernels import flash

    return flash.fits(q, k)


@jax.custom_vjp
def whole(q, k, v):
    """``dense`` without a length by the kernel for Hopper; its gradients are cuDNN's."""
    from longlive_jax.kernels import flash

    return vary_like(flash.attend(q, k, v), q)


whole.defvjp(lambda *x: jax.vjp(lambda q, k, v: dense(q, k, v, "cudnn"), *x), lambda back, g: back(g))


def masked(q, k, v, visible):
    """The reference: scores of all pairs in float32, ``visible`` ``[Fq,Fk]`` or ``[B,1|Fq,Fk]``."""
    wide = lambda x: x.astype(jnp.float32)
    scores = jnp.einsum("bftnd,bgsnd->bnftgs", wide(q), wide(k)) / np.sqrt(q.shape[-1])
    visible = jnp.asarray(visible)
    mask = visible[:, None, :, None, :, None] if visible.ndim == 3 else visible[None, None, :, None, :, None]
    scores = jnp.where(mask, scores, -jnp.inf)
    weights = jax.nn.softmax(scores.reshape(*scores.shape[:4], -1), -1).reshape(scores.shape)
    return jnp.einsum("bnftgs,bgsnd->bftnd", weights, wide(v)).astype(q.dtype)


# ---- planning, on the host -----------------------------------------------------------------------------------------------------------------


def plan(visible):
    """Groups of frames with equal rows, by call shape: ``{(rows, columns): [(row indices, column indices), ...]}``.

    Groups of one shape are stacked on the batch axis and share one call.
    """
    sets = {}
    for i, row in enumerate(visible):
        sets.setdefault(tuple(np.flatnonzero(row).tolist()), []).append(i)
    calls = {}
    for columns, rows in sets.items():
        calls.setdefault((len(rows), len(columns)), []).append((tuple(rows), columns))
    return calls


def runs(indices):
    """Half-open runs of consecutive indices."""
    out = []
    for i in indices:
        if out and out[-1][1] == i:
            out[-1][1] = i + 1
        else:
            out.append([i, i + 1])
    return out


def take(x, indices):
    """Frames ``indices`` of ``x [B,F,...]`` by static slices."""
    parts = [x[:, a:b] for a, b in runs(indices)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 1)


def gather(rows, n):
    """The frames ``0..n-1`` from ``rows[i] = (array, position in it)``, neighbours joined into slices."""
    parts = []
    for i in range(n):
        source, j = rows[i]
        if parts and parts[-1][0] is source and parts[-1][2] == j:
            parts[-1][2] = j + 1
        else:
            parts.append([source, j, j + 1])
    parts = [x[:, a:b] for x, a, b in parts]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 1)


def flat(x):
    """Frames and tokens in one axis."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])
