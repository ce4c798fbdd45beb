"""Planned dense calls against one masked softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import ConfigError
from longlive_jax.model.frames import block_causal, clip_frames, everything, interleave, teacher_forcing
from longlive_jax.ops import attention
from longlive_jax.ops.attention import attend, attend_filled, gather, has_kernel, pick, plan, runs, take
from tests.programs import quick

B, T, N, D = 2, 3, 2, 4


def arrays(queries, keys, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((B, n, T, N, D)), jnp.float32) for n in (queries, keys, keys)]


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=2e-6 * float(jnp.abs(expected).max()))


def visibility(seed):
    """A random matrix in which every query sees a key; some rows repeat."""
    rng = np.random.default_rng(seed)
    rows, columns = int(rng.integers(1, 9)), int(rng.integers(1, 9))
    some = rng.random((int(rng.integers(1, rows + 1)), columns)) < 0.5
    some[np.arange(len(some)), rng.integers(0, columns, len(some))] = True
    return some[rng.integers(0, len(some), rows)]


@pytest.mark.parametrize("seed", range(6))
def test_any_visibility_equals_the_reference(seed):
    visible = visibility(seed)
    both = quick(lambda q, k, v: [attend(q, k, v, visible, name) for name in ("xla", "reference")])
    close(*both(*arrays(*visible.shape, seed)))


@pytest.mark.parametrize("shards", [1, 2])
def test_gradients_equal_the_reference(shards):
    parts = [clip_frames(B, 4, 2, noisy=noisy) for noisy in (False, True)]
    frames = interleave(*parts, shards)
    visible = teacher_forcing(frames, frames)
    grads = lambda name: quick(jax.grad(lambda a: jnp.sum(attend(*a, visible, name) ** 2)))(arrays(8, 8))
    jax.tree.map(close, grads("xla"), grads("reference"))


def test_filled_slots_are_a_length():
    q, k, v = arrays(2, 5)
    count = jnp.array([1, 4])

    @quick
    def results(q, k, v, count):
        cut = lambda x, b, n: x[b : b + 1, :n]
        parts = [attend(q[b : b + 1], cut(k, b, n), cut(v, b, n), np.ones((2, n), bool), "reference") for b, n in enumerate((1, 4))]
        return jnp.concatenate(parts), *(attend_filled(q, k, v, count, name) for name in ("xla", "reference"))

    expected, *found = results(q, k, v, count)
    for y in found:
        close(y, expected)


def test_full_slots_are_read_without_a_length(monkeypatch):
    """On a GPU, by a conditional: samples that are not all full are read by their lengths."""
    q, k, v = arrays(2, 5)
    dense, calls = attention.dense, []

    def instead(q, k, v, name, length=None):
        calls.append((name, length is None))
        return dense(q, k, v, "xla", length) + (length is None)  # to be told apart

    monkeypatch.setattr(attention, "dense", instead)
    both = quick(lambda q, k, v, count: [attend_filled(q, k, v, count, name) for name in ("cudnn", "reference")])
    for count, full in (((5, 5), 1), ((5, 4), 0), ((1, 1), 0)):
        y, expected = both(q, k, v, jnp.array(count))
        close(y - full, expected)
    assert sorted(calls) == [("cudnn", False), ("cudnn", True)]


@pytest.mark.parametrize("counts", [(2, 2), (2, 8), (5, 1)])
def test_a_first_chunk_reads_its_own_slots(counts):
    """Where XLA attends and the scores are many. ``v`` past the count says whether anything else was read."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, n, 128, 1, 8)), jnp.float32) for n in (2, 8, 8))
    count = jnp.array(counts)
    whole, own = (jax.jit(lambda *a, name=name: attend_filled(*a, name)) for name in ("reference", "xla"))
    assert "cond" in str(own.trace(q, k, v, count).jaxpr)
    assert "cond" not in str(own.trace(q, k[:, :3], v[:, :3], count).jaxpr)  # few scores: one call
    close(own(q, k, v, count), whole(q, k, v, count))
    spoilt = own(q, k, v.at[:, 2:].set(jnp.nan), count)
    assert bool(jnp.isfinite(spoilt).all()) == (max(counts) <= 2)


