"""Kinds of weight as pytrees: jit, scan over layers, vmap, donation, shardings, checkpoints, bundles and names."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.checkpoint import KINDS as KINDS_FILE
from longlive_jax.checkpoint import CheckpointError, Checkpoints, load_parts, save_bundle
from longlive_jax.config import TINY, ConfigError
from longlive_jax.ops.matmul import matmul
from longlive_jax.quant.leaves import FP8, NVFP4, Dynamic, Int8, LoRA, Recipe, abstract_leaf, dense, flatten, leaf_specs, nbytes, unflatten
from longlive_jax.quant.lora import add_lora
from longlive_jax.quant.rewrite import published, rewrite
from longlive_jax.sharding import make_mesh
from longlive_jax.streaming.bundles import random_bundle
from longlive_jax.tree import cast, flat_params
from tests.programs import quick

LAYERS, OUT, IN = 3, 32, 64
W = np.random.default_rng(0).normal(size=(LAYERS, OUT, IN)).astype(np.float32)


def lora(base):
    lead = base.shape[:-2]
    return LoRA(base=base, a=jnp.full((*lead, 4, IN), 0.5), b=jnp.full((*lead, OUT, 4), 0.25), scaling=0.5)


def nvfp4(w):
    return NVFP4.encode(w, "static_6", "static_6")


QUICK = Recipe("static_6", "static_6", "static_6")  # compiles in less time than the rules that choose
MAKE = {"fp8": quick(FP8.encode), "int8": quick(Int8.encode), "nvfp4": quick(nvfp4), "dynamic": lambda w: Dynamic.encode(w, QUICK)}
MAKE["lora"] = lambda w: lora(MAKE["nvfp4"](w))


@pytest.fixture(scope="module", params=MAKE)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def leaf(kind):
    """One layer."""
    return MAKE[kind](jnp.asarray(W[0]))


@pytest.fixture(scope="module")
def stack(kind):
    """All layers, encoded as a stack."""
    return MAKE[kind](jnp.asarray(W))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32)), a, b)


# ---- transformations -----------------------------------------------------------------------------------------------------------------------


def test_a_leaf_has_the_shape_of_the_dense_weight(kind, leaf, stack):
    assert leaf.shape == dense(leaf).shape == (OUT, IN) and leaf.ndim == 2 and leaf.size == OUT * IN
    assert stack.shape == dense(stack).shape == W.shape and stack.ndim == 3
    assert leaf.dtype == jnp.float32 and dense(leaf, jnp.bfloat16).dtype == jnp.bfloat16
    low = 0.5 * 4 * 0.5 * 0.25 if kind == "lora" else 0
    assert np.linalg.norm(dense(leaf) - low - W[0]) < 0.11 * np.linalg.norm(W[0])


def test_a_stack_is_its_layers(kind, leaf, stack):
    layers = [MAKE[kind](jnp.asarray(w)) for w in W]
    same(jax.tree.map(lambda *x: jnp.stack(x), *layers), stack)
    same(jax.tree.map(lambda x: x[0], stack), leaf)


def test_scan_and_vmap_over_layers_are_a_loop(stack):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(16, IN)), jnp.float32)
    grow = lambda y: jnp.concatenate([y, y], -1)
    loop, each = x, []
    for i in range(LAYERS):
        layer = jax.tree.map(lambda v, i=i: v[i], stack)
        each.append(quick(matmul)(layer, x))
        loop = grow(quick(matmul)(layer, loop))
    scanned, _ = quick(lambda s, x: jax.lax.scan(lambda x, layer: (grow(matmul(layer, x)), None), x, s))(stack, x)
    np.testing.assert_allclose(scanned, loop, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(quick(jax.vmap(matmul, (0, None)))(stack, x), jnp.stack(each), rtol=1e-5, atol=1e-4)


def test_the_gradient_through_a_scan_reaches_what_is_trained(kind, stack):
    """And the input; ``jax.grad`` is given arrays, and the leaves are made inside."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(16, IN)), jnp.float32)
    names = {"dynamic": ("weight",), "lora": ("a", "b")}.get(kind, ())

    def loss(part, x):
        body = lambda x, layer: (x + matmul(layer, x).mean(-1, keepdims=True), None)
        return (jax.lax.scan(body, x, replace(stack, **part))[0] ** 2).mean()

    part, dx = quick(jax.grad(loss, (0, 1)))({n: vars(stack)[n] for n in names}, x)
    assert float(jnp.abs(dx).min()) > 0
    for n in names:
        assert part[n].shape == vars(stack)[n].shape and np.all(np.any(part[n], (1, 2))), n


