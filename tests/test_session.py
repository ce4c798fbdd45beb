"""Sessions on an untrained TINY model: seeds, batches, forks, saved states, live prompts, cuts, given noise and images, meshes, memory."""

import pathlib
import resource
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import TINY, ConfigError, MeshConfig, VideoConfig, replace
from longlive_jax.data.prompts import storyboard
from longlive_jax.data.toywords import PromptError
from longlive_jax.model.memory import held_frames
from longlive_jax.model.vae import to_uint8
from longlive_jax.streaming.bundles import random_bundle
from longlive_jax.streaming.decode import put
from longlive_jax.streaming.programs import take_in
from longlive_jax.streaming.session import Session, advance, decode_chunk
from longlive_jax.streaming.writer import OutputError

STAR, RING = "A red star bounces in a meadow.", "A blue ring stands still at night."
CUT = TINY.stream.cut_prefix
PROMPTS = [STAR, STAR, RING, CUT + STAR, STAR]
CHUNK = TINY.stream.chunk


@pytest.fixture(scope="module")
def bundle():
    return random_bundle(TINY)


@pytest.fixture(scope="module")
def session(bundle):
    return Session(bundle)


@pytest.fixture(scope="module")
def film(session):
    """The frames of ``PROMPTS`` from seed 3."""
    return frames(session.stream(PROMPTS, seed=3))


def frames(chunks):
    return np.concatenate([chunk.frames for chunk in chunks], axis=-4)


def latents(session, prompts, state, cuts=True):
    """Step through ``prompts``: the last state and the latents [B,frames,h,w,C]."""
    out = []
    for prompt in prompts:
        state, z = session.step(state, session.read(prompt), cut=cuts and prompt.startswith(CUT))
        out.append(z)
    return state, np.concatenate(out, 1)


def noise(chunks, batch=1, seed=0):
    shape = (batch, chunks * CHUNK, *TINY.grid, TINY.transformer.channels)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def same(a, b):
    """Equal states: every leaf, keys and counters included."""
    data = lambda x: np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(data(x), data(y)) for x, y in pairs)


# ---- seeds and batches ---------------------------------------------------------------------------------------------------------------------


def test_chunks_say_what_they_are(session):
    chunks = list(session.stream(PROMPTS, seed=3))
    assert [c.index for c in chunks] == [0, 1, 2, 3, 4] and [c.prompt for c in chunks] == PROMPTS
    assert [c.cut for c in chunks] == [False, False, False, True, False]
    assert [c.frames.shape for c in chunks] == [(5, 32, 64, 3)] + [(8, 32, 64, 3)] * 4
    assert all(c.frames.dtype == np.uint8 and c.denoise_seconds > 0 for c in chunks)


def test_seed_decides_everything(session, film):
    assert np.array_equal(frames(session.stream(PROMPTS, seed=3)), film)
    assert np.array_equal(latents(session, PROMPTS, session.start(3))[1], latents(session, PROMPTS, session.start(3))[1])
    other = frames(session.stream(PROMPTS[:1], seed=4))
    assert np.abs(other.astype(int) - film[:5]).mean() > 1


def test_prompt_changes_the_video(session, film):
    assert not np.array_equal(frames(session.stream([RING], seed=3)), film[:5])


def test_batch_is_the_videos_of_its_seeds(session):
    state, batch = latents(session, PROMPTS, session.start(5, batch=2))
    for b in range(2):
        np.testing.assert_allclose(batch[b : b + 1], latents(session, PROMPTS, session.start(5 + b))[1], atol=1e-5)
    assert held_frames(state.memory) == [held_frames(state.memory)[0]] * 2


def test_every_sample_has_its_own_prompt_and_cut(session):
    """A batch whose samples read other prompts and cut at other chunks is the two videos."""
    stories = [STAR, STAR, CUT + RING, RING], [RING, CUT + RING, STAR, STAR]
    state, out = session.start(0, batch=2), []
    for pair in zip(*stories, strict=True):
        state, z = session.step(state, session.read(pair), cut=[p.startswith(CUT) for p in pair])
        out.append(z)
    for b, story in enumerate(stories):
        alone, z = latents(session, story, session.start(b))
        np.testing.assert_allclose(np.concatenate(out, 1)[b : b + 1], z, atol=1e-5)
        assert held_frames(state.memory)[b] == held_frames(alone.memory)[0]


