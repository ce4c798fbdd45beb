"""Who makes the frames that an evaluation judges: the model, or the renderer.

A player turns scenes into pixels, chunk by chunk, for a fixed number of scenes at a time, so that one sampler and one decoder program serve
every measurement. From a scene the model sees its captions and cuts alone, and the pixel frames that it is given to begin with: an image, or
whole chunks of a video that it goes on from. Rendered truth shows what a perfect model would.
"""

import functools
import sys
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
from longlive_jax.diffusion.rollout import chunk_noise, given_first, next_chunk, recache, remember_chunk, start_stream
from longlive_jax.diffusion.solvers import make_solver
from longlive_jax.metrics import Progress
from longlive_jax.model.text import encode_prompts
from longlive_jax.model.vae import to_uint8
from longlive_jax.tree import cast


class Player(NamedTuple):
    """``play(scenes, first, sink, given, rebuild)`` yields the pixel frames of chunk 0, 1, ..., uint8 [batch,P,H,W,3] on the device.

    P is 29, then 32. ``scenes``: exactly ``batch`` of equal length. ``first``: the number of the first one's random stream. ``sink=False``:
    nothing is kept in the memory for being early. ``given`` uint8 [batch,P,H,W,3]: how the video begins, one frame (an image) or whole
    chunks, which are shown as the player has them. ``rebuild``: where a caption changes without a cut, the memory of the shot is rebuilt
    under the new one.
    """

    batch: int
    play: Callable


def told(player, label, chunks):
    """``player``, which says how far it is with ``chunks`` of its batches, and how long the rest takes."""
    print(f"{label}: {chunks} chunks of {player.batch} streams; the first may wait for its programs", flush=True)
    progress = Progress(chunks, label, unit="chunk", stream=sys.stdout, interval=5.0, window=3)

    def play(*args, **options):
        for frames in player.play(*args, **options):
            yield jax.block_until_ready(frames)
            progress.update()

    return player._replace(play=play)


# ---- rendered truth ----------------------------------------------------------------------------------------------------------------------


@jax.jit
def paint(arrays):
    return to_uint8(render_batch(arrays))


def painted(scenes, start, stop):
    """The pixel frames ``start`` to ``stop`` that scenes ask for, uint8 [B,P,H,W,3]."""
    window = lambda scene: {key: a[start:stop] for key, a in device_arrays(scene).items()}
    return paint(jax.tree.map(lambda *rows: np.stack(rows), *map(window, scenes)))


def truth_player(batch, alter=lambda scene: scene):
    """Plays what the scenes ask for, after what is given; ``alter``: scene -> the scene to show in its place."""

    def play(scenes, first=0, sink=True, given=None, rebuild=False):
        shown = [alter(scene) for scene in scenes]
        for k in range(len(scenes[0].captions)):
            start, stop = scenes[0].span(k)
            known = jnp.zeros((batch, 0)) if given is None else given[:, start:stop]
            frames = painted(shown, start, stop)
            yield frames if not known.shape[1] else jnp.concatenate([known, frames[:, known.shape[1] :]], 1)

    return Player(batch, play)


# ---- the model ---------------------------------------------------------------------------------------------------------------------------


def read_prompts(transformer, text, tokens):
    """What the transformer reads of one prompt a sample; ``tokens``: ids and mask, each [B,M]."""
    return transformer.read(encode_prompts(text, *tokens)[:, None])


def read_both(transformer, text, tokens, negative):
    """The same of the negative prompt, each [M], and of ``tokens``."""
    spread = jax.tree.map(lambda a, b: jnp.broadcast_to(a, b.shape), negative, tokens)
    return read_prompts(transformer, text, spread), read_prompts(transformer, text, tokens)


@functools.partial(jax.jit, static_argnames=("stream", "grid"), donate_argnames="state")
def sample(transformer, text, solver, state, keys, chunk, tokens, negative, cut, guidance, keep, image, *, stream, grid):
    """The next chunk of B streams -> the new state, latents [B,F,h,w,C].

    ``keys [B]``, ``chunk []``: whence the noise; ``tokens``: ids and mask, each [B,M]; ``negative``: each [M]; ``cut [B]`` bool;
    ``keep []`` bool: whether shot sinks stay pinned; ``image [B,1,h,w,C]``: the first latent, or None.
    """
    noise = jax.vmap(chunk_noise, (0, None, None))(keys, chunk, (stream.chunk, *grid, transformer.config.channels))
    base, prompt = read_both(transformer, text, tokens, negative)
    given = None if image is None else given_first(image, noise)
    state, z = next_chunk(transformer, solver, stream, state, noise, prompt, cut=cut, negative=base, guidance=guidance, given=given)
    return replace(state, memory=replace(state.memory, pinned=state.memory.pinned & keep)), z


