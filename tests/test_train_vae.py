"""What experiments/train_vae.py starts from."""

import dataclasses

import numpy as np
import pytest

from experiments import train_vae
from longlive_jax.checkpoint import abstract_part, save_bundle
from longlive_jax.config import TINY, ConfigError
from longlive_jax.tree import flat_params


def test_training_goes_on_from_a_vae_of_its_sizes(tmp_path):
    rng = np.random.default_rng(0)
    shell = flat_params(abstract_part("vae", TINY.vae))
    params = {k: rng.normal(size=x.shape).astype(np.float32) for k, x in shell.items()}
    known = dataclasses.replace(TINY, vae=dataclasses.replace(TINY.vae, mean=(0.0,) * 4, std=(2.0,) * 4))
    save_bundle(tmp_path, known, {"vae": params}, {})
    found = train_vae.initial_params(TINY, str(tmp_path))["vae"]
    assert found.keys() == params.keys()
    for k, x in params.items():
        np.testing.assert_allclose(found[k], x, rtol=1e-2, err_msg=k)
    wider = dataclasses.replace(TINY, vae=dataclasses.replace(TINY.vae, decoder_dim=8))
    with pytest.raises(ConfigError, match="VAE of other sizes"):
        train_vae.initial_params(wider, str(tmp_path))
