"""Train the video VAE on short clips of the toy world; see configs/toy.py for the command.

Writes ``metrics.jsonl``, ``checkpoints/``, pictures (truth above reconstruction) and, when it stops, ``bundle/``: the averaged weights with the
latents' mean and standard deviation measured. Running the same command again resumes.
"""

import functools
import itertools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import config_flags

from longlive_jax.checkpoint import Checkpoints, Deadline, abstract_part, check_config, load_parts, save_bundle
from longlive_jax.config import from_config_dict, replace, require
from longlive_jax.config_train import WATCHING, VAERun, flat_config
from longlive_jax.data.pipeline import batches, short_clips
from longlive_jax.data.toyworld import render
from longlive_jax.metrics import MetricsWriter, Progress, finite_or_raise, provenance
from longlive_jax.model.vae import VAE, to_uint8
from longlive_jax.sharding import REPLICATE, REPLICATED_RULES, make_mesh, weight_shardings
from longlive_jax.state import init_state, make_optimizer, next_state, state_shardings, with_shardings
from longlive_jax.streaming.pictures import contact_sheet
from longlive_jax.tree import cast, flat_params, with_params

HELD_OUT, EVAL_BATCHES, SHOWN = 1 << 30, 16, 4  # first evaluation batch; batches evaluated; clips in a picture


def main(_):
    logging.set_verbosity(logging.WARNING)
    run = from_config_dict(VAERun, flags.FLAGS.config)
    with Deadline(run.train.stop_after_minutes) as deadline:
        train(run, pathlib.Path(flags.FLAGS.workdir), deadline)


def train(run, workdir, deadline):
    # ---- mesh, model, data
    mesh = make_mesh(run.experiment.mesh.data)
    vae = abstract_part("vae", run.experiment.vae)
    weights = {"vae": weight_shardings({k: x.shape for k, x in flat_params(vae).items()}, REPLICATED_RULES, REPLICATE, mesh)}
    clips = short_clips(run.experiment, run.data)
    by_clip = NamedSharding(mesh, P("data"))
    feed = lambda start: (jax.device_put(b, by_clip) for b in batches(clips, run.train.batch, start, run.data.workers))

    # ---- state and step
    optimizer = make_optimizer(run.optimizer)
    like = jax.eval_shape(lambda: init_state(initial_params(run.experiment), optimizer))
    shardings = state_shardings(like, weights, mesh)
    step = make_step(run, vae, optimizer, shardings)
    evaluate = make_evaluate(run, vae)

    fresh = jax.jit(functools.partial(init_state, optimizer=optimizer), out_shardings=shardings)

    with Checkpoints(workdir / "checkpoints", run.train.keep) as checkpoints, jax.set_mesh(mesh):
        # ---- start or resume
        if checkpoints.latest() is None:
            params = initial_params(run.experiment, run.init)
            total = run.train.steps or measured(run.train.minutes, step, fresh(params), feed(0))
            state, record = fresh(params), {"config": flat_config(run), "total": total}
            checkpoints.save(0, state, record)
        else:
            record = checkpoints.record()
            check_config(flat_config(run), record["config"], WATCHING, f"checkpoint in {str(workdir)!r}")
            state, total = checkpoints.restore(with_shardings(like, shardings)), record["total"]

        # ---- loop
        start, length, window = int(state.step), jnp.float32(total), []
        with MetricsWriter(workdir / "metrics.jsonl") as metrics, Progress(max(1, total - start), "vae") as progress:
            for i, batch in zip(range(start + 1, total + 1), feed(start)):
                state, values = step(state, batch, length)
                window.append(values)
                progress.update(1)
                stop = deadline.over() or i == total
                save, show = stop or i % run.train.checkpoint_every == 0, run.train.sample_every and i % run.train.sample_every == 0
                if save or show or i % run.train.log_every == 0:
                    values = {name: float(np.mean([v[name] for v in jax.device_get(window)])) for name in window[0]}
                    finite_or_raise(values, i)
                    metrics.write(i, {**values, "steps_per_second": progress.rate})
                    window = []
                if show:
                    picture(evaluate, state.ema["vae"], feed(HELD_OUT), workdir / f"step_{i:06}.png")
                if save:
                    checkpoints.save(i, state, record)
                if stop:
                    break

            # ---- export
            mean, std, psnr = statistics(evaluate, state.ema["vae"], feed(HELD_OUT))
            metrics.write(int(state.step), {"psnr": psnr})
            picture(evaluate, state.ema["vae"], feed(HELD_OUT), workdir / "final.png")
        experiment = replace(run.experiment, vae=replace(run.experiment.vae, mean=mean, std=std))
        about = {"steps": int(state.step), "of": total, "psnr": psnr, "config": flat_config(run), "made_with": provenance()}
        about["left_behind"] = "optimizer state and float32 masters; the weights are their exponential average"
        save_bundle(workdir / "bundle", experiment, {"vae": state.ema["vae"]}, about)
    print(json.dumps({"done": int(state.step) == total, "step": int(state.step), "of": total, "psnr": psnr, "why": deadline.reason}))


