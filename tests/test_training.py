"""The training scripts: they learn, they resume exactly wherever they are killed, and a mesh changes nothing."""

import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import toy
from experiments import train_ar, train_vae
from longlive_jax.checkpoint import Checkpoints, abstract_part, load_bundle, load_parts, save_bundle
from longlive_jax.config import ConfigError, from_config_dict, replace
from longlive_jax.config_train import ARRun, ObjectiveConfig, VAERun
from longlive_jax.metrics import NonFiniteError, read_metrics
from longlive_jax.sharding import make_mesh
from longlive_jax.state import init_state, make_optimizer, state_shardings
from longlive_jax.tree import flat_params
from tests import run_folder

ROOT = pathlib.Path(__file__).resolve().parents[1]
AR = toy.RUNS["ar_tiny"]
SMALL = (
    "--config.optimizer.kind=muon",
    "--config.data.chunks=2",
    "--config.data.mistakes=0.5",
    "--config.objective.recache=0.5",
    "--config.experiment.transformer.layers=1",
)


@pytest.fixture(scope="module")
def vae_bundle(tmp_path_factory):
    """A VAE of random weights, as train_vae leaves it."""
    rng = np.random.default_rng(0)
    shell = flat_params(abstract_part("vae", AR.experiment.vae))
    values = {k: rng.normal(0, 0.1, x.shape).astype(np.float32) for k, x in shell.items()}
    experiment = replace(AR.experiment, vae=replace(AR.experiment.vae, mean=(0.01,) * 4, std=(0.2,) * 4))
    folder = tmp_path_factory.mktemp("vae")
    save_bundle(folder, experiment, {"vae": values}, {})
    return folder


# ---- as commands ---------------------------------------------------------------------------------------------------------------------------


