"""Golden weights in the product's own classes, through the product's own converter."""

import json

import jax.numpy as jnp
from flax import nnx

from longlive_jax.config import SamplerConfig, StreamConfig, TransformerConfig
from longlive_jax.convert.table import convert
from longlive_jax.convert.wan import TRANSFORMER_TABLE
from longlive_jax.model.transformer import VideoTransformer
from longlive_jax.tree import abstract, flat_params, with_params

VARIANTS = ("multishot", "plain", "sink_only", "relative", "cfg", "cfg_cut", "i2v", "steps2", "recache", "norecache")  # of sample.npz


def transformer_config(meta):
    """The ``TransformerConfig`` of a golden file's settings."""
    return TransformerConfig(
        dim=meta["dim"], ffn_dim=meta["ffn_dim"], heads=meta["heads"], layers=meta["layers"], channels=meta["in_dim"],
        text_dim=meta["text_dim"], text_len=meta["text_len"], freq_dim=meta["freq_dim"], patch=(2, 2),
    )  # fmt: skip


def stream_config(meta):
    """The ``StreamConfig`` of a whole golden run."""
    return StreamConfig(
        chunk=meta["frames_per_block"],
        window=meta["window_frames"],
        sink=meta["sink_frames"],
        shot_sink=meta["multi_shot_sink"],
        shot_offset=meta["multi_shot_rope_offset"],
        relative=meta["use_relative_rope"],
        clean_recache=meta["shot_clean_recache"],
    )


def sampler_config(meta):
    """The ``SamplerConfig`` of a whole golden run."""
    return SamplerConfig(steps=meta["sampling_steps"], shift=meta["timestep_shift"], guidance=meta["guidance_scale"])


def transformer(arrays, meta, prefix="weights/", attention=None):
    """A ``VideoTransformer`` with the golden weights under ``prefix``."""
    shell = abstract(lambda: VideoTransformer(transformer_config(meta), rngs=nnx.Rngs(0), attention=attention))
    tensors = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    params = convert(TRANSFORMER_TABLE, tensors, flat_params(shell))
    return with_params(shell, {k: jnp.asarray(v) for k, v in params.items()})


def meta_of(arrays):
    return json.loads(str(arrays["meta"]))


def frames_last(x):
    """``[B,C,F,h,w]`` as ``[B,F,h,w,C]``."""
    return jnp.asarray(x).transpose(0, 2, 3, 4, 1)


def channels_last(x):
    """``[B,F,C,h,w]`` as ``[B,F,h,w,C]``."""
    return jnp.asarray(x).transpose(0, 1, 3, 4, 2)
