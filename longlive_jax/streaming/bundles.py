"""Models that can stream: the bundled one, one from a folder, or one of random weights."""

import dataclasses
import difflib
import importlib.resources
import pathlib
import textwrap
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from longlive_jax.config import ConfigError, preset, replace, require
from longlive_jax.model.text import TextEncoder, Umt5Tokenizer
from longlive_jax.model.transformer import VideoTransformer
from longlive_jax.model.vae import VAE
from longlive_jax.sharding import REPLICATE, make_mesh
from longlive_jax.streaming.reading import host_device
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


def load(name, *, decoder=None, text="device", mesh=None, policy=REPLICATE):
    """The ``Bundle`` called ``name``: a bundled model (``"toy"``), or the path of a folder that ``checkpoint.save_bundle`` or
    ``experiments/convert.py`` wrote.

    ``decoder``: another folder to take the VAE's decoder from, as ``with_decoder``. ``text``: where the text encoder's weights are put, on the
    ``"device"`` or on the ``"host"``; an encoder on the host takes no memory of a device, and ``reading.PromptReader`` says how it runs.
    ``mesh``: put the weights on it, whole on every device (``sharding.REPLICATE``) or in parts (``sharding.SHARD``); of a converted folder each
    device reads its part only. Raises ``ConfigError`` for a name that is neither, and what ``load_bundle`` raises for a damaged folder.
    """
    from longlive_jax.checkpoint import load_bundle, load_parts, parts_of, read_experiment  # they bring along what random weights do not need

    require(text in ("device", "host"), f"text={text!r} must be 'device' or 'host'")
    folder = folder_of(name)
    if text == "device":
        bundle = Bundle(*load_bundle(folder, mesh=mesh, policy=policy))
    else:
        places = {"transformer": (mesh, policy), "vae": (mesh, policy), "text": (make_mesh(devices=[host_device()]), REPLICATE)}
        models = {part: load_parts(folder, (part,), None, *places[part])[1] for part in parts_of(folder)}
        bundle = Bundle(read_experiment(folder), *map(models.get, places))
    return bundle if decoder is None else with_decoder(bundle, decoder, mesh=mesh, policy=policy)


def with_decoder(bundle, name, *, mesh=None, policy=REPLICATE):
    """The bundle with the VAE decoder of the bundle called ``name``, e.g. MG-LightVAE in place of Wan2.2's; nothing else of that is read.

    The encoder stays, so image to video works with a light decoder. A bundle without a VAE gets one that only decodes. ``mesh``, ``policy``: as
    ``load``.

    Raises ``ConfigError`` unless both VAEs have the same latents (channels, statistics, strides) and stages; widths may differ.
    """
    from longlive_jax.checkpoint import load_parts, parts_of, read_experiment  # as in load

    folder, e = folder_of(name), bundle.experiment
    require("vae" in parts_of(folder), f"{str(folder)!r} holds no VAE, so there is no decoder to take; name a bundle with one")
    ours, theirs = e.vae, read_experiment(folder).vae
    shared = [f.name for f in dataclasses.fields(ours) if f.name not in ("dim", "decoder_dim")]
    short = lambda value: textwrap.shorten(str(value), 60, placeholder=" ...)")
    wrong = [f"vae.{n} is {short(vars(ours)[n])} here and {short(vars(theirs)[n])} there" for n in shared if vars(ours)[n] != vars(theirs)[n]]
    require(not wrong, f"the decoder of {str(folder)!r} is for other latents: {'; '.join(wrong)}; take one trained on the same latents")
    decoder = flat_params(load_parts(folder, ("vae",), e.dtype, mesh, policy)[1])
    params = {} if bundle.vae is None else flat_params(bundle.vae)
    params = {path: x for path, x in params.items() if not decodes(path)} | {path: x for path, x in decoder.items() if decodes(path)}
    config = replace(ours, dim=ours.dim if bundle.vae is not None else 0, decoder_dim=theirs.decoder_dim)
    vae = with_params(abstract(lambda: VAE(config, rngs=nnx.Rngs(0))), params)
    return bundle._replace(experiment=replace(e, vae=config), vae=vae)


def decodes(path):
    """Whether a parameter of the VAE belongs to its decoder."""
    return path.startswith(("decoder.", "conv2."))


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


def open_model(name, *, decoder=None, text="device"):
    """``load`` plus ``random:PRESET``, as ``StreamJob.model`` says."""
    if not name.startswith("random:"):
        return load(name, decoder=decoder, text=text)
    bundle = random_bundle(open_experiment(name))
    return bundle if decoder is None else with_decoder(bundle, decoder)


def open_experiment(name):
    """The ``Experiment`` of what ``open_model`` opens; reads no weights."""
    if name.startswith("random:"):
        return preset(name.removeprefix("random:"))
    from longlive_jax.checkpoint import read_experiment  # as in load

    return read_experiment(folder_of(name))
