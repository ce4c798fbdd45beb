"""FP8 memory and attention: against a written-out float64 oracle, and streams that use them."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from longlive_jax.config import TINY, ConfigError, StreamConfig
from longlive_jax.ops import fp8_attention
from longlive_jax.ops.attention import attend_filled
from longlive_jax.ops.fp8_attention import attend_fp8, narrow
from longlive_jax.quant.balance import VALUES, balance
from longlive_jax.quant.leaves import FP8, NVFP4, Dynamic, LoRA, dense
from longlive_jax.streaming.bundles import Bundle, random_bundle
from longlive_jax.streaming.session import Session
from longlive_jax.tree import flat_params, with_params
from tests import aot

E4M3 = ml_dtypes.float8_e4m3fn
B, M, K, N, D = 2, 5, 24, 3, 8


def draw(seed, *shape, outliers=False):
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    if outliers:
        x[..., 0] *= 50
    return x


def rounded(x):
    """To E4M3 and back, in numpy, saturating."""
    return np.clip(x, -448, 448).astype(E4M3).astype(np.float64)


def oracle(q, k, v, length):
    """Sample by sample, head by head, query by query, in float64."""
    out = np.zeros(q.shape)
    for b in range(len(q)):
        for n in range(q.shape[2]):
            for m in range(q.shape[1]):
                keys, values = rounded(k[b, : length[b], n]), rounded(v[b, : length[b], n])
                scores = keys @ rounded(q[b, m, n]) / np.sqrt(q.shape[-1])
                p = np.exp(scores - scores.max())
                out[b, m, n] = rounded(rounded(256 * p) @ values / 256 / p.sum())
    return out


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_emulation_is_the_oracle(outliers, implementation):
    q, k, v = draw(0, B, M, N, D), draw(1, B, K, N, D), draw(2, B, K, N, D, outliers=outliers)
    length = np.array([K, 10])
    k[1, 10:], v[1, 10:] = 300, 0.3  # what lies behind the length must not be seen
    memory = narrow(jnp.asarray(k), jnp.float8_e4m3fn), narrow(jnp.asarray(v), jnp.float8_e4m3fn)
    y = np.asarray(attend_fp8(jnp.asarray(q), *memory, jnp.asarray(length), implementation, None), np.float64)
    want = oracle(q, k, v, length)
    equal = y == want
    assert equal.mean() > 0.98  # float32 sums may fall on the other side of a tie
    assert np.abs(y - want)[~equal].max(initial=0) <= np.abs(want).max() / 8
    exact = np.einsum("bnmk,bknd->bmnd", softmax(q, k, length), v)
    assert 0.005 < np.linalg.norm(y - exact) / np.linalg.norm(exact) < 0.08


def softmax(q, k, length):
    scores = np.einsum("bmnd,bknd->bnmk", q, k) / np.sqrt(D)
    scores = np.where((np.arange(K) < length[:, None])[:, None, None], scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def test_narrow_saturates_and_keeps_other_dtypes():
    x = jnp.asarray([0.0, 1.0, 449.0, -1e9, 0.3])
    np.testing.assert_array_equal(np.asarray(narrow(x, jnp.float8_e4m3fn), np.float32), [0, 1, 448, -448, np.float32(E4M3(0.3))])
    assert narrow(x, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("largest", [0, 100 * VALUES])
def test_means_of_a_whole_window_are_exact_to_three_bits(largest):
    """Of the 5B model's, evenly attended to: no sum of so many values is smaller. Values as ``balance`` makes them, a channel of outliers."""
    v = narrow(jnp.asarray(VALUES * draw(3, 1, 28160, 1, 64)).at[..., 0].add(largest), jnp.float8_e4m3fn)
    y = attend_fp8(jnp.zeros((1, 1, 1, 64)), jnp.zeros_like(v), v, jnp.array([28160]), "xla", None)
    exact = v.astype(jnp.float32).mean(1, keepdims=True)
    assert abs(y - exact)[..., 0] <= 2**-4 * abs(exact)[..., 0]
    assert jnp.linalg.norm((y - exact)[..., 1:]) <= 0.04 * jnp.linalg.norm(exact[..., 1:])