def test_a_plan_has_one_call_for_equal_rows():
    frames = clip_frames(B, 6, 2)
    assert plan(everything(frames, frames)) == {(6, 6): [(tuple(range(6)), tuple(range(6)))]}
    assert plan(block_causal(frames, frames)) == {(2, 2 * n): [((2 * n - 2, 2 * n - 1), tuple(range(2 * n)))] for n in (1, 2, 3)}


@pytest.mark.parametrize("shards", [1, 2])
def test_teacher_forcing_makes_one_call_a_chunk(shards):
    """The clean and the noisy frames of a chunk see equally many frames: they share a call."""
    chunks, chunk = 4, 2
    parts = [clip_frames(B, chunks * chunk, chunk, noisy=noisy) for noisy in (False, True)]
    frames = interleave(*parts, shards)
    visible = teacher_forcing(frames, frames)
    calls = plan(visible)
    assert {shape: len(groups) for shape, groups in calls.items()} == {(chunk, chunk * n): 2 for n in range(1, chunks + 1)}
    covered = np.zeros_like(visible)
    for groups in calls.values():
        for rows, columns in groups:
            covered[np.ix_(rows, columns)] = True
    np.testing.assert_array_equal(covered, visible)


def test_frames_are_taken_and_put_back_in_order():
    x = jnp.arange(2 * 6).reshape(2, 6)
    assert runs((0, 1, 2, 5, 3)) == [[0, 3], [5, 6], [3, 4]]
    np.testing.assert_array_equal(take(x, (4, 0, 1)), x[:, jnp.array([4, 0, 1])])
    first, second = x[:, :4], x[:, 4:]
    np.testing.assert_array_equal(gather({0: (first, 2), 1: (first, 3), 2: (second, 1), 3: (first, 0)}, 4), x[:, jnp.array([2, 3, 5, 0])])


def test_a_frame_that_sees_nothing_is_refused():
    visible = np.array([[True, False], [False, False], [False, False]])
    with pytest.raises(ValueError, match=r"query frames \[1, 2\] see no key frame"):
        attend(*arrays(3, 2), visible)


def test_visibility_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"visible has shape \(2, 3\) and there are 3 query and 2 key frames"):
        attend(*arrays(3, 2), np.ones((2, 3), bool))


def test_what_the_kernel_for_hopper_takes():
    shape = lambda rows, keys, heads=24, dim=128, dtype=jnp.bfloat16: [jax.ShapeDtypeStruct((1, n, heads, dim), dtype) for n in (rows, keys)]
    fits = lambda *q_and_k: has_kernel("flash", *q_and_k)
    assert fits(*shape(7040, 28160)) and fits(*shape(200, 384, 3)) and fits(*shape(128, 256, 1))
    assert not has_kernel("cudnn", *shape(7040, 28160))
    for other in (
        shape(120, 256),
        shape(204, 256),
        shape(128, 128),
        shape(128, 320),
        shape(128, 256, dim=64),
        shape(128, 256, dtype=jnp.float32),
    ):
        assert not fits(*other)


def test_implementations_are_strict_by_name():
    with pytest.raises(ValueError, match="attention has no implementation 'fast'; use one of reference, xla, cudnn, flash"):
        attend(*arrays(2, 2), np.ones((2, 2), bool), "fast")
    with pytest.raises(ConfigError, match="attention kernel needs a Hopper GPU, and this is cpu; use 'reference' or None"):
        attend_filled(*arrays(2, 2), jnp.array([2, 2]), "flash")
    assert pick("cudnn", jnp.dtype(jnp.float32)) == "cudnn"
    assert pick(None, jnp.dtype(jnp.float32)) == pick(None, jnp.dtype(jnp.bfloat16)) == "xla"  # there is no GPU here
    with pytest.raises(RuntimeError, match="cuDNN"):  # never another in its place
        attend(*arrays(2, 2), np.ones((2, 2), bool), "cudnn")
