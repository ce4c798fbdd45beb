"""Bundles put together: a light decoder beside the whole encoder, and a text encoder that stays on the host."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longlive_jax
from longlive_jax.checkpoint import save_large_bundle
from longlive_jax.config import MG_LIGHTVAE, MG_LIGHTVAE_V2, TINY, WAN_5B, ConfigError, replace
from longlive_jax.model.vae import VAE
from longlive_jax.streaming.bundles import random_bundle, with_decoder
from longlive_jax.streaming.reading import host_device
from longlive_jax.tree import flat_params

WHOLE = replace(TINY, vae=replace(TINY.vae, dim=8, decoder_dim=8, multipliers=(1, 2, 2), time_downsample=(True, True)))
LIGHT = replace(WHOLE, vae=replace(WHOLE.vae, dim=4, decoder_dim=4))
IMAGE = np.random.default_rng(0).uniform(-1, 1, (1, 1, 32, 64, 3)).astype(np.float32)


@functools.cache
def whole():
    return random_bundle(WHOLE)


def light(tmp_path, experiment=LIGHT):
    """A folder with the VAE of an experiment alone, as ``experiments/convert.py`` makes of MG-LightVAE.pth."""
    folder = tmp_path / "light"
    params = flat_params(random_bundle(experiment, seed=1).vae)
    save_large_bundle(folder, experiment, {f"vae.{path}": x for path, x in params.items()}, {}, {})
    return folder, params


def test_a_light_decoder_beside_the_whole_encoder(tmp_path):
    folder, theirs = light(tmp_path)
    ours = flat_params(whole().vae)
    bundle = with_decoder(whole(), str(folder))
    found = flat_params(bundle.vae)
    assert (bundle.experiment.vae.dim, bundle.experiment.vae.decoder_dim) == (8, 4) and bundle.vae.config == bundle.experiment.vae
    for path, x in found.items():
        np.testing.assert_array_equal(x, theirs[path] if path.startswith(("decoder.", "conv2.")) else ours[path])
    z = jax.eval_shape(VAE.encode, bundle.vae, IMAGE)  # image to video
    assert jax.eval_shape(VAE.decode, bundle.vae, z).shape == IMAGE.shape
    assert bundle.transformer is whole().transformer and bundle.text is whole().text


def test_a_bundle_without_a_vae_gets_one_that_only_decodes(tmp_path):
    folder, theirs = light(tmp_path)
    bundle = with_decoder(whole()._replace(vae=None), str(folder))
    assert bundle.experiment.vae.dim == 0 and set(flat_params(bundle.vae)) == {p for p in theirs if p.startswith(("decoder.", "conv2."))}
    vae = longlive_jax.Session(bundle).vae
    assert jax.eval_shape(VAE.decode, vae, jnp.zeros((1, 2, *WHOLE.grid, 4))).shape == (1, 5, 32, 64, 3)
    for encode in (vae.encode, lambda x: vae.encode_start(1, WHOLE.grid), vae.encode_moments):
        with pytest.raises(ConfigError, match=r"this VAE has no encoder \(vae\.dim=0\).*decoder \(width 4\) by streaming.bundles.with_d"):
            encode(IMAGE)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"mean": (0.5, 0.0, 0.0, 0.0)}, r"vae\.mean is \(\) here and \(0\.5, 0\.0, 0\.0, 0\.0\) there"),
        ({"time_downsample": (False, True)}, r"vae\.time_downsample is \(True, True\) here and \(False, True\) there"),
        ({"res_blocks": 2, "std": (2.0,) * 4}, r"vae\.res_blocks is 1 here and 2 there; vae\.std is \(\) here"),
    ],
)
def test_a_decoder_of_other_latents_is_refused(tmp_path, change, said):
    e = replace(LIGHT, vae=replace(LIGHT.vae, **change))
    save_large_bundle(tmp_path / "other", e, {"vae.conv2.bias": np.zeros(4, np.float32)}, {}, {})
    with pytest.raises(ConfigError, match="the decoder of .* is for other latents: " + said):
        with_decoder(whole(), str(tmp_path / "other"))


def test_a_folder_without_a_vae_has_no_decoder(tmp_path):
    save_large_bundle(tmp_path / "t", LIGHT, {"transformer.head.head.bias": np.zeros(4, np.float32)}, {}, {})
    with pytest.raises(ConfigError, match="holds no VAE, so there is no decoder to take; name a bundle with one"):
        with_decoder(whole(), str(tmp_path / "t"))


def test_load_puts_the_text_encoder_on_the_host_and_takes_a_decoder(tmp_path):
    parts = {part: flat_params(x) for part, x in whole()._asdict().items() if part != "experiment"}
    save_large_bundle(tmp_path / "whole", WHOLE, {f"{part}.{path}": x for part in parts for path, x in parts[part].items()}, {}, {})
    folder, theirs = light(tmp_path)
    bundle = longlive_jax.load(str(tmp_path / "whole"), text="host", decoder=str(folder))
    assert bundle.experiment.vae.decoder_dim == 4
    parts["vae"] |= {path: x for path, x in theirs.items() if path.startswith(("decoder.", "conv2."))}
    for part, expected in parts.items():
        for path, x in flat_params(bundle._asdict()[part]).items():
            np.testing.assert_array_equal(x, expected[path], err_msg=path)
    assert {d for x in jax.tree.leaves(bundle.text) for d in x.devices()} == {host_device()}
    assert longlive_jax.load(str(folder), text="host").text is None  # a folder that has no text encoder
    with pytest.raises(ConfigError, match="text='gpu' must be 'device' or 'host'"):
        longlive_jax.load("toy", text="gpu")


def test_published_light_vaes():
    """Sizes of the two files (spec/names.md §5)."""
    assert [(v.dim, v.decoder_dim) for v in (MG_LIGHTVAE, MG_LIGHTVAE_V2)] == [(80, 128), (40, 64)]
    for v in (MG_LIGHTVAE, MG_LIGHTVAE_V2):
        assert replace(v, dim=160, decoder_dim=256) == WAN_5B.vae
