"""What the toy reader compares with: blurred background pictures, normalised shape masks, sinusoid fits; and its picture operations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.config import require
from longlive_jax.data.toydraw import CANVAS, backgrounds, coverage
from longlive_jax.data.toywords import SHAPES

BLURS = (0.0, 1.0, 1.6, 2.4)  # px, of the background templates
SOFTNESS = (0.02, 0.05, 0.08, 0.12)  # blur of the shape templates over the square root of the area
GRID, EXTENT = 24, 0.95  # points a side of the normalised mask; half its width over the square root of the area
TRIAL_PERIODS = np.geomspace(12, 130, 160)  # pixel frames
RIDGE = 1e-4  # holds fits of less than a period back from huge amplitudes


# ---- templates ------------------------------------------------------------------------------------------------


def gaussian(image, sigma, axes):
    """Blur along ``axes`` with edge padding (numpy)."""
    if sigma == 0:
        return image
    reach = int(np.ceil(3 * sigma))
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    for axis in axes:
        pad = [(0, 0)] * image.ndim
        pad[axis] = (reach, reach)
        padded = np.moveaxis(np.pad(image, pad, mode="edge"), axis, 0)
        n = image.shape[axis]
        image = np.moveaxis(sum(t * padded[i : i + n] for i, t in enumerate(taps)), 0, axis)
    return image.astype(np.float32)


@functools.cache
def background_templates():
    """Pictures as planes: plain [backgrounds,3,H,W], smoothed [backgrounds,blurs,3,H,W], coarse structure [backgrounds,3,H,W]."""
    plain = np.moveaxis(backgrounds(), -1, 1)
    with jax.ensure_compile_time_eval():  # also when first needed inside a trace
        smoothed = np.asarray(smooth(plain))
    blurred = np.stack([gaussian(smoothed, s, (2, 3)) for s in BLURS], 1)
    return plain, blurred, gaussian(smoothed, 10.0, (2, 3))


@functools.cache
def shape_templates():
    """Normalised masks [shapes, softness, GRID, GRID] (zero mean, unit norm) and areas in squared radii [shapes]."""
    r = 30.0
    with jax.ensure_compile_time_eval():
        masks = np.asarray(coverage(np.arange(len(SHAPES)), np.full((len(SHAPES), 2), 64.0), np.full(len(SHAPES), r))[0])
        areas = masks.sum((1, 2))
        rows = np.array([[gaussian(m, s * a**0.5, (0, 1)) for s in SOFTNESS] for m, a in zip(masks, areas)])
        canon = jax.vmap(jax.vmap(lambda m: normalise(m, *moments(m))))(jnp.asarray(rows))
        return np.asarray(unit(canon)), areas / r**2


@functools.cache
def fits(frames):
    """Ridge fits of constant, cos, sin at every trial period: design [G,T,3] and solver [G,3,T]."""
    angle = 2 * np.pi * (np.arange(frames) - (frames - 1) / 2) / TRIAL_PERIODS[:, None]
    design = np.stack([np.ones_like(angle), np.cos(angle), np.sin(angle)], -1)
    penalty = np.diag([0.0, 1.0, 1.0]) * RIDGE * frames
    solver = np.linalg.solve(design.swapaxes(1, 2) @ design + penalty, design.swapaxes(1, 2))
    return design.astype(np.float32), solver.astype(np.float32)


# ---- pictures ------------------------------------------------------------------------------------------------


def unit_frames(frames):
    """Frames [...,H,W,3] as float32 in [0,1]; uint8 or float in [-1,1]. Raises ``ConfigError`` for another size."""
    require(
        frames.shape[-3:] == (CANVAS, CANVAS, 3),
        f"frames of shape {tuple(frames.shape)} cannot be read: the reader wants [...,{CANVAS},{CANVAS},3]",
    )
    frames = jnp.asarray(frames)
    return frames.astype(jnp.float32) / 255 if frames.dtype == jnp.uint8 else jnp.clip((frames.astype(jnp.float32) + 1) / 2, 0, 1)


def taps(x, weights, axis):
    """Correlate along one axis with edge padding."""
    reach, n = len(weights) // 2, x.shape[axis]
    pad = [(0, 0)] * x.ndim
    pad[axis] = (reach, reach)
    padded = jnp.pad(x, pad, mode="edge")
    return sum(w * jax.lax.slice_in_dim(padded, i, i + n, axis=axis) for i, w in enumerate(weights))


def smooth(x):
    """Binomial blur (sigma 1 px) of [...,H,W]."""
    weights = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
    return taps(taps(x, weights, x.ndim - 2), weights, x.ndim - 1)


def box(m, size=5):
    """Mean over size x size pixels of [...,H,W]."""
    weights = (1 / size,) * size
    return taps(taps(m, weights, m.ndim - 2), weights, m.ndim - 1)


def moments(mask):
    """Area, centroid x, centroid y of [H,W]."""
    area = mask.sum() + 1e-6
    at = jnp.arange(CANVAS) + 0.5
    return area, (mask.sum(0) * at).sum() / area, (mask.sum(1) * at).sum() / area


def normalise(mask, area, x, y):
    """The mask on a GRID x GRID grid around its centroid, scaled by its area."""
    reach = EXTENT * jnp.sqrt(area) * ((jnp.arange(GRID) + 0.5) / GRID * 2 - 1)
    rows, columns = jnp.broadcast_arrays(y - 0.5 + reach[:, None], x - 0.5 + reach[None])
    return jax.scipy.ndimage.map_coordinates(mask, [rows, columns], 1)


def unit(m):
    """Zero mean and unit norm over the last two axes."""
    m = m - m.mean((-2, -1), keepdims=True)
    return m / (jnp.sqrt((m * m).sum((-2, -1), keepdims=True)) + 1e-6)
