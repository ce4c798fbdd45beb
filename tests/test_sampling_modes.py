"""Every way of sampling equals the list-based reference of ``tests/oracle.py``, and what cannot be combined is refused by name.

The runs overflow the window, cut twice (each sample of a batch elsewhere), and change the prompt inside a shot. The reference itself is held to
the public source's runs.
"""

import functools
import itertools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.config import TINY, ConfigError, MeshConfig, SamplerConfig, StreamConfig
from longlive_jax.data.prompts import Storyboard
from longlive_jax.diffusion.rollout import given_first
from longlive_jax.model.memory import held_frames
from longlive_jax.model.vae import VAE
from longlive_jax.streaming.bundles import Bundle
from longlive_jax.streaming.session import Session
from longlive_jax.tree import abstract, flat_params, with_params
from tests import oracle
from tests.golden_models import VARIANTS, sampler_config, stream_config, transformer, transformer_config
from tests.programs import shell
from tests.shared import golden

CHUNK, CHUNKS, SAMPLES = 4, 7, 3
CUTS = ((2, 5), (1, 4), (3, 6))  # chunks that start a shot, of every sample
PROMPT = (0, 0, 1, 1, 2, 3, 3)  # which of its prompts a sample reads in every chunk: it also changes where no shot starts
KNOWN = 2  # chunks of the video that an extension goes on from; one of them is a cut of sample 1
LAYERS = {1: 2, 4: 1}  # of the model, by devices: what a frame's keys saw matters from two layers on, one compiles sooner

MODES = ("text", "image", "extension")
GUIDANCE = (1.0, 2.5)
SINKS = {
    "no sink": dict(sink=0, shot_sink=False),
    "global": dict(sink=CHUNK, shot_sink=False),
    "global + shot": dict(sink=CHUNK, shot_sink=True),
}
RELATIVE = (False, True)
BATCHES = (1, SAMPLES)
DEVICES = (1, 4)
LEGAL = list(itertools.product(GUIDANCE, SINKS, RELATIVE, BATCHES, DEVICES, MODES))  # modes last: neighbours share programs
COVER = (  # every pair of two settings occurs here, in all modes; the rest of the matrix runs by ``pytest -m exhaustive``
    (1.0, "global + shot", False, 1, 1),
    (2.5, "no sink", True, 3, 1),
    (1.0, "global", False, 3, 4),
    (2.5, "global", True, 1, 4),
    (1.0, "no sink", False, 1, 4),
    (1.0, "global + shot", True, 3, 4),
    (2.5, "global", False, 1, 1),
    (2.5, "global + shot", False, 1, 1),
)
QUICK = COVER[0]


def named(case):
    guidance, sink, relative, batch, devices, mode = case
    text = f"{mode}, guidance {guidance}, {sink}, {'relative' if relative else 'absolute'}, batch {batch}, {devices} devices"
    marks = () if case[:5] == QUICK else pytest.mark.slow if case[:5] in COVER else pytest.mark.exhaustive
    return pytest.param(*case, id=text, marks=marks)


def test_every_pair_of_settings_is_in_the_cover():
    pairs = lambda row: {(i, j, row[i], row[j]) for i, j in itertools.combinations(range(5), 2)}
    assert set().union(*map(pairs, COVER)) == set().union(*(pairs(case[:5]) for case in LEGAL))


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


FRAME = *TINY.grid, TINY.transformer.channels
NOISE = normal(1, SAMPLES, CHUNKS, CHUNK, *FRAME)
VIDEO = normal(2, SAMPLES, KNOWN, CHUNK, *FRAME)
IMAGE = normal(3, SAMPLES, 1, *FRAME)
PROMPTS = normal(4, SAMPLES, max(PROMPT) + 1, TINY.transformer.text_len, TINY.transformer.text_dim)
NEGATIVE = normal(5, TINY.transformer.text_len, TINY.transformer.text_dim)


