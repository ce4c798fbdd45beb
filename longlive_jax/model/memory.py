"""The KV memory of a stream: a table of slots, one latent frame each.

- Slots fill from the front: the filled ones are a prefix, in no order of age, and nothing is ever shifted.
- When it is full, the oldest frames that are neither in the global sink (frame < ``sink``) nor pinned (the shot sink) make room.
- Every function is pure and traces once: filling, a cut, a pin and a wrap are data. Samples of a batch may cut at different chunks.

Softmax does not depend on the order of keys, and absolute keys carry their own rotary time, so slots need no order; relative mode rotates the
keys when they are read, by their rank in time among the filled slots (spec/inference.md §2).
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import kernels
from longlive_jax.model.frames import pytree
from longlive_jax.ops.fp8_attention import narrow
from longlive_jax.quant.formats import BLOCK

FREE, KEEP = -(2**30), 2**30  # eviction order: free slots first, kept frames never
AMAX = 6.0 * 256  # of NVFP4 tables: the tensor scale is 1, so a slot depends on nothing but its own frame; see quant/balance.py


class Packed(NamedTuple):
    """Keys or values in NVFP4 by "four over six", blocks along the head dimension (spec/inference.md §3)."""

    codes: jax.Array  # uint8 [B,S,T,N,Dh/2]
    scales: jax.Array  # E4M3 [B,S,T,N,Dh/16]


@pytree(static=("sink", "relative"))
class Memory:
    """KV memory of all layers. S is the window, the current chunk's frames included."""

    layers: tuple  # L pairs (k, v), each [B,S,T,N,Dh] or Packed; separate buffers, so that each is updated in place
    frame: jax.Array  # [B,S] int32 absolute frame held, -1 = empty
    pinned: jax.Array  # [B,S] bool, shot sink
    count: jax.Array  # [B] int32 filled slots
    sink: int  # frames of the global sink
    relative: bool = False

    @property
    def slots(self):
        return self.frame.shape[1]


def empty_memory(transformer, stream, batch, tokens, dtype):
    """A memory that holds nothing, for a ``TransformerConfig`` and a ``StreamConfig``; ``dtype`` is the model's."""
    table = lambda size, dtype: jnp.zeros((batch, stream.window, tokens, transformer.heads, size), dtype)
    size = transformer.head_dim
    empty = {
        "model": lambda: table(size, dtype),
        "fp8": lambda: table(size, jnp.float8_e4m3fn),
        "nvfp4": lambda: Packed(table(size // 2, jnp.uint8), table(size // BLOCK, jnp.float8_e4m3fn)),
    }[stream.memory]
    return Memory(
        layers=tuple((empty(), empty()) for _ in range(transformer.layers)),
        frame=jnp.full((batch, stream.window), -1, jnp.int32),
        pinned=jnp.zeros((batch, stream.window), bool),
        count=jnp.zeros((batch,), jnp.int32),
        sink=stream.sink,
        relative=stream.relative,
    )


def put(table, slots, rows):
    """``table [B,S,...]`` with ``rows [B,n,...]`` in the distinct ``slots [B,n]``; what goes past the last slot is not written.

    Batched, so that a batch over devices stays where it is. ``unique_indices``: without it a GPU writes elements of one and two bytes by atomic
    compare-and-swap, which takes several times as long.
    """
    return jax.vmap(lambda x, at, values: x.at[at].set(values, unique_indices=True))(table, slots, rows)


def make_room(memory, frames):
    """Slots ``[B,n]`` for the absolute ``frames [B,n]``: the next free ones, else those of the oldest frames that may go."""
    index = jnp.arange(memory.slots, dtype=jnp.int32)
    keep = memory.pinned | (memory.frame < memory.sink)
    order = jnp.where(memory.frame < 0, FREE + index, jnp.where(keep, KEEP, memory.frame))
    slots = jnp.argsort(order, axis=1)[:, : frames.shape[1]].astype(jnp.int32)
    fresh = jnp.take_along_axis(memory.frame, slots, 1) < 0
    return replace(
        memory,
        frame=put(memory.frame, slots, frames.astype(jnp.int32)),
        pinned=put(memory.pinned, slots, jnp.zeros(slots.shape, bool)),
        count=memory.count + fresh.sum(1, dtype=jnp.int32),
    ), slots


def write(layer, slots, k, v):
    """A layer's pair with ``k``, ``v`` ``[B,n,T,N,Dh]`` in ``slots [B,n]``."""
    stored = lambda x, table: pack(x) if isinstance(table, Packed) else narrow(x, table.dtype)
    return tuple(jax.tree.map(lambda y, rows: put(y, slots, rows), table, stored(x, table)) for table, x in zip(layer, (k, v)))


def read(layer, slots, k, v):
    """A layer's pair as attention takes it, ``[B,S,T,N,Dh]``: what is packed is decoded, with ``k``, ``v`` themselves in ``slots``."""
    wide = lambda x, table: put(unpack(table).astype(x.dtype), slots, x) if isinstance(table, Packed) else table
    return tuple(wide(x, table) for table, x in zip(layer, (k, v)))


@jax.jit  # one kernel for all layers
def pack(x):
    return Packed(*kernels.quantise(x, "mse", amax=AMAX)[:2])


@jax.jit
def unpack(table):
    return kernels.dequantise(*table, jnp.float32(1))  # exact in bfloat16


def marked(memory, slots):
    """Bool ``[B,S]``: which slots are among ``slots [B,n]``."""
    return put(jnp.zeros_like(memory.pinned), slots, jnp.ones(slots.shape, bool))


def pin(memory, slots, cut):
    """Make ``slots [B,n]`` the shot sink of every sample where ``cut [B]``; the earlier shot sink is let go."""
    return replace(memory, pinned=jnp.where(cut[:, None], marked(memory, slots), memory.pinned))


def forget(memory, slots, frames, cut):
    """Where ``cut [B]``: keep the global sink and the current chunk alone (``clean_recache``); its ``frames [B,n]`` move from ``slots``.

    Returns the memory and the slots of the chunk. The sink was written first, so it is the front of the slots, and the chunk goes behind it.
    """
    sink = (memory.frame < memory.sink) & ~marked(memory, slots)  # a sink of several chunks may be filling up
    kept = replace(
        memory,
        frame=jnp.where(sink, memory.frame, -1),
        pinned=jnp.zeros_like(memory.pinned),
        count=((memory.frame >= 0) & sink).sum(1, dtype=jnp.int32),
    )
    fresh, moved = make_room(kept, frames)
    pick = lambda new, old: jnp.where(cut.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
    return replace(
        memory,
        frame=pick(fresh.frame, memory.frame),
        pinned=pick(fresh.pinned, memory.pinned),
        count=pick(fresh.count, memory.count),
    ), pick(moved, slots)


def rank(memory):
    """Position in time of each slot among the filled ones ``[B,S]``, as rotary time for relative mode; 0 for empty slots."""
    held = memory.frame >= 0
    older = (memory.frame[:, None, :] < memory.frame[:, :, None]) & held[:, None, :]
    return jnp.where(held, older.sum(2), 0).astype(jnp.float32)


def held_frames(memory):
    """Per sample, the sorted absolute frames held; on the host, for tests and reports."""
    return [sorted(f[f >= 0].tolist()) for f in np.asarray(memory.frame)]
