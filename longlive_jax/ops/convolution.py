"""Convolutions of the video VAE, channels last: causal in time, and plain 2-D.

``causal_conv3d`` takes the frames before its input explicitly (``history``), so one function serves whole clips and streams. Four
implementations of the same sum, for kernels of kt frames:

- ``conv3d``: one 3-D convolution, fast on a GPU;
- ``concat2d``: one 2-D convolution over kt frames side by side in the channels;
- ``shift2d``: one 2-D convolution to kt groups of outputs, added with shifts in time;
- ``sum2d``: kt 2-D convolutions, added.

On a CPU the 2-D forms run at 3 to 10 times the speed of the 3-D one (float32, 20 to 80 channels).

``upsample_conv2d`` doubles the size and convolves, ``plain`` as it says or in ``phases``: each of the four pixels that a pixel becomes sees
two by two of the small image, so one 2 x 2 convolution gives all four, with 4/9 of the operations and no enlarged image.
"""

import jax
import jax.numpy as jnp

from longlive_jax.ops.dispatch import choose
from longlive_jax.sharding import local

IMPLEMENTATIONS = ("conv3d", "concat2d", "shift2d", "sum2d")
UPSAMPLINGS = ("plain", "phases")
WORD = 8  # channels
PICTURES = ("batch", None, "height", None, None)  # [B,T,H,W,C] on a mesh, which only a decoder over several devices is under