def test_no_gradient_reaches_quantised_values():
    leaf = MAKE["fp8"](jnp.asarray(W[0]))
    grads = jax.grad(lambda leaf: matmul(leaf, jnp.ones((16, IN))).sum())(leaf)
    assert not np.any(grads.scale) and not np.any(np.asarray(grads.values, np.float32))
    with pytest.raises(TypeError, match="uint8"):
        jax.grad(lambda leaf: matmul(leaf, jnp.ones((16, IN))).sum())(MAKE["nvfp4"](jnp.asarray(W[0])))


def test_donated_leaves_give_their_buffers(leaf):
    mine = jax.tree.map(jnp.copy, leaf)
    out = jax.jit(lambda leaf: jax.tree.map(jnp.flip, leaf), donate_argnums=0)(mine)
    assert jax.tree.structure(out) == jax.tree.structure(leaf)
    assert all(x.is_deleted() for x in jax.tree.leaves(mine))


def test_what_differs_in_static_fields_differs_in_structure():
    one = jax.eval_shape(NVFP4.encode, W[0])
    assert jax.tree.structure(one) != jax.tree.structure(replace(one, activations="none"))
    assert jax.tree.structure(one) != jax.tree.structure(jax.eval_shape(FP8.encode, W[0]))


def test_cast_leaves_quantised_values_and_scales(kind, leaf):
    out = cast({"w": leaf, "x": jnp.ones(3)}, jnp.bfloat16)
    assert out["x"].dtype == jnp.bfloat16
    types = {
        "fp8": ["float8_e4m3fn", "float32"],
        "int8": ["int8", "float32"],
        "nvfp4": ["uint8", "float8_e4m3fn", "float32"],
        "dynamic": ["bfloat16", "uint32"],
        "lora": ["uint8", "float8_e4m3fn", "float32", "bfloat16", "bfloat16"],
    }
    assert [str(x.dtype) for x in jax.tree.leaves(out["w"])] == types[kind]


def test_bytes():
    assert nbytes(jax.eval_shape(FP8.encode, W[0])) == nbytes(jax.eval_shape(Int8.encode, W[0])) == OUT * IN + 4 * OUT
    assert nbytes(jax.eval_shape(NVFP4.encode, W)) == LAYERS * (OUT * IN * 9 // 16 + 4)


# ---- shardings -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [P(("data", "seq"), None), P(None, "data"), P("seq"), P()])
def test_values_inherit_the_sharding_and_scales_follow(leaf, stack, spec):
    mesh = make_mesh(2, 2)
    for weight, whole in ((leaf, spec), (stack, P(None, *spec))):
        specs = leaf_specs(weight, whole)
        placed = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), weight, specs)
        same(placed, weight)
    rows, columns = (*spec, None, None)[:2]
    lead = (None,)
    expected = {
        FP8: lambda s: (s.values, s.scale) == (P(*lead, rows, columns), P(*lead, rows, None)),
        Int8: lambda s: (s.values, s.scale) == (P(*lead, rows, columns), P(*lead, rows, None)),
        NVFP4: lambda s: (s.codes, s.scales, s.scale) == (P(*lead, rows, columns), P(*lead, rows, columns), P(*lead)),
        Dynamic: lambda s: (s.weight, s.seed) == (P(*lead, rows, columns), P(*lead)),
        LoRA: lambda s: (s.base.codes, s.a, s.b) == (P(*lead, rows, columns), P(*lead, None, columns), P(*lead, rows, None)),
    }
    assert expected[type(stack)](leaf_specs(stack, P(None, *spec)))


def test_the_spec_of_an_array_is_its_own():
    assert leaf_specs(jnp.ones((2, 2)), P("data")) == P("data")


# ---- files ---------------------------------------------------------------------------------------------------------------------------------


