"""One chunk of a stream: make room, solve, remember. Shared by streaming and by distillation.

A chunk's noisy passes overwrite their own slots; the pass at t = 0 comes last and leaves the clean keys and values. Guidance is a second set
of keys and values: at scale 1 it does not exist (spec/inference.md §1.2).
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from longlive_jax.model.frames import one_chunk, pytree
from longlive_jax.model.memory import Memory, empty_memory, forget, make_room, pin
from longlive_jax.sharding import constrain


@pytree()
class StreamState:
    """A running stream; a value: keep a copy and you can go back to it."""

    key: jax.Array  # PRNG key of the sample; noise of chunk c comes from fold_in(key, c)
    chunk: jax.Array  # [] int32 number of the next chunk
    offset: jax.Array  # [B] rotary shift of the current shot
    memory: Memory
    unguided: tuple | None  # keys and values under the negative prompt; their slots are the memory's


def start_stream(transformer, stream, key, batch, tokens, dtype, guided):
    """The state before the first chunk, for a ``TransformerConfig`` and a ``StreamConfig``."""
    return StreamState(
        key=key,
        chunk=jnp.int32(0),
        offset=jnp.zeros((batch,), jnp.float32),
        memory=empty_memory(transformer, stream, batch, tokens, dtype),
        unguided=empty_memory(transformer, stream, batch, tokens, dtype).layers if guided else None,
    )


def chunk_noise(key, chunk, shape):
    """Standard normal noise of a chunk; it does not depend on devices or history."""
    return jax.random.normal(jax.random.fold_in(key, chunk), shape)


def next_chunk(model, solver, stream, state, noise, text, *, cut, negative=None, guidance=1.0, given=None):
    """Denoise and remember the next chunk.

    ``noise [B,F,h,w,C]`` start of the solver; ``text``, ``negative``: ``model.read`` of one prompt per sample; ``cut [B]`` bool: the chunk
    starts a new shot; ``given``: ``(latents [B,F,h,w,C], mask [B,F])``, frames that are known (image to video), kept at t = 0.
    Returns the new state and the latents.
    """
    batch, n = noise.shape[:2]
    cut = cut & (state.chunk > 0)
    offset = state.offset + cut * stream.shot_offset
    # Whole on every shard of the frames: the tables of the memory need it so, and would otherwise gather it.
    index = constrain(jnp.broadcast_to(state.chunk * n + jnp.arange(n, dtype=jnp.int32), (batch, n)), "batch", None)
    frames = one_chunk(index.astype(jnp.float32) + offset[:, None])
    known = None if given is None else given[1][:, :, None, None, None]

    def clamp(x):
        return x if given is None else jnp.where(known, given[0], x)

    def velocity(x, t, memory, unguided, slots):
        """Guided velocity; the memories with this call's keys and values."""
        v, memory = model(x, t, text, frames, memory=memory, slots=slots)
        if unguided is None:
            return v, memory, None
        base, other = model(x, t, negative, frames, memory=replace(memory, layers=unguided), slots=slots)
        return base + guidance * (v - base), memory, other.layers

    memory, slots = make_room(state.memory, index)

    def solve(i, carry):
        solution, memory, unguided = carry
        t = jnp.full((batch, n), jnp.asarray(solver.timesteps)[i])
        t = t if given is None else jnp.where(given[1], 0.0, t)
        v, memory, unguided = velocity(solution.x, t, memory, unguided, slots)
        solution = solver.step(solution, i, v)
        return solution._replace(x=clamp(solution.x)), memory, unguided

    with jax.named_scope("solve"):
        solution, memory, unguided = jax.lax.fori_loop(0, solver.steps, solve, (solver.init(clamp(noise)), memory, state.unguided))
    z = solution.x
    with jax.named_scope("remember"):
        if stream.pins and stream.clean_recache:
            memory, slots = forget(memory, slots, index, cut)
        _, memory, unguided = velocity(z, jnp.zeros((batch, n)), memory, unguided, slots)
        if stream.pins:
            memory = pin(memory, slots, cut)
    return replace(state, chunk=state.chunk + 1, offset=offset, memory=memory, unguided=unguided), z


def given_first(image, noise):
    """``given`` of a first chunk whose first frame is the latent ``image [B,1,h,w,C]``."""
    latents = jnp.zeros_like(noise).at[:, :1].set(image)
    mask = jnp.zeros(noise.shape[:2], bool).at[:, 0].set(True)
    return latents, mask