@pytest.mark.slow
def test_batch_in_stream(session):
    video = frames(session.stream(PROMPTS[:2], seed=3, batch=2))
    assert video.shape == (2, 13, 32, 64, 3)
    for b in range(2):
        assert np.abs(video[b].astype(int) - frames(session.stream(PROMPTS[:2], seed=3 + b))).max() <= 1


# ---- stream = step by step -----------------------------------------------------------------------------------------------------------------


def test_stream_is_steps_and_the_decoder_over_the_whole(session, film):
    z = latents(session, PROMPTS, session.start(3))[1]
    whole = np.asarray(jax.jit(lambda vae, z: to_uint8(vae.decode(z)))(session.vae, z))[0]
    assert whole.shape == film.shape
    assert np.abs(whole.astype(int) - film).max() <= 1


def test_ahead_changes_nothing_but_time(session, film):
    for ahead in (0, 3):
        assert np.array_equal(frames(session.stream(PROMPTS, seed=3, ahead=ahead)), film)


def test_the_first_frames_come_early_where_that_is_asked(session, film):
    """The first chunk in parts, of one number and one time together, and the same video."""
    for ahead in (0, 1):
        chunks = list(session.stream(PROMPTS, seed=3, ahead=ahead, early=1))
        assert [c.index for c in chunks] == [0, 0, *range(1, len(PROMPTS))]
        assert [len(c.frames) for c in chunks[:3]] == [1, 4, 8] and chunks[0].denoise_seconds > 0 == chunks[1].denoise_seconds
        assert np.abs(np.concatenate([c.frames for c in chunks]).astype(int) - film).max() <= 1


def test_live_prompts_are_asked_one_chunk_at_a_time(session, film):
    """The next prompt is asked for when the chunk before it has been seen."""
    asked, seen = [], []

    def user():
        for index, prompt in enumerate(PROMPTS):
            assert len(seen) == index
            asked.append(prompt)
            yield prompt

    for chunk in session.stream(user(), seed=3, ahead=0):
        assert len(asked) == chunk.index + 1
        seen.append(chunk.frames)
    assert np.array_equal(np.concatenate(seen), film)


def test_first_chunk_does_not_wait_for_the_second(session):
    """With one chunk ahead, chunk 0 is handed over once step 1 is on its way, not once a third prompt is there."""
    asked = []
    stream = session.stream((asked.append(p) or p for p in PROMPTS), seed=3)
    assert next(stream).index == 0 and len(asked) <= 2
    stream.close()


def test_storyboard_streams_its_prompts(session, film):
    board = storyboard([f"[2] {STAR}", f"+ [1] {RING}", f"[2] {STAR}"])
    assert list(board.prompts) == PROMPTS
    assert np.array_equal(frames(session.stream(board, seed=3)), film)


def test_closing_early_leaves_no_thread(session):
    before = set(threading.enumerate())
    stream = session.stream(iter([STAR] * 1000))
    next(stream)
    assert set(threading.enumerate()) - before
    stream.close()
    assert set(threading.enumerate()) == before


def test_prompt_that_cannot_be_read_ends_a_live_stream_cleanly(session, film):
    before, seen = set(threading.enumerate()), []
    with pytest.raises(PromptError, match="unknown word 'dragon'"):
        for chunk in session.stream(iter([STAR, "A red dragon."]), seed=3, ahead=0):
            seen.append(chunk.frames)
    assert np.array_equal(np.concatenate(seen), film[:5]) and set(threading.enumerate()) == before


