"""Wan2.2 causal video VAE (spec/model.md §4): pixels ``[B, T, H, W, 3]`` in [-1, 1] to latents ``[B, F, h, w, C]`` and back.

Latent 0 stands for one pixel frame and every other for ``time_stride`` (4). Whole clips and streams are the same computation: ``encode_step``
and ``decode_step`` take and return a carry, and ``encode`` and ``decode`` are one step from a fresh carry.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from longlive_jax.config import VAEConfig, require
from longlive_jax.model.layers import Linear
from longlive_jax.model.vae_layers import SPACE, CausalConv, Down, Middle, Norm, Timeline, Up

WIDEST = 2**30  # elements of an activation in one pass: past 2**31 a GPU has no fast convolution, and a pass holds several of them


class VAECarry(NamedTuple):
    """Everything a stream remembers between chunks; shapes do not change."""

    first: jax.Array  # [] bool: the next chunk starts the video
    history: tuple


def patchify(x, patch):
    """``[..., H, W, c]`` -> ``[..., H/p, W/p, c*p*p]``, channels ordered (c, column, row)."""
    *lead, height, width, dim = x.shape
    n = len(lead)
    x = x.reshape(*lead, height // patch, patch, width // patch, patch, dim)
    x = x.transpose(*range(n), n, n + 2, n + 4, n + 3, n + 1)
    return x.reshape(*lead, height // patch, width // patch, dim * patch * patch)


def unpatchify(x, patch):
    """Inverse of ``patchify``."""
    *lead, height, width, dim = x.shape
    n = len(lead)
    x = x.reshape(*lead, height, width, dim // patch**2, patch, patch)
    x = x.transpose(*range(n), n, n + 4, n + 1, n + 3, n + 2)
    return x.reshape(*lead, height * patch, width * patch, dim // patch**2)


def count_passes(frames, size):
    """The fewest equal parts of ``frames`` latent frames, each of ``size`` elements at its widest, that stay within ``WIDEST``."""
    return next((n for n in range(1, frames) if frames % n == 0 and frames // n * size <= WIDEST), frames)


def in_passes(step, carry, x, frames, size):
    """``step(carry, x)`` over ``x [B, T, ...]`` in ``count_passes`` parts; what it returns of ``[B, t, ...]`` is joined."""
    passes = count_passes(frames, size)
    if passes == 1:
        return step(carry, x)
    cut = jnp.moveaxis(x.reshape(x.shape[0], passes, -1, *x.shape[2:]), 1, 0)
    carry, y = jax.lax.scan(step, carry, cut)
    return carry, jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(y.shape[1], -1, *y.shape[3:]), y)


def to_uint8(pixels):
    """Pixels in [-1, 1], clamped and rounded to 0..255."""
    return jnp.round((jnp.clip(pixels.astype(jnp.float32), -1, 1) + 1) * 127.5).astype(jnp.uint8)


class Encoder(nnx.Module):
    """Patches ``[B, 4f, H/2, W/2, 12]`` -> ``[B, f, h, w, 2C]``."""

    def __init__(self, config, *, rngs):
        last = len(config.multipliers) - 1
        widths = [config.dim * m for m in (1, *config.multipliers)]
        times = (*config.time_downsample, False)
        self.conv1 = CausalConv(3 * config.patch**2, widths[0], rngs=rngs)
        self.downsamples = nnx.List([Down(widths[i], widths[i + 1], config.res_blocks, i < last, times[i], rngs=rngs) for i in range(last + 1)])
        self.middle = Middle(widths[-1], rngs=rngs)
        self.norm = Norm(widths[-1])
        self.head = CausalConv(widths[-1], 2 * config.channels, rngs=rngs)
        self.lead = config.time_stride - 1

    def start(self, batch, grid, dtype):
        """``grid`` is the latent height and width."""
        sizes = [tuple(g * SPACE**i for g in grid) for i in reversed(range(len(self.downsamples)))]
        return (
            self.conv1.start(batch, sizes[0], dtype),
            tuple(stage.start(batch, size, dtype) for stage, size in zip(self.downsamples, sizes)),
            self.middle.start(batch, grid, dtype),
            self.head.start(batch, grid, dtype),
        )

    def __call__(self, x, history, first):
        stem, stages, middle, head = history
        stages = list(stages)
        timeline = Timeline(first, self.lead)
        with jax.named_scope("stem"):
            x, stem = self.conv1(timeline.blank(x), stem)
        for i, stage in enumerate(self.downsamples):
            with jax.named_scope(f"down{i}"):
                x, stages[i], timeline = stage(x, stages[i], timeline)
        with jax.named_scope("middle"):
            x, middle = self.middle(x, middle, timeline)
        with jax.named_scope("head"):
            x, head = self.head(self.norm.activate(x, timeline), head)
        return x, (stem, tuple(stages), middle, head)


class Decoder(nnx.Module):
    """``[B, f, h, w, C]`` -> patches ``[B, 4f, H/2, W/2, 12]``."""

    def __init__(self, config, *, rngs):
        last = len(config.multipliers) - 1
        widths = [config.decoder_dim * m for m in (config.multipliers[-1], *reversed(config.multipliers))]
        times = (*reversed(config.time_downsample), False)
        self.conv1 = CausalConv(config.channels, widths[0], rngs=rngs)
        self.middle = Middle(widths[0], rngs=rngs)
        blocks = config.res_blocks + 1
        self.upsamples = nnx.List([Up(widths[i], widths[i + 1], blocks, i < last, times[i], rngs=rngs) for i in range(last + 1)])
        self.norm = Norm(widths[-1])
        self.head = CausalConv(widths[-1], 3 * config.patch**2, rngs=rngs)

    def start(self, batch, grid, dtype):
        """``grid`` is the latent height and width."""
        sizes = [tuple(g * SPACE**i for g in grid) for i in range(len(self.upsamples))]
        return (
            self.conv1.start(batch, grid, dtype),
            self.middle.start(batch, grid, dtype),
            tuple(stage.start(batch, size, dtype) for stage, size in zip(self.upsamples, sizes)),
            self.head.start(batch, sizes[-1], dtype),
        )

    def __call__(self, x, history, first):
        stem, middle, stages, head = history
        stages = list(stages)
        timeline = Timeline(first, 0)
        with jax.named_scope("stem"):
            x, stem = self.conv1(x, stem)
        with jax.named_scope("middle"):
            x, middle = self.middle(x, middle, timeline)
        for i, stage in enumerate(self.upsamples):
            with jax.named_scope(f"up{i}"):
                x, stages[i], timeline = stage(x, stages[i], timeline)
        with jax.named_scope("head"):
            x, head = self.head(self.norm.activate(x, timeline), head)
        return x, (stem, middle, tuple(stages), head)


class VAE(nnx.Module):
    """The autoencoder. It computes in the dtype of its weights (norms and latent statistics in float32) and holds no stream state.

    ``conv1`` maps the encoder's output to mean and log-variance, ``conv2`` latents to the decoder's input (the names of the checkpoint).
    A VAE of ``config.dim`` 0 has no ``encoder`` and no ``conv1``, and refuses to encode.
    """

    def __init__(self, config: VAEConfig, *, rngs):
        self.encoder = Encoder(config, rngs=rngs) if config.dim else None
        self.conv1 = Linear(2 * config.channels, 2 * config.channels, rngs=rngs) if config.dim else None
        self.conv2 = Linear(config.channels, config.channels, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.config = config

    @property
    def dtype(self):
        return self.conv2.weight.get_value().dtype

    def check_encoder(self):
        """Refuse to encode without an encoder: raises ``ConfigError``."""
        require(
            self.encoder is not None,
            f"this VAE has no encoder (vae.dim=0), so it cannot take an image or a video, only decode; give the whole VAE, and this one's "
            f"decoder (width {self.config.decoder_dim}) by streaming.bundles.with_decoder",
        )

    def statistics(self):
        """Mean and standard deviation of the latents, float32 ``[C]``."""
        c = self.config
        mean = jnp.asarray(c.mean or (0.0,) * c.channels, jnp.float32)
        return mean, jnp.asarray(c.std or (1.0,) * c.channels, jnp.float32)

    def pixel_frames(self, first, frames):
        """How many of the ``time_stride * frames`` pixel frames of a chunk belong to the video: the last ones, all but 3 in a first chunk."""
        return self.config.time_stride * frames - (self.config.time_stride - 1 if first else 0)

    # ---- whole clips

    def encode_moments(self, video):
        """Mean and log-variance of the latents of ``video [B, 4k+1, H, W, 3]``, each float32 ``[B, k+1, h, w, C]``, not normalised.

        Raises:
            ValueError: another number of frames or channels, or a size that is not a multiple of ``space_stride``.
            ConfigError: a VAE that only decodes.
        """
        stride = self.config.time_stride
        frames = video.shape[1]
        if (frames - 1) % stride:
            below = frames - (frames - 1) % stride
            raise ValueError(
                f"encode got {frames} pixel frames; the first latent takes 1 and each other {stride}, so cut the video to {below} "
                f"frames or extend it to {below + stride}"
            )
        video = jnp.pad(video, ((0, 0), (stride - 1, 0), (0, 0), (0, 0), (0, 0)))
        return self.moments_step(self.encode_start(video.shape[0], self.latent_grid(video)), video)[1]

    def encode(self, video):
        """``video [B, 4k+1, H, W, 3]`` -> normalised latents float32 ``[B, k+1, h, w, C]`` (the mean, not a sample)."""
        return self.scale(self.encode_moments(video)[0])

    def decode(self, z):
        """Normalised latents ``[B, F, h, w, C]`` -> ``[B, 4(F-1)+1, H, W, 3]``, not clamped."""
        _, pixels = self.decode_step(self.decode_start(z.shape[0], z.shape[2:4]), z)
        return pixels[:, self.config.time_stride - 1 :]

    # ---- streams

    def encode_start(self, batch, grid):
        """The carry before a video; ``grid`` is the latent height and width. Raises ``ConfigError`` if there is no encoder."""
        self.check_encoder()
        return VAECarry(jnp.array(True), self.encoder.start(batch, tuple(grid), self.dtype))

    def encode_step(self, carry, video):
        """``video [B, 4f, H, W, 3]`` -> ``(carry, latents [B, f, h, w, C])``, normalised.

        The first chunk of a stream has 3 leading frames of any finite value before the video's first frame.
        """
        carry, (mean, _) = self.moments_step(carry, video)
        return carry, self.scale(mean)

    def moments_step(self, carry, video):
        """As ``encode_step``, giving ``(carry, (mean, log-variance))``, float32 and not normalised."""
        stride = self.config.time_stride
        if video.shape[1] % stride:
            raise ValueError(
                f"encode_step got {video.shape[1]} pixel frames; it takes {stride} per latent frame, the first chunk with {stride - 1} "
                f"leading dummy frames: pad or cut to a multiple of {stride}"
            )
        self.latent_grid(video)
        batch, frames, height, width, _ = video.shape
        size = batch * stride * height * width // self.config.patch**2 * self.config.dim
        return in_passes(self.encode_pass, carry, video, frames // stride, size)

    def encode_pass(self, carry, video):
        """``moments_step`` in one piece."""
        with jax.named_scope("vae_encode"):
            x = patchify(video.astype(self.dtype), self.config.patch)
            x, history = self.encoder(x, carry.history, carry.first)
            mean, log_variance = jnp.split(self.conv1(x).astype(jnp.float32), 2, -1)
        return VAECarry(jnp.zeros_like(carry.first), history), (mean, log_variance)

    def decode_start(self, batch, grid):
        """The carry before a video; ``grid`` is the latent height and width."""
        return VAECarry(jnp.array(True), self.decoder.start(batch, tuple(grid), self.dtype))

    def decode_step(self, carry, z):
        """Normalised latents ``[B, f, h, w, C]`` -> ``(carry, pixels [B, 4f, H, W, 3])``, in the dtype of the weights, not clamped.

        The first 3 frames of a stream's first chunk mean nothing; ``pixel_frames`` says how many to keep.
        """
        if z.shape[-1] != self.config.channels:
            raise ValueError(
                f"decode got latents of shape {z.shape}; the last axis must hold vae.channels={self.config.channels} (layout [B, F, h, w, C])"
            )
        return in_passes(self.decode_pass, carry, z, z.shape[1], self.widest_decoded(z.shape[0], z.shape[2:4]))

    def widest_decoded(self, batch, grid):
        """Elements of the decoder's widest activation for each latent frame of a latent height and width ``grid``."""
        c = self.config
        return batch * c.time_stride * math.prod(grid) * (c.space_stride // c.patch) ** 2 * 2 * c.decoder_dim

    def decode_pass(self, carry, z):
        """``decode_step`` in one piece."""
        mean, std = self.statistics()
        with jax.named_scope("vae_decode"):
            x = self.conv2((z.astype(jnp.float32) * std + mean).astype(self.dtype))
            x, history = self.decoder(x, carry.history, carry.first)
            pixels = unpatchify(x, self.config.patch)
        return VAECarry(jnp.zeros_like(carry.first), history), pixels

    def scale(self, mean):
        """Un-normalised latents to normalised ones."""
        center, std = self.statistics()
        return (mean - center) / std

    def latent_grid(self, video):
        """Latent height and width of ``video [B, T, H, W, 3]``."""
        stride = self.config.space_stride
        _, _, height, width, channels = video.shape
        if height % stride or width % stride or channels != 3:
            raise ValueError(
                f"encode got a video of shape {video.shape}; height and width must be multiples of {stride} and the last axis 3 "
                "(layout [B, T, H, W, 3]): resize or crop"
            )
        return height // stride, width // stride