SERVER = """
import json, os, runpy, sys
import experiments.train_ar, experiments.train_vae
for line in sys.stdin:
    script, log, *words = json.loads(line)
    if not (child := os.fork()):
        file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.argv = [script, *words]
        runpy.run_path(script, run_name="__main__")
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Commands:
    """Runs the training scripts as processes, forked from one that has imported everything (which takes longer than the runs)."""

    def __init__(self, folder):
        env = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="", PYTHONPATH=str(ROOT)) | run_folder.QUICK
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, env=env, text=True, bufsize=1, **pipes)
        self.log = folder / "log.txt"

    def start(self, script, config, workdir, *overrides):
        words = [f"experiments/{script}.py", str(self.log), f"--config=configs/toy.py:{config}", f"--workdir={workdir}", *overrides]
        self.server.stdin.write(json.dumps(words) + "\n")
        return int(self.server.stdout.readline())

    def finish(self):
        """The JSON of the last line of the process that was started, or its exit status if that is not 0, and all it wrote."""
        status, text = int(self.server.stdout.readline()), self.log.read_text()
        return status or json.loads(text.splitlines()[-1]), text

    def succeed(self):
        said, text = self.finish()
        assert isinstance(said, dict), text[-3000:]
        return said

    def close(self):
        self.server.stdin.close()
        self.server.wait()


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    server = Commands(tmp_path_factory.mktemp("commands"))
    yield server
    server.close()


def latest(workdir):
    return max((int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()), default=-1)


def final_state(workdir):
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        found = checkpoints.manager.restore(latest(workdir))["state"]
    return {name: np.asarray(x).tobytes() for name, x in found.items()}


def kill_when(process, workdir, ready, delay):
    """``kill -9`` so long after ``ready()`` first holds or, if it never does, when the run is over."""
    while not ready() and latest(workdir) < AR.train.steps:
        time.sleep(0.01)
    time.sleep(delay)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("times", [6, pytest.param(10, marks=pytest.mark.exhaustive)])
def test_a_run_that_is_killed_ends_in_the_same_bits(times, tmp_path, vae_bundle, commands):
    options = (f"--config.vae={vae_bundle}", "--config.train.checkpoint_every=2", "--config.train.log_every=1", *SMALL)
    go = lambda name: commands.start("train_ar", "ar_tiny", tmp_path / name, *options)
    go("whole")
    assert commands.succeed()["done"]
    rng, workdir, kills = random.Random(0), tmp_path / "killed", 0
    for n in range(times):
        process, before = go("killed"), latest(workdir)
        writing = lambda: any((workdir / "checkpoints").glob("*tmp*"))
        moved = lambda before=before: latest(workdir) > max(before, 0)
        kill_when(process, workdir, writing if n % 2 else moved, rng.uniform(0, 0.15))
        kills += commands.finish()[0] == signal.SIGKILL
    assert kills >= 0.8 * times
    go("killed")
    assert commands.succeed()["done"]
    whole, killed = final_state(tmp_path / "whole"), final_state(workdir)
    assert [name for name in whole if whole[name] != killed.get(name)] == [] and whole.keys() == killed.keys()
    losses = lambda name: {r["step"]: r["loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl")}
    assert losses("killed") == losses("whole") and len(losses("whole")) == AR.train.steps


@pytest.mark.slow
def test_the_vae_learns_stops_when_told_and_goes_on(tmp_path, commands):
    process = commands.start("train_vae", "vae_tiny", tmp_path, "--config.train.steps=40", "--config.train.sample_every=20")
    while latest(tmp_path) < 5:
        time.sleep(0.05)
    os.kill(process, signal.SIGTERM)
    said = commands.succeed()
    assert not said["done"] and said["why"] == "SIGTERM" and latest(tmp_path) == said["step"]
    commands.start("train_vae", "vae_tiny", tmp_path, "--config.train.steps=40", "--config.train.sample_every=20")
    said = commands.succeed()
    assert said["done"] and said["step"] == 40
    losses = [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl") if "loss" in r]
    assert losses[-1] < 0.6 * losses[0]
    experiment, _ = load_parts(tmp_path / "bundle", ("vae",))
    assert len(experiment.vae.mean) == 4 and min(experiment.vae.std) > 0 and (tmp_path / "final.png").is_file()


@pytest.mark.slow
def test_ar_ends_in_a_whole_bundle_and_keeps_its_config(tmp_path, vae_bundle, commands):
    options = (f"--config.vae={vae_bundle}", "--config.train.sample_every=3", "--config.train.steps=3", *SMALL)
    commands.start("train_ar", "ar_tiny", tmp_path, *options)
    assert commands.succeed()["done"]
    experiment, transformer, vae, _ = load_bundle(tmp_path / "bundle")
    assert experiment.vae.mean == (0.01,) * 4 and transformer.config == replace(AR.experiment.transformer, layers=1)
    theirs = load_parts(vae_bundle, ("vae",))[1]
    jax.tree.map(np.testing.assert_array_equal, flat_params(vae), flat_params(theirs))
    assert (tmp_path / "final.png").is_file() and json.loads((tmp_path / "bundle/record.json").read_text())["steps"] == 3
    commands.start("train_ar", "ar_tiny", tmp_path, *options, "--config.optimizer.lr=0.5")
    status, text = commands.finish()
    assert status != 0 and "optimizer.lr=0.5 (there 0.001)" in text and "another --workdir" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, option, message",
    [("ar_tiny", "--config.train.bach=3", 'Did you mean "batch"'), ("ar_tny", "--config.train.batch=2", "did you mean 'ar_tiny'?")],
)
def test_a_typo_ends_the_run_at_once(tmp_path, commands, config, option, message):
    commands.start("train_ar", config, tmp_path / "none", option)
    status, text = commands.finish()
    assert status != 0 and message in text and not (tmp_path / "none").exists()


# ---- the steps -----------------------------------------------------------------------------------------------------------------------------


def prepared(run):
    """Mesh, step and first state of an AR run."""
    mesh = make_mesh(run.experiment.mesh.data, run.experiment.mesh.seq)
    models = {part: abstract_part(part, config) for part, config in parts_of(run.experiment).items()}
    optimizer, params = make_optimizer(run.optimizer), train_ar.initial_params(run.experiment)
    like = jax.eval_shape(lambda: init_state(params, optimizer))
    shardings = state_shardings(like, train_ar.part_shardings(like.params, mesh), mesh)
    state = jax.device_put(init_state(params, optimizer), shardings)
    return mesh, train_ar.make_step(run, models, optimizer, shardings), state


def parts_of(experiment):
    return {"transformer": experiment.transformer, "text": experiment.text}


def ring_of(run, mesh, clips):
    """A ring of so many different clips with random smooth latents, again and again."""
    rng = np.random.default_rng(1)
    chunks, n = run.data.chunks, run.ring.size
    frames, c = chunks * run.experiment.stream.chunk, run.experiment.vae.channels
    pick = np.arange(n) % clips
    ids = rng.integers(2, 90, (clips, chunks, run.experiment.transformer.text_len))
    ring = {
        "z": np.broadcast_to(rng.normal(size=(clips, 1, 1, 1, c)), (clips, frames, *run.experiment.grid, c))[pick],
        "ids": ids[pick],
        "mask": np.ones_like(ids, bool)[pick],
        "cut": (np.arange(chunks) % 2 == 1) & (pick % 2 == 0)[:, None],
        "change": (np.arange(chunks) % 2 == 1) & (pick % 2 == 1)[:, None],
        "wrong": np.zeros((n, chunks)),
        "time": np.broadcast_to(np.arange(frames), (n, frames)),
    }
    types = {"z": np.float32, "ids": np.int32, "mask": bool, "cut": bool, "change": bool, "wrong": bool, "time": np.float32}
    return jax.device_put({k: x.astype(types[k]) for k, x in ring.items()}, NamedSharding(mesh, P()))


def losses_of(run, steps, clips):
    mesh, step, state = prepared(run)
    out = []
    with jax.set_mesh(mesh):
        ring = ring_of(run, mesh, clips)
        for _ in range(steps):
            state, values = step(state, ring, jnp.float32(steps))
            out.append(values["loss"])
    return np.array(jax.device_get(out)), state


SHORT = replace(
    AR,
    experiment=replace(AR.experiment, transformer=replace(AR.experiment.transformer, layers=1)),
    data=replace(AR.data, chunks=2),
    optimizer=replace(AR.optimizer, lr=3e-3, warmup=0.0, decay=0.3),
)


@pytest.mark.slow
def test_one_batch_is_learnt_by_heart():
    losses, state = losses_of(SHORT, 60, clips=1)
    assert losses[-10:].mean() < 0.35 * losses[:3].mean()
    assert int(state.step) == 60


@pytest.mark.exhaustive
def test_training_in_nvfp4_falls_as_in_bfloat16():
    run = replace(SHORT, train=replace(SHORT.train, dtype="bfloat16"))
    plain, four = (losses_of(replace(run, rules=rules), 60, clips=1)[0] for rules in ("", "train_ar"))
    assert four[-10:].mean() < 1.1 * plain[-10:].mean()


def test_rules_of_training_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="rules='fp8' are no rules of training; use train_ar or train_dmd"):
        replace(AR, rules="fp8")
    models = lambda e: {"transformer": abstract_part("transformer", e.transformer)}
    assert train_ar.rules_of(AR, models(AR.experiment)) == () and train_ar.rules_of(replace(AR, rules="train_ar"), models(AR.experiment))
    odd = replace(AR.experiment, transformer=replace(AR.experiment.transformer, ffn_dim=40))
    with pytest.raises(ConfigError, match=r"blocks.0.ffn.down.weight has 40 along 'in'"):
        train_ar.rules_of(replace(AR, rules="train_ar"), models(odd))


@pytest.mark.slow
def test_a_mesh_changes_nothing():
    run = replace(SHORT, objective=replace(SHORT.objective, recache=0.5))
    on = lambda data, seq: replace(run, experiment=replace(run.experiment, mesh=replace(run.experiment.mesh, data=data, seq=seq)))
    one, single = losses_of(on(1, 1), 3, clips=4)
    four, spread = losses_of(on(2, 2), 3, clips=4)
    np.testing.assert_allclose(four, one, rtol=1e-4)
    assert len(spread.params["transformer"]["blocks.0.ffn.up.weight"].sharding.device_set) == 4
    for path, x in single.params["transformer"].items():
        np.testing.assert_allclose(spread.params["transformer"][path], x, atol=5e-4, err_msg=path)


@pytest.mark.slow
def test_chunks_before_a_change_of_rebuilt_clips_and_wrong_ones_teach_nothing():
    """At first all velocities are 0, so the loss is the mean square of the targets that count."""

    runs = {share: replace(SHORT, objective=replace(SHORT.objective, recache=share)) for share in (0.0, 1.0)}
    made = {share: prepared(run) for share, run in runs.items()}

    def first_loss(share, **labels):
        run, (mesh, step, state) = runs[share], made[share]
        state = jax.tree.map(jnp.copy, state)  # it is donated
        with jax.set_mesh(mesh):
            ring = ring_of(run, mesh, 4)
            fill = lambda name, chunk: jnp.zeros_like(ring[name]).at[:, chunk].set(True)
            ring |= {name: jnp.zeros_like(ring[name]) for name in ("cut", "change")}
            ring |= {name: fill(name, chunk) for name, chunk in labels.items()}
            return float(step(state, ring, jnp.float32(1))[1]["loss"])

    plain, second = first_loss(0.0), first_loss(0.0, wrong=0)
    assert first_loss(0.0, change=1) == first_loss(1.0) == plain != second
    assert first_loss(1.0, change=1) == second
    assert plain == pytest.approx((second + first_loss(0.0, wrong=1)) / 2, rel=1e-5)


def test_edges_are_steps_to_a_neighbour_spread_by_a_pixel():
    video = np.full((1, 2, 8, 8, 3), -0.5, np.float32)
    assert float(train_vae.edges(video).max()) == 0
    video[0, 1, :, 5:, 1] = 0.5
    strength = np.asarray(train_vae.edges(video))
    assert strength.shape == (1, 2, 8, 8, 1) and strength[0, 0].max() == 0
    np.testing.assert_array_equal(strength[0, 1, 3, :, 0], [0, 0, 0, 1, 1, 1, 0, 0])


def test_training_needs_a_vae_of_its_own_sizes(vae_bundle):
    with pytest.raises(ConfigError, match="train the VAE first"):
        train_ar.with_vae(AR)
    other = replace(AR, vae=str(vae_bundle), experiment=replace(AR.experiment, vae=replace(AR.experiment.vae, decoder_dim=8)))
    with pytest.raises(ConfigError, match="train a VAE of these sizes"):
        train_ar.with_vae(other)
    run, vae = train_ar.with_vae(replace(AR, vae=str(vae_bundle)))
    assert run.experiment.vae.std == vae.config.std == (0.2,) * 4


def test_training_goes_on_from_a_bundle_of_its_sizes(tmp_path):
    rng = np.random.default_rng(0)
    experiment = AR.experiment
    shells = {part: flat_params(abstract_part(part, config)) for part, config in parts_of(experiment).items()}
    parts = {part: {k: rng.normal(size=x.shape).astype(np.float32) for k, x in shell.items()} for part, shell in shells.items()}
    save_bundle(tmp_path, experiment, parts, {})
    params = train_ar.initial_params(experiment, str(tmp_path))
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-2), params, parts)
    wider = replace(experiment, text=replace(experiment.text, ffn_dim=40))
    with pytest.raises(ConfigError, match="models of other sizes"):
        train_ar.initial_params(wider, str(tmp_path))


def test_a_loss_that_is_no_number_ends_the_run():
    with pytest.raises(NonFiniteError, match="step 7: loss=nan"):
        train_ar.report(None, 7, [{"loss": 1.0}, {"loss": float("nan")}], None)


def test_the_configs_are_runs():
    for name, kind in (("vae", VAERun), ("ar", ARRun), ("vae_tiny", VAERun), ("ar_tiny", ARRun)):
        assert from_config_dict(kind, toy.get_config(name)) == toy.RUNS[name]
    with pytest.raises(ConfigError, match="did you mean 'vae_tiny'"):
        toy.get_config("vae_tin")


def test_weights_after_a_cut():
    cut = np.array([[False, True, False], [False, False, False]])
    objective = ObjectiveConfig(cut_weight=2.0, first_weight=3.0)
    np.testing.assert_array_equal(train_ar.loss_weights(cut, objective, 2), [[1, 1, 6, 2, 1, 1], [1] * 6])
