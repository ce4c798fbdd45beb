"""Flow matching, the direction of time stated once: sigma 1 is noise, sigma 0 is data, and t = 1000 sigma is what the network sees.

    x_t = (1 - sigma) x_0 + sigma eps        v = eps - x_0        x_0 = x_t - sigma v

``x_0`` is called clean, ``eps`` noise, ``x_t`` noisy, ``v`` velocity. Arithmetic is float32 whatever the dtype of the arguments. A sigma of
shape ``[B]`` or ``[B, F]`` belongs to the leading axes of an array ``[B, F, h, w, C]``.
"""

import functools
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from longlive_jax.config import require

TIME_SCALE = 1000.0  # t = TIME_SCALE sigma


def shift_sigma(u, shift):
    """Warp ``u`` in 0..1 towards noise: ``shift u / (1 + (shift - 1) u)``. Both ends stay; shift 1 changes nothing."""
    return shift * u / (1 + (shift - 1) * u)


def widen(sigma, x):
    """``sigma`` as float32 with trailing unit axes, to multiply ``x``."""
    sigma = jnp.asarray(sigma, jnp.float32)
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))


def add_noise(clean, noise, sigma):
    """``x_t`` in the dtype of ``noise``."""
    s = widen(sigma, noise)
    return ((1 - s) * clean.astype(jnp.float32) + s * noise.astype(jnp.float32)).astype(noise.dtype)


def velocity_target(clean, noise):
    """``v``, float32: what the network is trained to predict."""
    return noise.astype(jnp.float32) - clean.astype(jnp.float32)


def to_clean(noisy, velocity, sigma):
    """The estimate of ``x_0``, float32."""
    return noisy.astype(jnp.float32) - widen(sigma, noisy) * velocity.astype(jnp.float32)


@dataclass(frozen=True)
class TrainingSchedule:
    """The table of noise levels that training draws from (spec/model.md section 6.1): ``steps`` entries, noisiest first.

    ``u = 1, 1 - 1/steps, ...``, shifted. Sigma never reaches 0, so a timestep of 0 has the sigma and the weight of the last entry.
    """

    shift: float
    steps: int = 1000

    def __post_init__(self):
        require(self.shift > 0, f"schedule.shift={self.shift} must be positive")
        require(self.steps > 1, f"schedule.steps={self.steps} must be at least 2")

    @functools.cached_property
    def sigmas(self):
        """float32 ``[steps]``, descending from 1."""
        u = 1 - np.arange(self.steps) / self.steps
        return shift_sigma(u, self.shift).astype(np.float32)

    @functools.cached_property
    def timesteps(self):
        """float32 ``[steps]``, descending from 1000."""
        return self.sigmas * np.float32(TIME_SCALE)

    @functools.cached_property
    def weights(self):
        """float32 ``[steps]``: loss weights, a bell around t = 500 less its minimum, with mean 1."""
        y = np.exp(-2 * ((self.timesteps.astype(np.float64) - TIME_SCALE / 2) / TIME_SCALE) ** 2)
        y -= y.min()
        return (y * self.steps / y.sum()).astype(np.float32)

    def index(self, t):
        """The entry nearest to each timestep ``t [...]`` -> int ``[...]``; of two equally near, the noisier."""
        t = jnp.asarray(t, jnp.float32)
        return jnp.argmin(jnp.abs(self.timesteps - t[..., None]), -1)

    def sigma(self, t):
        """Sigma of the entry nearest to each timestep."""
        return jnp.asarray(self.sigmas)[self.index(t)]

    def weight(self, t):
        """Loss weight of the entry nearest to each timestep."""
        return jnp.asarray(self.weights)[self.index(t)]
