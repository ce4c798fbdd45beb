"""Checkpoints and bundles: what comes back, on which devices, and what is said when it cannot."""

import functools
import itertools
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax import checkpoint
from longlive_jax.checkpoint import (
    PARTS,
    CheckpointError,
    Checkpoints,
    Deadline,
    abstract_part,
    check_config,
    load_bundle,
    load_parts,
    save_bundle,
)
from longlive_jax.config import TINY, TOY, replace
from longlive_jax.config_train import OptimizerConfig
from longlive_jax.model.text import encode_prompts
from longlive_jax.sharding import make_mesh
from longlive_jax.state import init_state, make_optimizer
from longlive_jax.tree import flat_params

NARROW = replace(TINY, transformer=replace(TINY.transformer, layers=1), vae=replace(TINY.vae, mean=(0.1,) * 4, std=(1.5,) * 4))


def state(fill=0.0):
    params = {"transformer": {"blocks.0.q.weight": jnp.full((16, 24), fill), "blocks.0.q.bias": jnp.full((16,), fill + 1)}}
    return init_state(params, make_optimizer(OptimizerConfig()))


def like(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), a, b)


# ---- checkpoints ---------------------------------------------------------------------------------------------------------------------------


def test_a_state_comes_back_although_it_was_donated(tmp_path):
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() is None
        s = state()
        for i in range(4):
            expected = jax.tree.map(np.asarray, jax.tree.map(jnp.copy, s))
            checkpoints.save(i, s, {"total": 7, "at": i})
            s = advance(s)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 3 and checkpoints.record() == {"total": 7, "at": 3}
        equal(checkpoints.restore(like(state())), expected)
        assert checkpoints.record(2)["at"] == 2
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 1; there are \[2, 3\]"):
            checkpoints.record(1)


def test_a_step_is_saved_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(), {"first": True})
        checkpoints.save(1, state(5.0), {"first": False})
        assert checkpoints.record() == {"first": True}


def test_a_state_comes_back_on_other_devices(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state(3.0), {})
        rows = NamedSharding(make_mesh(2, 2), P(("data", "seq")))
        spread = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows if x.shape[:1] == (16,) else None), like(state()))
        again = checkpoints.restore(spread)
    assert again.params["transformer"]["blocks.0.q.weight"].sharding == rows
    equal(again, state(3.0))


def test_every_mismatch_is_listed(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, {"kept": jnp.ones(2), "grown": jnp.ones((2, 3)), "gone": jnp.ones(4)}, {})
        other = like({"kept": jnp.ones(2), "grown": jnp.ones((2, 5)), "new": jnp.ones(1)})
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(other)
    for line in ("missing new (1,)", "not known gone (4,)", "grown has shape (2, 3), needed (2, 5)", "another --workdir"):
        assert line in str(error.value)
    assert "kept" not in str(error.value)


def test_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=r"no checkpoint of step None; there are \[\]"):
        checkpoints.restore(like(state()))


@pytest.mark.parametrize("what", ["truncated", "missing", "metadata"])
def test_a_damaged_checkpoint_is_named(tmp_path, what):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, state(), {})
    folder = tmp_path / "4" / "state"
    if what == "metadata":
        (folder / "_METADATA").write_text("{")
    for path in [p for p in folder.rglob("d/*") if p.is_file()] if what != "metadata" else []:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]) if what == "truncated" else path.unlink()
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=r"4' is damaged or incomplete .* remove that folder"):
        checkpoints.restore(like(state()))


def test_a_checkpoint_without_a_state_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, state(), {})
    shutil.rmtree(tmp_path / "4" / "state")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="4' is damaged or incomplete"):
        checkpoints.restore(like(state()))


def test_an_unfinished_save_does_not_count(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(2.0), {"at": 1})
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.save(2, state(4.0), {"at": 2})
    with Checkpoints(tmp_path) as checkpoints:
        equal(checkpoints.restore(like(state())), state(4.0))


def test_another_config_is_refused_by_key():
    ours, theirs = {"a.lr": 1.0, "a.batch": 4, "log": 5}, {"a.lr": 2.0, "a.batch": 4, "log": 7, "old": 1}
    with pytest.raises(CheckpointError, match=r"a.lr=1.0 \(there 2.0\); old=None \(there 1\). Use another --workdir"):
        check_config(ours, theirs, ("log",), "checkpoint")
    check_config(ours, {**ours, "log": 9}, ("log",), "checkpoint")


# ---- leaving in time -----------------------------------------------------------------------------------------------------------------------


