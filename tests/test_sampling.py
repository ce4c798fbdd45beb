"""Ways of sampling on an untrained TINY model: known latents, videos that go on, prompts that change, schedules of samples, late chunks."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import TINY, ConfigError
from longlive_jax.model.memory import held_frames
from longlive_jax.model.vae import to_uint8
from longlive_jax.streaming.bundles import random_bundle
from longlive_jax.streaming.programs import encode_piece, take_in
from longlive_jax.streaming.session import Session
from tests.programs import quick

STAR, RING = "A red star bounces in a meadow.", "A blue ring stands still at night."
CUT = TINY.stream.cut_prefix
CHUNK = TINY.stream.chunk


@pytest.fixture(scope="module")
def bundle():
    return random_bundle(TINY)


@pytest.fixture(scope="module")
def session(bundle):
    return Session(bundle)


@pytest.fixture(scope="module")
def shifting(bundle):
    """Rebuilds its memory when a prompt changes; guided, so that there is a second memory."""
    return Session(bundle, recache=True, guidance=2.0)


def steps(session, state, prompts):
    """Step through ``prompts``, a string or one per sample each: the last state and the latents of each chunk."""
    out = []
    for prompt in prompts:
        cut = [p.startswith(CUT) for p in ([prompt] if isinstance(prompt, str) else prompt)]
        state, z = session.step(state, session.read(prompt), cut=cut)
        out.append(z)
    return state, out


def close(a, b, atol=1e-6):
    """States that agree; keys and counters exactly. What lies in empty slots is never read."""
    filled = lambda s: np.asarray(s.memory.frame >= 0)[..., None, None, None]
    bare = lambda s: replace(s, memory=replace(s.memory, layers=()), unguided=None)
    read = lambda s: [bare(s), *(x * filled(s) for x in jax.tree.leaves((s.memory.layers, s.unguided)))]
    a, b = (read(s) for s in (a, b))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=atol if x.dtype == jnp.float32 else 0)


# ---- known latents -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance": 2.0, "recache": True},
        pytest.param({"relative": True, "clean_recache": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_remembering_what_was_generated_is_generating_it(bundle, settings):
    """Filling, a cut with its pin, eviction, a second cut: every part of the state, whatever the cuts of the other sample."""
    s = Session(bundle, **settings)
    prompts = [(STAR, STAR), (STAR, CUT + RING), (CUT + RING, RING), (RING, RING), (RING, STAR), (CUT + STAR, STAR)]
    generated = remembered = s.start(3, batch=2)
    remembered = s.fork(remembered)
    for pair in prompts:
        text, cut = s.read(pair), [p.startswith(CUT) for p in pair]
        generated, z = s.step(generated, text, cut=cut)
        remembered = s.remember(remembered, z, text, cut=cut)
        close(remembered, generated)
    assert held_frames(generated.memory)[0] == ([0, 1, 10, 11] if s.experiment.stream.clean_recache else [0, 1, 6, 7, 8, 9, 10, 11])


def test_latents_of_another_size_are_refused(session):
    with pytest.raises(ConfigError, match=r"latents have shape \(1, 4, 2, 4, 4\); this chunk takes \[B,F,h,w,C\] = \(1, 2, 2, 4, 4\)"):
        session.remember(session.start(), np.zeros((1, 4, 2, 4, 4), np.float32), session.read(STAR))


# ---- a video goes on -----------------------------------------------------------------------------------------------------------------------


def clip(frames, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, 32, 64, 3), np.uint8)


def test_extension_is_the_encoded_video_remembered(session, caplog):
    """13 of 16 frames, the second chunk under its own prompt, as one call on the whole clip; then the stream goes on from there."""
    video, prompts, shown = clip(16), [STAR, CUT + RING], []
    state, carry = session.extend(iter(video), prompts, seed=5, shown=shown.append)
    assert "last 3 frames do not fill a chunk of 8 and are dropped: it goes on after frame 13" in caplog.text
    z = quick(lambda vae, v: vae.encode(v))(session.vae, video[None, :13].astype(np.float32) / 127.5 - 1)
    expected, decoder, pixels = session.start(5), session.decode_start(), []
    for c, prompt in enumerate(prompts):
        part = z[:, c * CHUNK : (c + 1) * CHUNK]
        expected = session.remember(expected, part, session.read(prompt), cut=c == 1)
        decoder, drawn = session.decode_step(decoder, part)
        pixels.append(to_uint8(drawn)[0])
    close(state, expected, 1e-5)
    for x, y in zip(jax.tree.leaves(carry), jax.tree.leaves(decoder), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)
    assert [len(s) for s in shown] == [5, 8]
    assert np.abs(np.concatenate(shown).astype(int) - np.concatenate(pixels)[3:]).max() <= 1
    more = list(session.stream([RING, STAR], state=state, carry=carry))
    assert [(c.index, c.cut, c.frames.shape) for c in more] == [(2, False, (8, 32, 64, 3)), (3, False, (8, 32, 64, 3))]


def test_samples_go_on_from_one_video(session):
    state, carry = session.extend(clip(5), STAR, seed=5, batch=2)
    assert {x.shape[:1] for x in jax.tree.leaves(carry)} == {(), (2,)}
    alone, _ = session.extend(clip(5), STAR, seed=6)
    np.testing.assert_allclose(state.memory.layers[1][0][1], alone.memory.layers[1][0][0], atol=1e-6)
    assert np.array_equal(jax.random.key_data(state.key[1:]), jax.random.key_data(alone.key))


@pytest.mark.parametrize(
    ("video", "prompts", "message"),
    [
        (clip(4), STAR, "has 4 pixel frames and the first chunk takes 5 .each further one 8.; give at least 5 frames"),
        (iter(clip(4)), STAR, "has 4 pixel frames and the first chunk takes 5"),
        (clip(13), [STAR], "1 prompts for 2 chunks of the given video; give one for each, or one string for all"),
        (clip(5)[:, :, :32], STAR, r"image has shape \(32, 32, 3\); this model takes \(32, 64, 3\)"),
    ],
)
def test_video_that_cannot_be_extended(session, video, prompts, message):
    counts = encode_piece._cache_size(), take_in._cache_size()
    with pytest.raises(ConfigError, match=message):
        session.extend(video, prompts)
    assert (encode_piece._cache_size(), take_in._cache_size()) == counts


def test_prompts_are_counted_as_frames_come(session):
    for prompts in ([STAR], [STAR] * 3):
        with pytest.raises(ConfigError, match=f"{len(prompts)} prompts for .*2 chunks of the given video"):
            session.extend(iter(clip(13)), prompts)


def test_extension_needs_a_vae(bundle):
    with pytest.raises(ConfigError, match="no VAE, so it cannot read a video; use remember for latents"):
        Session(bundle._replace(vae=None)).extend(clip(5), STAR)
