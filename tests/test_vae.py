import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.config import MG_LIGHTVAE, MG_LIGHTVAE_V2, TINY, WAN_5B, ConfigError, VAEConfig, replace
from longlive_jax.convert.table import convert, export
from longlive_jax.convert.wan_vae import VAE_TABLE, vae_table
from longlive_jax.model.vae import VAE, in_passes, patchify, to_uint8, unpatchify
from longlive_jax.model.vae_layers import CausalConv, Conv2d, average_down, duplicate_up
from longlive_jax.tree import abstract, cast, count, flat_params, with_params
from tests.shared import golden

GRID, LATENTS = (1, 2), 5
# Three stages compile faster than four; the fourth, without a change of rate, is in the comparison with the reference.
CONFIG = replace(TINY.vae, multipliers=(1, 2, 2), time_downsample=(True, True), mean=(0.1, -0.2, 0.3, 0.0), std=(0.5, 1.0, 2.0, 0.7))


def filled(config, spread):
    """A VAE with weights of unit gain; gains differ from one and biases from zero by about ``spread``."""
    empty, draw = abstract(lambda: VAE(config, rngs=nnx.Rngs(0))), np.random.default_rng(0).standard_normal
    params = {}
    for name, p in flat_params(empty).items():
        fan_in = p.shape[-1] if p.ndim == 2 else np.prod(p.shape[:-1])
        value = draw(p.shape) * (spread if p.ndim == 1 else fan_in**-0.5) + name.endswith("gamma")
        params[name] = jnp.asarray(value, p.dtype)
    return with_params(empty, params)


@functools.cache
def model():
    return filled(CONFIG, 0.1)


def video(frames, seed=0, batch=1):
    size = [g * CONFIG.space_stride for g in GRID]
    return jax.random.uniform(jax.random.key(seed), (batch, frames, *size, 3), minval=-1.0)


def latents(frames, seed=0, batch=1):
    return jax.random.normal(jax.random.key(seed), (batch, frames, *GRID, CONFIG.channels))


encode, decode, encode_moments = jax.jit(VAE.encode), jax.jit(VAE.decode), jax.jit(VAE.encode_moments)
encode_step, decode_step = jax.jit(VAE.encode_step), jax.jit(VAE.decode_step)


@functools.cache
def whole():
    """(video, its latents, latents, their video), computed in one piece."""
    vae, x, z = model(), video(4 * LATENTS - 3), latents(LATENTS)
    return x, encode(vae, x), z, decode(vae, z)


def compositions(n):
    for cuts in itertools.product((False, True), repeat=n - 1):
        at = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), n]
        yield tuple(b - a for a, b in itertools.pairwise(at))


# ---- against the reference


@functools.cache
def published():
    """The golden arrays and a VAE with their weights."""
    arrays = golden("vae22.npz")
    stats = {name: tuple(map(float, arrays[name])) for name in ("mean", "std")}
    empty = abstract(lambda: VAE(VAEConfig(dim=8, decoder_dim=8, channels=4, **stats), rngs=nnx.Rngs(0)))
    weights = {k.removeprefix("weights/"): v for k, v in arrays.items() if k.startswith("weights/")}
    return arrays, weights, with_params(empty, convert(VAE_TABLE, weights, flat_params(empty), place=jnp_array))


def jnp_array(path, x):
    return jnp.asarray(x)


def channels_last(x):
    return np.moveaxis(x, 1, -1)


def test_encode_is_the_references():
    arrays, _, vae = published()
    z = jax.jit(VAE.encode)(vae, channels_last(arrays["video"]))
    np.testing.assert_allclose(z, channels_last(arrays["latents"]), atol=2e-5)


def test_decode_is_the_references():
    arrays, _, vae = published()
    pixels = decode(vae, channels_last(arrays["z"]))
    np.testing.assert_allclose(pixels, channels_last(arrays["decoded"]), atol=2e-5)


def test_weights_return_under_their_names():
    _, weights, vae = published()
    back = export(VAE_TABLE, flat_params(vae))
    assert sorted(back) == sorted(weights)
    for name, x in weights.items():
        np.testing.assert_array_equal(back[name], x)


