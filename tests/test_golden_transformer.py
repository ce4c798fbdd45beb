"""Single forwards and cached rollouts of the public source (golden/dit_causal.npz)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import StreamConfig
from longlive_jax.model.frames import block_causal, clip_frames, interleave, one_chunk, teacher_forcing, unweave, weave
from longlive_jax.model.memory import empty_memory, make_room, pin
from tests.golden_models import frames_last, meta_of, transformer
from tests.shared import golden

TOLERANCE = 2e-4
IMPLEMENTATIONS = ("reference", "xla")


@pytest.fixture(scope="module")
def arrays():
    return golden("dit_causal.npz")


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def model(arrays, request):
    return transformer(arrays, meta_of(arrays), attention=request.param)


def per_chunk(context, batch):
    """``[B*chunks,L,E]``, sample-major, as ``[B,P,L,E]``."""
    return jnp.asarray(context).reshape(batch, -1, *context.shape[1:])


@functools.partial(jax.jit, static_argnames="chunk")
def teacher_forced(model, clean, noisy, clean_t, t, context, chunk):
    """Velocity of the noisy frames."""
    both = interleave(clip_frames(*t.shape, chunk, noisy=False), clip_frames(*t.shape, chunk))
    v, _ = model(weave(clean, noisy), weave(clean_t, t), model.read(context), both, teacher_forcing(both, both))
    return unweave(v)[1]


@pytest.mark.parametrize("history", ["clean", "augmented"])
def test_teacher_forcing_forward(arrays, model, history):
    clean, noisy, t = frames_last(arrays["tf/clean"]), frames_last(arrays["tf/noisy"]), jnp.asarray(arrays["t/tf"])
    clean_t = jnp.zeros_like(t) if history == "clean" else jnp.asarray(arrays["tf/aug_t"])
    v = teacher_forced(model, clean, noisy, clean_t, t, per_chunk(arrays["tf/context"], len(t)), meta_of(arrays)["frames_per_block"])
    expected = arrays["tf/flow" if history == "clean" else "tf/flow_aug_t"]
    np.testing.assert_allclose(v, frames_last(expected), atol=TOLERANCE)


@functools.partial(jax.jit, static_argnames="chunk")
def causal(model, noisy, t, context, chunk):
    frames = clip_frames(*t.shape, chunk)
    return model(noisy, t, model.read(context), frames, block_causal(frames, frames))[0]


def test_block_causal_forward(arrays, model):
    noisy, t = frames_last(arrays["tf/noisy"]), jnp.asarray(arrays["t/tf"])
    v = causal(model, noisy, t, per_chunk(arrays["tf/context"], len(t)), meta_of(arrays)["frames_per_block"])
    np.testing.assert_allclose(v, frames_last(arrays["causal/flow"]), atol=TOLERANCE)


room, pinned = jax.jit(make_room), jax.jit(pin)
read = jax.jit(lambda model, context: model.read(context))


@jax.jit
def cached(model, z, t, text, time, memory, slots):
    """Velocity and memory of one pass over a chunk; all rollouts with the same sink and rotary mode share the program."""
    return model(z, t, text, one_chunk(time), memory=memory, slots=slots)


@pytest.mark.parametrize("name", ["plain", "sink", "multishot", "relative"])
def test_cached_rollout(arrays, model, name):
    meta = meta_of(arrays)
    n, multishot = meta["frames_per_block"], name == "multishot"
    stream = StreamConfig(
        chunk=n,
        window=meta["window_frames"],
        sink=0 if name == "plain" else meta["sink_frames"],
        shot_sink=multishot,
        relative=name == "relative",
    )
    tokens = meta["H"] * meta["W"] // 4
    memory = empty_memory(model.config, stream, 1, tokens, jnp.float32)
    x, context = arrays[f"rollout_{name}/x"], arrays[f"rollout_{name}/context"]
    programs, offset = cached._cache_size(), 0.0
    for c in range(meta["n_chunks"]):
        cut = multishot and c == meta["cut_chunk"]
        offset += meta["rope_shot_offset"] * cut
        index = c * n + np.arange(n, dtype=np.int32)[None]
        memory, slots = room(memory, index)
        time, text = np.float32(index + offset), read(model, context[c][None, None])
        for t, expected in ((800.0, "flow_t800"), (300.0, "flow_t300"), (0.0, None)):
            v, memory = cached(model, frames_last(x[c]), np.full((1, n), t, np.float32), text, time, memory, slots)
            if expected:
                np.testing.assert_allclose(v, frames_last(arrays[f"rollout_{name}/{expected}"][c]), atol=TOLERANCE, err_msg=f"chunk {c} t {t}")
        memory = pinned(memory, slots, np.array([cut]))
    assert cached._cache_size() <= programs + 1
