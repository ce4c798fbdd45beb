"""Train the transformer and the text encoder by teacher forcing on endless clips of the toy world; see configs/toy.py for the command.

Clips are rendered and encoded on the training device and kept there in a ring (``RingConfig``). Writes ``metrics.jsonl``, ``checkpoints/``,
streamed pictures and, when it stops, ``bundle/``: transformer, text encoder (averages) and VAE. Running the same command again resumes.
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

from longlive_jax.checkpoint import Checkpoints, Deadline, abstract_part, check_config, digest, load_parts, save_bundle
from longlive_jax.config import ConfigError, from_config_dict, replace, require
from longlive_jax.config_train import WATCHING, ARRun, flat_config
from longlive_jax.data import toyworld
from longlive_jax.data.pipeline import LABELS, batches, first_held, made, training_clips
from longlive_jax.diffusion.flow import TIME_SCALE, shift_sigma
from longlive_jax.diffusion.rollout import chunk_noise, next_chunk, start_stream
from longlive_jax.diffusion.solvers import make_solver
from longlive_jax.diffusion.teacher_forcing import chunk_draws, corrupt, expand, loss_of, predict, rebuilt
from longlive_jax.metrics import MetricsWriter, Progress, finite_or_raise, provenance
from longlive_jax.model.frames import teacher_forcing, window
from longlive_jax.model.text import TextEncoder, encode_prompts
from longlive_jax.model.transformer import VideoTransformer
from longlive_jax.model.vae import to_uint8
from longlive_jax.quant.rewrite import RULE_SETS, rewrite, seeded
from longlive_jax.sharding import REPLICATE, REPLICATED_RULES, SHARD, TRANSFORMER_RULES, constrain, make_mesh, weight_shardings
from longlive_jax.state import init_state, make_optimizer, next_state, state_shardings, with_shardings
from longlive_jax.streaming.pictures import contact_sheet
from longlive_jax.tree import cast, flat_params, with_params

SHOWN = 4  # clips in a picture


def main(_):
    logging.set_verbosity(logging.WARNING)
    run = from_config_dict(ARRun, flags.FLAGS.config)
    with Deadline(run.train.stop_after_minutes) as deadline:
        train(run, pathlib.Path(flags.FLAGS.workdir), deadline)


def train(run, workdir, deadline):
    # ---- mesh, models, data
    run, vae = with_vae(run)
    mesh = make_mesh(run.experiment.mesh.data, run.experiment.mesh.seq)
    everywhere = NamedSharding(mesh, P())
    encode = make_encode(run, vae)
    clips = training_clips(run.experiment, run.data)
    feed = lambda start: (jax.device_put(b, everywhere) for b in batches(clips, run.ring.group, start, run.data.workers))

    # ---- state and step
    models = {"transformer": abstract_part("transformer", run.experiment.transformer), "text": abstract_part("text", run.experiment.text)}
    optimizer = make_optimizer(run.optimizer)
    like = jax.eval_shape(lambda: init_state(initial_params(run.experiment), optimizer))
    shardings = state_shardings(like, part_shardings(like.params, mesh), mesh)
    fresh = jax.jit(functools.partial(init_state, optimizer=optimizer), out_shardings=shardings)
    step = make_step(run, models, optimizer, shardings)
    sample = make_sample(run, models, vae)

    with Checkpoints(workdir / "checkpoints", run.train.keep) as checkpoints, jax.set_mesh(mesh):
        # ---- start or resume
        resumed = checkpoints.latest() is not None
        config = flat_config(run) | {"vae_weights": digest(run.vae)}
        record = checkpoints.record() if resumed else {"config": config, "total": run.train.steps}
        check_config(config, record["config"], WATCHING, f"checkpoint in {str(workdir)!r}")
        params = None if resumed else initial_params(run.experiment, run.init)
        state = checkpoints.restore(with_shardings(like, shardings)) if resumed else fresh(params)
        start = int(state.step)
        groups = zip(itertools.count(first_held(start, run.ring)), feed(first_held(start, run.ring)))
        ring, seconds = fill(run.ring, encode, empty_ring(run, everywhere), groups, made(start, run.ring))
        if not resumed:
            total = run.train.steps or measured(run, step, fresh(params), ring, seconds)
            record["total"] = total
            checkpoints.save(0, state, record)
        total = record["total"]

        # ---- loop
        length, waiting = jnp.float32(total), []
        with MetricsWriter(workdir / "metrics.jsonl") as metrics, Progress(max(1, total - start), "ar") as progress:
            for i in range(start, total):
                if i > start and made(i, run.ring) > made(i - 1, run.ring):
                    ring = encode(ring, *next(groups))
                state, values = step(state, ring, length)
                waiting.append(values)
                progress.update(1)
                done = i + 1
                stop = deadline.over() or done == total
                save, show = stop or done % run.train.checkpoint_every == 0, run.train.sample_every and done % run.train.sample_every == 0
                if save or show or done % run.train.log_every == 0:
                    report(metrics, done, waiting, progress)
                    waiting = []
                if show:
                    picture(run, sample, state.ema, workdir / f"step_{done:06}.png")
                if save:
                    checkpoints.save(done, state, record)
                if stop:
                    break

        # ---- export
        if run.train.sample_every:
            picture(run, sample, state.ema, workdir / "final.png")
        about = {"steps": int(state.step), "of": total, "config": record["config"], "made_with": provenance()}
        about["left_behind"] = "optimizer state and float32 masters; the weights are their exponential average"
        parts = {name: jax.device_put(leaves, everywhere) for name, leaves in state.ema.items()} | {"vae": flat_params(vae)}
        size = save_bundle(workdir / "bundle", run.experiment, parts, about)
    print(json.dumps({"done": int(state.step) == total, "step": int(state.step), "of": total, "bundle": size, "why": deadline.reason}))


# ---- the ring of encoded clips -------------------------------------------------------------------------------------------------------------


def with_vae(run):
    """The run with the VAE config of ``run.vae`` (its latents' mean and standard deviation), and that VAE."""
    if not run.vae:
        raise ConfigError("vae is empty; train the VAE first and give its folder: --config.vae=<workdir of train_vae>/bundle")
    experiment, vae = load_parts(run.vae, ("vae",), dtype=run.train.dtype)
    bare = replace(experiment.vae, mean=run.experiment.vae.mean, std=run.experiment.vae.std)
    if bare != run.experiment.vae:
        raise ConfigError(f"the VAE in {run.vae!r} is {bare} and experiment.vae is {run.experiment.vae}; train a VAE of these sizes")
    return replace(run, experiment=replace(run.experiment, vae=experiment.vae)), vae


def empty_ring(run, sharding):
    """Room for ``ring.size`` clips: latents ``z [N,F,h,w,C]``, ``ids`` and ``mask [N,chunks,M]``, rotary ``time [N,F]``, and for
    every chunk, ``[N,chunks]``, whether it is a ``cut``, a ``change`` or ``wrong`` (data/pipeline.py)."""
    e, n, chunks = run.experiment, run.ring.size, run.data.chunks
    frames = chunks * e.stream.chunk
    text = (n, chunks, e.transformer.text_len)
    build = lambda: {
        "z": jnp.zeros((n, frames, *e.grid, e.vae.channels), run.train.dtype),
        "ids": jnp.zeros(text, jnp.int32),
        "mask": jnp.zeros(text, bool),
        **{name: jnp.zeros((n, chunks), bool) for name in ("cut", "change", "wrong")},
        "time": jnp.zeros((n, frames), jnp.float32),
    }
    return jax.jit(build, out_shardings=dict.fromkeys(("z", *LABELS), sharding))()


def make_encode(run, vae):
    """``encode(ring, group, batch)``: the ring with the clips of that group rendered, encoded and written to their slot."""
    graph, params = nnx.split(vae)
    size, slots = (run.experiment.video.height, run.experiment.video.width), run.ring.size // run.ring.group

    @functools.partial(jax.jit, donate_argnums=0)
    def program(ring, params, slot, batch):
        vae = nnx.merge(graph, params)
        drawn = {name: x for name, x in batch.items() if name not in LABELS}
        parts = jax.tree.map(lambda x: x.reshape(-1, run.ring.part, *x.shape[1:]), drawn)
        z = jax.lax.map(lambda part: vae.encode(toyworld.render(part, *size)).astype(ring["z"].dtype), parts)
        new = {"z": z.reshape(-1, *z.shape[2:])} | {name: batch[name] for name in LABELS}
        return jax.tree.map(lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x, slot * run.ring.group, 0), ring, new)

    return lambda ring, group, batch: program(ring, params, jnp.int32(group % slots), batch)


