"""longlive_jax: long, multi-shot, interactive video generation in JAX."""

from longlive_jax.config import TINY, TOY, WAN_5B, ConfigError, Experiment
from longlive_jax.data.prompts import read_prompts, storyboard
from longlive_jax.model.transformer import VideoTransformer
from longlive_jax.model.vae import VAE
from longlive_jax.streaming.bundles import Bundle, load, random_bundle
from longlive_jax.streaming.session import Chunk, Session

__all__ = [
    "TINY", "TOY", "VAE", "WAN_5B", "Bundle", "Chunk", "ConfigError", "Experiment", "Session", "VideoTransformer", "load", "random_bundle",
    "read_prompts", "storyboard",
]  # fmt: skip