def test_the_deadline_is_a_clock():
    now = itertools.count(0, 20)
    deadline = Deadline(1.0, clock=lambda: next(now))  # made at 0, asked at 20, 40, 60
    assert [deadline.over() for _ in range(3)] == [False, False, True] and deadline.reason == "time is up"
    assert not Deadline(0).over() and Deadline(0).reason == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_deadline_is_a_signal(number):
    before = signal.getsignal(number)
    with Deadline() as deadline:
        assert not deadline.over()
        os.kill(os.getpid(), number)
        assert deadline.over() and deadline.reason == number.name
        assert signal.getsignal(number) == before  # a second one acts at once
    assert signal.getsignal(number) == before


# ---- bundles -------------------------------------------------------------------------------------------------------------------------------


@functools.cache
def random_parts():
    """Random weights of ``NARROW``, as numpy: part -> path -> array."""
    rng = np.random.default_rng(0)
    shells = {part: abstract_part(part, {"transformer": NARROW.transformer, "vae": NARROW.vae, "text": NARROW.text}[part]) for part in PARTS}
    return {part: {k: rng.normal(0, 0.1, x.shape).astype(np.float32) for k, x in flat_params(m).items()} for part, m in shells.items()}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 200_000)  # several shards of this little model
    save_bundle(tmp_path / "b", NARROW, random_parts(), {"steps": 3, "said": "é"})
    return tmp_path / "b"


def test_a_bundle_comes_back_in_bfloat16(folder):
    experiment, transformer, vae, text = load_bundle(folder)
    assert experiment == NARROW and experiment.vae.mean == (0.1,) * 4
    assert json.loads((folder / "record.json").read_text()) == {"steps": 3, "said": "é"}
    for part, module in (("transformer", transformer), ("vae", vae), ("text", text)):
        for path, x in flat_params(module).items():
            assert x.dtype == jnp.float32
            np.testing.assert_array_equal(x, np.asarray(jnp.asarray(random_parts()[part][path], jnp.bfloat16), np.float32), err_msg=path)
    ids = np.ones((1, TINY.transformer.text_len), np.int32)
    assert np.isfinite(encode_prompts(text, ids, ids > 0)).all()
    assert load_bundle(folder, dtype="bfloat16")[2].dtype == jnp.bfloat16


def test_shards_are_small(folder):
    sizes = [f.stat().st_size for f in folder.glob("*.safetensors")]
    assert len(sizes) > 1 and max(sizes) <= 200_000
    before = sorted(f.name for f in folder.iterdir())
    save_bundle(folder, NARROW, {"vae": random_parts()["vae"]}, {})  # nothing of the old one stays
    assert len(list(folder.glob("*.safetensors"))) < len(sizes) and "config.json" in before


def test_parts_of_a_bundle(folder):
    save_bundle(folder, NARROW, {"vae": random_parts()["vae"]}, {})
    experiment, vae = load_parts(folder, ("vae",))
    assert vae.config == experiment.vae == NARROW.vae
    with pytest.raises(CheckpointError, match=r"missing transformer\.patch_embedding\.weight"):
        load_bundle(folder)


def test_damaged_bundles_name_the_file(folder):
    shards = sorted(folder.glob("*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=f"{shards[1].name}' is damaged or truncated"):
        load_bundle(folder)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"lacks {shards[1].name}"):
        load_bundle(folder)
    for path in shards:
        path.unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_bundle(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json' is damaged"):
        load_bundle(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json' is missing"):
        load_bundle(folder)


def test_a_bundle_of_another_model_lists_every_mismatch(folder):
    wider = replace(NARROW, text=replace(NARROW.text, ffn_dim=40), vae=replace(NARROW.vae, mean=(), std=()))
    config = json.loads((folder / "config.json").read_text())
    config["text"]["ffn_dim"] = wider.text.ffn_dim
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as error:
        load_bundle(folder)
    for name in ("gate", "fc1", "fc2"):
        assert f"text.blocks.0.ffn.{name}.weight has shape" in str(error.value)


def test_the_toy_model_fits_the_package():
    configs = {"transformer": TOY.transformer, "vae": TOY.vae, "text": TOY.text}
    leaves = {f"{part}.{path}": x for part, config in configs.items() for path, x in flat_params(abstract_part(part, config)).items()}
    header = 200 * len(leaves)  # safetensors: name, dtype, shape and offsets of a tensor as JSON
    size = 2 * sum(x.size for x in leaves.values()) + header
    assert 23_000_000 < size < 24_900_000


def test_nothing_is_initialised_at_random(folder, monkeypatch):
    monkeypatch.setattr(jax.random, "normal", lambda key, shape, *a: jnp.zeros(shape) if isinstance(key, jax.core.Tracer) else 1 / 0)
    load_bundle(folder)
    with pytest.raises(ZeroDivisionError):
        PARTS["text"](NARROW.text, rngs=nnx.Rngs(0))
