"""Three-axis rotary positions from frame times, at any length: no table and no end.

Head dimension Dh splits into Dh/2 adjacent pairs: time gets Dh/2 - 2 (Dh//6) of them, height and width Dh//6 each
(spec/model.md §1.5). Pair i of an axis with n pairs turns by ``position * 10000**(-i/n)`` radians.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

THETA = 10000.0
DIGIT = 128  # times are read as base-128 numbers, so that an angle is as exact at hour 20 as at second 0
DIGITS = 4


def pairs(head_dim):
    """Rotary pairs of time, height and width."""
    side = head_dim // 6
    return head_dim // 2 - 2 * side, side, side


def frequencies(n):
    """Radians per unit of position, float64 ``[n]``."""
    return THETA ** (-np.arange(n) / n)


def turn(position: Float[Array, "..."], radians: np.ndarray) -> Float[Array, "... n"]:
    """Angle ``position * radians`` modulo a full turn, in float32 radians within about 1e-6 for any |position| < 128**4.

    Each base-128 digit of the integer part meets a per-digit frequency reduced modulo one turn in float64 on the host, in two parts: a
    12-bit one whose product is exact in float32, and the rest.
    """
    whole = jnp.floor(position)
    turns = (position - whole)[..., None] * jnp.asarray(radians / (2 * np.pi), jnp.float32)
    for k in range(DIGITS):
        digit = jnp.mod(jnp.floor(whole / float(DIGIT**k)), DIGIT)[..., None]
        rate = np.mod(radians / (2 * np.pi) * float(DIGIT**k), 1.0)
        coarse = np.round(rate * 4096) / 4096
        exact = digit * jnp.asarray(coarse, jnp.float32)
        turns = turns + (exact - jnp.floor(exact)) + digit * jnp.asarray(rate - coarse, jnp.float32)
    return (turns - jnp.round(turns)) * (2 * np.pi)


def sinusoid(t: Float[Array, "B F"], width: int) -> Float[Array, "B F {width}"]:
    """Timestep embedding: cosines, then sines (spec/model.md §1.2)."""
    angle = turn(t, frequencies(width // 2))
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


def rotation(time: Float[Array, "B F"], grid: tuple[int, int], head_dim: int):
    """Cosine and sine ``[B,F,T,Dh/2]`` of every token; rows, then columns, width fastest."""
    n_time, n_height, n_width = pairs(head_dim)
    rows, columns = (g.reshape(-1) for g in np.mgrid[: grid[0], : grid[1]])
    space = np.concatenate([rows[:, None] * frequencies(n_height), columns[:, None] * frequencies(n_width)], 1)
    angle_time = turn(time, frequencies(n_time))[:, :, None]
    join = lambda f, g: jnp.concatenate(
        [
            jnp.broadcast_to(f(angle_time), (*time.shape, len(rows), n_time)),
            jnp.broadcast_to(jnp.asarray(g(space), jnp.float32), (*time.shape, len(rows), n_height + n_width)),
        ],
        -1,
    )
    return join(jnp.cos, np.cos), join(jnp.sin, np.sin)


def rotate(x: Float[Array, "B F T N Dh"], cos, sin) -> Float[Array, "B F T N Dh"]:
    """Rotate adjacent pairs in float32, rounding once; elementwise, so that a compiler fuses what follows, a rounding to E4M3 or a write."""
    sides = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    c, s = cos[..., None, :, None], sin[..., None, :, None] * jnp.array([-1.0, 1.0])
    return (sides * c + jnp.flip(sides, -1) * s).reshape(x.shape).astype(x.dtype)