def test_a_width_is_not_negative():
    with pytest.raises(ConfigError, match=r"VAEConfig\.dim=-1 must not be negative; 0 means a VAE that only decodes"):
        replace(CONFIG, dim=-1)


def test_published_sizes_of_the_light_vaes():
    """MG-LightVAE.pth and MG-LightVAE_v2.pth (spec/names.md §5)."""
    sizes = {MG_LIGHTVAE: 176_981_772, MG_LIGHTVAE_V2: 44_654_660}
    for config, size in sizes.items():
        assert count(abstract(lambda config=config: VAE(config, rngs=nnx.Rngs(0)))) == size


def test_full_size_has_196_tensors():
    vae = abstract(lambda: VAE(WAN_5B.vae, rngs=nnx.Rngs(0)))
    assert (count(vae), count(vae.encoder), count(vae.decoder)) == (704_688_668, 149_627_776, 555_049_228)
    params = flat_params(vae)
    names = {row.name(path) for path in params for row in VAE_TABLE} - {None}
    assert len(params) == len(names) == 196
    assert "decoder.upsamples.1.upsamples.3.time_conv.weight" in names
    assert "encoder.downsamples.2.downsamples.0.shortcut.bias" in names
    assert params["decoder.upsamples.1.time_conv.weight"].shape == (3, 1, 1, 1024, 2048)
    carry = jax.eval_shape(lambda: vae.decode_start(1, (44, 80)))
    step = jax.eval_shape(VAE.decode_step, vae, carry, jax.ShapeDtypeStruct((1, 8, 44, 80, 48), jnp.bfloat16))
    assert step[0] == carry and step[1].shape == (1, 32, 704, 1280, 3)


def test_table_follows_the_number_of_blocks():
    names = [row.name("encoder.downsamples.0.resample.bias") for row in vae_table(res_blocks=1)]
    assert {n for n in names if n} == {"encoder.downsamples.0.downsamples.1.resample.1.bias"}


# ---- streams


@pytest.mark.parametrize("sizes", list(compositions(LATENTS)), ids=str)
def test_decoding_in_pieces_is_decoding_whole(sizes):
    vae, (_, _, z, pixels) = model(), whole()
    carry, done, out = vae.decode_start(1, GRID), 0, []
    for n in sizes:
        carry, piece = decode_step(vae, carry, z[:, done : done + n])
        out.append(piece[:, -vae.pixel_frames(done == 0, n) :])
        done += n
    np.testing.assert_allclose(np.concatenate(out, 1), pixels, atol=1e-5)


@pytest.mark.parametrize("sizes", list(compositions(LATENTS)), ids=str)
def test_encoding_in_pieces_is_encoding_whole(sizes):
    vae, (x, z, _, _) = model(), whole()
    # What stands before the first frame must not matter.
    x = np.concatenate([np.full_like(x[:, :3], 7.0), x], 1)
    carry, done, out = vae.encode_start(1, GRID), 0, []
    for n in sizes:
        carry, piece = encode_step(vae, carry, x[:, 4 * done : 4 * (done + n)])
        out.append(piece)
        done += n
    np.testing.assert_allclose(np.concatenate(out, 1), z, atol=1e-5)


def test_large_videos_take_several_passes(monkeypatch):
    """A chunk that is too large for one pass is decoded, and encoded, frame by frame: the same values, the same history."""
    vae, z, x = model(), latents(4, batch=2), video(16, batch=2)
    programs = lambda: (jax.jit(lambda c, z: vae.decode_step(c, z)), jax.jit(lambda c, x: vae.encode_step(c, x)))
    starts = vae.decode_start(2, GRID), vae.encode_start(2, GRID)
    expected = [program(start, y) for program, start, y in zip(programs(), starts, (z, x))]
    monkeypatch.setattr("longlive_jax.model.vae.WIDEST", 1)
    for program, start, y, pair in zip(programs(), starts, (z, x), expected):
        assert "while" in program.lower(start, y).as_text()
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), program(start, y), pair)


