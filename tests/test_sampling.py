"""Ways of sampling on an untrained TINY model: known latents, videos that go on, prompts that change, schedules of samples, late chunks.

All sessions stream batches of two with guidance, so that they share their programs.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.config import TINY, ConfigError, MeshConfig, StreamConfig
from longlive_jax.data.prompts import storyboard
from longlive_jax.data.toywords import PromptError
from longlive_jax.diffusion.rollout import next_chunk, remember_chunk, start_stream
from longlive_jax.diffusion.solvers import make_solver
from longlive_jax.model.frames import block_causal, clip_frames, one_chunk
from longlive_jax.model.memory import held_frames, make_room
from longlive_jax.model.transformer import stack_blocks
from longlive_jax.model.vae import to_uint8
from longlive_jax.streaming.bundles import random_bundle
from longlive_jax.streaming.programs import advance, encode_piece, rebuild, take_in
from longlive_jax.streaming.session import Session
from tests.programs import quick

STAR, RING = "A red star bounces in a meadow.", "A blue ring stands still at night."
CUT = TINY.stream.cut_prefix
CHUNK = TINY.stream.chunk
SCHEDULE = [(STAR, STAR), (STAR, CUT + RING), (RING, RING), (CUT + STAR, STAR), (STAR, STAR), (STAR, CUT + RING)]


@pytest.fixture(scope="module")
def bundle():
    return random_bundle(TINY)


@pytest.fixture(scope="module")
def session(bundle):
    return Session(bundle, recache=True, guidance=2.0)


def is_cut(pair):
    return [p.startswith(CUT) for p in pair]


def steps(session, state, schedule):
    """Step through a schedule: the last state and all latents ``[B,frames,h,w,C]``."""
    out = []
    for pair in schedule:
        state, z = session.step(state, session.read(pair), cut=is_cut(pair))
        out.append(z)
    return state, np.concatenate(out, 1)


def close(a, b, atol=1e-6):
    """States that agree; keys and counters exactly. What lies in empty slots is never read."""
    filled = lambda s: np.asarray(s.memory.frame >= 0)[..., None, None, None]
    bare = lambda s: replace(s, memory=replace(s.memory, layers=()), unguided=None)
    read = lambda s: [bare(s), *(x * filled(s) for x in jax.tree.leaves((s.memory.layers, s.unguided)))]
    for x, y in zip(jax.tree.leaves(read(a)), jax.tree.leaves(read(b)), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=atol if x.dtype == np.float32 else 0)


# ---- known latents -------------------------------------------------------------------------------------------------------------------------


def draw(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


@functools.cache
def by_hand(guided):
    """The rollout's settings and its two ways to a state: guided with a memory that can be rebuilt, or relative with clean cuts."""
    stream = replace(TINY.stream, recache=guided, relative=not guided, clean_recache=not guided)
    solver = make_solver("unipc", 2, 5.0)

    def told(model, prompt, negative):
        return model.read(prompt), model.read(negative) if guided else None

    @quick
    def generate(model, state, noise, prompt, negative, cut):
        text, negative = told(model, prompt, negative)
        return next_chunk(model, solver, stream, state, noise, text, cut=cut, negative=negative, guidance=2.0)

    @quick
    def remember(model, state, z, prompt, negative, cut):
        text, negative = told(model, prompt, negative)
        return remember_chunk(model, stream, state, z, text, cut=cut, negative=negative)

    start = start_stream(TINY.transformer, stream, jax.random.key(0), 2, TINY.tokens, jnp.float32, guided, TINY.grid)
    return start, generate, remember


def turns():
    """Noise, prompt, negative prompt and cuts of every chunk of the schedule."""
    rng = np.random.default_rng(0)
    text = lambda: draw(rng, 2, 1, TINY.transformer.text_len, TINY.transformer.text_dim)
    return [(draw(rng, 2, CHUNK, *TINY.grid, TINY.transformer.channels), text(), text(), np.array(is_cut(pair))) for pair in SCHEDULE]