def fill(config, encode, ring, groups, count):
    """The ring with the next groups up to number ``count``, and the seconds that one takes."""
    start, done = time.monotonic(), 0
    for group, batch in groups:
        ring = encode(ring, group, batch)
        if done == 0:  # compiles
            jax.block_until_ready(ring)
            start = time.monotonic()
        done += 1
        if group + 1 == count:
            break
    jax.block_until_ready(ring)
    seconds = (time.monotonic() - start) / max(1, done - 1)
    print(f"ring: {done * config.group} clips, {config.group / max(seconds, 1e-9):.0f} clips/s", flush=True)
    return ring, seconds


def measured(run, step, state, ring, group_seconds, trial=20):
    """How many steps fit into ``train.minutes``, new clips included, by the time of some after those that compile."""
    for n in (3, trial):
        start = time.monotonic()
        for _ in range(n):
            state, _ = step(state, ring, jnp.float32(1e9))
        jax.block_until_ready(state)
    seconds = (time.monotonic() - start) / trial + group_seconds / run.ring.every
    return max(1, round(60 * run.train.minutes / seconds))


# ---- the step ------------------------------------------------------------------------------------------------------------------------------


def initial_params(experiment, bundle=""):
    """What is trained: random weights, or those of a ``bundle`` of the same sizes."""
    if not bundle:
        return random_params(experiment)
    source, transformer, text = load_parts(bundle, ("transformer", "text"), dtype="float32")
    same = (source.transformer, source.text) == (experiment.transformer, experiment.text)
    require(same, f"init={bundle!r} holds models of other sizes than this run's; use its sizes, or start from random weights with init=''")
    return {"transformer": flat_params(transformer), "text": flat_params(text)}