def test_slots_in_e4m3_are_dispatched_on(monkeypatch):
    """By the kernel where the window is full; in the dtype of the queries where it is not, or where the GPU is older."""
    q, k, v = (jnp.asarray(draw(i, 1, 2, 3, N, D), jnp.bfloat16) for i in range(3))
    slots = narrow(k, jnp.float8_e4m3fn), narrow(v, jnp.float8_e4m3fn)
    seen = []

    def kernel(q, k, v):
        seen.append((q.dtype, k.dtype, v.dtype))
        return jnp.full(q.shape, 2, q.dtype)

    monkeypatch.setattr(fp8_attention, "by_cudnn", kernel)
    wide = lambda q, k, v, name, length=None: jnp.full(q.shape, 7, q.dtype)
    monkeypatch.setattr("longlive_jax.ops.attention.dense", wide)
    full = attend_filled(q, *slots, jnp.array([2]), "cudnn")
    np.testing.assert_array_equal(np.asarray(full, np.float32), 2)
    assert seen == [(jnp.float8_e4m3fn,) * 3] and full.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(attend_filled(q, *slots, jnp.array([1]), "cudnn"), np.float32), 7)
    monkeypatch.setattr(fp8_attention, "before_hopper", lambda: True)
    np.testing.assert_array_equal(np.asarray(attend_filled(q, *slots, jnp.array([2]), "cudnn"), np.float32), 7)


def test_an_unknown_jax_is_refused(monkeypatch):
    fp8_attention.private.cache_clear()
    monkeypatch.setattr(fp8_attention, "TRIED", ("0.3.",))
    with pytest.raises(ConfigError, match=r"private module of jax 0.3.x.*stream.memory='model'"):
        fp8_attention.private()
    monkeypatch.undo()
    assert fp8_attention.private().dot_product_attention
    monkeypatch.setattr(fp8_attention, "PRIVATE", "jax._src.cudnn.nowhere")
    fp8_attention.private.cache_clear()
    with pytest.raises(ConfigError, match=r"nowhere is not there"):
        fp8_attention.private()
    fp8_attention.private.cache_clear()


def test_settings():
    assert StreamConfig(memory="fp8").memory == "fp8"
    with pytest.raises(ConfigError, match=r"stream.memory='int3' is unknown; use one of model, fp8"):
        StreamConfig(memory="int3")
    with pytest.raises(ConfigError, match=r"stream.memory='fp8' with stream.relative=True"):
        StreamConfig(memory="fp8", relative=True)


# ---- balance -------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle():
    return random_bundle(TINY, seed=0)


def skewed(model, kind=lambda w: w):
    """Keys of about 2**-9 and values of about 2**11, in every block."""
    params = flat_params(model)
    for path, w in params.items():
        if path.endswith("norm_k.weight") and "self_attn" in path:
            params[path] = w * 2.0**-9
        if path.endswith("self_attn.v.weight"):
            params[path] = kind(w * 2.0**11)
    return with_params(model, params)