def test_passes_are_the_fewest_equal_ones_that_fit(monkeypatch):
    monkeypatch.setattr("longlive_jax.model.vae.WIDEST", 100)
    x = jnp.arange(12.0).reshape(2, 6)
    step = lambda carry, part: (carry + 1, part)
    for size, passes in ((16, 1), (17, 2), (34, 3), (51, 6), (999, 6)):
        carry, y = in_passes(step, 0, x, 6, size)
        assert carry == passes and np.array_equal(x, y)


def test_one_program_for_first_and_later_chunks_and_for_all_streams():
    vae, traces = model(), []

    @functools.partial(jax.jit, donate_argnums=1)
    def step(vae, carry, z):
        traces.append(z.shape)
        return vae.decode_step(carry, z)

    streams = {seed: latents(6, seed) for seed in (1, 2)}
    carries = {seed: vae.decode_start(1, GRID) for seed in streams}
    out = {seed: [] for seed in streams}
    for at in (0, 2, 4):
        for seed, z in streams.items():
            carries[seed], piece = step(vae, carries[seed], z[:, at : at + 2])
            out[seed].append(piece[:, -vae.pixel_frames(at == 0, 2) :])
    assert traces == [(1, 2, *GRID, CONFIG.channels)]
    for seed, z in streams.items():
        carry, pixels = decode_step(vae, vae.decode_start(1, GRID), z)
        np.testing.assert_allclose(np.concatenate(out[seed], 1), pixels[:, 3:], atol=1e-5)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), carry) == jax.tree.map(lambda a: (a.shape, a.dtype), carries[seed])


def test_the_past_matters_and_the_future_does_not():
    vae, (x, z, _, _) = model(), whole()
    changed = encode(vae, x.at[:, 9].add(0.5))
    np.testing.assert_array_equal(changed[:, :3], z[:, :3])
    assert jnp.abs(changed[:, 3:] - z[:, 3:]).max() > 1e-3


def test_histories_are_the_last_frames_before_a_convolution():
    """Saved streams hold them; a CPU and a GPU write the same."""
    vae, z = model(), whole()[2]
    carry, _ = decode_step(vae, vae.decode_start(1, GRID), z)
    x = vae.conv2(z * np.array(CONFIG.std) + np.array(CONFIG.mean))
    assert carry.history[0].shape == (1, 2, *GRID, CONFIG.channels)
    np.testing.assert_allclose(carry.history[0], x[:, -2:], atol=1e-5)


# ---- values


def test_moments_and_statistics():
    vae, (x, z, _, _) = model(), whole()
    mean, log_variance = encode_moments(vae, x)
    assert mean.shape == log_variance.shape == (1, LATENTS, *GRID, CONFIG.channels)
    np.testing.assert_allclose(z, (mean - np.array(CONFIG.mean)) / np.array(CONFIG.std), atol=1e-5)
    assert jnp.abs(mean - log_variance).max() > 0.1
    bare = abstract(lambda: VAE(replace(CONFIG, mean=(), std=()), rngs=nnx.Rngs(0))).statistics()
    np.testing.assert_array_equal(bare, np.stack([np.zeros(4), np.ones(4)]))


def test_patches_put_columns_before_rows():
    x = jnp.arange(4 * 6 * 3).reshape(1, 4, 6, 3)
    y = patchify(x, 2)
    assert y.shape == (1, 2, 3, 12)
    for c, column, row in itertools.product(range(3), range(2), range(2)):
        np.testing.assert_array_equal(y[..., (c * 2 + column) * 2 + row], x[:, row::2, column::2, c])
    np.testing.assert_array_equal(unpatchify(y, 2), x)


def test_shortcuts_by_their_definition():
    x = jax.random.normal(jax.random.key(0), (1, 4, 2, 4, 4))
    y = average_down(x, 8, 2)
    np.testing.assert_allclose(y[0, 1, 0, 1, 5], x[0, 3, 0:2, 2:4, 2].mean(), atol=1e-6)
    narrow = average_down(x, 2, 2)
    np.testing.assert_allclose(narrow[0, 0, 0, 0, 1], x[0, 0:2, 0:2, 0:2, 2:4].mean(), atol=1e-6)
    y = duplicate_up(x, 2, 1)
    np.testing.assert_array_equal(y[0, 1, 3, 5], x[0, 1, 1, 2, 1::2])
    y = duplicate_up(x, 2, 2)
    np.testing.assert_array_equal(y[0, 2, 3, 5], x[0, 1, 1, 2, 0::2])
    np.testing.assert_array_equal(duplicate_up(x, 4, 2)[0, 5, 3, 5], x[0, 2, 1, 2])


