"""The mesh, the placement rules and their refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.config import ConfigError
from longlive_jax.sharding import (
    REPLICATE,
    REPLICATED_RULES,
    SHARD,
    axis_size,
    check_divides,
    constrain,
    frames_to_heads,
    heads_to_frames,
    local,
    make_mesh,
    spec,
    weight_shardings,
    weight_specs,
)  # fmt: skip

RULES = ((r"norm\.weight", ("width",)), (r".*\.weight", ("rows", None)))


def test_mesh_is_data_by_seq():
    mesh = make_mesh(2, 4)
    assert dict(mesh.shape) == {"data": 2, "seq": 4}
    with jax.set_mesh(mesh):
        assert (axis_size("batch"), axis_size("frames"), axis_size("heads")) == (2, 4, 4)
    assert axis_size("frames") == 1


def test_mesh_needs_its_devices():
    with pytest.raises(ConfigError, match=r"mesh data=3 x seq=3 needs 9 devices and 8 are there; lower mesh\.data or mesh\.seq"):
        make_mesh(3, 3)


def test_first_rule_wins():
    specs = weight_specs({"norm.weight": (8,), "q.weight": (8, 4)}, RULES, SHARD)
    assert specs == {"norm.weight": P(("data", "seq")), "q.weight": P(("data", "seq"), None)}
    assert set(weight_specs({"norm.weight": (8,), "q.weight": (8, 4)}, RULES, REPLICATE).values()) == {P()}
    assert weight_specs({"x": (3,)}, REPLICATED_RULES, SHARD) == {"x": P()}


def test_a_weight_without_a_rule_is_refused():
    with pytest.raises(ConfigError, match=r"no sharding rule matches weight 'q\.scale' of shape \(4,\)"):
        weight_specs({"norm.weight": (8,), "q.weight": (8, 4), "q.scale": (4,)}, RULES, SHARD)


def test_a_rule_without_a_weight_is_refused():
    with pytest.raises(ConfigError, match=r"match no weight: \['norm"):
        weight_specs({"q.weight": (8, 4)}, RULES, SHARD)


def test_weights_that_do_not_divide_are_named():
    sizes = {"norm.weight": (12,), "q.weight": (6, 4), "k.weight": (8, 4)}
    with pytest.raises(ConfigError, match=r"norm\.weight: axis of 12 over 8 devices; q\.weight: axis of 6 over 8 devices; use fewer devices"):
        weight_shardings(sizes, RULES, SHARD, make_mesh(2, 4))
    check_divides(sizes, weight_specs(sizes, RULES, SHARD), {"data": 1, "seq": 2})
    placed = weight_shardings(sizes, RULES, SHARD, make_mesh(1, 2))
    assert placed["q.weight"] == NamedSharding(make_mesh(1, 2), P(("data", "seq"), None))


def test_constrain_places_by_name():
    x = jnp.zeros((2, 8, 3))
    with jax.set_mesh(make_mesh(2, 4)):
        y = jax.jit(lambda x: constrain(x, "batch", "frames", None))(x)
        assert y.sharding.spec == spec("batch", "frames") and y.sharding.shard_shape(y.shape) == (1, 2, 3)
    assert constrain(x, "batch", "frames", None) is x


def test_frames_to_heads_and_back():
    """Inside ``local`` a shard trades its frames of all heads for all frames of its heads."""
    x = np.arange(2 * 8 * 4 * 3, dtype=np.float32).reshape(2, 8, 4, 3)
    frames, heads, seen = ("batch", "frames", None, None), ("batch", None, "heads", None), []

    def there(x):
        y = frames_to_heads(x, frames=1, heads=2)
        seen.append(y.shape)
        return y

    with jax.set_mesh(make_mesh(2, 4)):
        y = jax.jit(local(there, (frames,), heads))(x)
        back = jax.jit(local(lambda y: heads_to_frames(y, frames=1, heads=2), (heads,), frames))(y)
    assert seen == [(1, 8, 1, 3)]
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(back, x)


def test_local_takes_trees_and_nothing():
    """An argument may be a tree of arrays or None, and so may a result."""
    body = lambda pair, none: (pair[0] + pair[1], pair[0], none)
    names = ("batch", "frames")
    a = jnp.arange(64.0).reshape(8, 8)
    with jax.set_mesh(make_mesh(2, 4)):
        total, first, none = jax.jit(local(body, (names, ("batch",)), (names, names, names)))((a, a), None)
    np.testing.assert_array_equal(total, 2 * a)
    np.testing.assert_array_equal(first, a)
    assert none is None


def test_local_results_lie_on_the_whole_mesh():
    """Every input counts as different on every device, so a result that names too few axes is refused."""
    with jax.set_mesh(make_mesh(2, 4)), pytest.raises(ValueError, match="could not infer replication"):
        jax.jit(local(lambda x: x, (("batch",),), ("batch",)))(jnp.arange(8.0))