def test_nothing_retraces(session, film):
    """Window filling and wrapping, prompt changes, a cut with its pin: one program; so do a fork and a loaded state."""
    counts = advance._cache_size(), decode_chunk._cache_size()
    list(session.stream([STAR, RING, CUT + RING, STAR, STAR, CUT + STAR, RING], seed=8))
    state, _ = latents(session, [STAR, CUT + RING], session.start(1))
    session.step(session.fork(state), session.read(RING), cut=True)
    assert (advance._cache_size(), decode_chunk._cache_size()) == counts


def test_what_is_compiled_ahead_is_what_runs(bundle, caplog):
    """The step and the decoder are lowered from shapes before the first prompt is asked for, and the calls find them."""
    other = Session(bundle, steps=1, guidance=1.0)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        lowered = lambda: [m for m in caplog.messages if m.startswith(("Compiling jit(advance)", "Compiling jit(decode_chunk)"))]
        before = []
        prompts = (before.extend(lowered()) or prompt for prompt in [[STAR, RING]])
        frames(other.stream(prompts, batch=2))
        assert len(before) == 2 and before == lowered()


def test_two_sessions_share_a_bundle(bundle, session, film):
    """Turn by turn, other settings, one set of weights and of compiled programs."""
    other = Session(bundle)
    counts = advance._cache_size(), decode_chunk._cache_size()
    both = list(zip(session.stream(PROMPTS, seed=3), other.stream(PROMPTS, seed=3), strict=True))
    assert np.array_equal(frames(a for a, _ in both), film) and np.array_equal(frames(b for _, b in both), film)
    assert (advance._cache_size(), decode_chunk._cache_size()) == counts


# ---- cuts, guidance, noise, image ----------------------------------------------------------------------------------------------------------


def test_cut_pins_shifts_and_is_no_cut_at_the_start(session):
    state, _ = latents(session, [CUT + STAR, STAR], session.start())
    assert not state.memory.pinned.any() and float(state.offset[0]) == 0
    state, _ = latents(session, [CUT + RING], state)
    assert np.asarray(state.memory.frame[0][state.memory.pinned[0]]).tolist() == [4, 5]
    assert float(state.offset[0]) == TINY.stream.shot_offset
    state, _ = latents(session, [RING] * 3, state)
    assert held_frames(state.memory) == [[0, 1, 4, 5, 8, 9, 10, 11]]  # sink, shot sink, the latest


def test_guidance_one_has_no_second_memory(session):
    assert not session.guided and session.negative is None and session.start().unguided is None


@pytest.mark.slow
def test_guidance_moves_the_latents(bundle, session):
    guided = Session(bundle, guidance=3.0)
    state, z = latents(guided, [STAR], guided.start(2))
    assert len(state.unguided) == TINY.transformer.layers
    plain = latents(session, [STAR], session.start(2))[1]
    assert np.abs(z - plain).max() > 1e-3
    given = Session(bundle, guidance=3.0, negative=guided.text and jnp.zeros((1, TINY.transformer.text_len, TINY.text.dim)))
    assert np.abs(latents(given, [STAR], given.start(2))[1] - z).max() > 1e-6


def test_settings_go_to_sampler_and_stream(bundle):
    s = Session(bundle, steps=3, solver="euler", window=12, sink=4, shot_offset=1)
    assert (s.experiment.sampler.steps, s.experiment.stream.window, s.solver.steps) == (3, 12, 3)
    assert s.start().memory.slots == 12 and s.experiment.transformer == TINY.transformer


def test_given_noise(session, film):
    """The noise that the seed draws, given by hand, is the same video; other noise is another."""
    shape = (CHUNK, *TINY.grid, TINY.transformer.channels)
    drawn = [jax.random.normal(jax.random.fold_in(jax.random.key(3), c), shape) for c in range(len(PROMPTS))]
    given = np.concatenate(drawn)[None]
    assert np.abs(frames(session.stream(PROMPTS, seed=99, noise=given)).astype(int) - film).max() <= 1
    assert not np.array_equal(frames(session.stream(PROMPTS[:1], seed=3, noise=noise(1))), film[:5])