@functools.partial(jax.jit, static_argnames="stream", donate_argnames="state")
def remember(transformer, text, state, z, tokens, negative, cut, *, stream):
    """The state after a chunk whose latents ``z [B,F,h,w,C]`` are known; the rest as in ``sample``."""
    base, prompt = read_both(transformer, text, tokens, negative)
    return remember_chunk(transformer, stream, state, z, prompt, cut=cut, negative=base)


@functools.partial(jax.jit, static_argnames="stream", donate_argnames="state")
def reread(transformer, text, state, tokens, changed, *, stream):
    """The state with the shot so far remembered under the prompts ``tokens`` where ``changed [B]``."""
    return recache(transformer, stream, state, read_prompts(transformer, text, tokens), changed=changed)


@functools.partial(jax.jit, donate_argnames="carry")
def encode(vae, carry, frames):
    """Latents [B,F,h,w,C] of the next pixel frames, uint8; the first frame of a video is a latent of its own."""
    lead = -frames.shape[1] % vae.config.time_stride
    return vae.encode_step(carry, jnp.pad(frames, ((0, 0), (lead, 0), (0, 0), (0, 0), (0, 0))).astype(jnp.float32) / 127.5 - 1)


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
    sampler, length, grid = experiment.sampler, experiment.transformer.text_len, experiment.grid
    guided = sampler.guidance != 1 if guided is None else guided
    dtype = dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    transformer, vae, text = jax.device_put(cast((transformer, vae, text), dtype))
    solver = jax.tree.map(jnp.asarray, make_solver(sampler.solver, sampler.steps, sampler.shift))
    negative = jax.tree.map(jnp.asarray, tokenize(sampler.negative_prompt, length))
    lead = experiment.vae.time_stride - 1

    def play(scenes, first=0, sink=True, given=None, rebuild=False):
        require(len(scenes) == batch, f"{len(scenes)} scenes given to a player of batch={batch}; fill up with any scene")
        chunks, known = len(scenes[0].captions), 0 if given is None else given.shape[1]
        ends = [scenes[0].span(k)[1] for k in range(chunks)]
        require(known in (0, 1, *ends), f"{known} frames are given; give one, or whole chunks: {ends[0]} frames, {ends[0] + 32}, ...")
        ids, mask = map(np.stack, zip(*(tokenize(caption, length) for scene in scenes for caption in scene.captions)))
        ids, mask = (a.reshape(batch, chunks, length) for a in (ids, mask))
        cuts = np.stack([scene.cut for scene in scenes])
        changed = np.stack([[k > 0 and s.captions[k] != s.captions[k - 1] and not s.cut[k] for k in range(chunks)] for s in scenes])
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(first + jnp.arange(batch))
        stream = replace(experiment.stream, recache=rebuild)
        state = start_stream(experiment.transformer, stream, jax.random.key(seed), batch, experiment.tokens, dtype, guided, grid)
        if not sink:  # frames count on from beyond the sink: none is early enough to be kept, and attention sees only time differences
            state = replace(state, chunk=jnp.int32(-(-stream.sink // stream.chunk)))
        carry, encoder = vae.decode_start(batch, grid), vae.encode_start(batch, grid) if known else None
        for k in range(chunks):
            tokens, cut, z = (jnp.asarray(ids[:, k]), jnp.asarray(mask[:, k])), jnp.asarray(cuts[:, k]), None
            start, stop = scenes[0].span(k)
            if start < known:
                encoder, z = encode(vae, encoder, given[:, start:stop])
            if rebuild and changed[:, k].any():
                state = reread(transformer, text, state, tokens, jnp.asarray(changed[:, k]), stream=stream)
            if stop <= known:
                state = remember(transformer, text, state, z, tokens, negative, cut, stream=stream)
            else:
                state, z = sample(
                    transformer, text, solver, state, keys, jnp.int32(k), tokens, negative, cut, jnp.float32(sampler.guidance),
                    jnp.asarray(sink), z, stream=stream, grid=grid,
                )  # fmt: skip
            carry, pixels = decode(vae, carry, z)
            yield pixels if k else pixels[:, lead:]

    return Player(batch, play)


__all__ = ["Player", "model_player", "painted", "told", "truth_player"]
