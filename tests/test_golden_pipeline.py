"""Whole videos of latents of the public source (golden/sample.npz) through ``Session``, and its memory schedules (golden/memory.json)."""

import functools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import TINY, Experiment, StreamConfig, TextConfig, VAEConfig, VideoConfig
from longlive_jax.diffusion.rollout import given_first
from longlive_jax.model.memory import empty_memory, forget, held_frames, make_room, pin
from longlive_jax.streaming.bundles import Bundle
from longlive_jax.streaming.session import Session
from tests.golden_models import VARIANTS, channels_last, sampler_config, stream_config, transformer, transformer_config
from tests.shared import golden, shared

CHUNKS = 14  # of the longest schedule


@pytest.fixture(scope="module")
def arrays():
    return golden("sample.npz")


@pytest.fixture(scope="module", params=["reference", "xla"])
def model(arrays, request):
    """The golden transformer, one for all variants."""
    return transformer(arrays, json.loads(str(arrays["meta"]))[VARIANTS[0]], attention=request.param)


def session(arrays, meta, model):
    """A session over the golden transformer, with the golden run's settings."""
    config = transformer_config(meta)
    assert config == model.config
    experiment = Experiment(
        transformer=config,
        vae=VAEConfig(dim=4, decoder_dim=4, channels=meta["in_dim"]),
        text=TextConfig(vocab=8, dim=meta["text_dim"], attention_dim=8, ffn_dim=8, heads=1, layers=1),
        video=VideoConfig(height=16 * meta["H"], width=16 * meta["W"]),
        stream=stream_config(meta),
        sampler=sampler_config(meta),
        dtype="float32",
    )
    return Session(Bundle(experiment, model), negative=arrays["negative_embeds"][None])


@pytest.mark.parametrize("variant", VARIANTS)
def test_pipeline(arrays, variant, model):
    meta = json.loads(str(arrays["meta"]))[variant]
    s, n = session(arrays, meta, model), meta["frames_per_block"]
    noise = channels_last(arrays["noise"])
    state, out = s.start(), []
    for c in range(meta["n_chunks"]):
        part = noise[:, c * n : (c + 1) * n]
        given = given_first(channels_last(arrays["initial_latent"]), part) if meta["uses_initial_latent"] and c == 0 else None
        text = s.read_embeddings(arrays["prompt_embeds"][c][None])
        state, z = s.step(state, text, cut=bool(arrays[f"{variant}/cut_flags"][c]), noise=part, given=given)
        out.append(z)
    np.testing.assert_allclose(jnp.concatenate(out, 1), channels_last(arrays[f"{variant}/latents"]), atol=1e-4)
    if meta["uses_initial_latent"]:
        np.testing.assert_array_equal(out[0][:, :1], channels_last(arrays["initial_latent"]))


@functools.partial(jax.jit, static_argnames="chunk")
def remember(memory, sink, recache, cuts, chunk):
    """The memory operations of every chunk, as ``rollout.next_chunk`` orders them; the memories while denoising and at the clean pass.

    ``sink [B,1]`` and what follows are data here: samples of other settings share the program. ``recache``, ``cuts`` ``[chunks,B]``.
    """

    def one(memory, c_recache_cut):
        c, recache, cut = c_recache_cut
        index = jnp.broadcast_to(c * chunk + jnp.arange(chunk), (len(cut), chunk))
        denoising, slots = make_room(replace(memory, sink=sink), index)
        clean, slots = forget(denoising, slots, index, recache)
        bare = lambda memory: replace(memory, sink=0)
        return bare(pin(clean, slots, cut)), (bare(denoising), bare(pin(clean, slots, cut)))

    return jax.lax.scan(one, memory, (jnp.arange(len(cuts)), recache, cuts))[1]


def test_memory_schedules():
    """Which frames each chunk attends to, for the public source's random schedules; those with equal windows run as one batch."""
    schedules = json.loads(shared("golden", "memory.json").read_text())["schedules"]
    assert len(schedules) >= 200
    groups = {}
    for case in schedules:
        groups.setdefault((case["chunk_frames"], case["window_frames"]), []).append(case)
    for (chunk, window), cases in groups.items():
        streams = [
            StreamConfig(
                chunk=chunk,
                window=window,
                sink=case["sink_frames"],
                shot_sink=case["multi_shot_sink"],
                clean_recache=case["shot_clean_recache"],
            )
            for case in cases
        ]
        cuts = np.array([[stream.pins and c > 0 and c in case["cut_chunks"] for case, stream in zip(cases, streams)] for c in range(CHUNKS)])
        recache = cuts & np.array([stream.clean_recache for stream in streams])
        memory = replace(empty_memory(TINY.transformer, streams[0], len(cases), 1, jnp.float32), layers=(), sink=0)
        sink = np.array([[stream.sink] for stream in streams], np.int32)
        denoising, clean = jax.device_get(remember(memory, sink, recache, cuts, chunk))
        for c in range(CHUNKS):
            during, after = (held_frames(jax.tree.map(lambda x, c=c: x[c], m)) for m in (denoising, clean))
            filled, count = clean.frame[c] >= 0, clean.count[c]
            for i, case in enumerate(cases):
                if c < case["n_chunks"]:
                    assert during[i] == case["attended"][c], (case, c)
                    assert after[i] == case.get("attended_clean_pass", case["attended"])[c], (case, c)
                    assert filled[i, : count[i]].all() and not filled[i, count[i] :].any(), "filled slots are not a prefix"