@functools.cache
def model(layers):
    """A TINY transformer in which every parameter is random: gates, heads and biases are open."""
    bare = shell(replace(TINY.transformer, layers=layers), jnp.float32)
    scale = lambda x: 0.3 if x.ndim == 1 else x.shape[-1] ** -0.5
    values = {k: scale(x) * normal(i, *x.shape) + ("norm" in k and k.endswith("weight")) for i, (k, x) in enumerate(flat_params(bare).items())}
    return with_params(bare, {k: jnp.asarray(x, jnp.float32) for k, x in values.items()})


@functools.cache
def session(devices=1, **settings):
    """A session of the TINY model that shards frames over ``devices``."""
    stream = StreamConfig(chunk=CHUNK, window=4 * CHUNK, sink=CHUNK, shot_offset=3.0)
    experiment = replace(TINY, transformer=model(LAYERS[devices]).config, stream=stream, mesh=MeshConfig(1, devices))
    return Session(Bundle(experiment, model(LAYERS[devices])), negative=NEGATIVE[None], **{"steps": 3, **settings})


@functools.cache
def network(layers):
    return oracle.Network(flat_params(model(layers)), model(layers).config)


def streamed(s, mode, batch):
    """What ``Session`` makes: latents ``[B,frames,h,w,C]`` of the generated chunks, and the frames held after every chunk."""
    state, out, held = s.start(0, batch), [], []
    for c in range(CHUNKS):
        text = s.read_embeddings(PROMPTS[:batch, PROMPT[c]])
        cut = [c in cuts for cuts in CUTS[:batch]]
        if mode == "extension" and c < KNOWN:
            state = s.remember(state, VIDEO[:batch, c], text, cut=cut)
        else:
            noise = NOISE[:batch, c]
            latents, mask = given_first(IMAGE[:batch], noise)  # one program for all chunks: later ones have no given frames
            state, z = s.step(state, text, cut=cut, noise=noise, given=(latents, mask & (mode == "image" and c == 0)))
            out.append(np.asarray(z))
        held.append(held_frames(state.memory))
    return np.concatenate(out, 1), held


@functools.cache
def expected(layers, stream, sampler, mode, sample):
    """The same of one sample from the reference."""
    run, out, held = oracle.Stream(network(layers), stream, sampler, NEGATIVE), [], []
    for c in range(CHUNKS):
        text, cut = PROMPTS[sample, PROMPT[c]], c in CUTS[sample]
        if mode == "extension" and c < KNOWN:
            run.remember(VIDEO[sample, c], text, cut)
        else:
            out.append(run.step(NOISE[sample, c], text, cut, {0: IMAGE[sample, 0]} if mode == "image" and c == 0 else None))
        held.append(run.held)
    return np.concatenate(out), held


def agrees(s, mode, batch):
    z, held = streamed(s, mode, batch)
    e = s.experiment
    for b in range(batch):
        latents, frames = expected(e.transformer.layers, e.stream, e.sampler, mode, b)
        assert [row[b] for row in held] == frames
        np.testing.assert_allclose(z[b], latents, rtol=0, atol=1e-5, err_msg=f"sample {b}")
    if mode == "image":
        np.testing.assert_array_equal(z[:, 0], IMAGE[:batch, 0])


@pytest.mark.parametrize("guidance, sink, relative, batch, devices, mode", [named(case) for case in LEGAL])
def test_equals_the_reference(guidance, sink, relative, batch, devices, mode):
    agrees(session(devices, guidance=guidance, relative=relative, **SINKS[sink]), mode, batch)


@pytest.mark.exhaustive
def test_every_setting_is_another_video():
    """So none of the settings of the matrix is one that does nothing: the reference's runs differ, by far more than the tolerance."""
    stream, videos = session().experiment.stream, {}
    for guidance, sink, relative, mode in itertools.product(GUIDANCE, SINKS, RELATIVE, MODES):
        settings = replace(stream, relative=relative, **SINKS[sink]), replace(session().experiment.sampler, guidance=guidance)
        videos[guidance, sink, relative, mode] = expected(LAYERS[1], *settings, mode, 0)[0][-(CHUNKS - KNOWN) * CHUNK :]
    for (a, x), (b, y) in itertools.combinations(videos.items(), 2):
        assert np.abs(x - y).max() > 1e-3 * np.abs(x).max(), (a, b)


