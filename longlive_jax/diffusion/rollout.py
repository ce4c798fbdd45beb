"""One chunk of a stream: solve, then remember. Shared by streaming and by distillation.

A chunk's noisy passes overwrite their own slots; the pass at t = 0 comes last and leaves the clean keys and values. Guidance is a second set
of keys and values: at scale 1 it does not exist (spec/inference.md §1.2). Latents that are known, those of a given video, are remembered in the
same way without being solved for, and what is held can be remembered again under another prompt.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from longlive_jax.config import require
from longlive_jax.model.frames import one_chunk, pytree
from longlive_jax.model.memory import KEEP, Memory, empty_memory, forget, make_room, pin, put
from longlive_jax.sharding import constrain


@pytree()
class Held:
    """What the filled slots of a memory were made from, so that it can be rebuilt; anything in empty slots."""

    z: jax.Array  # [B,S,h,w,C] float32 clean latents
    time: jax.Array  # [B,S] rotary time, shot offsets added
    shot: jax.Array  # [B,S] int32 number of the shot


@pytree()
class StreamState:
    """A running stream; a value: keep a copy and you can go back to it."""

    key: jax.Array  # PRNG key of the sample; noise of chunk c comes from fold_in(key, c)
    chunk: jax.Array  # [] int32 number of the next chunk
    offset: jax.Array  # [B] rotary shift of the current shot
    memory: Memory
    unguided: tuple | None  # keys and values under the negative prompt; their slots are the memory's
    held: Held | None = None  # with ``StreamConfig.recache``


def start_stream(transformer, stream, key, batch, tokens, dtype, guided, grid=None):
    """The state before the first chunk, for a ``TransformerConfig`` and a ``StreamConfig``; ``stream.recache`` needs the ``grid`` (h, w)."""
    return StreamState(
        key=key,
        chunk=jnp.int32(0),
        offset=jnp.zeros((batch,), jnp.float32),
        memory=empty_memory(transformer, stream, batch, tokens, dtype),
        unguided=empty_memory(transformer, stream, batch, tokens, dtype).layers if guided else None,
        held=empty_held(transformer, stream, batch, grid) if stream.recache else None,
    )


def empty_held(transformer, stream, batch, grid):
    require(grid is not None, "stream.recache keeps the latents of the window; give start_stream their grid=(h, w)")
    slots = batch, stream.window
    return Held(
        z=jnp.zeros((*slots, *grid, transformer.channels), jnp.float32),
        time=jnp.zeros(slots, jnp.float32),
        shot=jnp.zeros(slots, jnp.int32),
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
    index, frames, _ = place(stream, state, cut, batch, n)
    known = None if given is None else given[1][:, :, None, None, None]
    memory, slots = make_room(state.memory, index)

    def clamp(x):
        return x if given is None else jnp.where(known, given[0], x)

    def solve(i, carry):
        solution, memory, unguided = carry
        t = jnp.full((batch, n), jnp.asarray(solver.timesteps)[i])
        t = t if given is None else jnp.where(given[1], 0.0, t)
        (v, base), memory, unguided = both(model, solution.x, t, text, negative, frames, memory, unguided, slots)
        v = v if base is None else base + guidance * (v - base)
        solution = solver.step(solution, i, v)
        return solution._replace(x=clamp(solution.x)), memory, unguided

    with jax.named_scope("solve"):
        solution, memory, unguided = jax.lax.fori_loop(0, solver.steps, solve, (solver.init(clamp(noise)), memory, state.unguided))
    # The noisy keys lie in the slots that this chunk is about to take, so the memory is as before but for what is overwritten next.
    state = replace(state, memory=replace(state.memory, layers=memory.layers), unguided=unguided)
    return remember_chunk(model, stream, state, solution.x, text, cut=cut, negative=negative), solution.x


def remember_chunk(model, stream, state, z, text, *, cut, negative=None):
    """The state after a chunk whose clean latents are ``z [B,F,h,w,C]``, whether they were solved for or are known: one pass at t = 0.

    ``text``, ``negative``, ``cut`` as in ``next_chunk``. Slots, rotary shift, pins and chunk number are those of a generated chunk.
    """
    batch, n = z.shape[:2]
    index, frames, offset = place(stream, state, cut, batch, n)
    cut = cut & (state.chunk > 0)
    memory, slots = make_room(state.memory, index)
    with jax.named_scope("remember"):
        if stream.pins and stream.clean_recache:
            memory, slots = forget(memory, slots, index, cut)
        _, memory, unguided = both(model, z, jnp.zeros((batch, n)), text, negative, frames, memory, state.unguided, slots)
        if stream.pins:
            memory = pin(memory, slots, cut)
    held = None if state.held is None else hold(state.held, slots, z, frames.time, cut)
    return replace(state, chunk=state.chunk + 1, offset=offset, memory=memory, unguided=unguided, held=held)


def place(stream, state, cut, batch, n):
    """Absolute frames ``[B,n]`` of the next chunk, its ``Frames``, and the rotary shift ``[B]`` of its shot."""
    offset = state.offset + (cut & (state.chunk > 0)) * stream.shot_offset
    # Whole on every shard of the frames: the tables of the memory need it so, and would otherwise gather it.
    index = constrain(jnp.broadcast_to(state.chunk * n + jnp.arange(n, dtype=jnp.int32), (batch, n)), "batch", None)
    return index, one_chunk(index.astype(jnp.float32) + offset[:, None]), offset


def both(model, x, t, text, negative, frames, memory, unguided, slots):
    """Velocities of the branches of guidance (the second None at scale 1), and the memories with this call's keys and values."""
    v, memory = model(x, t, text, frames, memory=memory, slots=slots)
    if unguided is None:
        return (v, None), memory, None
    base, other = model(x, t, negative, frames, memory=replace(memory, layers=unguided), slots=slots)
    return (v, base), memory, other.layers