@functools.partial(jax.jit, static_argnums=0)
def random_params(experiment):
    """Random weights of what is trained."""
    rngs = nnx.Rngs(experiment.seed)
    transformer, text = VideoTransformer(experiment.transformer, rngs=rngs), TextEncoder(experiment.text, rngs=rngs)
    return {"transformer": flat_params(transformer), "text": flat_params(text)}


def part_shardings(params, mesh):
    """Masters of the transformer are split over all devices; the text encoder's are not."""
    rules = {"transformer": (TRANSFORMER_RULES, SHARD), "text": (REPLICATED_RULES, REPLICATE)}
    return {part: weight_shardings({k: x.shape for k, x in leaves.items()}, *rules[part], mesh) for part, leaves in params.items()}


def built(models, params, dtype, rules=(), key=None):
    """The transformer with a copy of the weights in ``dtype`` and the text encoder in float32 (it is small), gathered on every device.

    ``rules``: for ``rewrite`` of that copy; ``key``: of what its weights draw in this step.
    """
    whole = jax.tree.map(constrain, params | {"transformer": cast(params["transformer"], dtype)})
    transformer = seeded(rewrite(whole["transformer"], rules)[0], key)
    return with_params(models["transformer"], transformer), with_params(models["text"], whole["text"])


def rules_of(run, models):
    """The rules that ``run.rules`` names, tried on weights without values: sizes that they cannot take are refused, by name."""
    rules = RULE_SETS[run.rules] if run.rules else ()
    rewrite(flat_params(models["transformer"]), rules)
    return rules


def read_prompts(model, text, ids, mask):
    """Keys and values of prompts ``[B,P,M]``."""
    rows = encode_prompts(text, ids.reshape(-1, ids.shape[-1]), mask.reshape(-1, mask.shape[-1]))
    return model.read(rows.reshape(*ids.shape, -1))


def loss_weights(cut, objective, chunk):
    """Weights of the latents ``[B,F]`` of clips whose chunks begin a later shot where ``cut [B,chunks]``."""
    weight = jnp.where(cut, objective.cut_weight, 1.0)
    first = jnp.where(cut, objective.cut_weight * objective.first_weight, 1.0)
    return jnp.stack([first] + [weight] * (chunk - 1), axis=-1).reshape(len(cut), -1)


