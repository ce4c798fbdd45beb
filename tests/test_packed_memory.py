"""A memory in NVFP4: what is kept of keys and values, and streams that read it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import TINY, ConfigError, MeshConfig, replace
from longlive_jax.model.memory import AMAX, Packed, empty_memory, read, write
from longlive_jax.quant.formats import decode_nvfp4, encode_nvfp4
from longlive_jax.streaming.bundles import Bundle, random_bundle
from longlive_jax.streaming.session import Session

SIXTEEN = replace(TINY, transformer=replace(TINY.transformer, heads=4))  # channels a head
STORY = ["A red star slides."] * 3 + ["The scene transitions. A blue ring.", "A red star slides."]


@pytest.fixture(scope="module")
def bundle():
    made = random_bundle(SIXTEEN)
    return Bundle(made.experiment, made.transformer, None, made.text)


def latents(bundle, **settings):
    return np.stack([np.asarray(z, np.float32) for _, z in Session(bundle, steps=2, **settings).stream_latents(STORY, seed=1)])


def test_what_is_remembered_is_nvfp4_and_what_is_new_is_not():
    memory = empty_memory(SIXTEEN.transformer, replace(SIXTEEN.stream, memory="nvfp4"), 2, 5, jnp.float32)
    assert [x.dtype for x in memory.layers[0][0]] == [jnp.uint8, jnp.float8_e4m3fn] and memory.layers[0][0].scales.shape[-1] == 1
    draw = lambda seed: jnp.asarray(
        np.random.default_rng(seed).normal(size=(2, 2, 5, 4, 16)) * 10 ** np.linspace(-1, 1, 5)[:, None, None], jnp.float32
    )
    old, new = (draw(0), draw(1)), (draw(2), draw(3))
    first, second = jnp.array([[1, 2], [0, 3]]), jnp.array([[2, 4], [3, 1]])
    layer = jax.jit(write)(jax.jit(write)(memory.layers[0], first, *old), second, *new)
    for seen, kept, fresh in zip(jax.jit(read)(layer, second, *new), old, new, strict=True):
        codes, scales, scale = encode_nvfp4(kept, "mse", amax=AMAX)
        want = np.zeros(seen.shape, np.float32)
        for b in range(2):
            want[b, np.asarray(first[b])] = decode_nvfp4(codes, scales, scale)[b]
            want[b, np.asarray(second[b])] = fresh[b]
        assert scale == 1
        np.testing.assert_array_equal(seen, want)
    assert np.linalg.norm(decode_nvfp4(*encode_nvfp4(old[0], "mse", amax=AMAX)) - old[0]) < 0.1 * np.linalg.norm(old[0])


@pytest.mark.slow
def test_a_stream_with_a_packed_memory_stays_near_the_other(bundle):
    """A first chunk reads itself alone, and does not differ; the next ones by the rounding of E2M1, and no more after the window is full."""
    exact, near = latents(bundle), latents(bundle, memory="nvfp4")
    error = np.sqrt(((exact - near) ** 2).mean(axis=tuple(range(1, exact.ndim))) / (exact**2).mean())
    assert error[0] < 1e-5 and (error[1:] > 1e-3).all() and (error < 0.2).all(), error


@pytest.mark.exhaustive
def test_a_packed_memory_over_devices_and_with_relative_keys(bundle):
    """Slots depend on their own frame and head alone, so sharded heads are rounded alike; relative keys are rotated after they are decoded."""
    settings = {"memory": "nvfp4", "relative": True, "shot_offset": 0.0}
    one, two = latents(bundle, **settings), latents(Bundle(replace(bundle.experiment, mesh=MeshConfig(1, 2)), *bundle[1:]), **settings)
    assert np.linalg.norm(two - one) < 1e-2 * np.linalg.norm(one)  # a sum in another order may round to the next code


def test_a_packed_state_is_small_and_is_saved(bundle, saved_alike):
    session = Session(bundle, steps=2, memory="nvfp4")
    state, text = session.start(seed=5), session.read(STORY[0])
    held = sum(x.nbytes for x in jax.tree.leaves(state.memory.layers))
    dense = jax.eval_shape(lambda: empty_memory(SIXTEEN.transformer, SIXTEEN.stream, 1, state.memory.layers[0][0].codes.shape[2], jnp.bfloat16))
    assert isinstance(state.memory.layers[0][0], Packed)
    assert 32 * held == 9 * sum(2 * x.size for x in jax.tree.leaves(dense.layers))  # 4.5 bits of 16
    state, _ = session.step(state, text)
    path = saved_alike(session, state, text)
    with pytest.raises(ConfigError, match=r"codes: not in this session"):
        Session(bundle, steps=2).load(path)


def test_blocks_that_do_not_divide_a_head_are_refused():
    with pytest.raises(ConfigError, match=r"stream.memory='nvfp4' takes blocks of 16 of head_dim=8; use 'fp8', or a head_dim that 16 divides"):
        replace(TINY, stream=replace(TINY.stream, memory="nvfp4"))