def test_to_uint8_rounds_and_clamps():
    pixels = jnp.array([-3.0, -1.0, 0.0, 0.5, 1.0, 9.0])
    assert to_uint8(pixels).tolist() == [0, 0, 128, 191, 255, 255]


@pytest.mark.slow
def test_gradients_reach_every_parameter():
    def loss(vae, x, z):
        mean, log_variance = vae.encode_moments(x)
        return jnp.mean(mean**2) + jnp.mean(jnp.abs(log_variance - 1)) + jnp.mean((vae.decode(z) - x) ** 2)

    grads = flat_params(jax.jit(jax.grad(loss))(model(), video(9), latents(3)))
    for path, grad in grads.items():
        assert jnp.isfinite(grad).all() and jnp.abs(grad).max() > 0, path


def test_initial_weights_have_unit_gain():
    conv = CausalConv(16, 24, rngs=nnx.Rngs(0))
    plain = Conv2d(16, 24, rngs=nnx.Rngs(0))
    assert jnp.std(conv.weight.get_value()) == pytest.approx((27 * 16) ** -0.5, rel=0.05)
    assert jnp.std(plain.weight.get_value()) == pytest.approx((9 * 16) ** -0.5, rel=0.05)
    assert not conv.bias.get_value().any() and not plain.bias.get_value().any()


@pytest.mark.slow
def test_a_blank_video_has_finite_gradients():
    """Zero pixels and zero biases: every norm meets vectors of length zero."""
    vae = filled(CONFIG, 0.0)
    grads = jax.jit(jax.grad(lambda vae, x: jnp.sum(vae.encode(x) ** 2)))(vae, jnp.zeros_like(video(1)))
    assert all(jnp.isfinite(g).all() for g in flat_params(grads).values())


def test_bfloat16_is_close_to_float32():
    vae, (x, z, y, pixels) = cast(model(), jnp.bfloat16), whole()
    ours, decoded = encode(vae, x), decode(vae, y)
    assert ours.dtype == jnp.float32 and decoded.dtype == jnp.bfloat16
    assert vae.decode_start(1, GRID).history[0].dtype == jnp.bfloat16
    for a, b in ((ours, z), (decoded.astype(jnp.float32), pixels)):
        assert jnp.sqrt(jnp.mean((a - b) ** 2)) < 0.05 * jnp.std(b)


# ---- errors


def test_illegal_inputs_are_refused():
    vae = model()
    with pytest.raises(ValueError, match=r"got 12 pixel frames.*cut the video to 9 frames or extend it to 13"):
        vae.encode(jnp.zeros((1, 12, 8, 16, 3)))
    with pytest.raises(ValueError, match="multiples of 8"):
        vae.encode(jnp.zeros((1, 5, 12, 16, 3)))
    with pytest.raises(ValueError, match="last axis 3"):
        vae.encode(jnp.zeros((1, 5, 8, 16, 4)))
    with pytest.raises(ValueError, match=r"encode_step got 5 pixel frames.*multiple of 4"):
        vae.encode_step(vae.encode_start(1, GRID), jnp.zeros((1, 5, 8, 16, 3)))
    with pytest.raises(ValueError, match=r"vae\.channels=4"):
        vae.decode(jnp.zeros((1, 1, *GRID, 3)))


def test_widths_without_a_shortcut_are_refused():
    for change, words in (
        ({"multipliers": (1, 2, 3, 3)}, "encoder stage from 8 to 12"),
        ({"multipliers": (1, 2, 2, 1)}, "last stage must keep its width"),
        ({"multipliers": (1, 1, 2, 2), "time_downsample": (False, False, False)}, "encoder stage from 4 to 8"),
        ({"multipliers": (1, 2, 1, 1)}, "decoder stage from 4 to 8"),
    ):
        with pytest.raises(ConfigError, match=words):
            abstract(lambda change=change: VAE(replace(TINY.vae, **change), rngs=nnx.Rngs(0)))