@pytest.mark.slow
def test_video_starts_with_the_given_image(session):
    image = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
    latent = session.encode_image(image)
    assert latent.shape == (1, 1, *TINY.grid, TINY.transformer.channels)
    shape = (1, CHUNK, *TINY.grid, TINY.transformer.channels)
    mask = jnp.zeros((1, CHUNK), bool).at[:, 0].set(True)
    given = jnp.zeros(shape).at[:, :1].set(latent), mask
    _, z = session.step(session.start(1), session.read(STAR), given=given)
    np.testing.assert_array_equal(z[:, :1], latent)
    assert np.abs(np.asarray(z[:, 1:])).max() > 0.1
    video = frames(session.stream([STAR, STAR], seed=1, image=image))
    _, pixels = session.decode_step(session.decode_start(), z)
    assert np.abs(video[:5].astype(int) - np.asarray(to_uint8(pixels))[0, 3:]).max() <= 1
    assert not np.array_equal(video[1:], frames(session.stream([STAR, STAR], seed=1))[1:])


# ---- states as values ----------------------------------------------------------------------------------------------------------------------


def test_fork_gives_two_continuations(session):
    trunk, head = latents(session, [STAR, STAR], session.start(7))
    branch = session.fork(trunk)
    one = latents(session, [RING, CUT + STAR], trunk)[1]
    two = latents(session, [STAR, STAR], branch)[1]
    assert np.abs(one - two).max() > 1e-3
    for tail, prompts in ((one, [RING, CUT + STAR]), (two, [STAR, STAR])):
        whole = latents(session, [STAR, STAR, *prompts], session.start(7))[1]
        np.testing.assert_array_equal(whole, np.concatenate([head, tail], 1))


def first_part(session, chunks=3):
    """State and carry after the first chunks of the film."""
    state, carry = session.start(3), session.decode_start()
    for prompt in PROMPTS[:chunks]:
        state, z = session.step(state, session.read(prompt))
        carry, _ = session.decode_step(carry, z)
    return state, carry


def test_saved_state_goes_on_as_if_never_stopped(session, bundle, film, tmp_path):
    state, carry = first_part(session)
    session.save(tmp_path / "deep" / "state.safetensors", state, carry)
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["state.safetensors"]
    counts = advance._cache_size(), decode_chunk._cache_size()
    other = Session(bundle)
    loaded, loaded_carry = other.load(tmp_path / "deep" / "state.safetensors")
    assert same(loaded, state) and same(loaded_carry, carry)
    chunks = list(other.stream(PROMPTS[3:], state=loaded, carry=loaded_carry))
    assert [c.index for c in chunks] == [3, 4] and [c.cut for c in chunks] == [True, False]
    assert np.array_equal(frames(chunks), film[5 + 2 * 8 :])
    assert (advance._cache_size(), decode_chunk._cache_size()) == counts


def test_state_is_saved_without_the_carry(session, tmp_path):
    state = session.start(11)
    session.save(tmp_path / "s", state)
    loaded, carry = session.load(tmp_path / "s")
    assert carry is None and same(loaded, state)
    assert len(frames(session.stream([STAR], state=loaded))) == 5


def test_damaged_and_foreign_states_are_refused(session, bundle, tmp_path):
    path = tmp_path / "s"
    with pytest.raises(ConfigError, match=r"no saved state at .*/s; save one with Session\.save"):
        session.load(path)
    session.save(path, *first_part(session, 1))
    whole = path.read_bytes()
    for size in (0, 4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=r"cannot be read .* truncated or no saved state: save it again"):
            session.load(path)
    path.write_bytes(whole)
    with pytest.raises(ConfigError, match="another model or other settings") as error:
        Session(bundle, window=12, guidance=2.0).load(path)
    text = str(error.value)  # every difference in one message
    assert "['state'].memory.frame: file has int32[1, 8], this session int32[1, 12]" in text
    assert "['state'].unguided[0][0]: not in the file" in text
    with pytest.raises(ConfigError, match=r"file has float32\[1\], this session float32\[2\]"):
        session.load(path, batch=2)


