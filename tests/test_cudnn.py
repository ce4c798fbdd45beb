"""The cuDNN attention on a GPU: as near to the public source's float32 as the reference attention is in the same bfloat16.

JAX_PLATFORMS=cuda pytest tests/test_cudnn.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import StreamConfig
from longlive_jax.model.frames import clip_frames, interleave, one_chunk, teacher_forcing, window
from longlive_jax.model.memory import empty_memory, make_room, pin
from longlive_jax.ops.attention import attend, attend_filled
from tests.golden_models import frames_last, meta_of, transformer
from tests.shared import golden
from tests.test_golden_transformer import causal, per_chunk, teacher_forced

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU; set JAX_PLATFORMS=cuda on a machine with one")


@functools.cache
def arrays():
    return golden("dit_causal.npz")


@functools.cache
def model(attention):
    return jax.tree.map(half, transformer(arrays(), meta_of(arrays()), attention=attention))


def half(x):
    return x.astype(jnp.bfloat16)


def error(x, expected):
    """Root mean squared error over the expected spread."""
    x, expected = np.asarray(x, np.float32), np.asarray(expected, np.float32)
    return np.sqrt(np.mean((x - expected) ** 2)) / expected.std()


def check(values, expected, share=1.1):
    """``values``: by attention. cuDNN's error is at most ``share`` times that of the reference: both carry the rounding of bfloat16."""
    errors = {name: error(v, expected) for name, v in values.items()}
    print(errors)
    assert 0 < errors["cudnn"] <= share * errors["reference"] + 1e-3 < 0.05
    return errors


@pytest.mark.parametrize("history", ["clean", "augmented"])
def test_teacher_forcing_forward(history):
    a, chunk = arrays(), meta_of(arrays())["frames_per_block"]
    clean, noisy, t = half(frames_last(a["tf/clean"])), half(frames_last(a["tf/noisy"])), jnp.asarray(a["t/tf"])
    clean_t = jnp.zeros_like(t) if history == "clean" else jnp.asarray(a["tf/aug_t"])
    text = half(per_chunk(a["tf/context"], len(t)))
    values = {name: teacher_forced(model(name), clean, noisy, clean_t, t, text, chunk) for name in ("reference", "cudnn")}
    check(values, frames_last(a["tf/flow" if history == "clean" else "tf/flow_aug_t"]))


def test_block_causal_forward():
    a, chunk = arrays(), meta_of(arrays())["frames_per_block"]
    noisy, t = half(frames_last(a["tf/noisy"])), jnp.asarray(a["t/tf"])
    text = half(per_chunk(a["tf/context"], len(t)))
    check({name: causal(model(name), noisy, t, text, chunk) for name in ("reference", "cudnn")}, frames_last(a["causal/flow"]))


room, pinned = jax.jit(make_room), jax.jit(pin)


@jax.jit
def cached(model, z, t, context, time, memory, slots):
    return model(z, t, model.read(context), one_chunk(time), memory=memory, slots=slots)


def rollout(attention, name):
    """Velocities at t = 800 and 300 of all chunks of a cached rollout."""
    a, meta, out, offset = arrays(), meta_of(arrays()), [], 0.0
    n, multishot = meta["frames_per_block"], name == "multishot"
    sink = 0 if name == "plain" else meta["sink_frames"]
    stream = StreamConfig(chunk=n, window=meta["window_frames"], sink=sink, shot_sink=multishot, relative=name == "relative")
    memory = empty_memory(model(attention).config, stream, 1, meta["H"] * meta["W"] // 4, jnp.bfloat16)
    for c in range(meta["n_chunks"]):
        cut = multishot and c == meta["cut_chunk"]
        offset += meta["rope_shot_offset"] * cut
        index = c * n + np.arange(n, dtype=np.int32)[None]
        memory, slots = room(memory, index)
        z, context = half(frames_last(a[f"rollout_{name}/x"][c])), half(jnp.asarray(a[f"rollout_{name}/context"][c])[None, None])
        for t in (800.0, 300.0, 0.0):
            v, memory = cached(model(attention), z, np.full((1, n), t, np.float32), context, np.float32(index + offset), memory, slots)
            out += [v] if t else []
        memory = pinned(memory, slots, np.array([cut]))
    return np.stack([np.asarray(v, np.float32) for v in out])


@pytest.mark.parametrize("name", ["plain", "sink", "multishot", "relative"])
def test_cached_rollout(name):
    chunks = zip(arrays()[f"rollout_{name}/flow_t800"], arrays()[f"rollout_{name}/flow_t300"])
    expected = np.stack([np.asarray(frames_last(x)) for pair in chunks for x in pair])
    check({attention: rollout(attention, name) for attention in ("reference", "cudnn")}, expected)


def drawn(seed, *shape):
    """Another draw a seed: if keys were queries, every token would see itself alone, and its gradient be a difference of rounded numbers."""
    return half(jax.random.normal(jax.random.key(seed), shape))


def test_dense_calls_and_their_gradients():
    frames = interleave(clip_frames(2, 8, 2, noisy=False), clip_frames(2, 8, 2))
    visible = (teacher_forcing & window(2, 1))(frames, frames)
    q, k, v = (drawn(i, 2, 16, 32, 4, 64) for i in range(3))
    one = functools.partial(attend, visible=visible)
    loss = lambda name: lambda q, k, v: jnp.sum(jnp.sin(one(q, k, v, implementation=name).astype(jnp.float32)))
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    exact = jax.jit(jax.value_and_grad(loss("reference"), (0, 1, 2)))(*wide)
    found = {name: jax.jit(jax.value_and_grad(loss(name), (0, 1, 2)))(q, k, v) for name in ("reference", "cudnn")}
    for i in range(3):  # the reference alone keeps its weights in float32
        check({name: g[1][i] for name, g in found.items()}, exact[1][i], share=2)


def test_a_filled_memory_is_a_length():
    q, k, v, count = drawn(0, 2, 2, 32, 4, 128), drawn(1, 2, 12, 32, 4, 128), drawn(2, 2, 12, 32, 4, 128), jnp.array([3, 12])
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    exact = attend_filled(*wide, count, implementation="reference")
    check({name: attend_filled(q, k, v, count, implementation=name) for name in ("reference", "cudnn")}, exact, share=2)
    changed = attend_filled(q, k.at[0, 3:].set(9.0), v.at[0, 3:].set(9.0), count, implementation="cudnn")
    np.testing.assert_array_equal(changed, attend_filled(q, k, v, count, implementation="cudnn"))