# ---- settings beyond the matrix ------------------------------------------------------------------------------------------------------------


QUICK_SETTINGS = dict(guidance=QUICK[0], **SINKS[QUICK[1]])  # programs that the matrix has compiled already


def follows(s, state, run, chunks, sample=0, **given):
    """Steps of a session of one sample and of the reference, side by side; the session's last state."""
    for c in chunks:
        noise, text, cut = NOISE[sample, c], PROMPTS[sample, PROMPT[c]], c in CUTS[sample]
        places = given.get(f"chunk{c}", {})
        mask = np.array([[i in places for i in range(CHUNK)]])
        latents = np.array([[places.get(i, np.zeros(FRAME, np.float32)) for i in range(CHUNK)]])
        state, z = s.step(state, s.read_embeddings(text[None]), cut=cut, noise=noise[None], given=(latents, mask))
        same(z[0], run.step(noise, text, cut, places))
    return state


def same(actual, wanted):
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-5)


def reference(s):
    return oracle.Stream(network(s.experiment.transformer.layers), s.experiment.stream, s.experiment.sampler, NEGATIVE)


def test_euler_steps():
    s = session(solver="euler", **QUICK_SETTINGS)
    follows(s, s.start(), reference(s), range(3))


def test_given_frames_anywhere():
    """Frames may be known at any place of any chunk, also in the middle of a video, and come out as they were given."""
    s = session(**QUICK_SETTINGS)
    follows(s, s.start(), reference(s), range(4), chunk1={1: IMAGE[1, 0], 3: IMAGE[2, 0]}, chunk3={0: IMAGE[0, 0]})


def test_video_remembered_in_the_middle():
    """Known chunks may also come later than at the start."""
    s = session(**QUICK_SETTINGS)
    run = reference(s)
    state = follows(s, s.start(), run, range(1))
    state = s.remember(state, VIDEO[:1, 0], s.read_embeddings(PROMPTS[:1, 0]))
    run.remember(VIDEO[0, 0], PROMPTS[0, 0])
    state = follows(s, state, run, range(2, 4))
    assert held_frames(state.memory)[0] == run.held


@pytest.mark.slow
def test_drawn_noise_is_that_of_the_seed():
    """The call with the fewest arguments: noise from the sample's seed and the chunk alone, no given frames."""
    s = session(**SINKS["global + shot"])
    state, runs = s.start(7, SAMPLES), [reference(s) for _ in range(SAMPLES)]
    for c in range(3):
        cut = [c in cuts for cuts in CUTS]
        state, z = s.step(state, s.read_embeddings(PROMPTS[:, PROMPT[c]]), cut=cut)
        for b, run in enumerate(runs):
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(7 + b), c), z.shape[1:])
            same(z[b], run.step(noise, PROMPTS[b, PROMPT[c]], cut[b]))


