"""Who makes the frames that an evaluation judges: the model, or the renderer.

A player turns scenes into pixels, chunk by chunk, for a fixed number of scenes at a time, so that one sampler and one decoder program serve
every measurement. From a scene the model sees its captions and cuts alone; rendered truth shows what a perfect model would.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.config import require
from longlive_jax.data.toydraw import CANVAS, render_batch
from longlive_jax.data.toywords import tokenize
from longlive_jax.data.toyworld import device_arrays
from longlive_jax.diffusion.rollout import chunk_noise, next_chunk, start_stream
from longlive_jax.diffusion.solvers import make_solver
from longlive_jax.model.text import encode_prompts
from longlive_jax.model.vae import to_uint8
from longlive_jax.tree import cast


class Player(NamedTuple):
    """``play(scenes, first, sink)`` yields the pixel frames of chunk 0, 1, ..., uint8 [batch,P,H,W,3] on the device (P 29, then 32).

    ``scenes``: exactly ``batch`` of equal length. ``first``: the number of the first one's random stream. ``sink=False``: nothing is kept in
    the memory for being early.
    """

    batch: int
    play: Callable


# ---- rendered truth ----------------------------------------------------------------------------------------------------------------------


@jax.jit
def paint(arrays):
    return to_uint8(render_batch(arrays))


def truth_player(batch, alter=lambda scene: scene):
    """Plays what the scenes ask for; ``alter``: scene -> the scene to show in its place."""

    def play(scenes, first=0, sink=True):
        shown = [alter(scene) for scene in scenes]
        arrays = jax.tree.map(lambda *rows: np.stack(rows), *map(device_arrays, shown))
        for k in range(len(scenes[0].captions)):
            start, stop = scenes[0].span(k)
            yield paint(jax.tree.map(lambda a, window=slice(start, stop): a[:, window], arrays))

    return Player(batch, play)


# ---- the model ---------------------------------------------------------------------------------------------------------------------------


def read_prompts(transformer, text, tokens):
    """What the transformer reads of one prompt a sample; ``tokens``: ids and mask, each [B,M]."""
    return transformer.read(encode_prompts(text, *tokens)[:, None])


@functools.partial(jax.jit, static_argnames=("stream", "grid"), donate_argnames="state")
def sample(transformer, text, solver, state, keys, chunk, tokens, negative, cut, guidance, keep, *, stream, grid):
    """The next chunk of B streams -> the new state, latents [B,F,h,w,C].

    ``keys [B]``, ``chunk []``: whence the noise; ``tokens``: ids and mask, each [B,M]; ``negative``: each [M]; ``cut [B]`` bool;
    ``keep []`` bool: whether shot sinks stay pinned.
    """
    noise = jax.vmap(chunk_noise, (0, None, None))(keys, chunk, (stream.chunk, *grid, transformer.config.channels))
    base = read_prompts(transformer, text, jax.tree.map(lambda a: jnp.broadcast_to(a, (len(keys), a.shape[-1])), negative))
    prompt = read_prompts(transformer, text, tokens)
    state, z = next_chunk(transformer, solver, stream, state, noise, prompt, cut=cut, negative=base, guidance=guidance)
    return replace(state, memory=replace(state.memory, pinned=state.memory.pinned & keep)), z


@functools.partial(jax.jit, donate_argnames="carry")
def decode(vae, carry, z):
    """The next chunk's pixel frames, uint8; the first 3 of a video mean nothing."""
    carry, pixels = vae.decode_step(carry, z)
    return carry, to_uint8(pixels)


def model_player(experiment, transformer, vae, text, *, batch, seed=0, dtype=None, guided=None):
    """Plays the videos that a model makes of the captions and cuts of the scenes, with ``experiment.sampler``.

    Sample i of seed s has the same noise in every batch. ``dtype``: of weights, activations and memory; None: bfloat16, on a CPU float32.
    ``guided=True``: also run guidance 1 as guidance, so that one program serves every scale. Raises ``ConfigError`` for other pixel sizes
    than the toy world's.
    """
    size = experiment.video.height, experiment.video.width
    require(size == (CANVAS, CANVAS), f"video {size[0]}x{size[1]} cannot be read: the toy world's reader wants {CANVAS}x{CANVAS}")
    stream, sampler, length = experiment.stream, experiment.sampler, experiment.transformer.text_len
    guided = sampler.guidance != 1 if guided is None else guided
    dtype = dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    transformer, vae, text = jax.device_put(cast((transformer, vae, text), dtype))
    solver = jax.tree.map(jnp.asarray, make_solver(sampler.solver, sampler.steps, sampler.shift))
    negative = jax.tree.map(jnp.asarray, tokenize(sampler.negative_prompt, length))
    lead = experiment.vae.time_stride - 1

    def play(scenes, first=0, sink=True):
        require(len(scenes) == batch, f"{len(scenes)} scenes given to a player of batch={batch}; fill up with any scene")
        chunks = len(scenes[0].captions)
        ids, mask = map(np.stack, zip(*(tokenize(caption, length) for scene in scenes for caption in scene.captions)))
        ids, mask = (a.reshape(batch, chunks, length) for a in (ids, mask))
        cuts = np.stack([scene.cut for scene in scenes])
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(first + jnp.arange(batch))
        state = start_stream(experiment.transformer, stream, jax.random.key(seed), batch, experiment.tokens, dtype, guided)
        if not sink:  # frames count on from beyond the sink: none is early enough to be kept, and attention sees only time differences
            state = replace(state, chunk=jnp.int32(-(-stream.sink // stream.chunk)))
        carry = vae.decode_start(batch, experiment.grid)
        for k in range(chunks):
            tokens = jnp.asarray(ids[:, k]), jnp.asarray(mask[:, k])
            state, z = sample(
                transformer, text, solver, state, keys, jnp.int32(k), tokens, negative, jnp.asarray(cuts[:, k]),
                jnp.float32(sampler.guidance), jnp.asarray(sink), stream=stream, grid=experiment.grid,
            )  # fmt: skip
            carry, pixels = decode(vae, carry, z)
            yield pixels if k else pixels[:, lead:]

    return Player(batch, play)


__all__ = ["Player", "model_player", "truth_player"]