# ---- another prompt for what is held -------------------------------------------------------------------------------------------------------


def hold(held, slots, z, time, cut):
    """``held`` with a chunk ``z [B,n,h,w,C]`` at rotary ``time [B,n]`` in ``slots [B,n]``; where ``cut [B]`` it starts the next shot."""
    shot = jnp.broadcast_to((held.shot.max(1) + cut)[:, None], slots.shape)  # the newest chunk is of the current shot and always held
    z = constrain(z.astype(jnp.float32), "batch", None, None, None, None)
    return Held(z=put(held.z, slots, z), time=put(held.time, slots, time), shot=put(held.shot, slots, shot))


def recache(model, stream, state, text, *, changed):
    """The state with the current shot remembered anew under ``text``, for the samples where ``changed [B]``.

    The held chunks of the shot are replayed from their clean latents in time order, each a pass at t = 0 at its own rotary times that sees the
    held chunks before it and itself. Chunks of earlier shots, pins, shifts and the unguided branch, which reads no prompt, stay. Visibility is
    a length, so slots are brought into time order on the way. Exact (a no-op under the old prompt) as long as nothing that the replayed chunks
    saw has been evicted (spec/inference.md §2.7).
    """
    n, size = stream.chunk, state.memory.slots
    current = state.held.shot.max(1, keepdims=True)

    def replay(i, state):
        here = jnp.broadcast_to(i * n + jnp.arange(n, dtype=jnp.int32), (changed.shape[0], n))
        oldest = jnp.argsort(jnp.where(state.memory.frame < 0, KEEP, state.memory.frame), axis=1)
        there = jnp.where(changed[:, None], jnp.take_along_axis(oldest, here, 1), here)
        state = swap(state, here, there)
        memory, held = state.memory, jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * n, n, 1), state.held)
        replayed = changed[:, None] & (jnp.take_along_axis(memory.frame, here, 1) >= 0) & (held.shot == current)
        slots = jnp.where(replayed, here, size + here)  # what goes past the last slot is not written
        seen = replace(memory, count=jnp.full_like(memory.count, (i + 1) * n))
        _, seen = model(held.z, jnp.zeros(slots.shape), text, one_chunk(held.time), memory=seen, slots=slots)
        return replace(state, memory=replace(memory, layers=seen.layers))

    with jax.named_scope("recache"):
        return jax.lax.fori_loop(0, state.memory.count.max() // n, replay, state)


def swap(state, here, there):
    """The state with what lies in the slots ``here [B,n]`` and ``there [B,n]`` (equal or disjoint) exchanged, a chunk's rows at a time."""
    take = jax.vmap(lambda x, at: x[at])
    past = jnp.where(here == there, here + state.memory.slots, there)  # a slot is written once
    both = jnp.concatenate([here, past], 1)
    turn = lambda x: put(x, both, take(x, jnp.concatenate([there, here], 1)))
    memory = state.memory
    layers, frame, pinned, unguided, held = jax.tree.map(turn, (memory.layers, memory.frame, memory.pinned, state.unguided, state.held))
    return replace(state, memory=replace(memory, layers=layers, frame=frame, pinned=pinned), unguided=unguided, held=held)


def given_first(image, noise):
    """``given`` of a first chunk whose first frame is the latent ``image [B,1,h,w,C]``."""
    latents = jnp.zeros_like(noise).at[:, :1].set(image)
    mask = jnp.zeros(noise.shape[:2], bool).at[:, 0].set(True)
    return latents, mask
