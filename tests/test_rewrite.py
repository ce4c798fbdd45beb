"""Rules that put kinds of weight in place: the published exclusion at full size, reports, errors, and whole models that run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.config import TINY, WAN_5B, ConfigError
from longlive_jax.model.frames import block_causal, clip_frames
from longlive_jax.model.layers import MLP
from longlive_jax.model.transformer import VideoTransformer, stack_blocks
from longlive_jax.quant.leaves import FP8, NVFP4, Dynamic, Int8, LoRA, Recipe, dense
from longlive_jax.quant.lora import add_lora
from longlive_jax.quant.rewrite import KINDS, RULE_SETS, Kind, dynamic, published, rewrite, seeded, w4a4
from longlive_jax.streaming.bundles import random_bundle
from longlive_jax.streaming.session import Session
from longlive_jax.tree import abstract, cast, flat_params, with_params
from tests.programs import quick

QUICK = Recipe("static_6", "static_6", "static_6")
KEPT = {
    "text_embedding.up.weight", "text_embedding.down.weight", "time_embedding.up.weight", "time_embedding.down.weight",
    "time_projection.weight", "head.head.weight", "patch_embedding.weight",
}  # fmt: skip


@functools.cache
def wan():
    """The weights of the 5B model in bfloat16, without values."""
    model = abstract(lambda: VideoTransformer(WAN_5B.transformer, rngs=nnx.Rngs(0)))
    return flat_params(jax.eval_shape(functools.partial(cast, dtype=jnp.bfloat16), model))


@pytest.fixture(scope="module")
def bundle():
    return random_bundle(TINY)


@pytest.fixture(scope="module")
def params(bundle):
    return flat_params(bundle.transformer)


# ---- the published exclusion ---------------------------------------------------------------------------------------------------------------


def test_the_published_exclusion_takes_300_linears_of_the_5b_model():
    out, report = rewrite(wan(), RULE_SETS["w4a4"])
    taken = {path for path in out if isinstance(out[path], NVFP4)}
    matrices = {path for path, x in wan().items() if x.ndim == 2 and path.endswith(".weight")}
    assert len(taken) == 300 and matrices - taken == KEPT
    assert all(out[path].shape == wan()[path].shape for path in taken)
    assert report.rows["w4a4"] == (300, 9_814_671_360, 2_760_376_320 + 300 * 4)  # spec/inference.md §4.7, and a tensor scale each
    assert report.rows["other"][0] == 525 and report.before == 2 * 4_999_787_712


@pytest.mark.parametrize("name", RULE_SETS)
def test_every_rule_set_fits_the_5b_model(name):
    kinds = {"fp8": FP8, "int8": Int8, "w4a4": NVFP4, "w4a16": NVFP4, "train_ar": Dynamic, "train_dmd": Dynamic}
    out, report = rewrite(wan(), RULE_SETS[name])
    assert sum(type(x) is kinds[name] for x in out.values()) == 300
    assert all(path in out and not isinstance(out[path], kinds[name]) for path in KEPT)
    assert ("300 weights" in str(report)) and "MiB" in str(report)


def test_training_recipes_are_the_published_ones():
    path = "blocks.0.ffn.up.weight"
    ar, dmd = (rewrite(wan(), RULE_SETS[name])[0][path].recipe for name in ("train_ar", "train_dmd"))
    assert (ar.weights, ar.activations, ar.gradients) == ("static_6", "mse", "mse") and ar.square and ar.stochastic and ar.hadamard
    assert dmd == dataclasses.replace(ar, weights="mse")


# ---- rules ---------------------------------------------------------------------------------------------------------------------------------


def test_the_first_rule_decides_and_the_rest_stays(params):
    rules = [(r"blocks\.0\.ffn\.up\.weight", "dense"), (r".*\.ffn\.up\.weight", w4a4("static_6", implementation="emulated"))]
    out, report = rewrite(params, rules)
    assert list(out) == list(params)
    changed = {path for path in params if out[path] is not params[path]}
    assert changed == {"blocks.1.ffn.up.weight"} and out["blocks.1.ffn.up.weight"].implementation == "emulated"
    assert report.rows["w4a4"][0] == 1 and report.rows["other"][0] == len(params) - 1


def test_an_adapted_weight_has_its_base_rewritten(params):
    path = "blocks.0.ffn.up.weight"
    adapted = add_lora(params, [path], rank=2, key=jax.random.key(0))
    out, _ = rewrite(adapted, [(path, "fp8")])
    assert type(out[path]) is LoRA and type(out[path].base) is FP8 and out[path].a is adapted[path].a


W = np.ones((32, 48), np.float32)


@pytest.mark.parametrize(
    "rules, weights, words",
    [
        (
            [(r"blocks\.0\.ffn\.upp\.weight", "fp8")],
            {},
            ("'blocks\\\\.0\\\\.ffn\\\\.upp\\\\.weight' matches no weight", "blocks.0.ffn.up.weight"),
        ),
        ([("zzz", "fp8")], {}, ("near it are none",)),
        ([("w", "w4a5")], {"w": W}, ("unknown kind of weight 'w4a5'", "did you mean 'w4a")),
        ([("w", "xyz")], {"w": W}, ("unknown kind of weight 'xyz'",)),
        ([("w", "w4a4")], {"w": W[:, :40]}, ("w has 40 along 'in'", "multiple of 16")),
        ([("w", "fp8")], {"w": W[:20]}, ("w has 20 along 'out'", "fp8")),
        ([("w", "dynamic")], {"w": W[:20]}, ("w has 20 along 'out'",)),
        ([("w", "fp8")], {"w": W[0]}, ("w has shape (48,)", "only matrices")),
        ([("w", "fp8")], {"w": np.where(W.cumsum(0) == 3, np.nan, W)}, ("weight w (32, 48) holds 48 NaN",)),
        ([("w", "w4a16")], {"w": np.where(W.cumsum(0) == 3, np.inf, W)}, ("weight w", "48 inf")),
        ([("w", "w4a4")], {"w": jax.eval_shape(FP8.encode, W)}, ("w is FP8 already",)),
    ],
)
def test_bad_input_is_named(params, rules, weights, words):
    with pytest.raises(ConfigError) as caught:
        rewrite(params | weights, rules)
    assert all(word in str(caught.value) for word in words), caught.value


def test_weights_alone_need_no_multiple_along_out_and_int8_none_at_all():
    assert rewrite({"w": jax.ShapeDtypeStruct((20, 41), jnp.float32)}, [("w", "int8")])[0]["w"].shape == (20, 41)
    assert rewrite({"w": jax.ShapeDtypeStruct((20, 48), jnp.float32)}, [("w", "w4a4")])[0]["w"].shape == (20, 48)


def test_a_rule_is_named_or_given():
    assert jax.eval_shape(KINDS["w4a4_static_4"].encode, W).rule == "static_4"
    out, report = rewrite({"w": jnp.asarray(W)}, [("w", Kind("half", lambda w: w.astype(jnp.float16), ()))])
    assert out["w"].dtype == jnp.float16 and report.rows == {"half": (1, W.nbytes, W.nbytes // 2)}


# ---- whole models --------------------------------------------------------------------------------------------------------------------------

FRAMES, CHUNK = 4, 2
NAMES = {"fp8": "fp8", "int8": "int8", "w4a4": w4a4("static_6"), "w4a16": "w4a16_static_6", "dynamic": dynamic(QUICK), "lora": "w4a16_static_6"}


def forward(model, z, text):
    frames = clip_frames(1, FRAMES, CHUNK)
    return model(z, jnp.full((1, FRAMES), 500.0), model.read(text), frames, block_causal(frames, frames))[0]


velocity = quick(forward)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(1, FRAMES, *TINY.grid, TINY.transformer.channels))
    text = rng.normal(size=(1, 1, TINY.transformer.text_len, TINY.transformer.text_dim))
    return jnp.asarray(z, jnp.float32), jnp.asarray(text, jnp.float32)


@pytest.mark.parametrize(
    "kind", [pytest.param(n, marks=pytest.mark.exhaustive if n in ("fp8", "int8", "w4a4", "w4a16") else ()) for n in NAMES]
)
def test_a_whole_model_runs_and_is_near_the_dense_one(bundle, params, inputs, kind):
    """Also stacked, where a scan slices the leaves, and as the dense model of what the leaves stand for."""
    out, _ = rewrite(params, published(NAMES[kind]))
    if kind == "lora":
        out = add_lora(out, rank=4, key=jax.random.key(1))
        out = {p: dataclasses.replace(x, b=x.b + 0.01) if isinstance(x, LoRA) else x for p, x in out.items()}
    model = with_params(bundle.transformer, out)
    v, exact = velocity(model, *inputs), velocity(bundle.transformer, *inputs)
    away = float(jnp.linalg.norm(v - exact) / jnp.linalg.norm(exact))
    assert v.shape == exact.shape and v.dtype == exact.dtype
    assert 1e-3 < away < (0.1 if kind in ("fp8", "int8") else 0.4), away
    if kind in ("int8", "w4a16", "lora"):  # activations as they are: the same function
        like = with_params(bundle.transformer, {path: dense(x) for path, x in out.items()})
        np.testing.assert_allclose(v, velocity(like, *inputs), atol=1e-4)
    if kind in ("w4a4", "lora"):
        np.testing.assert_allclose(velocity(stack_blocks(model), *inputs), v, atol=1e-4)


@pytest.mark.slow
def test_a_session_streams_with_rewritten_weights(bundle, params):
    out, _ = rewrite(params, published("fp8"))
    dense_one = Session(bundle)
    session = Session(bundle._replace(transformer=with_params(bundle.transformer, out)))
    latents = []
    for s in (dense_one, session):
        state, _ = s.step(s.start(0), s.read("A red star."))
        latents.append(s.step(state, s.read("A red star."))[1])
    away = float(jnp.linalg.norm(latents[1] - latents[0]) / jnp.linalg.norm(latents[0]))
    assert 1e-3 < away < 0.5, away


# ---- training ------------------------------------------------------------------------------------------------------------------------------


def test_a_step_rewrites_its_masters_and_seeds_every_layer():
    """Gradients with respect to plain float32 masters; the key decides the rounding."""
    model = MLP(64, 96, 64, rngs=nnx.Rngs(0))
    params, x = flat_params(model), jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 64)), jnp.float32)
    loss = lambda params, x: (with_params(model, params)(x).astype(jnp.float32) ** 2).mean()

    @quick
    @jax.value_and_grad
    def step(params, key):
        leaves, _ = rewrite(cast(params, jnp.bfloat16), [(r"(up|down)\.weight", dynamic(QUICK))])
        return loss(seeded(leaves, key), x.astype(jnp.bfloat16))

    (value, one), (again, same), (_, other) = (step(params, jax.random.key(k)) for k in (1, 1, 2))
    exact = quick(jax.grad(loss))(params, x)
    assert value == again and all(np.array_equal(one[p], same[p]) for p in one)
    for p in ("up.weight", "down.weight"):
        assert one[p].shape == params[p].shape and one[p].dtype == jnp.float32 and not np.array_equal(one[p], other[p])
        cosine = jnp.vdot(one[p], exact[p]) / jnp.linalg.norm(one[p]) / jnp.linalg.norm(exact[p])
        assert 0.9 < cosine < 0.9999, cosine


def test_seeds_differ_between_layers_of_lists_and_of_stacks():
    one = {f"blocks.{i}.weight": Dynamic.encode(jnp.ones((16, 16))) for i in range(3)}
    stack = {"w": Dynamic.encode(jnp.ones((3, 16, 16))), "b": jnp.ones(3)}
    seeds = lambda params: np.concatenate([np.ravel(x.seed) for x in params.values() if isinstance(x, Dynamic)])
    assert len(set(seeds(seeded(one, jax.random.key(0))))) == 3 == len(set(seeds(seeded(stack, jax.random.key(0)))))
    adapted = {"w": LoRA(base=one["blocks.0.weight"], a=jnp.ones((1, 16)), b=jnp.ones((16, 1)))}
    assert seeded(adapted, jax.random.key(0))["w"].base.seed == seeded(one, jax.random.key(0))["blocks.0.weight"].seed != 0
