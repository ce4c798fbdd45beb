"""The AR objective against the public source (golden/training.npz): predictions, losses and gradients; rebuilt histories against streaming."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.convert.table import export
from longlive_jax.convert.wan import TRANSFORMER_TABLE
from longlive_jax.diffusion.flow import TrainingSchedule
from longlive_jax.diffusion.rollout import place
from longlive_jax.diffusion.teacher_forcing import corrupt, loss_of, noisy_rows, predict, rebuilt
from longlive_jax.model.frames import teacher_forcing, window
from longlive_jax.model.memory import make_room
from longlive_jax.model.transformer import stack_blocks
from longlive_jax.tree import flat_params
from tests.golden_models import channels_last, meta_of, transformer
from tests.shared import golden
from tests.test_sampling_modes import CHUNK, SINKS, model, normal, session

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


# ---- histories that a change of the prompt rebuilds ------------------------------------------------------------------------------------------


def test_a_rebuilt_history_reads_the_last_prompt_of_its_shot():
    cut = np.array([[0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]], bool)
    change = np.array([[0, 0, 1, 0, 0], [0, 1, 0, 0, 1], [0, 0, 1, 0, 0], [0, 1, 0, 1, 0]], bool)
    rows = [[2, 2, 2, 3, 4], [1, 1, 4, 4, 4], [0, 2, 2, 3, 4], [3, 3, 3, 3, 4]]
    np.testing.assert_array_equal(rebuilt(change, cut), rows)
    np.testing.assert_array_equal(rebuilt(change & False, cut), np.tile(np.arange(5), (4, 1)))


@functools.partial(jax.jit, static_argnames="stream")
def streamed(transformer, stream, state, z, t, text, cut):
    """Velocity of a stream's next chunk ``z [B,F,h,w,C]`` at times ``t [B,F]``."""
    index, frames, _ = place(stream, state, cut, *t.shape)
    memory, slots = make_room(state.memory, index)
    return transformer(z, t, text, frames, memory=memory, slots=slots)[0]


@pytest.mark.slow
def test_a_rebuilt_history_is_that_of_a_stream_after_recache():
    """A prompt changes at chunk 3: of a video without a cut, of two with one before it; the last video's does not, and nothing is rebuilt."""
    samples, chunks, at = 4, 5, 3
    cut, change = np.zeros((samples, chunks), bool), np.zeros((samples, chunks), bool)
    cut[1, 1] = cut[2, 2] = change[:3, at] = True
    rows = np.repeat([[0, 1, 2, 3, 4]], samples, 0)  # one prompt a chunk, reworded each time
    s = session(recache=True, **SINKS["global + shot"])
    stream, config = s.experiment.stream, s.experiment.transformer
    prompts = jnp.asarray(normal(0, samples, chunks, config.text_len, config.text_dim))
    frames = samples, chunks * CHUNK, *s.experiment.grid, config.channels
    clean, noise = (jnp.asarray(normal(seed, *frames)) for seed in (1, 2))
    t = np.repeat(np.linspace(900, 100, chunks), CHUNK) + np.zeros((samples, 1))
    step = corrupt(clean, noise, jnp.asarray(t / 1000, jnp.float32), jnp.asarray(t, jnp.float32))
    shot = np.repeat(np.cumsum(cut, 1), CHUNK, 1)
    time = jnp.asarray(np.arange(chunks * CHUNK) + stream.shot_offset * shot, jnp.float32)
    visible = teacher_forcing & window(stream.window // CHUNK, stream.sink // CHUNK)

    def forced(past, transformer, **more):
        options = dict(chunk=CHUNK, time=time, past=jnp.repeat(past, CHUNK, axis=1), visible=visible, **more)
        v = jax.jit(lambda model: predict(model, step, model.read(prompts), **options)[0])(transformer)
        return np.split(np.asarray(noisy_rows(v, more.get("shards", 1))), chunks, 1)

    expected, plain = forced(rebuilt(change, cut), model(2)), forced(jnp.asarray(rows), model(2))
    scanned = forced(rebuilt(change, cut), stack_blocks(model(2)), shards=4, remat=True)
    np.testing.assert_allclose(scanned, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    z, state = jnp.split(clean, chunks, 1), s.start(0, samples)
    for c in range(chunks):
        text = s.read_embeddings(prompts[:, c])
        if c == at:
            state = s.recache(state, text, changed=change[:, at])
        kept = np.arange(samples) if c <= at else np.array([0, 3])  # the others' shot sink takes the slot of a chunk that training sees
        if c in (0, at, at + 1):
            v = streamed(model(2), stream, state, step.noisy[:, c * CHUNK :][:, :CHUNK], step.t[:, c * CHUNK :][:, :CHUNK], text, cut[:, c])
            want = expected[c]
            np.testing.assert_allclose(v[kept], want[kept], rtol=0, atol=1e-5 * np.abs(want).max())
        state = s.remember(state, z[c], text, cut=cut[:, c])
    apart = np.abs(expected[at] - plain[at]).max((1, 2, 3, 4))
    assert (apart[:3] > 1e-2).all() and apart[3] == 0