@pytest.mark.parametrize("guided", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_remembering_what_was_generated_is_generating_it(bundle, guided):
    """Filling, cuts with their pins, evictions, a second cut: every part of the state."""
    start, generate, remember = by_hand(guided)
    generated = remembered = start
    for noise, *told in turns():
        generated, z = generate(bundle.transformer, generated, noise, *told)
        remembered = remember(bundle.transformer, remembered, z, *told)
        close(remembered, generated)
    assert held_frames(generated.memory)[1] == ([0, 1, 2, 3, 8, 9, 10, 11] if guided else [0, 1, 10, 11])


def test_a_stacked_model_streams_alike(bundle):
    """Scanned blocks, for small programs: a memory that fills, and what is read of it under guidance."""
    state, generate, _ = by_hand(True)
    other, stacked = state, stack_blocks(bundle.transformer)
    for noise, *told in turns()[:2]:
        state, z = generate(bundle.transformer, state, noise, *told)
        other, y = generate(stacked, other, noise, *told)
        np.testing.assert_allclose(y, z, atol=1e-5)
    close(other, state, 1e-5)


def test_latents_of_another_size_are_refused(session):
    with pytest.raises(ConfigError, match=r"latents have shape \(1, 4, 2, 4, 4\); this chunk takes \[B,F,h,w,C\] = \(1, 2, 2, 4, 4\)"):
        session.remember(session.start(), np.zeros((1, 4, 2, 4, 4), np.float32), session.read(STAR))


# ---- a video goes on -----------------------------------------------------------------------------------------------------------------------


def clip(frames, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, 32, 64, 3), np.uint8)


def test_extension_is_the_encoded_video_remembered(session, caplog):
    """13 of 16 frames, a cut in the second chunk; as one call on the whole clip. Then both samples go on, each with its own noise."""
    video, prompts, shown = clip(16), [STAR, (CUT + RING, STAR)], []
    state, carry = session.extend(iter(video), prompts, seed=5, batch=2, shown=shown.append)
    assert "last 3 frames do not fill a chunk of 8 and are dropped: it goes on after frame 13" in caplog.text
    z = quick(lambda vae, v: vae.encode(v))(session.vae, video[None, :13].astype(np.float32) / 127.5 - 1)
    expected, decoder, pixels = session.start(5, batch=2), session.decode_start(), []
    for c, prompt in enumerate(prompts):
        part = z[:, c * CHUNK : (c + 1) * CHUNK]
        expected = session.remember(expected, part, session.read(prompt), cut=[c == 1, False])
        decoder, drawn = session.decode_step(decoder, part)
        pixels.append(to_uint8(drawn)[0])
    close(state, expected, 1e-5)
    for x, y in zip(jax.tree.leaves(carry), jax.tree.leaves(decoder), strict=True):
        np.testing.assert_allclose(x, y if x.ndim == 0 else np.repeat(y, 2, 0), atol=1e-4)
    assert [len(s) for s in shown] == [5, 8]
    assert np.abs(np.concatenate(shown).astype(int) - np.concatenate(pixels)[3:]).max() <= 1
    (index, more), *_ = session.stream_latents([RING], state=state)
    assert index == 2 and np.abs(more[0] - more[1]).max() > 0.1


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


def test_prompts_of_an_extension_are_counted_as_frames_come(session):
    for prompts in ([STAR], [STAR] * 3):
        with pytest.raises(ConfigError, match=f"{len(prompts)} prompts for .*2 chunks of the given video"):
            session.extend(iter(clip(13)), prompts, batch=2)
    with pytest.raises(PromptError, match="unknown word 'dragon'"):
        session.extend(clip(13), "A red dragon.")


def test_extension_needs_a_vae_that_encodes(bundle):
    with pytest.raises(ConfigError, match="no VAE, so it cannot read a video; use remember for latents"):
        Session(bundle._replace(vae=None)).extend(clip(5), STAR)
    half = nnx.clone(bundle.vae)
    half.encoder = None
    decoder = Session(bundle._replace(vae=half))
    for call in (lambda: decoder.extend(clip(5), STAR), lambda: decoder.stream([STAR], image=clip(1)[0])):
        with pytest.raises(ConfigError, match="this VAE has no encoder"):
            call()


# ---- another prompt for what is held -------------------------------------------------------------------------------------------------------


def test_the_same_prompt_read_again_changes_nothing(session):
    """A window that is just full, a cut in one sample: nothing that the chunks of the shot saw is gone."""
    state, _ = steps(session, session.start(3, batch=2), [(STAR, STAR), (STAR, STAR), (STAR, CUT + RING), (STAR, CUT + RING)])
    before = session.fork(state)
    close(session.recache(state, session.read((STAR, CUT + RING))), before, 1e-5)


