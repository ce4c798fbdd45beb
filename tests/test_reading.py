"""Prompts read once, by an encoder on the device, on the host, or on the device only meanwhile; int8 matrices; memory of the full size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.config import TINY, WAN_5B, ConfigError, TextConfig, replace
from longlive_jax.model.text import TextEncoder, encode_prompts
from longlive_jax.quant.leaves import Int8, nbytes
from longlive_jax.streaming import reading
from longlive_jax.streaming.bundles import random_bundle
from longlive_jax.streaming.reading import PromptReader, host_device, int8_encoder
from longlive_jax.tree import abstract
from tests.programs import quick

M, PROMPTS = 300, ["a red star", "a blue ring and a bear", "a bear"]


def tokenize(prompts):
    """One token a word, by its length; ``calls`` counts the prompts that were tokenised."""
    tokenize.calls += len(prompts)
    ids, mask = np.zeros((len(prompts), M), np.int32), np.zeros((len(prompts), M), np.int32)
    for row, prompt in enumerate(prompts):
        words = [len(word) + ord(word[0]) for word in prompt.split()]
        ids[row, : len(words)], mask[row, : len(words)] = words, 1
    return ids, mask


tokenize.calls = 0


@functools.cache
def encoder():
    return random_bundle(TINY).text


@functools.cache
def expected():
    return np.asarray(quick(encode_prompts)(encoder(), *tokenize(PROMPTS)))


@pytest.mark.parametrize("placement", reading.PLACEMENTS)
def test_embeddings_are_the_encoder_s_wherever_it_runs(placement):
    reader = PromptReader(encoder(), tokenize, placement=placement)
    found = reader.read([PROMPTS[1], PROMPTS[0], PROMPTS[1], PROMPTS[2]])
    assert found.shape == (4, M, TINY.text.dim)
    np.testing.assert_allclose(found, expected()[[1, 0, 1, 2]], atol=1e-5)
    assert not np.any(np.asarray(found)[0, 6:]) and np.all(np.any(found[0, :6], -1))
    assert isinstance(found, np.ndarray if placement == "host" else jax.Array)
    kinds = {type(x) for x in jax.tree.leaves(reader.encoder)}
    assert all(issubclass(k, np.ndarray if placement == "freed" else jax.Array) for k in kinds)


def test_a_prompt_is_read_once_and_few_are_held():
    reader = PromptReader(encoder(), tokenize, keep=2)
    calls = lambda prompts: (before := tokenize.calls, reader.read(prompts), tokenize.calls - before)[-1]
    assert calls(PROMPTS[:2]) == 2 and calls([PROMPTS[0]] * 3) == 0
    assert calls(PROMPTS[2:]) == 1 and list(reader.known) == [PROMPTS[0], PROMPTS[2]]  # the one that was not asked for longest went
    assert calls(PROMPTS) == 1 and len(reader.known) == 2  # more than are held at once: still all there
    np.testing.assert_allclose(reader.read(PROMPTS), expected(), atol=1e-5)


def test_a_storyboard_is_read_ahead_where_that_saves_copies():
    freed, device = (PromptReader(encoder(), tokenize, placement=placement) for placement in ("freed", "device"))
    for reader in (freed, device):
        reader.ahead([*PROMPTS, PROMPTS[0]])
        reader.ahead([])
    assert list(freed.known) == [PROMPTS[1], PROMPTS[2], PROMPTS[0]] and not device.known


def test_one_program_reads_every_prompt():
    before = reading.embed_prompts._cache_size()
    PromptReader(encoder(), tokenize).read([f"{p} twice" for p in PROMPTS])
    assert reading.embed_prompts._cache_size() - before <= 1


def test_a_long_prompt_is_read_whole():
    prompt = " ".join(["bear"] * 140)
    found = PromptReader(encoder(), tokenize).read([prompt])
    np.testing.assert_allclose(found, jax.jit(encode_prompts)(encoder(), *tokenize([prompt])), atol=1e-5)
    assert np.any(np.asarray(found)[0, 139]) and not np.any(np.asarray(found)[0, 140:])


def test_readers_that_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="placement='gpu' of the text encoder must be one of device, host, freed"):
        PromptReader(encoder(), tokenize, placement="gpu")
    with pytest.raises(ConfigError, match="keep=0 embeddings must be positive"):
        PromptReader(encoder(), tokenize, keep=0)
    with pytest.raises(ConfigError, match="tokenizer needs files that are not in the bundle; pass tokenizer= to Session"):
        PromptReader(encoder(), None).read(["a"])
    with pytest.raises(ConfigError, match="there are no prompts to read"):
        PromptReader(encoder(), tokenize).read([])

    def absent(platform):
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(jax, "devices", absent)
    with pytest.raises(ConfigError, match=r"needs JAX's CPU backend \(Unknown backend cpu\); add cpu to JAX_PLATFORMS"):
        host_device()


# ---- int8 ----------------------------------------------------------------------------------------------------------------------------------

SIZES = TextConfig(vocab=64, dim=64, attention_dim=64, ffn_dim=160, heads=4, layers=1)


def test_int8_halves_the_matrices_and_keeps_the_embeddings():
    e = replace(TINY, text=SIZES, transformer=replace(TINY.transformer, text_dim=64), dtype="bfloat16")
    whole = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_bundle(e).text)
    narrow, report = int8_encoder(whole)
    matrices, rows = 4 * 64 * 64 + 3 * 64 * 160, 4 * 64 + 2 * 160 + 64
    assert report.rows["int8"] == (7, 2 * matrices, matrices + 4 * rows) and nbytes(narrow) == report.after
    ids, mask = np.random.default_rng(0).integers(0, 64, (2, 24)), np.ones((2, 24), np.int32)
    exact = quick(encode_prompts)(jax.tree.map(lambda x: x.astype(jnp.float32), whole), ids, mask)
    error = lambda found: float(jnp.linalg.norm(found.astype(jnp.float32) - exact) / jnp.linalg.norm(exact))
    found = quick(encode_prompts)(narrow, ids, mask)
    assert found.dtype == jnp.bfloat16
    print(f"int8: error {error(found):.4f} of the embeddings")
    assert error(found) < 0.02


def test_a_row_that_is_not_finite_is_not_a_number():
    w = jnp.asarray([[1.0, -2.0], [jnp.nan, 1.0], [jnp.inf, 1.0], [0.0, 0.0]])
    found = np.asarray(Int8.encode(w).dense())
    np.testing.assert_allclose(found[0], [1.0, -2.0], atol=1 / 127)
    assert np.all(np.isnan(found[1:3])) and not np.any(found[3])


# ---- memory --------------------------------------------------------------------------------------------------------------------------------


def compiled(layers, dtype, kind=lambda encoder: encoder):
    """Memory of the compiled program that reads one prompt of 512 tokens on the host, at full width; nothing is allocated."""
    config = replace(WAN_5B.text, layers=layers)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract(lambda: TextEncoder(config, rngs=nnx.Rngs(0))))
    ids = jax.ShapeDtypeStruct((1, WAN_5B.transformer.text_len), jnp.int32)
    return jax.jit(encode_prompts).lower(kind(shapes), ids, ids).compile().memory_analysis()


def test_the_host_reads_a_prompt_within_the_weights_memory():
    """Beside the weights: scores ``[64, 512, 512]`` in float32 and what they are made of; of int8 one matrix in bfloat16, not one a layer."""
    assert compiled(1, jnp.bfloat16).temp_size_in_bytes < 200 * 2**20
    few, more = (compiled(layers, jnp.bfloat16, lambda e: int8_encoder(e)[0]).temp_size_in_bytes for layers in (1, 2))
    assert more < 200 * 2**20 + 2 * 4096 * 10240 and more - few < 2**20