@pytest.mark.slow
@pytest.mark.parametrize("relative", RELATIVE)
def test_clean_recache(relative):
    """A cut leaves the global sink and the new shot; each sample of the batch at its own chunk."""
    agrees(session(relative=relative, clean_recache=True, **SINKS["global + shot"]), "text", SAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("guidance, relative", [(1.0, False), (2.5, False), (1.0, True)])
def test_recache(guidance, relative):
    """A prompt that changes within a shot is read into what is held of the shot, of some samples of a batch."""
    s = session(guidance=guidance, relative=relative, recache=True, **SINKS["global + shot"])
    state, runs, changes = s.start(0, SAMPLES), [reference(s) for _ in range(SAMPLES)], 0
    for c in range(CHUNKS):
        text, cut = s.read_embeddings(PROMPTS[:, PROMPT[c]]), [c in cuts for cuts in CUTS]
        changed = [c > 0 and PROMPT[c] != PROMPT[c - 1] and not cut[b] for b in range(SAMPLES)]
        if any(changed):
            state = s.recache(state, text, changed=changed)
        state, z = s.step(state, text, cut=cut, noise=NOISE[:, c])
        for b, run in enumerate(runs):
            if changed[b]:
                run.recache(PROMPTS[b, PROMPT[c]])
                changes += 1
            same(z[b], run.step(NOISE[b, c], PROMPTS[b, PROMPT[c]], cut[b]))
    assert changes == 6


# ---- the reference against the public source -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_equals_the_public_source(variant):
    """Every variant of golden/sample.npz, whose own pipeline made it."""
    arrays = golden("sample.npz")
    variants = json.loads(str(arrays["meta"]))
    assert len(variants) == 10
    meta = variants[variant]
    stream = stream_config(meta)
    weights = oracle.Network(flat_params(transformer(arrays, meta)), transformer_config(meta))
    run, frames = oracle.Stream(weights, stream, sampler_config(meta), arrays["negative_embeds"]), lambda x: x[0].transpose(0, 2, 3, 1)
    noise, image, out = frames(arrays["noise"]), frames(arrays["initial_latent"])[0], []
    for c in range(meta["n_chunks"]):
        given = {0: image} if meta["uses_initial_latent"] and c == 0 else None
        part = noise[c * stream.chunk : (c + 1) * stream.chunk]
        out.append(run.step(part, arrays["prompt_embeds"][c], bool(arrays[f"{variant}/cut_flags"][c]), given))
    np.testing.assert_allclose(np.concatenate(out), frames(arrays[f"{variant}/latents"]), rtol=0, atol=1e-5)


# ---- what is refused -----------------------------------------------------------------------------------------------------------------------


def stream_of(**changes):
    return lambda: StreamConfig(**{"chunk": 4, "window": 16, "sink": 4, **changes})


def mesh_of(data=1, seq=1, heads=8):
    sizes = replace(TINY.transformer, heads=heads)
    return lambda: replace(TINY, transformer=sizes, stream=StreamConfig(chunk=4, window=16, sink=4), mesh=MeshConfig(data, seq))


SETTINGS_REFUSED = {
    "a window of part of a chunk": (stream_of(window=18), r"stream\.window=18 is not a multiple of chunk=4; use 16"),
    "a sink of part of a chunk": (
        stream_of(sink=6),
        r"stream\.sink=6 is not a multiple of chunk=4, so a shot sink could be evicted; use sink=0",
    ),
    "a negative sink": (stream_of(sink=-4), r"stream\.sink=-4 must not be negative; 0 turns the sink off"),
    "a global sink that fills the window": (
        stream_of(sink=16, shot_sink=False),
        r"window=16 cannot hold sink=16 and the current chunk; use window=20 or more",
    ),
    "both sinks that fill the window": (
        stream_of(sink=12),
        r"window=16 cannot hold sink=12 with shot sinks on, which needs sink \+ 2 chunks; use window=20 or more",
    ),
    "every chunk a cut": (stream_of(cut_prefix=" "), r"stream\.cut_prefix is empty, so every chunk would be a cut"),
    "devices that do not divide the heads": (
        mesh_of(seq=4, heads=2),
        r"transformer\.heads=2 does not divide by mesh\.seq=4; use seq in \[1, 2\]",
    ),
    "devices that do not divide the chunk": (mesh_of(seq=8), r"stream\.chunk=4 does not divide by mesh\.seq=8; use seq in \[1, 2, 4\]"),
    "no steps": (lambda: SamplerConfig(steps=0), r"sampler\.steps=0 must lie in 1\.\.1000"),
    "another solver": (lambda: SamplerConfig(solver="dpm"), r"sampler\.solver='dpm' must be 'unipc' or 'euler'"),
    "a shift of zero": (lambda: SamplerConfig(shift=0.0), r"sampler\.shift=0\.0 must be positive"),
}


@pytest.mark.parametrize("name", SETTINGS_REFUSED)
def test_refused_settings(name):
    build, message = SETTINGS_REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        build()


def later(s):
    """A state that is not at the start of its video, as after an extension."""
    return replace(s.start(), chunk=jnp.int32(KNOWN))


@functools.cache
def with_vae():
    """A session that could read an image; what is refused comes before anything of the VAE is used."""
    vae = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract(lambda: VAE(TINY.vae, rngs=nnx.Rngs(0))))
    return Session(Bundle(session().experiment, model(LAYERS[1]), vae=vae), negative=NEGATIVE[None])


