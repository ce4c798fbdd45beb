"""What must hold for any weights, to 1e-5 in float32: one forward, whatever the order of slots, frames, devices or samples."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from longlive_jax.config import TINY
from longlive_jax.diffusion.rollout import next_chunk, start_stream
from longlive_jax.diffusion.solvers import make_solver
from longlive_jax.diffusion.teacher_forcing import corrupt, loss_of, noisy_rows, predict
from longlive_jax.model.frames import clip_frames, one_chunk
from longlive_jax.model.memory import empty_memory, make_room
from longlive_jax.model.transformer import stack_blocks
from longlive_jax.sharding import make_mesh
from longlive_jax.tree import flat_params, with_params
from tests.programs import quick, shell

CHUNK, CHUNKS = 2, 4
FRAMES = CHUNK * CHUNKS
GRID, TOKENS = TINY.grid, TINY.tokens
CONFIG = TINY.transformer
TEXT = CONFIG.text_len, CONFIG.text_dim


def normal(seed, *shape):
    """On the host, so that neither drawing nor holding the numbers is compiled."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@functools.cache
def tiny():
    """A TINY transformer in which every parameter is random: gates, heads and biases are open."""
    model = shell(CONFIG, jnp.float32)
    scale = lambda x: 0.3 if x.ndim == 1 else x.shape[-1] ** -0.5
    values = {k: scale(x) * normal(i, *x.shape) + ("norm" in k and k.endswith("weight")) for i, (k, x) in enumerate(flat_params(model).items())}
    return with_params(model, {k: jnp.asarray(x, jnp.float32) for k, x in values.items()})


def clip(batch):
    """Latents, noise, times per frame and prompts per chunk of a batch of clips."""
    t = np.repeat(np.random.default_rng(3).uniform(0, 1000, (batch, CHUNKS)).astype(np.float32), CHUNK, 1)
    latents = batch, FRAMES, *GRID, CONFIG.channels
    return normal(1, *latents), normal(2, *latents), t, normal(4, batch, CHUNKS, *TEXT)


def close(actual, expected, message=""):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=message)


# ---- one clip ------------------------------------------------------------------------------------------------------------------------------


def train_pass(params, inputs, shards=1, remat=False, stacked=False):
    """Loss of one teacher-forced forward, and the velocity of the noisy frames in time order."""
    model = with_params(shell(CONFIG, jnp.float32), params)
    model = stack_blocks(model) if stacked else model
    clean, noise, t, prompts = inputs
    step = corrupt(clean, noise, t / 1000, t)
    v, frames = predict(model, step, model.read(prompts), chunk=CHUNK, shards=shards, remat=remat)
    return loss_of(v, frames, step, shards)[0], noisy_rows(v, shards)


def trained(**options):
    """Loss, velocity and gradients, on the host."""
    step = quick(jax.value_and_grad(functools.partial(train_pass, **options), has_aux=True))
    (loss, v), grads = step(flat_params(tiny()), clip(2))
    return jax.tree.map(np.asarray, (loss, v, grads))


plain = functools.cache(trained)


@functools.cache
def optimizer_change():
    """The change of all parameters by one AdamW step, as one vector."""

    def change(params, grads):
        tx = optax.adamw(1e-2, b2=0.99, weight_decay=0.0)
        updates, _ = tx.update(grads, tx.init(params), params)
        return jnp.concatenate([updates[k].ravel() for k in sorted(updates)])

    return quick(change)


def agrees(loss, v, grads):
    loss0, v0, grads0 = plain()
    np.testing.assert_allclose(loss, loss0, rtol=1e-5)
    close(v, v0)
    for name, g in grads0.items():
        np.testing.assert_allclose(grads[name], g, rtol=0, atol=1e-5 * max(1.0, np.abs(g).max()), err_msg=name)
    change = functools.partial(optimizer_change(), flat_params(tiny()))
    assert np.linalg.norm(change(grads) - change(grads0)) / np.linalg.norm(change(grads0)) <= 1e-4