def test_memory_under_a_new_prompt_is_the_forward_without_a_memory(session):
    """After evictions, so with slots out of order: the next chunk's velocity is that of one call over all held frames and the chunk.

    The sample whose prompt did not change goes on as before.
    """
    plain, _ = steps(session, session.start(3, batch=2), [(STAR, STAR)] * 6)
    assert np.asarray(plain.memory.frame[0]).tolist() == [0, 1, 8, 9, 10, 11, 6, 7]
    text, kept = session.read((RING, STAR)), session.fork(plain)
    state = session.recache(plain, text, changed=[True, False])
    now = jnp.broadcast_to(jnp.arange(12, 14), (2, CHUNK))
    x = jnp.asarray(draw(np.random.default_rng(0), 2, CHUNK, *TINY.grid, TINY.transformer.channels))

    @quick
    def remembered(state):
        memory, slots = make_room(state.memory, now)
        t = jnp.full((2, CHUNK), 700.0)
        return session.transformer(x, t, text, one_chunk(now.astype(jnp.float32)), memory=memory, slots=slots)[0]

    @quick
    def at_once(z, time):
        """The first sample. The new chunk does not see frames 6 and 7, whose slots it takes, though the frames after them did."""
        frames = clip_frames(1, 10, CHUNK, time=time, prompt=jnp.zeros((1, 10), jnp.int32))
        visible = block_causal(frames, frames) & ~np.pad(np.ones((2, 2), bool), ((8, 0), (2, 6)))
        return session.transformer(z, jnp.where(time < 12, 0.0, 700.0), jax.tree.map(lambda a: a[:1], text), frames, visible)[0]

    v, before = remembered(state), remembered(kept)
    assert np.asarray(state.memory.frame[0]).tolist() == state.held.time[0].tolist() == [0, 1, 6, 7, 8, 9, 10, 11]
    whole = at_once(jnp.concatenate([state.held.z[:1], x[:1]], 1), jnp.concatenate([state.held.time[:1], now[:1]], 1))
    np.testing.assert_allclose(v[0], whole[0, 8:], atol=1e-5)
    np.testing.assert_allclose(v[1], before[1], atol=1e-5)
    assert np.abs(v[0] - before[0]).max() > 1e-3


def test_stream_reads_a_changed_prompt_into_the_memory(session):
    """Where it changes without a cut, sample by sample; the cut prefix that goes after a shot's first chunk is no change."""
    changed = [None, None, (True, False), (False, True), None, None]
    state, out = session.start(7, batch=2), []
    for pair, where in zip(SCHEDULE, changed, strict=True):
        text = session.read(pair)
        state = state if where is None else session.recache(state, text, changed=where)
        state, z = session.step(state, text, cut=is_cut(pair))
        out.append(z)
    counts = advance._cache_size(), rebuild._cache_size()
    for (index, z), expected in zip(session.stream_latents(SCHEDULE, seed=7, batch=2), out, strict=True):
        np.testing.assert_allclose(z, expected, atol=1e-6, err_msg=f"chunk {index}")
    plain = steps(session, session.start(7, batch=2), SCHEDULE[:3])[1]
    assert np.abs(plain[:, 2 * CHUNK :] - out[2])[0].max() > 1e-4
    assert (advance._cache_size(), rebuild._cache_size()) == counts


@pytest.mark.slow
def test_memory_is_read_again_on_four_devices(session, bundle, tmp_path):
    """2 x 2: the schedule with its changes, and a state with its latents saved on one layout and loaded on another."""
    wide = Session(bundle._replace(experiment=replace(TINY, mesh=MeshConfig(2, 2))), recache=True, guidance=2.0)
    plain = [z for _, z in session.stream_latents(SCHEDULE, seed=7, batch=2)]
    for (index, z), expected in zip(wide.stream_latents(SCHEDULE, seed=7, batch=2), plain, strict=True):
        np.testing.assert_allclose(z, expected, atol=1e-5, err_msg=f"chunk {index}")
    state, _ = steps(wide, wide.start(7, batch=2), SCHEDULE[:2])
    wide.save(tmp_path / "s", state)
    close(session.load(tmp_path / "s", batch=2)[0], wide.load(tmp_path / "s", batch=2)[0])