def test_state_that_cannot_be_written(session, tmp_path):
    state = session.start()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot be written: .*: free space or give another folder"):
        session.save(tmp_path / "file" / "s", state)
    session.save(tmp_path / "s", state)
    before = (tmp_path / "s").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            session.save(tmp_path / "s", state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (tmp_path / "s").read_bytes() == before and sorted(f.name for f in tmp_path.iterdir()) == ["file", "s"]


# ---- what is refused -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stepz": 4}, "unknown session setting 'stepz'; did you mean 'steps'"),
        ({"colour": 4}, "unknown session setting 'colour'; known: solver, steps"),
        ({"steps": 0}, r"sampler.steps=0 must lie in 1\.\.1000"),
        ({"sink": 3}, "stream.sink=3 is not a multiple of chunk=2"),
        ({"window": 4}, "stream.window=4 cannot hold sink=2 with shot sinks on, which needs sink"),
    ],
)
def test_settings_refused(bundle, settings, message):
    with pytest.raises(ConfigError, match=message):
        Session(bundle, **settings)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("A red star.", {}, "'A red star.' is one string; give one per chunk"),
        ([STAR], {"batch": 0}, "batch=0 must be positive"),
        ([STAR], {"seed": -1}, r"seed=-1 must lie in 0\.\.4294967295"),
        ([STAR], {"seed": 2**32 - 1, "batch": 2}, r"seed=4294967295 must lie in 0\.\.4294967294"),
        ([STAR], {"ahead": -1}, "ahead=-1 must not be negative"),
        ([STAR], {"early": 3}, "early=3 latents do not divide a chunk of 2; use 0 or one of 1, 2"),
        ([STAR], {"noise": noise(1)[:, :1]}, r"frames=1 does not split into chunks of 2; use a multiple of 2, e\.g\. frames=2"),
        ([STAR] * 3, {"noise": noise(2)}, "noise has 4 frames for 3 chunks of 2; give 6 frames"),
        ([STAR], {"noise": noise(1)[0]}, r"noise has shape \(2, 2, 4, 4\); this video takes \[B,frames,h,w,C\]"),
        ([STAR], {"noise": noise(1, batch=2)}, "with B=1"),
        ([STAR], {"image": np.zeros((64, 32, 3), np.uint8)}, r"image has shape \(64, 32, 3\); this model takes \(32, 64, 3\)"),
        ([STAR], {"image": np.zeros((32, 64, 3))}, "image is float64; give uint8, 0 to 255"),
    ],
)
def test_stream_refused_at_the_call(session, prompts, options, message):
    """Before the first chunk is asked for, so before anything is compiled."""
    with pytest.raises(ConfigError, match=message):
        session.stream(prompts, **options)


def test_prompts_are_read_before_the_first_chunk(session):
    for prompts in ([STAR, "A red dragon."], storyboard([STAR, "A red dragon."], 4)):
        with pytest.raises(PromptError, match="unknown word 'dragon'"):
            session.stream(prompts)


def test_going_on_needs_the_whole_state(session):
    state, carry = first_part(session, 1)
    with pytest.raises(ConfigError, match="state is at chunk 1, so the decoder's carry at that point is needed too"):
        session.stream([STAR], state=state)
    with pytest.raises(ConfigError, match="an image starts a video, but the given state is at chunk 1"):
        session.stream([STAR], state=state, carry=carry, image=np.zeros((32, 64, 3), np.uint8))
    with pytest.raises(ConfigError, match=r"noise has shape \(1, 4, 2, 4, 4\); this chunk takes"):
        session.step(state, session.read(STAR), noise=noise(2))


def test_parts_that_a_bundle_lacks(bundle):
    bare = Session(bundle._replace(vae=None, text=None))
    with pytest.raises(ConfigError, match="no text encoder, so it cannot read prompts; use read_embeddings"):
        bare.read(STAR)
    with pytest.raises(ConfigError, match="no VAE, so it cannot make pictures; use stream_latents"):
        bare.stream([STAR])
    foreign = bundle._replace(experiment=replace(TINY, text=replace(TINY.text, tokenizer="umt5")))
    with pytest.raises(ConfigError, match="tokenizer needs files that are not in the bundle; pass tokenizer="):
        Session(foreign).read(STAR)


