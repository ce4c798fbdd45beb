"""Layers of the Wan2.2 causal video VAE (spec/model.md §4.2, §4.6).

Every temporal layer takes the frames it remembers and returns those of the next call. A chunk always has ``time_stride`` pixel frames per
latent frame, also the first one, whose first latent stands for one pixel frame only: the others are *leading* frames before the start of the
video. They hold arbitrary values, are zeroed wherever a layer would look at them, and are dropped by the caller. So the first chunk and the
later ones are one program, told apart by a traced flag.
"""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx

from longlive_jax.config import require
from longlive_jax.model.layers import Linear
from longlive_jax.ops.convolution import causal_conv3d, conv2d, history_frames, upsample_conv2d

TIME, SPACE = 2, 2  # factors of one resampling


@dataclass(frozen=True)
class Timeline:
    """Where a chunk lies: ``first`` (traced bool) says that it starts the video, ``lead`` how many leading frames it then has."""

    first: jax.Array
    lead: int

    def early(self, x, extra=0):
        """``[1, T, 1, 1, 1]``, true on the leading frames of ``x [B, T, H, W, C]`` and on ``extra`` more of a first chunk."""
        frames = jax.lax.broadcasted_iota(jnp.int32, (1, x.shape[1], 1, 1, 1), 1)
        return self.first & (frames < self.lead + extra)

    def blank(self, x, extra=0):
        """``x`` with those frames zeroed."""
        return jnp.where(self.early(x, extra), jnp.zeros((), x.dtype), x) if self.lead + extra else x

    def halved(self):
        """The timeline after halving the frame rate: pairs end on the video's frame 0."""
        return replace(self, lead=(self.lead - 1) // TIME)

    def doubled(self):
        return replace(self, lead=TIME * self.lead + 1)


def normalize(x, gamma):
    """``x / |x| * sqrt(C) * gamma`` over the channels, in float32; a vector shorter than 1e-12 is zero, and so is its gradient."""
    wide = x.astype(jnp.float32)
    square = jnp.sum(wide * wide, -1, keepdims=True)
    blank = square < 1e-24
    scale = jnp.where(blank, 0.0, math.sqrt(x.shape[-1]) * jax.lax.rsqrt(jnp.where(blank, 1.0, square)))
    return wide * scale * gamma.astype(jnp.float32)


@jax.checkpoint
def activate(x, gamma, early):
    """Norm, SiLU and zeros on ``early`` frames (None: nowhere), in one pass; the gradient recomputes the float32 values from ``x``."""
    y = jax.nn.silu(normalize(x, gamma))
    y = y if early is None else jnp.where(early, 0.0, y)
    return y.astype(x.dtype)


class Norm(nnx.Module):
    def __init__(self, dim):
        self.gamma = nnx.Param(jnp.ones(dim))

    def __call__(self, x):
        return normalize(x, self.gamma.get_value()).astype(x.dtype)

    def activate(self, x, timeline):
        """The input of a causal convolution ``[B, T, H, W, C]``."""
        return activate(x, self.gamma.get_value(), timeline.early(x) if timeline.lead else None)


class CausalConv(nnx.Module):
    """``weight [kt, kh, kw, I, O]``; same height and width, ``T / time_stride`` frames. It remembers ``[B, t, H, W, I]``."""

    def __init__(self, inputs, outputs, kernel=(3, 3, 3), time_stride=1, *, rngs):
        std = (math.prod(kernel) * inputs) ** -0.5
        self.weight = nnx.Param(std * jax.random.normal(rngs.params(), (*kernel, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.time_stride = time_stride

    def start(self, batch, grid, dtype):
        weight = self.weight.get_value()
        return jnp.zeros((batch, history_frames(weight, self.time_stride), *grid, weight.shape[3]), dtype)

    def __call__(self, x, history):
        return causal_conv3d(x, self.weight.get_value(), self.bias.get_value(), history, time_stride=self.time_stride)


class Conv2d(nnx.Module):
    """``weight [kh, kw, I, O]`` on every frame."""

    def __init__(self, inputs, outputs, kernel=(3, 3), stride=1, padding=((1, 1), (1, 1)), *, rngs):
        std = (math.prod(kernel) * inputs) ** -0.5
        self.weight = nnx.Param(std * jax.random.normal(rngs.params(), (*kernel, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))
        self.stride, self.padding = stride, padding

    def __call__(self, x):
        return conv2d(x, self.weight.get_value(), self.bias.get_value(), stride=self.stride, padding=self.padding)


class ResidualBlock(nnx.Module):
    """``x [B, T, H, W, I]`` -> ``[B, T, H, W, O]``; remembers two frames before each of its two convolutions."""

    def __init__(self, inputs, outputs, *, rngs):
        self.norm1 = Norm(inputs)
        self.conv1 = CausalConv(inputs, outputs, rngs=rngs)
        self.norm2 = Norm(outputs)
        self.conv2 = CausalConv(outputs, outputs, rngs=rngs)
        self.shortcut = Linear(inputs, outputs, rngs=rngs) if inputs != outputs else None

    def start(self, batch, grid, dtype):
        return self.conv1.start(batch, grid, dtype), self.conv2.start(batch, grid, dtype)

    def __call__(self, x, history, timeline):
        y, first = self.conv1(self.norm1.activate(x, timeline), history[0])
        y, second = self.conv2(self.norm2.activate(y, timeline), history[1])
        return y + (x if self.shortcut is None else self.shortcut(x)), (first, second)


def through(blocks, x, history, timeline):
    """``x`` through the residual blocks of a stage, and what each of them remembers."""
    history = list(history)
    for i, block in enumerate(blocks):
        x, history[i] = block(x, history[i], timeline)
    return x, tuple(history)


class Attention(nnx.Module):
    """One head over the positions of each frame; ``to_qkv`` has the rows of queries, keys and values in thirds."""

    def __init__(self, dim, *, rngs):
        self.norm = Norm(dim)
        self.to_qkv = Linear(dim, 3 * dim, rngs=rngs)
        self.proj = Linear(dim, dim, rngs=rngs)

    def __call__(self, x):
        batch, frames, height, width, dim = x.shape
        q, k, v = jnp.split(self.to_qkv(self.norm(x)).reshape(batch * frames, height * width, 3 * dim), 3, -1)
        scores = jnp.einsum("nqc,nkc->nqk", q, k, preferred_element_type=jnp.float32) * dim**-0.5
        y = jnp.einsum("nqk,nkc->nqc", jax.nn.softmax(scores, -1).astype(x.dtype), v)
        return x + self.proj(y).reshape(x.shape)


class Middle(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, dim, *, rngs):
        self.res1 = ResidualBlock(dim, dim, rngs=rngs)
        self.attention = Attention(dim, rngs=rngs)
        self.res2 = ResidualBlock(dim, dim, rngs=rngs)

    def start(self, batch, grid, dtype):
        return self.res1.start(batch, grid, dtype), self.res2.start(batch, grid, dtype)

    def __call__(self, x, history, timeline):
        x, first = self.res1(x, history[0], timeline)
        x, second = self.res2(self.attention(x), history[1], timeline)
        return x, (first, second)


def average_down(x, outputs, time):
    """``[B, T, H, W, C]`` -> ``[B, T / time, H / 2, W / 2, outputs]``: means over space and over groups of (channel, frame) pairs."""
    batch, frames, height, width, dim = x.shape
    x = x.reshape(batch, frames // time, time, height // SPACE, SPACE, width // SPACE, SPACE, dim).mean((4, 6))
    x = jnp.moveaxis(x, 2, -1)
    return x.reshape(*x.shape[:-2], outputs, dim * time // outputs).mean(-1)


def duplicate_up(x, outputs, time):
    """``[B, T, H, W, C]`` -> ``[B, T * time, 2H, 2W, outputs]``; C / outputs input channels spread over time, then rows, then columns."""
    batch, frames, height, width, dim = x.shape
    spread = dim // outputs
    t = min(spread, time)
    h = min(spread // t, SPACE)
    w = spread // (t * h)
    x = x.reshape(batch, frames, height, width, outputs, t, h, w).transpose(0, 1, 5, 2, 6, 3, 7, 4)
    x = jnp.broadcast_to(x, (batch, frames, time, height, SPACE, width, SPACE, outputs))
    return x.reshape(batch, frames * time, height * SPACE, width * SPACE, outputs)


class Down(nnx.Module):
    """Encoder stage: residual blocks, then (not in the last stage) half the size and, with ``time``, half the rate; plus averages."""

    def __init__(self, inputs, outputs, blocks, space, time, *, rngs):
        self.blocks = nnx.List([ResidualBlock(outputs if i else inputs, outputs, rngs=rngs) for i in range(blocks)])
        self.resample = Conv2d(outputs, outputs, stride=SPACE, padding=((0, 1), (0, 1)), rngs=rngs) if space else None
        self.time_conv = CausalConv(outputs, outputs, (3, 1, 1), TIME, rngs=rngs) if time else None
        self.outputs, self.space, self.time = outputs, space, TIME if time else 1
        groups = inputs * self.time
        require(
            groups % outputs == 0 if space else inputs == outputs,
            f"a VAE encoder stage from {inputs} to {outputs} channels has no averaging shortcut: "
            + (f"{groups} must be a multiple of {outputs}" if space else "the last stage must keep its width")
            + "; choose vae.multipliers such as (1, 2, 4, 4)",
        )

    def start(self, batch, grid, dtype):
        """Frames remembered, all zero; ``grid`` is the stage's input size."""
        half = (grid[0] // SPACE, grid[1] // SPACE)
        time = self.time_conv.start(batch, half, dtype) if self.time_conv is not None else None
        return tuple(block.start(batch, grid, dtype) for block in self.blocks), time

    def __call__(self, x, history, timeline):
        residual, (memory, time) = x, history
        x, memory = through(self.blocks, x, memory, timeline)
        if self.resample is None:
            return x + residual, (memory, time), timeline
        x = self.resample(x)
        shortcut = average_down(timeline.blank(residual) if self.time > 1 else residual, self.outputs, self.time)
        if self.time_conv is not None:
            kept = x[:, TIME - 1 :: TIME]
            x, time = self.time_conv(x, time)
            timeline = timeline.halved()
            x = jnp.where(timeline.early(x, 1), kept, x)  # the video's frame 0 is not convolved
        return x + shortcut, (memory, time), timeline


class Up(nnx.Module):
    """Decoder stage: residual blocks, then (not in the last stage) twice the size and, with ``time``, twice the rate; plus duplicates."""

    def __init__(self, inputs, outputs, blocks, space, time, *, rngs):
        self.blocks = nnx.List([ResidualBlock(outputs if i else inputs, outputs, rngs=rngs) for i in range(blocks)])
        self.time_conv = CausalConv(outputs, 2 * outputs, (3, 1, 1), rngs=rngs) if time else None
        self.resample = Conv2d(outputs, outputs, rngs=rngs) if space else None
        self.outputs, self.time = outputs, TIME if time else 1
        require(
            not space or (inputs % outputs == 0 and (self.time * SPACE * SPACE) % (inputs // outputs) == 0),
            f"a VAE decoder stage from {inputs} to {outputs} channels has no duplicating shortcut: the ratio must be whole and "
            f"divide {self.time * SPACE * SPACE}; choose vae.multipliers such as (1, 2, 4, 4)",
        )

    def start(self, batch, grid, dtype):
        """Frames remembered, all zero; ``grid`` is the stage's input size."""
        time = self.time_conv.start(batch, grid, dtype) if self.time_conv is not None else None
        return tuple(block.start(batch, grid, dtype) for block in self.blocks), time

    def __call__(self, x, history, timeline):
        residual, (memory, time) = x, history
        x, memory = through(self.blocks, x, memory, timeline)
        if self.resample is None:
            return x, (memory, time), timeline
        if self.time_conv is not None:
            x, time = self.double_rate(x, time, timeline)
            timeline = timeline.doubled()
        x = upsample_conv2d(x, self.resample.weight.get_value(), self.resample.bias.get_value())
        return x + duplicate_up(residual, self.outputs, self.time), (memory, time), timeline

    def double_rate(self, x, history, timeline):
        """Two frames for each; the video's frame 0 is neither convolved nor part of the history of later frames."""
        batch, frames, height, width, dim = x.shape
        y, history = self.time_conv(timeline.blank(x, 1), history)
        pair = jnp.moveaxis(y.reshape(batch, frames, height, width, TIME, dim), -2, 2)
        pair = jnp.where(timeline.early(x, 1)[:, :, None], x[:, :, None], pair)
        return pair.reshape(batch, TIME * frames, height, width, dim), history