def test_states_of_other_settings_are_refused(session, bundle):
    plain = Session(bundle, window=12)
    with pytest.raises(
        ConfigError, match=r"other settings \(window is 12, here 8; recache is False, here True; guidance is False, here True\)"
    ):
        session.stream_latents([STAR], state=plain.start())
    with pytest.raises(ConfigError, match="keeps no latents to read again; make the session with recache=True"):
        plain.recache(plain.start(), None)
    with pytest.raises(ConfigError, match=r"give start_stream their grid=\(h, w\)"):
        start_stream(TINY.transformer, StreamConfig(recache=True), None, 1, 8, jnp.float32, False)


# ---- schedules of samples, latents alone ---------------------------------------------------------------------------------------------------


def test_storyboards_side_by_side(session, bundle):
    """One per sample, without a VAE: the same as tuples of prompts."""
    boards = [storyboard([f"[2] {STAR}", f"+ [1] {RING}", f"[1] {STAR}"]), storyboard([f"[1] {STAR}", f"[2] {RING}", f"+ [1] {STAR}"])]
    assert list(zip(*(b.prompts for b in boards))) == SCHEDULE[:4]
    bare = Session(bundle._replace(vae=None), recache=True, guidance=2.0)
    pairs = zip(bare.stream_latents(boards, seed=7, batch=2), session.stream_latents(SCHEDULE[:4], seed=7, batch=2), strict=True)
    for c, ((index, z), (_, expected)) in enumerate(pairs):
        assert index == c
        np.testing.assert_array_equal(z, expected)
    with pytest.raises(ConfigError, match="no VAE, so it cannot read an image"):
        bare.stream_latents([STAR], image=clip(1)[0])


@pytest.mark.slow
def test_chunks_say_the_prompts_and_cuts_of_their_samples(session):
    chunks = list(session.stream(iter(SCHEDULE[:2]), seed=7, batch=2))
    assert [c.prompt for c in chunks] == SCHEDULE[:2] and [c.cut for c in chunks] == [(False, False), (False, True)]
    assert [c.frames.shape for c in chunks] == [(2, 5, 32, 64, 3), (2, 8, 32, 64, 3)]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([(STAR, STAR, RING)], "a chunk's prompt is .*; give one string, or one string for each of batch=2 samples"),
        ([STAR, 3], "a chunk's prompt is 3; give one string"),
        ([storyboard([STAR], 2)], "1 prompts, 1 of them storyboards, for batch=2; give one storyboard per sample"),
        ([storyboard([STAR], 2), STAR], "2 prompts, 1 of them storyboards, for batch=2"),
        ([storyboard([STAR], 2), storyboard([STAR], 3)], r"storyboards have \[2, 3\] chunks; .* give them equal lengths"),
    ],
)
def test_schedules_refused(session, prompts, message):
    with pytest.raises(ConfigError, match=message):
        session.stream_latents(prompts, batch=2)


def test_live_schedule_is_refused_where_it_goes_wrong(session):
    chunks = session.stream_latents(iter([(STAR, RING), (STAR,)]), batch=2)
    assert next(chunks)[0] == 0
    with pytest.raises(ConfigError, match=r"prompt is \('A red star bounces in a meadow.',\); give one string, or one string for each"):
        next(chunks)


# ---- very late chunks ----------------------------------------------------------------------------------------------------------------------


def test_no_chunk_is_too_late(session, bundle):
    """Past 1,024 latents, and past four million: the same program, the sinks held, and rotary angles as exact as at the start."""
    late = lambda state, chunk: replace(state, chunk=jnp.int32(chunk))
    state, _ = steps(session, session.start(1, batch=2), SCHEDULE[:2])
    counts = advance._cache_size()
    state, _ = steps(session, late(state, 510), [(RING, RING)] * 4)
    assert held_frames(state.memory) == [[0, 1, *range(1022, 1028)], [0, 1, 2, 3, *range(1024, 1028)]]
    assert advance._cache_size() == counts
    start, generate, _ = by_hand(True)
    near, far = late(start, 1), late(start, 1 << 21)  # beyond the sink: nothing is kept for being early
    for noise, *told in turns()[:5]:
        near, z = generate(bundle.transformer, near, noise, *told)
        far, other = generate(bundle.transformer, far, noise, *told)
        np.testing.assert_allclose(other, z, atol=2e-5 * np.abs(z).max())
