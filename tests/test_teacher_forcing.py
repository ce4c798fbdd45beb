"""The AR objective against the public source (golden/training.npz): predictions, losses and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.convert.table import export
from longlive_jax.convert.wan import TRANSFORMER_TABLE
from longlive_jax.diffusion.flow import TrainingSchedule
from longlive_jax.diffusion.teacher_forcing import corrupt, loss_of, noisy_rows, predict
from longlive_jax.tree import flat_params
from tests.golden_models import channels_last, meta_of, transformer
from tests.shared import golden

IMPLEMENTATIONS = ("reference", "xla")
VARIANTS = ("plain", "mask", "i2v", "errors", "noise_aug")


@pytest.fixture(scope="module")
def arrays():
    return golden("training.npz")


@pytest.fixture(scope="module")
def models(arrays):
    return {name: transformer(arrays, meta_of(arrays), attention=name) for name in IMPLEMENTATIONS}


def close(actual, expected, message=""):
    """Within 1e-4 of the largest value of the array, the file's own tolerance."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=message)


def per_frame(x):
    """``[B,chunks,f,C,h,w]`` as ``[B,F,h,w,C]``."""
    return channels_last(np.asarray(x).reshape(x.shape[0], -1, *x.shape[3:]))


def corruption(arrays, variant, meta):
    schedule, n = TrainingSchedule(meta["timestep_shift"]), meta["frames_per_block"]
    table = lambda values, index: jnp.asarray(np.repeat(np.asarray(values)[index], n, axis=1))
    clean, noise = channels_last(arrays["clean"]), channels_last(arrays["noise"])
    index, given = arrays["timestep_index"], None
    if variant == "i2v":
        given = jnp.arange(clean.shape[1]) == 0
    options = {}
    if variant == "mask":
        options["mask"] = jnp.asarray(arrays["ar_mask/mask"])
    if variant == "errors":
        options["errors"] = (per_frame(arrays["ar_errors/error_latent"]), per_frame(arrays["ar_errors/error_noise"]))
        options["history"] = clean + per_frame(arrays["ar_errors/error_context"])
    if variant == "noise_aug":
        s = table(schedule.sigmas, arrays["ar_noise_aug/aug_index"])[..., None, None, None]
        options |= {"history": (1 - s) * clean + s * noise, "history_t": table(schedule.timesteps, arrays["ar_noise_aug/aug_index"])}
    sigma, t, weight = (table(v, index) for v in (schedule.sigmas, schedule.timesteps, schedule.weights))
    return corrupt(clean, noise, sigma, t, weight=weight, given=given, **options)


@functools.partial(jax.jit, static_argnames=("chunk", "shards"))
def gradients(model, step, text, chunk, shards):
    """``(loss, velocity), gradients``. The variants differ in the step alone: they share a program."""

    def objective(model):
        v, frames = predict(model, step, model.read(text), chunk=chunk, shards=shards)
        return loss_of(v, frames, step, shards)[0], v

    return jax.value_and_grad(objective, has_aux=True)(model)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_objective(arrays, models, variant, implementation, shards):
    meta = meta_of(arrays)
    step = corruption(arrays, variant, meta)
    text = jnp.asarray(arrays["prompt_embeds"]).reshape(meta["batch"], meta["chunks"], *arrays["prompt_embeds"].shape[1:])
    key = lambda name: arrays[f"ar_{variant}/{name}"]
    for mine, theirs in ((step.noisy, "noisy"), (step.clean, "context_clean"), (step.target, "target")):
        close(mine, channels_last(key(theirs)), theirs)
    np.testing.assert_allclose(step.t, key("timestep"), rtol=1e-6)

    (loss, v), grads = gradients(models[implementation], step, text, meta["frames_per_block"], shards)
    close(noisy_rows(v, shards), channels_last(key("flow_pred")), "flow")
    close(loss, key("loss"), "loss")
    names = {str(n): g for n, g in zip(arrays["param_names"], key("grad_norms"))}
    shapes = {k.removeprefix("weights/"): a.shape for k, a in arrays.items() if k.startswith("weights/")}
    mine = export(TRANSFORMER_TABLE, {k: np.asarray(g) for k, g in flat_params(grads).items()}, shapes)
    for name, norm in names.items():
        np.testing.assert_allclose(np.linalg.norm(mine[name]), norm, rtol=1e-3, atol=1e-6, err_msg=name)
        if f"ar_{variant}/grad/{name}" in arrays:
            close(mine[name], arrays[f"ar_{variant}/grad/{name}"], name)
