"""The training state: stacked optimizer leaves, schedule, averages, and where they live."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from longlive_jax.config_train import OptimizerConfig
from longlive_jax.sharding import SHARD, TRANSFORMER_RULES, make_mesh, weight_shardings
from longlive_jax.state import groups_of, init_state, learning_rate, make_optimizer, next_state, pack, state_shardings, unpack, with_shardings

TOTAL = 100


def params(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {
        "transformer": {
            "blocks.0.self_attn.q.weight": draw(16, 24),
            "blocks.1.self_attn.q.weight": draw(16, 24),
            "blocks.0.self_attn.q.bias": draw(16),
            "head.head.weight": draw(16, 24),
        },
        "text": {"blocks.0.attn.q.weight": draw(16, 24), "norm.weight": draw(16)},
    }


def same(a, b, **options):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **options), a, b)


def test_groups_join_equal_leaves_of_a_part_and_kind():
    tree = params()
    groups = groups_of(tree)
    assert groups["transformer/matrix/16x24"] == [("transformer", f"blocks.{i}.self_attn.q.weight") for i in (0, 1)]
    assert groups["transformer/other/16x24"] == [("transformer", "head.head.weight")]
    assert groups["text/matrix/16x24"] == [("text", "blocks.0.attn.q.weight")]
    assert sum(map(len, groups.values())) == len(jax.tree.leaves(tree))
    same(unpack(pack(tree, groups), groups), tree)


def test_adamw_is_the_textbook_one():
    config = OptimizerConfig(kind="adamw", lr=0.1, warmup=0, decay=0, b1=0.8, b2=0.9, weight_decay=0.05, clip=1.0)
    optimizer, start = make_optimizer(config), params()
    state = init_state(start, optimizer)
    theirs, m, v = jax.tree.map(np.asarray, start), *(jax.tree.map(lambda x: np.zeros(x.shape), start) for _ in range(2))
    for n in range(1, 4):
        grads = jax.tree.map(lambda x, n=n: x / n, params(seed=n))
        state, report = next_state(state, grads, optimizer, config, TOTAL)
        norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
        np.testing.assert_allclose(report["grad_norm"], norm, rtol=1e-5)
        assert norm > config.clip
        g = jax.tree.map(lambda x, s=norm: np.asarray(x) / s, grads)
        m = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, m, g)
        v = jax.tree.map(lambda v, g: 0.9 * v + 0.1 * g * g, v, g)

        def move(p, m, v, n=n):
            decay = 0.05 * p if p.ndim > 1 else 0  # gains and biases are not decayed
            return p - 0.1 * (m / (1 - 0.8**n) / (np.sqrt(v / (1 - 0.9**n)) + 1e-8) + decay)

        theirs = jax.tree.map(move, theirs, m, v)
    same(state.params, theirs, rtol=2e-5, atol=2e-6)
    assert int(state.step) == 3


def test_muon_moves_block_matrices_along_orthogonal_directions():
    config = OptimizerConfig(kind="muon", lr=0.1, warmup=0, decay=0, weight_decay=0.0)
    optimizer, start = make_optimizer(config), params()
    state, _ = next_state(init_state(start, optimizer), params(seed=1), optimizer, config, TOTAL)
    moved = jax.tree.map(lambda a, b: np.asarray(a - b), state.params, start)
    for part, path in (("transformer", "blocks.1.self_attn.q.weight"), ("text", "blocks.0.attn.q.weight")):
        values = np.linalg.svd(moved[part][path] / (0.1 * 0.2 * 24**0.5), compute_uv=False)
        assert 0.5 < values.min() and values.max() < 1.3
    other = np.abs(moved["transformer"]["head.head.weight"])
    assert np.ptp(other) < 1e-4 and 0.09 < other.mean() < 0.2  # Adam's first step is as long in every entry


def test_learning_rate_rises_stays_and_falls():
    config = OptimizerConfig(lr=2.0, warmup=0.1, decay=0.4)
    rates = [float(learning_rate(config, done)) for done in (0, 0.05, 0.1, 0.3, 0.6, 0.8, 1.0)]
    np.testing.assert_allclose(rates, [0, 1, 2, 2, 2, 1, 0], atol=1e-6)
    assert float(learning_rate(OptimizerConfig(lr=2.0, warmup=0, decay=0), 1.0)) == 2.0


def test_the_average_forgets_its_start():
    config = OptimizerConfig(lr=0.1, ema=0.5)
    optimizer = make_optimizer(config)
    state, mean = init_state(params(), optimizer), jax.tree.map(np.asarray, params())
    for n in range(1, 21):
        state, _ = next_state(state, params(seed=n), optimizer, config, TOTAL)
        keep = min(0.5, (1 + n) / (10 + n))
        mean = jax.tree.map(lambda e, p, k=keep: k * e + (1 - k) * np.asarray(p), mean, state.params)
    same(state.ema, mean, rtol=1e-4, atol=1e-5)


def test_the_length_of_the_run_may_be_traced():
    config = OptimizerConfig(lr=0.1)
    optimizer = make_optimizer(config)
    step = jax.jit(lambda state, total: next_state(state, params(1), optimizer, config, total)[1]["lr"])
    a, b = step(init_state(params(), optimizer), 10.0), step(init_state(params(), optimizer), 1000.0)
    assert step._cache_size() == 1 and a > b


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_everything_follows_the_weights_over_the_mesh(kind):
    mesh = make_mesh(2, 2)
    optimizer = make_optimizer(OptimizerConfig(kind=kind))
    shapes = {"blocks.0.q.weight": (16, 24), "blocks.1.q.weight": (16, 24), "blocks.0.q.bias": (16,), "blocks.0.modulation": (6, 16)}
    shapes["blocks.0.norm_q.weight"] = (16,)
    tree = {"transformer": {k: jnp.ones(s) for k, s in shapes.items()}}
    weights = {"transformer": weight_shardings(shapes, TRANSFORMER_RULES, SHARD, mesh)}
    like = jax.eval_shape(lambda: init_state(tree, optimizer))
    shardings = state_shardings(like, weights, mesh)
    state = jax.jit(lambda: init_state(tree, optimizer), out_shardings=shardings)()
    assert state.params["transformer"]["blocks.0.q.weight"].sharding.spec == P(("data", "seq"), None)
    stacks = [x for x in jax.tree.leaves(state.optimizer) if x.shape == (2, 16, 24)]
    assert stacks and all(x.sharding.spec == P(None, ("data", "seq"), None) for x in stacks)
    assert all(isinstance(x, jax.ShapeDtypeStruct) and x.sharding for x in jax.tree.leaves(with_shardings(like, shardings)))
    assert optax.tree.norm(state.params) > 0
