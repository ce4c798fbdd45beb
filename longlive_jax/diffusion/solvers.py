"""Deterministic solvers of the probability flow: UniPC order 2 (bh2) and Euler (spec/model.md section 6.3, spec/inference.md section 1.3).

Both are one linear recurrence over what a step can see: the sample ``x``, the corrected sample ``y`` that entered the previous prediction, and
the estimates ``m``, ``m'``, ``m''`` of the clean sample at this step and the two before. Step ``i``, given the velocity at ``x``:

    m    = x - sigma_i v
    y    = corrector_i . (x, y, m, m', m'')
    x    = predictor_i . (y, m, m')

The coefficients are computed once, in float64, and are arrays of the solver; so a jitted sampler serves every solver and shift with the
same number of steps, and its loop may trace the step. State and arithmetic are float32 whatever the dtype of the latents.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.config import require
from longlive_jax.diffusion.flow import TIME_SCALE, shift_sigma

SIGMA_MAX = float(np.float32(0.999))  # of the grid before the shift: sampling starts just below pure noise


class State(NamedTuple):
    """What a solver carries between steps, float32. ``x`` is the sample to show the network; after the last step, the result.

    To hold given frames, replace ``x`` before and after a step: ``state._replace(x=...)``.
    """

    x: jax.Array
    history: tuple[jax.Array, jax.Array, jax.Array]  # y, m', m''


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Solver:
    """Tables of a solver for ``S`` steps; a pytree of arrays. Make one with ``unipc``, ``euler`` or ``make_solver``."""

    timesteps: jax.Array  # [S] float32, whole numbers: what the network sees
    sigmas: jax.Array  # [S + 1] float32, not truncated, ending in 0
    corrector: jax.Array  # [S, 5] of x, y, m, m', m''
    predictor: jax.Array  # [S, 3] of y, m, m'

    @property
    def steps(self):
        return self.timesteps.shape[0]

    def init(self, x):
        """The state that starts from noise ``x``, of any shape and floating dtype."""
        x = jnp.asarray(x, jnp.float32)
        zero = jnp.zeros_like(x)
        return State(x, (zero, zero, zero))

    def clean(self, state, i, velocity):
        """The estimate of the clean sample at step ``i``, float32."""
        return state.x - jnp.asarray(self.sigmas)[i] * velocity.astype(jnp.float32)

    def step(self, state, i, velocity):
        """The state after step ``i`` (0 .. S - 1, may be traced), from the network's ``velocity`` at ``state.x`` and ``timesteps[i]``."""
        m = self.clean(state, i, velocity)
        y, m1, m2 = state.history
        y = dot(jnp.asarray(self.corrector)[i], (state.x, y, m, m1, m2))
        return State(dot(jnp.asarray(self.predictor)[i], (y, m, m1)), (y, m, m1))


def dot(coefficients, arrays):
    return sum(coefficients[k] * x for k, x in enumerate(arrays))


def grid(steps, shift):
    """float32 sigmas ``[steps + 1]``, evenly spaced from ``SIGMA_MAX`` to 0 and shifted; timesteps ``[steps]``, truncated to whole numbers."""
    require(steps >= 1, f"solver steps={steps} must be at least 1")
    require(shift > 0, f"solver shift={shift} must be positive")
    sigmas = shift_sigma(np.linspace(SIGMA_MAX, 0, steps + 1), shift)
    return sigmas.astype(np.float32), np.trunc(TIME_SCALE * sigmas[:-1]).astype(np.float32)


def tables(sigmas, timesteps, corrector, predictor):
    return Solver(timesteps, sigmas, corrector.astype(np.float32), predictor.astype(np.float32))


def euler(steps, shift):
    """``x + (sigma_{i+1} - sigma_i) v``: straight steps on the grid that UniPC uses."""
    sigmas, timesteps = grid(steps, shift)
    ratio = sigmas[1:].astype(np.float64) / sigmas[:-1]
    corrector = np.zeros((steps, 5))
    corrector[:, 0] = 1
    return tables(sigmas, timesteps, corrector, np.stack([ratio, 1 - ratio, 0 * ratio], -1))


def unipc(steps, shift):
    """UniPC order 2 with the bh2 scale on clean-sample estimates: orders 1, 2, ..., 2, 1. The last step returns its estimate itself."""
    sigmas, timesteps = grid(steps, shift)
    s = sigmas.astype(np.float64)
    with np.errstate(divide="ignore"):
        lam = np.log(1 - s) - np.log(s)  # half the log of the signal-to-noise ratio; infinite at the end
    order = [min(2, steps - i, i + 1) for i in range(steps)]
    corrector, predictor = np.zeros((steps, 5)), np.zeros((steps, 3))
    corrector[0, 0] = 1
    for i in range(steps):
        if i > 0:
            corrector[i, 1:] = correct(s[i] / s[i - 1], lam[i] - lam[i - 1], lam[i - 2] - lam[i - 1], order[i - 1])
        predictor[i] = predict(s[i + 1] / s[i], lam[i + 1] - lam[i], lam[i - 1] - lam[i], order[i])
    return tables(sigmas, timesteps, corrector, predictor)


def predict(ratio, h, back, order):
    """Weights of (y, m, m') for a step of ``h`` in log-SNR; ``back`` (negative): the log-SNR of m' less that of m."""
    scale = 1 - ratio  # equals -alpha expm1(-h)
    slope = 0.5 * scale * h / back if order == 2 else 0.0
    return ratio, scale - slope, slope


def correct(ratio, h, back, order):
    """Weights of (y, m, m', m'') for redoing the step that led to m from m'; ``back``: the log-SNR of m'' less that of m'."""
    scale = 1 - ratio
    if order == 1:
        return ratio, 0.5 * scale, 0.5 * scale, 0.0
    r, e = back / h, np.expm1(-h)
    phi = e / -h - 1
    old, new = np.linalg.solve([[1, 1], [r, 1]], [phi / e, 2 * (phi / -h - 0.5) / e])
    return ratio, scale * new, scale * (1 - new - old / r), scale * old / r


SOLVERS = {"unipc": unipc, "euler": euler}


def make_solver(name, steps, shift):
    """The solver called ``name`` (``SamplerConfig.solver``)."""
    require(name in SOLVERS, f"solver {name!r} is not known; use one of {', '.join(SOLVERS)}")
    return SOLVERS[name](steps, shift)