def text():
    return session().read_embeddings(PROMPTS[:1, 0])


PICTURE = np.zeros((TINY.video.height, TINY.video.width, 3), np.uint8)
CALLS_REFUSED = {
    "image and extension": (
        lambda: with_vae().stream(["a"], image=PICTURE, state=later(session()), carry=()),
        f"an image starts a video, but the given state is at chunk {KNOWN}; leave one of the two out",
    ),
    "image without a VAE": (lambda: session().stream_latents(["a"], image=PICTURE), "no VAE, so it cannot read an image; give latents to step"),
    "image of another size": (
        lambda: with_vae().stream(["a"], image=PICTURE[:-1]),
        r"image has shape \(31, 64, 3\); this model takes \(32, 64, 3\)",
    ),
    "image of floats": (lambda: with_vae().stream(["a"], image=PICTURE / 255), "image is float64; give uint8, 0 to 255"),
    "extension by part of a chunk": (
        lambda: session().remember(session().start(), VIDEO[:1, 0, :-1], text()),
        r"latents have shape \(1, 3, 2, 4, 4\); this chunk takes \[B,F,h,w,C\] = \(1, 4, 2, 4, 4\), or B=1 for all samples",
    ),
    "extension without a VAE": (lambda: session().extend(PICTURE[None], "a"), "no VAE, so it cannot read a video; use remember for latents"),
    "extension without the decoder's state": (
        lambda: with_vae().stream(["a"], state=later(session())),
        f"the given state is at chunk {KNOWN}, so the decoder's carry at that point is needed too",
    ),
    "a state of other settings": (
        lambda: session(relative=True, guidance=2.5).stream_latents(["a"], state=session(**SINKS["no sink"]).start()),
        "made under other settings .sink is 0, here 4; relative is False, here True; guidance is False, here True.; make it with this session",
    ),
    "recache without latents": (
        lambda: session().recache(session().start(), text()),
        "keeps no latents to read again; make .* with recache=True",
    ),
    "noise of another shape": (
        lambda: session().step(session().start(), text(), noise=NOISE[:, 0]),
        r"noise has shape \(3, 4, .* = \(1, 4, 2, 4, 4\)",
    ),
    "schedules for another batch": (
        lambda: session().stream_latents([("a", "b")], batch=3),
        "one string, or one string for each of batch=3 samples",
    ),
    "storyboards of other lengths": (
        lambda: session().stream_latents([Storyboard(("a",)), Storyboard(("a", "b"))], batch=2),
        r"the storyboards have \[1, 2\] chunks; samples of a batch run together: give them equal lengths",
    ),
    "a batch that devices do not divide": (
        lambda: data_parallel().start(0, 3),
        r"batch=3 does not divide over mesh\.data=2; use a multiple of 2",
    ),
    "no samples": (lambda: session().start(0, 0), "batch=0 must be positive"),
    "a seed past 32 bits": (lambda: session().start(2**32 - 1, 2), "seed=4294967295 must lie in 0..4294967294 for a batch of 2"),
    "an unknown setting": (lambda: session(guidence=2.0), "unknown session setting 'guidence'; did you mean 'guidance'"),
    "more devices than there are": (lambda: data_parallel(16), "mesh data=16 x seq=1 needs 16 devices and 8 are there"),
}


def data_parallel(data=2):
    return Session(Bundle(replace(session().experiment, mesh=MeshConfig(data, 1)), model(LAYERS[1])), negative=NEGATIVE[None])


@pytest.mark.parametrize("name", CALLS_REFUSED)
def test_refused_calls(name):
    call, message = CALLS_REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        call()
