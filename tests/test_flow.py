"""The direction of time, the training table and its nearest lookup."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import ConfigError
from longlive_jax.diffusion.flow import TrainingSchedule, add_noise, shift_sigma, to_clean, velocity_target
from tests.shared import golden


@pytest.mark.parametrize("shift", [3.0, 5.0, 8.0])
def test_table_is_the_reference_table(shift):
    arrays, schedule = golden("flow_schedule.npz"), TrainingSchedule(shift)
    for name, ours in (("timesteps", schedule.timesteps), ("sigmas", schedule.sigmas), ("training_weights", schedule.weights)):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, arrays[f"shift{shift}/{name}"], rtol=1e-6, atol=1e-6)


def test_published_weights():
    schedule = TrainingSchedule(5.0)
    at = [0, 1, 5, 100, 250, 500, 750, 900, 990, 999]
    sigma = [1, 0.99979979, 0.99899596, 0.97826087, 0.9375, 0.83333331, 0.625, 0.35714287, 0.04807693, 0.00498008]
    weight = [0, 0.00128145, 0.00642739, 0.13907489, 0.39795166, 1.02486193, 1.91404259, 1.86534631, 0.30679592, 0.03187901]
    np.testing.assert_allclose(schedule.sigmas[at], sigma, rtol=1e-6)
    np.testing.assert_allclose(schedule.weights[at], weight, rtol=1e-6, atol=5e-7)  # published ones are rounded
    assert abs(schedule.weights.mean() - 1) < 1e-6 and schedule.weights.argmax() == 833


def test_every_entry_finds_itself_and_zero_finds_the_last():
    schedule = TrainingSchedule(5.0)
    assert (schedule.index(schedule.timesteps) == np.arange(1000)).all()
    t = jnp.array([[0.0, 1e9], [999.9, 4.98]])
    np.testing.assert_array_equal(jax.jit(schedule.index)(t), [[999, 0], [0, 999]])
    np.testing.assert_array_equal(schedule.sigma(t), schedule.sigmas[[[999, 0], [0, 999]]])
    np.testing.assert_array_equal(schedule.weight(t), schedule.weights[[[999, 0], [0, 999]]])


def test_equally_near_takes_the_noisier_entry():
    schedule = TrainingSchedule(1.0, steps=4)
    np.testing.assert_array_equal(schedule.timesteps, [1000, 750, 500, 250])
    np.testing.assert_array_equal(schedule.index([875.0, 625.0, 374.0]), [0, 1, 3])


def test_training_arrays_agree():
    arrays = golden("training.npz")
    t = arrays["ar_plain/timestep"]
    schedule = TrainingSchedule(5.0)
    noisy = add_noise(jnp.asarray(arrays["clean"]), jnp.asarray(arrays["noise"]), schedule.sigma(t))
    np.testing.assert_allclose(noisy, arrays["ar_plain/noisy"], atol=1e-6)
    np.testing.assert_allclose(velocity_target(arrays["clean"], arrays["noise"]), arrays["ar_plain/target"], atol=1e-6)
    np.testing.assert_allclose(schedule.weight(t), arrays["ar_plain/weights"], rtol=1e-5)
    clean = to_clean(jnp.asarray(arrays["ar_plain/noisy"]), jnp.asarray(arrays["ar_plain/flow_pred"]), schedule.sigma(t))
    np.testing.assert_allclose(clean, arrays["ar_plain/x0_pred"], atol=1e-6)


def test_ends_and_inverse():
    clean, noise = jax.random.normal(jax.random.key(0), (2, 2, 3, 4, 4, 5))
    sigma = jnp.array([[0.0, 1.0, 0.3], [0.6, 0.9, 0.01]])
    noisy = add_noise(clean, noise, sigma)
    np.testing.assert_array_equal(noisy[0, 0], clean[0, 0])
    np.testing.assert_array_equal(noisy[0, 1], noise[0, 1])
    np.testing.assert_allclose(to_clean(noisy, velocity_target(clean, noise), sigma), clean, atol=2e-6)
    assert shift_sigma(0.0, 5.0) == 0 and shift_sigma(1.0, 5.0) == 1 and shift_sigma(0.25, 1.0) == 0.25
    assert shift_sigma(0.5, 5.0) == pytest.approx(5 / 6)


def test_arithmetic_is_float32_and_noise_gives_the_dtype():
    clean, noise = jnp.full((1, 2), 1.0078125, jnp.bfloat16), jnp.full((1, 2), 0.00390625, jnp.bfloat16)
    assert add_noise(clean.astype(jnp.float32), noise, 0.5).dtype == jnp.bfloat16
    assert velocity_target(clean, noise).dtype == to_clean(noise, clean, 0.5).dtype == jnp.float32
    assert velocity_target(clean, noise)[0, 0] == 0.00390625 - 1.0078125  # bfloat16 would round it


def test_bad_schedules_are_refused():
    with pytest.raises(ConfigError, match=r"shift=0 must be positive"):
        TrainingSchedule(0)
    with pytest.raises(ConfigError, match=r"steps=1 must be at least 2"):
        TrainingSchedule(5.0, steps=1)
