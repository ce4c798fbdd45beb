"""Models that can stream: the bundled one, one from a folder, or one of random weights."""

import difflib
import importlib.resources
import pathlib
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from longlive_jax.config import ConfigError, preset
from longlive_jax.model.text import TextEncoder, Umt5Tokenizer
from longlive_jax.model.transformer import VideoTransformer
from longlive_jax.model.vae import VAE
from longlive_jax.sharding import REPLICATE
from longlive_jax.tree import abstract, flat_params, with_params


class Bundle(NamedTuple):
    """An ``Experiment`` and its three models. ``vae`` and ``text`` may be None: latents and embeddings only."""

    experiment: object
    transformer: object
    vae: object = None
    text: object = None


def bundled():
    """Names of the models in the package."""
    return sorted(f.name for f in importlib.resources.files("longlive_jax.assets").iterdir() if f.joinpath("config.json").is_file())


def folder_of(name):
    """The folder of the bundle called ``name``: a bundled model (``"toy"``) or a path. Raises ``ConfigError`` for a name that is neither."""
    if name in bundled():
        return importlib.resources.files("longlive_jax.assets").joinpath(name)
    if pathlib.Path(name).is_dir():
        return pathlib.Path(name)
    near = difflib.get_close_matches(str(name), bundled(), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"no model {str(name)!r}: {hint}It is neither a bundled model ({', '.join(bundled()) or 'none'}) nor a folder with a bundle"
    )


def load(name, *, mesh=None, policy=REPLICATE):
    """The ``Bundle`` called ``name``: a bundled model (``"toy"``), or the path of a folder that ``checkpoint.save_bundle`` or
    ``experiments/convert.py`` wrote.

    ``mesh``: put the weights on it, whole on every device (``sharding.REPLICATE``) or in parts (``sharding.SHARD``); of a converted folder each
    device reads its part only. Raises ``ConfigError`` for a name that is neither, and what ``load_bundle`` raises for a damaged folder.
    """
    from longlive_jax.checkpoint import load_bundle  # it brings the checkpoint library along, which random weights do not need

    return Bundle(*load_bundle(folder_of(name), mesh=mesh, policy=policy))


def open_tokenizer(name):
    """The umT5 tokenizer whose files are in the folder of the bundle called ``name``, as ``Session`` takes it, or None."""
    experiment = open_experiment(name)
    files = None if name.startswith("random:") else folder_of(name).joinpath("tokenizer")
    if experiment.text.tokenizer != "umt5" or files is None or not files.joinpath("tokenizer.json").is_file():
        return None
    return Umt5Tokenizer(files, experiment.transformer.text_len)


def random_bundle(experiment, seed=0):
    """A ``Bundle`` of untrained weights of the experiment's sizes, for trials of everything but quality."""
    rng = np.random.default_rng(seed)

    def build(kind, config):
        shell = abstract(lambda: kind(config, rngs=nnx.Rngs(0)))
        fill = lambda x: jax.numpy.asarray(rng.normal(0, x.shape[-1] ** -0.5 if len(x.shape) > 1 else 0.1, x.shape), x.dtype)
        return with_params(shell, {path: fill(x) for path, x in flat_params(shell).items()})

    parts = ((VideoTransformer, experiment.transformer), (VAE, experiment.vae), (TextEncoder, experiment.text))
    return Bundle(experiment, *(build(*part) for part in parts))


def open_model(name):
    """``load`` plus ``random:PRESET``, as ``StreamJob.model`` says."""
    return random_bundle(open_experiment(name)) if name.startswith("random:") else load(name)


def open_experiment(name):
    """The ``Experiment`` of what ``open_model`` opens; reads no weights."""
    if name.startswith("random:"):
        return preset(name.removeprefix("random:"))
    from longlive_jax.checkpoint import read_experiment  # as in load

    return read_experiment(folder_of(name))