def conv2d(x, weight, bias=None, *, stride=1, padding=((1, 1), (1, 1))):
    """``x [..., H, W, I]`` by ``weight [kh, kw, I, O]`` -> ``[..., H', W', O]``; ``padding`` is ((top, bottom), (left, right))."""
    flat = x.reshape(-1, *x.shape[-3:])
    y = jax.lax.conv_general_dilated(flat, weight.astype(x.dtype), (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    if bias is not None:
        y = y + bias.astype(y.dtype)
    return y.reshape(*x.shape[:-3], *y.shape[1:])


def upsample_conv2d(x, weight, bias=None, *, implementation=None):
    """``x [..., H, W, I]`` at twice its size, every pixel repeated, convolved by ``weight [3, 3, I, O]`` -> ``[..., 2H, 2W, O]``.

    ``implementation``: one of ``UPSAMPLINGS``; None means phases, faster also on a CPU. Raises ``ValueError`` for another name or kernel.
    """
    if weight.shape[:2] != (3, 3):
        raise ValueError(f"upsample_conv2d got a kernel of {weight.shape[:2]}; it takes 3 x 3, so call conv2d on the enlarged x")
    name = choose("upsample_conv2d", implementation, UPSAMPLINGS, lambda platform: "phases")
    *lead, height, width, inputs = x.shape
    flat = x.reshape(-1, height, width, inputs)
    y = {"plain": upsample_plain, "phases": upsample_phases}[name](flat, weight, bias)
    return y.reshape(*lead, *y.shape[1:])


def upsample_plain(x, weight, bias):
    n, height, width, inputs = x.shape
    large = jnp.broadcast_to(x[:, :, None, :, None], (n, height, 2, width, 2, inputs))
    return conv2d(large.reshape(n, 2 * height, 2 * width, inputs), weight, bias)


def upsample_phases(x, weight, bias):
    """Phase 0 of a pixel sees the pixel before it and itself, phase 1 itself and the next: windows one apart of one convolution.

    With phase 1 before phase 0, the windows of a row hold its pixels in their order, between one too many at either end.
    """
    n, height, width, inputs = x.shape
    taps = pairs(jnp.moveaxis(pairs(weight.astype(jnp.float32)), 2, 0))  # [column phase, tap, row phase, tap, I, O]
    taps = taps.transpose(3, 1, 4, 2, 0, 5).reshape(2, 2, inputs, -1)
    y = conv2d(x, taps, None if bias is None else jnp.tile(bias, 4))
    y = y.reshape(n, height + 1, width + 1, 2, -1).swapaxes(2, 3)
    return y.reshape(n, 2 * height + 2, 2 * width + 2, -1)[:, 1:-1, 1:-1]


def pairs(weight):
    """The three taps of axis 0 as they fall on two neighbours that were repeated: ``[phase, 2, ...]``, phase 1 first."""
    first, middle, last = weight
    return jnp.stack([jnp.stack([first + middle, last]), jnp.stack([first, middle + last])])


def history_frames(weight, time_stride=1):
    """Frames of the past that a causal kernel ``[kt, kh, kw, I, O]`` needs before each call's first frame."""
    return weight.shape[0] - time_stride


def causal_conv3d(x, weight, bias=None, history=None, *, time_stride=1, implementation=None):
    """Causal convolution: same size in space (odd kernel), ``T / time_stride`` frames.

    Args:
        x: ``[B, T, H, W, I]``; T is a multiple of ``time_stride``.
        weight: ``[kt, kh, kw, I, O]``.
        bias: ``[O]`` or None.
        history: ``[B, kt - time_stride, H, W, I]``, the input frames just before ``x``; None stands for zeros.
        implementation: one of ``IMPLEMENTATIONS``; None chooses by platform.

    Returns:
        ``(y [B, T / time_stride, H, W, O], history)``, with the history of the next call.

    Raises:
        ValueError: frames that do not divide by ``time_stride``, a history of another shape, or an unknown implementation.
    """
    past = history_frames(weight, time_stride)
    batch, frames, height, width, inputs = x.shape
    if frames % time_stride:
        raise ValueError(f"causal_conv3d got {frames} frames, not a multiple of time_stride={time_stride}; pad or cut x")
    shape = (batch, past, height, width, inputs)
    if history is None:
        history = jnp.zeros(shape, x.dtype)
    if history.shape != shape:
        raise ValueError(f"causal_conv3d got a history of shape {history.shape}; x {x.shape} needs {shape}")
    name = choose("causal_conv3d", implementation, IMPLEMENTATIONS, lambda platform: automatic(platform, weight))
    padded = joined(history.astype(x.dtype), x) if past else x
    padded, after = settle(padded, frames) if name == "conv3d" else (padded, padded[:, frames:])
    y = {"conv3d": conv3d, "concat2d": concat2d, "shift2d": shift2d, "sum2d": sum2d}[name](padded, weight.astype(x.dtype), time_stride)
    if bias is not None:
        y = y + bias.astype(y.dtype)
    return y, after


def joined(history, x):
    """The frames of ``history`` and of ``x``, ``[B, T, H, W, C]``; joined flat, so that a GPU writes them in wide words."""
    flat = lambda x: x.reshape(len(x), -1)
    join = lambda history, x: jnp.concatenate([flat(history), flat(x)], 1).reshape(len(x), -1, *x.shape[2:])
    return local(join, (PICTURES,) * 2, PICTURES)(history, x)  # on a mesh, each device its rows


def settle(x, frames):
    """``x`` and its frames from ``frames`` on, both in memory before anything else reads ``x``.

    Left free, XLA computes the frames to remember a second time at the end of the program and holds what they come from until then: in a
    decoder of full size that is 6 GiB of every chunk's memory.
    """
    x = jax.lax.optimization_barrier(x)
    return jax.lax.optimization_barrier((x, x[:, frames:]))


def automatic(platform, weight):
    """On a CPU the 2-D form that moves fewer channels; elsewhere the 3-D one."""
    if platform != "cpu":
        return "conv3d"
    return "concat2d" if weight.shape[3] <= weight.shape[4] else "shift2d"


def same(weight):
    """Padding that keeps height and width."""
    return tuple((k // 2, k // 2) for k in weight.shape[-4:-2])


def conv3d(x, weight, time_stride):
    """``x [B, (n - 1) * time_stride + kt, H, W, I]`` -> ``[B, n, H, W, O]``, as all of the forms below.

    Channels are padded to a multiple of 8: cuDNN's fast kernels move 16 bytes of them at once.
    """
    outputs = weight.shape[4]
    inner, outer = -weight.shape[3] % WORD, -outputs % WORD
    x, weight = jnp.pad(x, (*((0, 0),) * 4, (0, inner))), jnp.pad(weight, (*((0, 0),) * 3, (0, inner), (0, outer)))
    y = jax.lax.conv_general_dilated(x, weight, (time_stride, 1, 1), ((0, 0), *same(weight)), dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))
    return jax.lax.optimization_barrier(y)[..., :outputs]  # a plain convolution: with bias and residual in it, cuDNN has fewer engines


def taps(x, weight, time_stride):
    """For each frame of the kernel, the frames of ``x`` that it meets."""
    kernel = weight.shape[0]
    span = x.shape[1] - kernel + 1
    return [x[:, k : k + span : time_stride] for k in range(kernel)]


def concat2d(x, weight, time_stride):
    kernel, kh, kw, inputs, outputs = weight.shape
    wide = jnp.concatenate(taps(x, weight, time_stride), -1)
    return conv2d(wide, jnp.moveaxis(weight, 0, 2).reshape(kh, kw, kernel * inputs, outputs), padding=same(weight))


def shift2d(x, weight, time_stride):
    kernel, kh, kw, inputs, outputs = weight.shape
    wide = conv2d(x, jnp.moveaxis(weight, 0, 3).reshape(kh, kw, inputs, kernel * outputs), padding=same(weight))
    parts = taps(wide, weight, time_stride)
    return sum(part[..., k * outputs : (k + 1) * outputs] for k, part in enumerate(parts))


def sum2d(x, weight, time_stride):
    parts = taps(x, weight, time_stride)
    return sum(conv2d(part, weight[k], padding=same(weight)) for k, part in enumerate(parts))
