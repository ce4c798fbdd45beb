"""The toy world's pixels: backgrounds as fixed pictures, shapes as signed distances; pure JAX, any leading axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.data.toywords import BACKGROUNDS, COLOURS

CANVAS = 128  # the world is this many units wide and high, whatever the number of pixels
PALETTE = np.array(list(COLOURS.values()), np.float32)  # [8,3] in [0,1]


# ---- backgrounds ---------------------------------------------------------------------------------------------------------------------------


def grid(height, width):
    """Centres of the pixels in world units: x [1,W], y [H,1]."""
    x = (np.arange(width, dtype=np.float32) + 0.5) * (CANVAS / width)
    y = (np.arange(height, dtype=np.float32) + 0.5) * (CANVAS / height)
    return x[None], y[:, None]


def step(d):
    """1 inside (d < 0), 0 outside, a ramp one unit wide between."""
    return np.clip(0.5 - d, 0, 1)[..., None]


def mix(a, b, weight):
    return np.asarray(a, np.float32) * (1 - weight) + np.asarray(b, np.float32) * weight


def studio(x, y):
    wall = mix((0.97, 0.97, 0.96), (0.88, 0.88, 0.89), np.clip(np.hypot(x - 64, y - 40) / 110, 0, 1)[..., None])
    floor = mix((0.76, 0.76, 0.78), (0.84, 0.84, 0.85), np.clip((y - 96) / 32, 0, 1)[..., None] + 0 * x[..., None])
    return mix(wall, floor, step(96 - y + 0 * x))


def night(x, y):
    sky = mix((0.03, 0.04, 0.13), (0.12, 0.13, 0.27), (y / CANVAS + 0 * x)[..., None])
    stars = [(14, 16), (42, 12), (70, 28), (104, 54), (18, 50), (48, 62), (78, 80), (114, 86), (14, 90), (42, 106), (74, 114), (106, 116)]
    for i, (sx, sy) in enumerate(stars):
        dx, dy = np.abs(x - sx), np.abs(y - sy)
        sparkle = (dx**0.8 + dy**0.8) ** 1.25 - (6.0 if i % 2 else 7.5)  # a plump four-pointed star
        sky = mix(sky, (0.88, 0.88, 0.78), step(0.75 * sparkle))
    moon = np.maximum(np.hypot(x - 102, y - 22) - 12, 8.5 - np.hypot(x - 96, y - 18))
    return mix(sky, (0.90, 0.89, 0.78), step(moon))


def checker(x, y):
    odd = (np.floor(x / 16) + np.floor(y / 16)) % 2
    return mix((0.49, 0.50, 0.53), (0.71, 0.72, 0.75), odd[..., None])


def stripes(x, y):
    t = (x + y) % 32
    return mix((0.83, 0.75, 0.62), (0.64, 0.55, 0.43), step(0.72 * (np.abs(t - 16) - 8)))


def meadow(x, y):
    sky = mix((0.60, 0.78, 0.95), (0.88, 0.94, 0.98), np.clip(y / 80, 0, 1)[..., None] + 0 * x[..., None])
    for cx, cy in ((28, 22), (98, 34)):
        puffs = [np.hypot(x - cx - dx, (y - cy - dy) * 1.15) - r for dx, dy, r in ((-11, 2, 8), (0, -2, 10), (12, 2, 8))]
        sky = mix(sky, (0.98, 0.98, 0.98), step(np.minimum.reduce(puffs)))
    far = 80 - 7 * np.sin(x / 17 + 0.8) - y
    near = 102 - 6 * np.sin(x / 21 + 3.2) - y
    return mix(mix(sky, (0.62, 0.72, 0.50), step(far)), (0.47, 0.58, 0.36), step(near))


def sunset(x, y):
    top, low = (0.24, 0.20, 0.36), (0.90, 0.70, 0.60)
    sky = mix(top, low, np.clip(y / 92, 0, 1)[..., None] ** 1.3 + 0 * x[..., None])
    sky = mix(sky, (0.99, 0.91, 0.76), step(np.hypot(x - 64, y - 86) - 22))
    sea = mix((0.36, 0.27, 0.38), (0.17, 0.15, 0.26), np.clip((y - 92) / 36, 0, 1)[..., None] + 0 * x[..., None])
    glint = np.maximum(np.abs(y - 104) - 3, np.abs(x - 64) - 16), np.maximum(np.abs(y - 116) - 3, np.abs(x - 64) - 9)
    sea = mix(sea, (0.80, 0.62, 0.52), step(np.minimum(*glint)))
    return mix(sky, sea, step(92 - y + 0 * x))


def bricks(x, y):
    row = np.floor(y / 16)
    bx, by = (x + 16 * (row % 2)) % 32, y % 16 + 0 * x
    inside = np.maximum(np.abs(bx - 16) - 13.5, np.abs(by - 8) - 5.5)
    tint = 0.06 * ((np.floor((x + 16 * (row % 2)) / 32) * 2 + row * 3) % 5 / 4 - 0.5)
    wall = np.stack([0.52 + tint, 0.34 + tint, 0.29 + tint], -1)
    return mix((0.76, 0.73, 0.68), wall, step(inside))


def mountains(x, y):
    sky = mix((0.66, 0.75, 0.84), (0.90, 0.92, 0.93), np.clip(y / 90, 0, 1)[..., None] + 0 * x[..., None])
    for px, py in ((30, 34), (92, 20)):
        slope = (1.15 * np.abs(x - px) - (y - py)) * 0.65
        sky = mix(sky, (0.50, 0.55, 0.63), step(slope))
        cap = np.maximum(slope, (y - py - 20 - 4 * np.cos((x - px) * 0.42)) * 0.8)
        sky = mix(sky, (0.96, 0.97, 0.98), step(cap))
    return mix(sky, (0.35, 0.39, 0.46), step(100 - 6 * np.sin(x / 14 + 1.0) - y))


PAINTERS = {
    "studio": studio,
    "night": night,
    "checker": checker,
    "stripes": stripes,
    "meadow": meadow,
    "sunset": sunset,
    "bricks": bricks,
    "mountains": mountains,
}


@functools.cache
def backgrounds(height=CANVAS, width=CANVAS):
    """All background pictures, float32 [backgrounds,H,W,3] in [0,1], averaged over 3x3 points a pixel."""
    x, y = grid(3 * height, 3 * width)
    fine = np.stack([np.clip(PAINTERS[name](x, y), 0, 1) for name in BACKGROUNDS])
    return fine.reshape(len(BACKGROUNDS), height, 3, width, 3, 3).mean((2, 4)).astype(np.float32)


# ---- shapes --------------------------------------------------------------------------------------------------------------------------------


def distances(x, y):
    """Signed distances in radii to the outlines of all shapes, in the order of ``SHAPES``; y points down."""
    ax, ay, r = jnp.abs(x), jnp.abs(y), jnp.hypot(x, y)
    circle = r - 0.95
    square = jnp.maximum(ax, ay) - 0.82
    triangle = jnp.maximum(y - 0.66, 0.868 * ax - 0.496 * y - 0.545)
    tip, inner, half = 1.12, 0.56, np.pi / 5
    along, across = -y, ax  # folded by mirrors into the sector of the upper tip, half of 36 degrees
    for mirror in (np.cos(half), -np.cos(half)):
        over = 2 * jnp.maximum(mirror * across - np.sin(half) * along, 0)
        along, across = along + np.sin(half) * over, across - mirror * over
    across = jnp.abs(across)
    ix, iy = inner * np.cos(half), inner * np.sin(half)
    star = (iy * (along - tip) + (tip - ix) * across) / np.hypot(tip - ix, iy)
    cross = jnp.minimum(jnp.maximum(ax - 0.33, ay - 1.0), jnp.maximum(ax - 1.0, ay - 0.33))
    ring = jnp.abs(r - 0.74) - 0.26
    return circle, square, triangle, star, cross, ring


def coverage(shape, centre, radius, height=CANVAS, width=CANVAS):
    """How much of each pixel an object covers, [...,H,W] in [0,1], and its coordinates in radii u, v [...,H,W].

    ``shape`` [...] index, ``centre`` [...,2] and ``radius`` [...] in world units.
    """
    x, y = grid(height, width)
    r = radius[..., None, None]
    u, v = (x - centre[..., 0, None, None]) / r, (y - centre[..., 1, None, None]) / r
    s = shape[..., None, None]
    options = distances(u, v)
    d = jnp.select([s == i for i in range(len(options))], options)
    pixel = CANVAS / min(height, width)
    return jnp.clip(0.5 - d * r / pixel, 0, 1), u, v


def shade(rgb, u, v):
    """Light from the upper left: [...,H,W,3] from rgb [...,3]."""
    light = jnp.clip(-(0.55 * u + 0.85 * v), -1, 1)[..., None]
    rgb = rgb[..., None, None, :]
    return rgb * (1 - 0.17 * jnp.maximum(-light, 0)) + (1 - rgb) * 0.20 * jnp.maximum(light, 0)


def render(arrays, height=CANVAS, width=CANVAS):
    """Pixel frames [...,P,H,W,3] in [-1,1] from ``device_arrays`` [...,P,...] (a whole clip, or any slice of its frames).

    The result and the gathered background take 2 x 37 MB a clip of 189 frames at 128 x 128; ``render_batch`` holds one clip at a time.
    """
    pictures = jnp.asarray(backgrounds(height, width))
    blend = arrays["blend"][..., None, None, None]
    image = pictures[arrays["background"][..., 0]] * (1 - blend) + pictures[arrays["background"][..., 1]] * blend
    for i in range(arrays["shape"].shape[-1]):
        cover, u, v = coverage(arrays["shape"][..., i], arrays["centre"][..., i, :], arrays["radius"][..., i], height, width)
        cover = (cover * arrays["presence"][..., i, None, None])[..., None]
        image = image * (1 - cover) + cover * shade(arrays["rgb"][..., i, :], u, v)
    return 2 * image - 1


def render_batch(arrays, height=CANVAS, width=CANVAS):
    """``render`` for arrays with a leading clip axis [N,P,...], one clip after another: [N,P,H,W,3]."""
    return jax.lax.map(functools.partial(render, height=height, width=width), arrays)