def abstract_of(tree, mesh=None):
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P()) if mesh else x.sharding)
    return jax.tree.map(place, tree)


def test_orbax_brings_leaves_back(tmp_path):
    state = {name: make(jnp.asarray(W[0])) for name, make in MAKE.items()}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        out = checkpoints.restore(abstract_of(state, make_mesh(2, 1)))
    same(out, state)
    assert [x.dtype for x in jax.tree.leaves(out)] == [x.dtype for x in jax.tree.leaves(state)]


def test_orbax_names_the_path_of_another_kind(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"blocks.0.q.weight": MAKE["fp8"](jnp.asarray(W[0]))}, {})
        with pytest.raises(CheckpointError) as caught:
            checkpoints.restore(abstract_of({"blocks.0.q.weight": MAKE["nvfp4"](jnp.asarray(W[0]))}))
    for words in (f"missing blocks.0.q.weight/codes {(OUT, IN // 2)}", "not known blocks.0.q.weight/values", "scale has shape"):
        assert words in str(caught.value), caught.value


def test_names_and_back(leaf):
    params = {"a.weight": leaf, "a.bias": jnp.ones(3)}
    arrays, kinds = flatten(params)
    if isinstance(leaf, Dynamic):
        assert list(arrays) == ["a.weight", "a.bias"] and not kinds
        return
    assert all(name.startswith("a.weight.") for name in arrays if name != "a.bias")
    back = unflatten(arrays, kinds)
    same({n: back[n] for n in params}, params)
    found = abstract_leaf(kinds["a.weight"], leaf.shape)
    assert jax.tree.structure(found) == jax.tree.structure(leaf)
    assert [x.shape for x in jax.tree.leaves(found)] == [x.shape for x in jax.tree.leaves(leaf)]


def test_a_file_of_unknown_or_incomplete_kinds_is_named():
    arrays, kinds = flatten({"w": jax.eval_shape(FP8.encode, W[0])})
    with pytest.raises(ConfigError, match="w is of an unknown kind 'INT3'"):
        unflatten(arrays, {"w": kinds["w"] | {"kind": "INT3"}})
    with pytest.raises(ConfigError, match="unknown kind 'INT3'"):
        abstract_leaf({"kind": "INT3"}, (2, 2))
    with pytest.raises(ConfigError, match=r"recorded as FP8, but w\.scale is missing"):
        unflatten({"w.values": arrays["w.values"]}, kinds)


def test_a_bundle_holds_any_kind(tmp_path):
    model = cast(random_bundle(TINY).transformer, jnp.bfloat16)
    params, _ = rewrite(flat_params(model), [(r"blocks\.1\.ffn\.up\.weight", "fp8"), *published("w4a16_static_6")])
    params = add_lora(params, [r"blocks\.0\.ffn\.up\.weight", r"time_projection\.weight"], rank=2, key=jax.random.key(0), dtype=jnp.bfloat16)
    save_bundle(tmp_path, TINY, {"transformer": params}, {})
    _, loaded = load_parts(tmp_path, ("transformer",), "bfloat16")
    out = flat_params(loaded)
    same(out, params)
    assert (
        type(out["blocks.0.ffn.up.weight"].base) is NVFP4
        and type(out["blocks.1.ffn.up.weight"]) is FP8
        and type(out["time_projection.weight"]) is LoRA
    )
    assert [x.dtype for x in jax.tree.leaves(out)] == [x.dtype for x in jax.tree.leaves(params)]

    kinds = (tmp_path / KINDS_FILE).read_text()
    (tmp_path / KINDS_FILE).write_text(kinds.replace("transformer.blocks.1.ffn.up", "transformer.blocks.7.ffn.up"))
    with pytest.raises(CheckpointError, match=r"names weights that its model lacks: transformer\.blocks\.7\.ffn\.up\.weight"):
        load_parts(tmp_path, ("transformer",))
    (tmp_path / KINDS_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"not known transformer\.blocks\.0\.self_attn\.q\.weight\.codes"):
        load_parts(tmp_path, ("transformer",))
    save_bundle(tmp_path, TINY, {"transformer": flat_params(model)}, {})
    assert not (tmp_path / KINDS_FILE).exists()