def initial_params(experiment, bundle=""):
    """What is trained: random weights, or those of a ``bundle`` of the same sizes."""
    if not bundle:
        return random_params(experiment)
    source, vae = load_parts(bundle, ("vae",), dtype="float32")
    bare = replace(source.vae, mean=experiment.vae.mean, std=experiment.vae.std)
    require(bare == experiment.vae, f"init={bundle!r} holds a VAE of other sizes than this run's; use its sizes, or random weights: init=''")
    return {"vae": flat_params(vae)}


@functools.partial(jax.jit, static_argnums=0)
def random_params(experiment):
    """Random weights. Of the random number generators this one compiles fastest."""
    return {"vae": flat_params(VAE(experiment.vae, rngs=nnx.Rngs(jax.random.key(experiment.seed, impl="unsafe_rbg"))))}


def make_step(run, vae, optimizer, shardings):
    """``step(state, batch, total)``: the next state and what to report."""
    size, dtype = (run.experiment.video.height, run.experiment.video.width), jnp.dtype(run.train.dtype)

    def objective(params, video, key):
        model = with_params(vae, cast(params["vae"], dtype))
        mean, _ = model.encode_moments(video)
        y = model.decode(mean + run.loss.noise * jax.random.normal(key, mean.shape)).astype(jnp.float32)
        d = y - video
        weight = 1 + run.loss.edge * edges(video)
        loss = jnp.mean(weight * (jnp.abs(d) + 2 * d * d)) + run.loss.latent * jnp.mean(mean * mean)
        return loss, {"mse": jnp.mean(d * d), "latent_std": jnp.std(mean)}

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def step(state, batch, total):
        key = jax.random.fold_in(jax.random.key(run.experiment.seed), state.step)
        (loss, report), grads = jax.value_and_grad(objective, has_aux=True)(state.params, render(batch, *size), key)
        state, more = next_state(state, grads, optimizer, run.optimizer, total)
        return state, {"loss": loss, **report, **more}

    return step


def edges(video):
    """Strength of the edges of ``[B,T,H,W,3]`` as ``[B,T,H,W,1]`` in 0..1: the largest step to a neighbour, spread by a pixel."""
    flat = video.reshape(-1, *video.shape[2:])
    down = jnp.pad(jnp.abs(flat[:, 1:] - flat[:, :-1]), ((0, 0), (0, 1), (0, 0), (0, 0)))
    right = jnp.pad(jnp.abs(flat[:, :, 1:] - flat[:, :, :-1]), ((0, 0), (0, 0), (0, 1), (0, 0)))
    strength = jnp.minimum(1.0, 2 * jnp.maximum(down, right).max(-1, keepdims=True))
    spread = jax.lax.reduce_window(strength, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    return spread.reshape(*video.shape[:-1], 1)


def measured(minutes, step, state, feed, trial=20):
    """How many steps fit into ``minutes``, by the time of some after those that compile."""
    for n in (3, trial):
        start = time.monotonic()
        for batch in itertools.islice(feed, n):
            state, _ = step(state, batch, jnp.float32(1e9))
        jax.block_until_ready(state)
    return max(1, round(60 * minutes * trial / (time.monotonic() - start)))


def make_evaluate(run, vae):
    """``evaluate(params, batch)``: frames, their reconstruction and the latents."""
    size, dtype = (run.experiment.video.height, run.experiment.video.width), jnp.dtype(run.train.dtype)

    @jax.jit
    def evaluate(params, batch):
        model, video = with_params(vae, cast(params, dtype)), render(batch, *size)
        z, _ = model.encode_moments(video)
        return video, jnp.clip(model.decode(z).astype(jnp.float32), -1, 1), z

    return evaluate


def statistics(evaluate, params, feed):
    """Mean and standard deviation of the latents per channel (tuples) and the PSNR in dB, over ``EVAL_BATCHES`` batches."""
    sums, squares, errors = [], [], []
    for batch in itertools.islice(feed, EVAL_BATCHES):
        video, again, z = evaluate(params, batch)
        sums.append(z.mean((0, 1, 2, 3)))
        squares.append((z * z).mean((0, 1, 2, 3)))
        errors.append(((again - video) ** 2).mean())
    mean = np.mean(jax.device_get(sums), 0, dtype=np.float64)
    std = np.sqrt(np.maximum(np.mean(jax.device_get(squares), 0, dtype=np.float64) - mean**2, 1e-8))
    psnr = -10 * np.log10(np.mean(jax.device_get(errors)) / 4)
    return tuple(map(float, mean.astype(np.float32))), tuple(map(float, std.astype(np.float32))), float(psnr)


def picture(evaluate, params, feed, path):
    """A contact sheet of some clips: truth, then reconstruction."""
    video, again, _ = evaluate(params, next(iter(feed)))
    rows = [np.asarray(to_uint8(x[i])) for i in range(min(SHOWN, len(video))) for x in (video, again)]
    contact_sheet(rows, ["truth", "reconstruction"] * (len(rows) // 2), path)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/toy.py:vae", "the run; see configs/toy.py")
    flags.DEFINE_string("workdir", None, "folder of the run", required=True)
    app.run(main)