def called(session, state):
    """Every call that takes a state and moves it on, as functions without arguments."""
    text, z = session.read(STAR), noise(1)
    return {
        "step": lambda: session.step(state, text),
        "remember": lambda: session.remember(state, z, text),
        "stream": lambda: session.stream([STAR], state=state),
        "stream_latents": lambda: session.stream_latents([STAR], state=state),
    }


@pytest.mark.parametrize("name", ["step", "remember", "stream", "stream_latents"])
def test_guided_and_unguided_states_do_not_mix(bundle, session, name):
    guided, before = Session(bundle, guidance=3.0), (advance._cache_size(), take_in._cache_size())
    for here, there in ((guided, session), (session, guided)):
        message = rf"made under other settings \(guidance is {there.guided}, here {here.guided}\); make it with this session"
        with pytest.raises(ConfigError, match=message):
            called(here, there.start())[name]()
    assert (advance._cache_size(), take_in._cache_size()) == before


def test_memory_of_another_window_is_not_read_again(bundle):
    state = Session(bundle, recache=True, window=12).start()
    here = Session(bundle, recache=True)
    with pytest.raises(ConfigError, match="window is 12, here 8"):
        here.recache(state, here.read(STAR))


def test_chunks_of_another_length_are_refused(bundle, session):
    """Window and sink may agree all the same; where the state is in its video does not."""
    state, _ = first_part(session, 1)
    wide = replace(TINY, stream=replace(TINY.stream, chunk=1, sink=2))
    with pytest.raises(
        ConfigError, match="the given state is at frame 2 after 1 chunks, and chunks have 1 frames here; make it with this session"
    ):
        Session(bundle._replace(experiment=wide)).stream_latents([STAR], state=state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": [STAR, RING]}, "text is of 2 prompts for a state of batch=3; give one, or one for each sample"),
        ({"cut": [True, False]}, r"cut has shape \(2,\) for a state of batch=3; give one bool, or one for each sample"),
        (
            {"given": (noise(1, batch=2), np.zeros((2, CHUNK), bool))},
            r"given latents and mask have shapes \(\(2, 2, 2, 4, 4\), \(2, 2\)\); this chunk takes .* = \(3, 2, 2, 4, 4\) and .* = \(3, 2\)",
        ),
        ({"given": (noise(1), np.zeros(CHUNK, bool))}, r"given latents and mask have shapes \(\(1, 2, 2, 4, 4\), \(2,\)\)"),
    ],
)
def test_what_is_for_another_batch_is_refused(session, changes, message):
    changes = {"text": [STAR], **changes}
    before = advance._cache_size()
    with pytest.raises(ConfigError, match=message):
        session.step(session.start(0, batch=3), session.read(changes.pop("text")), **changes)
    assert advance._cache_size() == before


def test_guidance_without_a_text_encoder_needs_embeddings(bundle):
    bare = Session(bundle._replace(text=None), guidance=2.0)
    text = bare.read_embeddings(jnp.zeros((1, TINY.transformer.text_len, TINY.text.dim)))
    with pytest.raises(ConfigError, match=r"no text encoder to read one; give embeddings, Session\(negative=\.\.\.\)"):
        bare.step(bare.start(), text)
    two = Session(bundle, guidance=2.0, negative=jnp.zeros((2, TINY.transformer.text_len, TINY.text.dim)))
    with pytest.raises(ConfigError, match="negative is of 2 prompts for a state of batch=1"):
        two.step(two.start(), text)


