"""UniPC and Euler against the reference trajectories, closed forms and the exact solution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import ConfigError
from longlive_jax.diffusion.solvers import euler, make_solver, unipc
from tests.shared import golden


@jax.jit
def trajectory(solver, x, a):
    """All samples ``[S, ...]`` in the reference's velocity field, by a scan with a traced step."""

    def body(state, i):
        state = solver.step(state, i, jnp.tanh(0.7 * state.x + a) * (0.5 + solver.timesteps[i] / 1000))
        return state, state.x

    return jax.lax.scan(body, solver.init(x), jnp.arange(solver.steps))[1]


def with_velocities(solver, x, velocities):
    state, out = solver.init(jnp.float32(x)), []
    for i, v in enumerate(velocities):
        state = solver.step(state, i, jnp.float32(v))
        out.append(float(state.x))
    return out


@pytest.mark.parametrize("steps", [2, 3, 4, 8, 20, 50])
def test_unipc_follows_the_reference(steps):
    arrays = golden("unipc.npz")
    for shift in (1.0, 3.0, 5.0):
        timesteps, sigmas, x, a, expected = (arrays[f"s{steps}_{shift}/{k}"] for k in ("timesteps", "sigmas", "x0", "a", "trajectory"))
        solver = unipc(steps, shift)
        np.testing.assert_array_equal(solver.timesteps, timesteps)
        np.testing.assert_allclose(solver.sigmas, sigmas, rtol=1e-7)
        assert np.abs(trajectory(solver, x, a) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_published_scalars():
    np.testing.assert_allclose(
        with_velocities(unipc(4, 5.0), 1, [0.3, -0.2, 0.5, 0.1]), [0.98123968, 1.02002347, 0.81501228, 0.75254357], rtol=1e-6
    )
    np.testing.assert_allclose(with_velocities(unipc(2, 5.0), 1, [0.3, -0.2]), [0.94997668, 1.11658776], rtol=1e-6)


def test_published_coefficients():
    solver = unipc(4, 5.0)
    np.testing.assert_allclose(solver.sigmas, [0.9997998476, 0.9372654557, 0.8330553770, 0.6246873736, 0], rtol=1e-7)
    np.testing.assert_array_equal(solver.timesteps, [999, 937, 833, 624])
    ratio, scale, r, rho = 0.888814766, 0.111185234, -5.300100668, (0.0259391, 0.5636649)
    expected = [0, ratio, scale * rho[1], scale * (1 - rho[1] - rho[0] / r), scale * rho[0] / r]
    np.testing.assert_allclose(solver.corrector[2], expected, rtol=1e-5)
    ratio, scale, r = 0.749874967, 0.250125033, -0.998788973
    np.testing.assert_allclose(solver.predictor[2], [ratio, scale * (1 - 0.5 / r), scale * 0.5 / r], rtol=1e-6)
    np.testing.assert_array_equal(solver.corrector[0], [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(solver.predictor[3], [0, 1, 0])


@pytest.mark.parametrize("name", ["unipc", "euler"])
@pytest.mark.parametrize("steps", [1, 2, 4, 9])
def test_the_result_is_the_last_estimate(name, steps):
    solver = make_solver(name, steps, 5.0)
    state = solver.init(jax.random.normal(jax.random.key(0), (3, 4)))
    for i in range(steps):
        v = jax.random.normal(jax.random.key(i + 1), (3, 4))
        x, clean = state.x, solver.clean(state, i, v)
        state = solver.step(state, i, v)
    np.testing.assert_array_equal(state.x, clean)
    np.testing.assert_allclose(clean, x - solver.sigmas[steps - 1] * v, rtol=1e-6)


def test_euler_takes_straight_steps_and_two_step_unipc_is_euler():
    solver, v = euler(5, 3.0), [0.3, -0.2, 0.5, 0.1, 0.7]
    np.testing.assert_allclose(with_velocities(solver, 1, v), 1 + np.cumsum(np.diff(solver.sigmas) * v), rtol=1e-6)
    np.testing.assert_array_equal(solver.timesteps, unipc(5, 3.0).timesteps)
    np.testing.assert_allclose(with_velocities(euler(2, 5.0), 1, v[:2]), with_velocities(unipc(2, 5.0), 1, v[:2]), rtol=1e-6)


def test_unipc_is_more_accurate_than_euler():
    # Data N(0, 0.5^2): v = x (sigma - (1 - sigma) 0.25) / ((1 - sigma)^2 0.25 + sigma^2), solved exactly by x_t ~ its standard deviation.
    def deviation(s):
        return np.sqrt((1 - s) ** 2 * 0.25 + s**2)

    def error(solver):
        state = solver.init(jnp.float32(deviation(float(solver.sigmas[0]))))
        for i, s in enumerate(solver.sigmas):
            if s < 0.5:  # beyond, the last step of order one would hide the difference
                return abs(float(state.x) - deviation(s))
            state = solver.step(state, i, state.x * (s - (1 - s) * 0.25) / deviation(s) ** 2)

    assert error(unipc(16, 3.0)) < 0.1 * error(euler(16, 3.0)) < 0.001
    assert error(unipc(32, 3.0)) < error(unipc(16, 3.0)) / 6  # of order three with its corrector


def test_one_program_for_every_solver_of_one_length():
    traces = []

    @jax.jit
    def run(solver, x):
        traces.append(1)
        return jax.lax.fori_loop(0, solver.steps, lambda i, s: solver.step(s, i, jnp.sin(s.x)), solver.init(x)).x

    x = jnp.linspace(-1, 1, 6)
    a, b, c = run(unipc(4, 5.0), x), run(unipc(4, 3.0), x), run(euler(4, 5.0), x)
    assert len(traces) == 1 and not np.allclose(a, b) and not np.allclose(a, c)


def test_narrow_latents_are_solved_in_float32():
    solver = unipc(4, 5.0)
    x = jnp.ones((2,), jnp.bfloat16)
    state = solver.init(x)
    for i in range(4):
        state = solver.step(state, i, jnp.full((2,), 0.1, jnp.bfloat16))
    v = np.float32(jnp.bfloat16(0.1))
    assert state.x.dtype == jnp.float32
    np.testing.assert_allclose(state.x, 1 - v * solver.sigmas[0], rtol=1e-6)  # a constant velocity is a straight line


def test_replacing_the_sample_between_steps():
    solver = unipc(3, 5.0)
    state = solver.init(jnp.zeros(2))
    for i in range(3):
        state = state._replace(x=state.x.at[0].set(7.0))
        state = solver.step(state, i, jnp.array([0.0, 0.2]))
    assert state.x[0] == 7.0 and state.x[1] == pytest.approx(-0.2 * float(solver.sigmas[0]), rel=1e-5)


def test_bad_solvers_are_refused():
    with pytest.raises(ConfigError, match=r"'heun' is not known; use one of unipc, euler"):
        make_solver("heun", 4, 5.0)
    with pytest.raises(ConfigError, match="steps=0 must be at least 1"):
        unipc(0, 5.0)
    with pytest.raises(ConfigError, match="shift=-1 must be positive"):
        euler(4, -1)