def make_step(run, models, optimizer, shardings):
    """``step(state, ring, total)``: the next state and what to report. Everything random follows from the step number."""
    e, o, dtype = run.experiment, run.objective, jnp.dtype(run.train.dtype)
    chunk, shards, batch_size = e.stream.chunk, e.mesh.seq, run.train.batch
    rules = rules_of(run, models)
    visible = teacher_forcing & window(e.stream.window // chunk, e.stream.sink // chunk)  # what a stream holds
    nothing, own = [jnp.asarray(x) for x in toyworld.tokenize("", e.transformer.text_len)], jnp.arange(run.data.chunks)

    def draw(key, ring):
        """A batch: corrupted latents, prompts, rotary time, and the chunk ``[B,F]`` whose prompt a frame of the history reads."""
        keys = jax.random.split(key, 7)
        pick = jax.random.randint(keys[0], (batch_size,), 0, run.ring.size)
        clips = {name: constrain(x[pick], "batch", *(None,) * (x.ndim - 1)) for name, x in ring.items()}
        z = clips["z"].astype(jnp.float32)
        sigma = chunk_draws(keys[1], batch_size, run.data.chunks, chunk, lambda k, s: shift_sigma(jax.random.uniform(k, s), o.shift))
        level = o.context_noise * jax.random.uniform(keys[2], (batch_size, 1)) * jax.random.bernoulli(keys[3], o.context_share, (batch_size, 1))
        history = z + expand(level) * jax.random.normal(keys[4], z.shape)
        drop = jax.random.bernoulli(keys[5], o.drop_text, (batch_size, 1, 1))
        ids, mask = (jnp.where(drop, none, clips[name]) for none, name in zip(nothing, ("ids", "mask")))
        again = jax.random.bernoulli(jax.random.fold_in(key, len(keys)), o.recache, (batch_size, 1))
        past = jnp.where(again, rebuilt(clips["change"], clips["cut"]), own)
        past, taught = (jnp.repeat(x, chunk, axis=1) for x in (past, (past == own) & ~clips["wrong"]))
        weight = loss_weights(clips["cut"], o, chunk)
        step = corrupt(z, jax.random.normal(keys[6], z.shape), sigma, TIME_SCALE * sigma, weight=weight, mask=taught, history=history)
        return step, ids, mask, clips["time"], past

    def objective(params, key, ring):
        step, ids, mask, rotary, past = draw(key, ring)
        model, text = built(models, params, dtype, rules, jax.random.fold_in(key, 8))  # draw folds 7 in
        prompts = read_prompts(model, text, ids, mask)
        v, frames = predict(model, step, prompts, chunk=chunk, time=rotary, past=past, shards=shards, visible=visible)
        return loss_of(v, frames, step, shards)[0]

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def step(state, ring, total):
        key = jax.random.fold_in(jax.random.key(e.seed), state.step)
        loss, grads = jax.value_and_grad(objective)(state.params, key, ring)
        state, more = next_state(state, grads, optimizer, run.optimizer, total)
        return state, {"loss": loss, **more}

    return step


def report(metrics, step, waiting, progress):
    """One line of means since the last one; waits for the device."""
    values = jax.device_get(waiting)
    means = {name: float(np.mean([v[name] for v in values])) for name in values[0]}
    finite_or_raise(means, step)
    metrics.write(step, {**means, "steps_per_second": progress.rate})


# ---- pictures ------------------------------------------------------------------------------------------------------------------------------


def make_sample(run, models, vae):
    """``sample(params, ids, mask, cut)``: streams ``[B,chunks,M]`` prompts with cuts ``[B,chunks]`` -> uint8 ``[B,P,H,W,3]``."""
    e, dtype = run.experiment, jnp.dtype(run.train.dtype)
    solver, guided = make_solver(e.sampler.solver, e.sampler.steps, e.sampler.shift), e.sampler.guidance != 1
    nothing = [jnp.asarray(x)[None, None] for x in toyworld.tokenize("", e.transformer.text_len)]

    @jax.jit
    def chunk(params, state, noise, ids, mask, cut):
        model, text = built(models, params, dtype)
        negative = read_prompts(model, text, *(jnp.broadcast_to(x, ids.shape) for x in nothing)) if guided else None
        prompts = read_prompts(model, text, ids, mask)
        return next_chunk(model, solver, e.stream, state, noise, prompts, cut=cut, negative=negative, guidance=e.sampler.guidance)

    decode = jax.jit(lambda z: to_uint8(vae.decode(z)))

    def sample(params, ids, mask, cut):
        key, shape = jax.random.key(e.seed), (len(ids), e.stream.chunk, *e.grid, e.vae.channels)
        state, out = start_stream(e.transformer, e.stream, key, len(ids), e.tokens, dtype, guided), []
        for c in range(ids.shape[1]):
            state, z = chunk(params, state, chunk_noise(key, c, shape), ids[:, c : c + 1], mask[:, c : c + 1], cut[:, c])
            out.append(z)
        return np.asarray(decode(jnp.concatenate(out, 1)))

    return sample


def picture(run, sample, params, path):
    """A contact sheet of streams with withheld combinations."""
    rng = np.random.default_rng(run.experiment.seed)
    scenes = [toyworld.sample_scene(rng, run.data.chunks, frames_per_chunk=run.experiment.stream.chunk, held_out=True) for _ in range(SHOWN)]
    words = [[toyworld.tokenize(caption, run.experiment.transformer.text_len) for caption in s.captions] for s in scenes]
    ids, mask = (np.stack([[w[i] for w in row] for row in words]) for i in (0, 1))
    video = sample(params, ids, mask, np.stack([s.cut for s in scenes]))
    contact_sheet(list(video), [" / ".join(dict.fromkeys(s.captions)) for s in scenes], path, columns=2 * run.data.chunks)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/toy.py:ar", "the run; see configs/toy.py")
    flags.DEFINE_string("workdir", None, "folder of the run", required=True)
    app.run(main)