def test_text_is_read_where_it_is_told_to_be(bundle, session):
    """The same keys and values from the device, the host, and a device that is freed again; another word is refused."""
    wanted = session.read([STAR, RING])
    for place in ("host", "freed"):
        for a, b in zip(jax.tree.leaves(Session(bundle, text_device=place).read([STAR, RING])), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    with pytest.raises(ConfigError, match="placement='gpu' of the text encoder must be one of device, host, freed"):
        Session(bundle, text_device="gpu")


def test_the_end_of_a_stream_is_handed_over(session, film):
    """Where the prompts end, also live ones that stop early, the point after the last chunk: the video goes on as if it had not stopped."""
    ends = []
    head = list(session.stream(iter(PROMPTS[:3]), seed=3, ended=lambda *end: ends.append(end)))
    ((state, carry),) = ends
    tail = list(session.stream(PROMPTS[3:], state=state, carry=carry))
    assert np.array_equal(frames(head + tail), film)
    parts = [z for _, z in session.stream_latents(PROMPTS[:2], seed=3, ended=lambda *end: ends.append(end))]
    assert len(parts) == 2 and int(ends[1][0].chunk) == 2 and ends[1][1] is None


# ---- meshes and long runs ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_mesh_of_four_devices_is_one_device(bundle, session, tmp_path):
    """2 x 2: latents, the stream with an image, and a state saved on one layout and loaded on another."""
    wide = Session(bundle._replace(experiment=replace(TINY, mesh=MeshConfig(2, 2))))
    with pytest.raises(ConfigError, match=r"batch=1 does not divide over mesh\.data=2; use a multiple of 2"):
        wide.start()
    prompts = [STAR, RING, CUT + STAR, STAR, STAR]
    state, z = latents(wide, prompts, wide.start(5, batch=2))
    plain_state, plain = latents(session, prompts, session.start(5, batch=2))
    np.testing.assert_allclose(z, plain, atol=1e-5)
    assert held_frames(state.memory) == held_frames(plain_state.memory)
    image = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
    video, plain_video = (frames(s.stream(prompts[:2], seed=5, batch=2, image=image)) for s in (wide, session))
    assert np.abs(video.astype(int) - plain_video).max() <= 1
    wide.save(tmp_path / "s", state)
    here, there = session.load(tmp_path / "s", batch=2)[0], wide.load(tmp_path / "s", batch=2)[0]
    tails = [latents(s, [RING], x)[1] for s, x in ((session, here), (wide, there), (wide, state))]
    np.testing.assert_allclose(tails[0], tails[1], atol=1e-5)
    np.testing.assert_array_equal(tails[1], tails[2])


def test_decoder_over_the_rows_of_a_mesh(bundle):
    """Two chunks by 2 x 2 devices are those by one; of a picture's 4 latent rows each has 2."""
    tall = replace(TINY, video=VideoConfig(height=64, width=32))
    one, wide = (Session(bundle._replace(experiment=replace(tall, mesh=mesh))) for mesh in (MeshConfig(1, 1), MeshConfig(2, 2)))
    pixels = {one: [], wide: []}
    for s, found in pixels.items():
        carry = s.decode_start(2)
        for i in range(2):
            z = jax.random.normal(jax.random.key(i), (2, CHUNK, *tall.grid, TINY.transformer.channels))
            carry, z = put(carry, s.decode_device), put(z, s.decode_device)
            carry, y = s.decode_step(carry, z)
            found.append(np.asarray(y))
    assert {x.shape for x in y.addressable_shards[0].data[None]} == {(1, 4 * CHUNK, 32, 32, 3)}
    np.testing.assert_allclose(pixels[wide], pixels[one], atol=1e-5)


@pytest.mark.slow
def test_decoder_on_a_device_of_its_own(bundle, film):
    apart = Session(bundle, vae_device=jax.devices()[1])
    assert np.abs(frames(apart.stream(PROMPTS, seed=3)).astype(int) - film).max() <= 1


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="reads the process's memory from /proc")
def test_memory_is_flat(session):
    """200 chunks with cuts and prompt changes; after the first 50 the process does not grow."""
    page = resource.getpagesize()
    held = lambda: int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * page
    prompts = [(CUT if i % 10 == 0 else "") + (STAR, RING)[i // 5 % 2] for i in range(200)]
    sizes = [held() for _ in session.stream(iter(prompts), seed=0)]
    assert len(sizes) == 200 and sizes[-1] - sizes[50] < 30 << 20, [s >> 20 for s in sizes[::25]]