def test_balanced_order_equals_plain_order():
    """On one device; with a device a shard, below."""
    agrees(*trained(shards=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "data, seq, options", [(2, 4, ["remat"]), (1, 8, ["remat", "stacked"]), pytest.param(2, 1, ["stacked"], marks=pytest.mark.exhaustive)]
)
def test_devices_equal_one(data, seq, options):
    """Losses, outputs, gradients and updates on a data x seq mesh of fake devices; rematerialised and scanned blocks change nothing either."""
    with jax.set_mesh(make_mesh(data, seq)):
        found = trained(shards=seq, **dict.fromkeys(options, True))
    agrees(*found)


# ---- streams -------------------------------------------------------------------------------------------------------------------------------


@functools.cache
def both_passes():
    """The noisy pass of a chunk and then the clean one, which stays in the memory."""

    def passes(model, noisy, clean, t, text, index, prompt, memory):
        memory, slots = make_room(memory, index)
        frames = one_chunk(index.astype(jnp.float32), prompt)
        v, memory = model(noisy, t, text, frames, memory=memory, slots=slots)
        _, memory = model(clean, jnp.zeros_like(t), text, frames, memory=memory, slots=slots)
        return v, memory

    return quick(passes), quick(lambda model, prompts: model.read(prompts))


@pytest.mark.parametrize("permuted", [False, True])
def test_streaming_equals_teacher_forcing(permuted):
    """Chunk by chunk with a memory, in any order of slots, equals one teacher-forced forward."""
    model, (clean, noise, t, prompts), expected = tiny(), clip(2), plain()[1]
    noisy = np.asarray(corrupt(clean, noise, t / 1000, t).noisy)
    step, read = both_passes()
    text = read(model, prompts)
    stream = replace(TINY.stream, window=FRAMES, sink=0, shot_sink=False)
    memory = empty_memory(CONFIG, stream, 2, TOKENS, jnp.float32)
    rng = np.random.default_rng(0)
    for c in range(CHUNKS):
        at = slice(c * CHUNK, (c + 1) * CHUNK)
        index = np.broadcast_to(np.arange(FRAMES, dtype=np.int32)[at], (2, CHUNK))
        v, memory = step(model, noisy[:, at], clean[:, at], t[:, at], text, index, np.full((2, CHUNK), c, np.int32), memory)
        close(v, expected[:, at], f"chunk {c}")
        if permuted:
            memory = shuffled(memory, rng)
    assert step._cache_size() == 1


def shuffled(memory, rng):
    """The filled prefix in another order, a different one for each sample."""
    order = np.stack([[*rng.permutation(n), *range(n, memory.slots)] for n in np.asarray(memory.count)])
    move = lambda x: jnp.asarray(np.take_along_axis(np.asarray(x), order.reshape(*order.shape, *(1,) * (x.ndim - 2)), 1))
    layers = tuple((move(k), move(v)) for k, v in memory.layers)
    return replace(memory, layers=layers, frame=move(memory.frame), pinned=move(memory.pinned))


CUTS = ((), (2,), (1, 5), (6,))  # chunks that start a shot, of four samples
STREAM_CHUNKS = 7  # the window holds four: both sinks, eviction and a cut while evicting


def stream_step(model, state, noise, prompt, cut, negative):
    text, negative = model.read(prompt), model.read(negative)
    solver = make_solver("unipc", 2, 5.0)
    return next_chunk(model, solver, TINY.stream, state, noise, text, cut=cut, negative=negative, guidance=2.0)


def stream_of(step, samples):
    """Latents ``[B,F,...]`` of the streams ``samples``; every sample has its own cuts, noise and prompts, and a prompt a chunk."""
    samples = list(samples)
    noise = normal(7, len(CUTS), STREAM_CHUNKS, CHUNK, *GRID, CONFIG.channels)[samples]
    prompts = normal(8, len(CUTS), STREAM_CHUNKS, *TEXT)[samples]
    negative = np.broadcast_to(normal(9, *TEXT), (len(samples), 1, *TEXT))
    state = start_stream(CONFIG, TINY.stream, jax.random.key(0), len(samples), TOKENS, jnp.float32, guided=True)
    out = []
    for c in range(STREAM_CHUNKS):
        cut = np.array([c in CUTS[b] for b in samples])
        state, z = step(tiny(), state, noise[:, c], prompts[:, c : c + 1], cut, negative)
        out.append(np.asarray(z))
    return np.concatenate(out, 1)


@functools.cache
def streams():
    """All samples as one batch on one device, and the compiled step."""
    step = quick(stream_step)
    return stream_of(step, range(len(CUTS))), step


@pytest.mark.slow
def test_batch_equals_single_streams_in_one_trace():
    """Samples with different cuts equal streams of one; filling, a cut, a pin, an eviction and a prompt change do not retrace."""
    z, step = streams()
    assert step._cache_size() == 1
    for b, cuts in enumerate(CUTS):
        close(stream_of(step, [b])[0], z[b], f"cuts {cuts}")
    assert step._cache_size() == 2  # one program for four samples, one for a single one


@pytest.mark.slow
def test_sequence_parallel_stream_equals_one_device():
    expected, _ = streams()
    with jax.set_mesh(make_mesh(2, 2)):
        close(stream_of(quick(functools.partial(stream_step)), range(len(CUTS))), expected)


def test_no_end_of_rotary_time():
    """A clip far beyond 1,024 latents is predicted as the same clip near 0: only differences of time matter."""
    clean, _, t, prompts = (jnp.asarray(x) for x in clip(1))
    frames = clip_frames(1, FRAMES, CHUNK)
    visible = np.ones((FRAMES, FRAMES), bool)
    forward = quick(lambda model, time: model(clean, t, model.read(prompts), replace(frames, time=time), visible)[0])
    near, far = forward(tiny(), frames.time), forward(tiny(), frames.time + 1_000_000)
    np.testing.assert_allclose(far, near, rtol=0, atol=2e-5 * np.abs(near).max())
    stretched = forward(tiny(), 2 * frames.time)
    assert np.abs(stretched - near).max() > 1e-2 * np.abs(near).max()
