"""Single forwards and cached rollouts of the public source (golden/dit_causal.npz)."""

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


@pytest.mark.parametrize("history", ["clean", "augmented"])
def test_teacher_forcing_forward(arrays, model, history):
    clean, noisy, t = frames_last(arrays["tf/clean"]), frames_last(arrays["tf/noisy"]), jnp.asarray(arrays["t/tf"])
    batch, frames = t.shape
    chunk = meta_of(arrays)["frames_per_block"]
    clean_t = jnp.zeros_like(t) if history == "clean" else jnp.asarray(arrays["tf/aug_t"])
    both = interleave(clip_frames(batch, frames, chunk, noisy=False), clip_frames(batch, frames, chunk))
    text = model.read(per_chunk(arrays["tf/context"], batch))
    v, _ = jax.jit(lambda m, z, t, text: m(z, t, text, both, teacher_forcing(both, both)))(model, weave(clean, noisy), weave(clean_t, t), text)
    expected = arrays["tf/flow" if history == "clean" else "tf/flow_aug_t"]
    np.testing.assert_allclose(unweave(v)[1], frames_last(expected), atol=TOLERANCE)


def test_block_causal_forward(arrays, model):
    noisy, t = frames_last(arrays["tf/noisy"]), jnp.asarray(arrays["t/tf"])
    frames = clip_frames(*t.shape, meta_of(arrays)["frames_per_block"])
    v, _ = model(noisy, t, model.read(per_chunk(arrays["tf/context"], len(t))), frames, block_causal(frames, frames))
    np.testing.assert_allclose(v, frames_last(arrays["causal/flow"]), atol=TOLERANCE)


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
    step = jax.jit(lambda m, z, t, text, frames, memory, slots: m(z, t, text, frames, memory=memory, slots=slots))
    offset = 0.0
    for c in range(meta["n_chunks"]):
        cut = multishot and c == meta["cut_chunk"]
        offset += meta["rope_shot_offset"] * cut
        index = c * n + jnp.arange(n)[None]
        memory, slots = make_room(memory, index)
        frames, text = one_chunk(index + jnp.float32(offset)), model.read(jnp.asarray(context[c])[None, None])
        for t, expected in ((800.0, "flow_t800"), (300.0, "flow_t300"), (0.0, None)):
            v, memory = step(model, frames_last(x[c]), jnp.full((1, n), t), text, frames, memory, slots)
            if expected:
                np.testing.assert_allclose(v, frames_last(arrays[f"rollout_{name}/{expected}"][c]), atol=TOLERANCE, err_msg=f"chunk {c} t {t}")
        memory = pin(memory, slots, jnp.array([cut]))
    assert step._cache_size() == 1
