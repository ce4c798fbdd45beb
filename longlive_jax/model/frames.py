"""The frame is the unit: per-frame data of one call, and who sees whom.

A visibility rule takes the frames that ask and the frames that answer and gives a boolean matrix ``[Fq,Fk]`` at trace time; rules compose with
``&`` and ``|``. The only dynamic visibility is how many memory slots are filled: a length, never a mask.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


def pytree(static=()):
    """A frozen dataclass that is a pytree; ``static`` fields are compared, not traced."""

    def decorate(cls):
        cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        names = [f.name for f in dataclasses.fields(cls)]
        return jax.tree_util.register_dataclass(cls, [n for n in names if n not in static], list(static))

    return decorate


@pytree(static=("chunk", "noisy"))
class Frames:
    """One row per frame of a call."""

    time: jax.Array  # [B,F] rotary time in latent frames, shot offsets added
    prompt: jax.Array  # [B,F] which row of the text each frame reads
    chunk: tuple  # [F] static: chunk number within this call
    noisy: tuple  # [F] static: which stream; a given image frame stays in its stream

    def __len__(self):
        return len(self.chunk)


def one_chunk(time, prompt=None, noisy=True):
    """Frames of a single chunk. ``time [B,F]``; ``prompt [B,F]`` defaults to row 0."""
    prompt = jnp.zeros(time.shape, jnp.int32) if prompt is None else prompt
    n = time.shape[1]
    return Frames(time=time, prompt=prompt, chunk=(0,) * n, noisy=(noisy,) * n)


def clip_frames(batch, frames, chunk, *, time=None, prompt=None, noisy=True):
    """Frames of a clip of whole chunks: rotary time 0, 1, ... and one prompt a chunk unless given as ``[B,F]``."""
    index = np.arange(frames)
    time = jnp.broadcast_to(jnp.asarray(index, jnp.float32), (batch, frames)) if time is None else time
    prompt = jnp.broadcast_to(jnp.asarray(index // chunk, jnp.int32), (batch, frames)) if prompt is None else prompt
    return Frames(time=time, prompt=prompt, chunk=tuple((index // chunk).tolist()), noisy=(noisy,) * frames)


def weave(first, second, shards=1, axis=1):
    """Rows of two equal arrays, shard by shard: ``[f0 s0 f1 s1 ...]``, by reshape and stack (a gather would move data between devices)."""
    n = first.shape[axis]
    cut = lambda x: x.reshape(*x.shape[:axis], shards, n // shards, *x.shape[axis + 1 :])
    stack = np.stack if isinstance(first, np.ndarray) else jnp.stack  # static tables stay on the host
    both = stack([cut(first), cut(second)], axis + 1)
    return both.reshape(*first.shape[:axis], 2 * n, *first.shape[axis + 1 :])


def unweave(x, shards=1, axis=1):
    """The two arrays that ``weave`` joined."""
    n = x.shape[axis] // 2
    parts = x.reshape(*x.shape[:axis], shards, 2, n // shards, *x.shape[axis + 1 :])
    join = lambda i: jax.lax.index_in_dim(parts, i, axis + 1, keepdims=False).reshape(*x.shape[:axis], n, *x.shape[axis + 1 :])
    return join(0), join(1)


def interleave(clean, noisy, shards=1):
    """Frames of clean history and noisy targets, paired on every shard (Balanced SP); ``shards=1`` is the plain order."""
    table = lambda a, b: tuple(weave(np.asarray(a), np.asarray(b), shards, 0).tolist())
    return Frames(
        time=weave(clean.time, noisy.time, shards),
        prompt=weave(clean.prompt, noisy.prompt, shards),
        chunk=table(clean.chunk, noisy.chunk),
        noisy=table(clean.noisy, noisy.noisy),
    )


@dataclasses.dataclass(frozen=True)
class Rule:
    """A visibility rule; call it with the asking and the answering frames."""

    decide: object  # (q: Frames, k: Frames) -> Bool[Fq,Fk]

    def __call__(self, q, k):
        return np.broadcast_to(self.decide(q, k), (len(q), len(k)))

    def __and__(self, other):
        return Rule(lambda q, k: self(q, k) & other(q, k))

    def __or__(self, other):
        return Rule(lambda q, k: self(q, k) | other(q, k))


def chunks(q, k):
    return np.asarray(q.chunk)[:, None], np.asarray(k.chunk)[None, :]


def streams(q, k):
    return np.asarray(q.noisy)[:, None], np.asarray(k.noisy)[None, :]


def see_past(q, k):
    own, other = chunks(q, k)
    return other <= own


def see_clean_past(q, k):
    (own, other), (q_noisy, k_noisy) = chunks(q, k), streams(q, k)
    past = np.where(q_noisy, other < own, other <= own) & ~k_noisy
    return past | (q_noisy & k_noisy & (own == other))


everything = Rule(lambda q, k: np.ones((len(q), len(k)), bool))
block_causal = Rule(see_past)  # own chunk and earlier ones
teacher_forcing = Rule(see_clean_past)  # clean: clean chunks up to its own; noisy: earlier clean chunks and its own noisy one


def window(chunks_kept, sink_chunks=0):
    """Chunks at most ``chunks_kept - 1`` back, and the first ``sink_chunks``: what a streaming memory of that size holds."""
    recent = chunks_kept - sink_chunks

    def decide(q, k):
        own, other = chunks(q, k)
        return (other > own - recent) | (other < sink_chunks)

    return Rule(decide)