KINDS = {
    "dense": lambda w: w,
    "fp8": lambda w: FP8.encode(w, implementation="emulated"),
    "nvfp4": NVFP4.encode,
    "lora": lambda w: LoRA(base=w, a=jnp.ones((2, w.shape[1])), b=jnp.ones((w.shape[0], 2))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_balance_moves_powers_of_two(bundle, kind):
    before = flat_params(skewed(bundle.transformer, KINDS[kind]))
    after = flat_params(balance(with_params(bundle.transformer, before)))
    moved = [path for path in before if not np.array_equal(dense(before[path], jnp.float32), dense(after[path], jnp.float32))]
    assert {path.split(".", 2)[2] for path in moved} <= {
        f"self_attn.{n}" for n in ("norm_k.weight", "norm_q.weight", "v.weight", "v.bias", "o.weight")
    }
    for path in moved:
        a, b = (np.asarray(dense(x[path], jnp.float32)) for x in (before, after))
        mantissa, _ = np.frexp(np.unique(b[a != 0] / a[a != 0]))
        np.testing.assert_array_equal(mantissa, 0.5)
    for i in range(TINY.transformer.layers):
        name = f"blocks.{i}.self_attn."
        gain = lambda n: float(np.sqrt(np.mean(np.square(dense(after[name + n], jnp.float32)))))  # noqa: B023
        assert 0.5 <= gain("norm_k.weight") / gain("norm_q.weight") <= 2
        assert 0.7 <= gain("v.weight") * np.sqrt(TINY.transformer.dim) / VALUES <= 1.42


def test_balance_changes_no_bit_of_a_stream(bundle):
    model = skewed(bundle.transformer)
    first = lambda m: next(Session(Bundle(bundle.experiment, m, bundle.vae, bundle.text), steps=2).stream_latents([PROMPT], seed=3))[1]
    a, b = (np.asarray(first(m)) for m in (model, balance(model)))
    np.testing.assert_array_equal(a, b)


def test_balance_refuses_training_weights(bundle):
    with pytest.raises(ConfigError, match=r"blocks.0.self_attn.v.weight is a Dynamic"):
        balance(skewed(bundle.transformer, Dynamic.encode))


# ---- streams -------------------------------------------------------------------------------------------------------------------------------

PROMPT = "A red star slides."


def test_a_stream_with_an_fp8_memory_stays_near_the_other(bundle, tmp_path):
    """A first chunk reads its own keys from the memory, so it differs too; by the rounding of E4M3, and no more after the window is full."""
    stories = [PROMPT] * 3 + ["The scene transitions. A blue ring."] + [PROMPT] * 2

    def latents(**settings):
        session = Session(bundle, steps=2, **settings)
        return np.stack([np.asarray(z, np.float32) for _, z in session.stream_latents(stories, seed=1)])

    exact, near = latents(), latents(memory="fp8")
    error = np.sqrt(((exact - near) ** 2).mean(axis=tuple(range(1, exact.ndim))) / (exact**2).mean())
    assert (error > 1e-4).all() and (error < 0.1).all(), error


def test_an_fp8_state_is_half_as_large_and_is_saved(bundle, saved_alike):
    session = Session(bundle, steps=2, memory="fp8")
    state, text = session.start(seed=5), session.read(PROMPT)
    assert {x.dtype for x in jax.tree.leaves(state.memory.layers)} == {jnp.dtype(jnp.float8_e4m3fn)}
    state, _ = session.step(state, text)
    path = saved_alike(session, state, text)
    with pytest.raises(ConfigError, match=r"float8_e4m3fn"):
        Session(bundle, steps=2).load(path)


@pytest.mark.slow
def test_the_5b_step_reads_e4m3_by_cudnn():
    """A layer at full size, compiled for an H100: a kernel a layer and pass, and no copy of window size."""
    report = aot.compiled("stream_fp8_memory")
    text, window = report["text"], "[1,32,880,24,128]"
    kernels, branches = re.findall(r'custom_call_target="__cudnn\$fmhaSoftmaxF8"', text), re.findall(r"= \S+ conditional\(", text)
    assert len(kernels) == len(branches) == 1  # none in the remembering pass: of the last layer only keys and values count
    assert f"f8e4m3fn{window}" in text and f"bf16{window}" not in text
    moved = [
        line for line in text.splitlines() if re.search(r"= f8e4m3fn\[1,(32,880|28160),24,128\]\S* (copy|transpose|slice|concatenate)\(", line)
    ]
    assert not moved, moved[0]
    assert report["alias_bytes"] >= 2 * 32 * 880 * 24 * 128


@pytest.mark.exhaustive
def test_on_two_gpus_heads_are_shared_out():
    text = aot.compiled("stream_fp8_seq")["text"]
    assert '__cudnn$fmhaSoftmaxF8"' in text
    assert not re.search(r"= \S+ (all-gather|collective-permute)(-start)?\(", text)
