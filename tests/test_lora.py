"""Adapters: added by rule, trained alone, merged and taken out, read and written in the public layout."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from longlive_jax.config import TINY, WAN_5B, ConfigError
from longlive_jax.convert.adapters import read_peft, write_peft
from longlive_jax.convert.table import ConversionError
from longlive_jax.convert.wan import TRANSFORMER_TABLE_DIFFUSERS
from longlive_jax.model.frames import clip_frames, everything
from longlive_jax.model.transformer import VideoTransformer
from longlive_jax.ops.matmul import matmul
from longlive_jax.quant.leaves import FP8, LoRA, dense
from longlive_jax.quant.lora import add_lora, join, merge, split, unmerge
from longlive_jax.quant.rewrite import published, rewrite
from longlive_jax.streaming.bundles import random_bundle
from longlive_jax.tree import abstract, flat_params, with_params
from tests.programs import quick

KEY, PATH = jax.random.key(0), "blocks.0.ffn.up.weight"
RANK = 5


@pytest.fixture(scope="module")
def model():
    return random_bundle(TINY).transformer


@pytest.fixture(scope="module")
def params(model):
    return flat_params(model)


@pytest.fixture(scope="module")
def adapted(params):
    """Adapters over all block linears, with ``b`` as training would leave it: not zero."""
    out = add_lora(params, rank=RANK, alpha=2.0, key=KEY)
    noise = lambda i, x: 0.1 * jax.random.normal(jax.random.fold_in(KEY, i), x.b.shape)
    return {p: replace(x, b=noise(i, x)) if isinstance(x, LoRA) else x for i, (p, x) in enumerate(out.items())}


def forward(model, z, text):
    frames = clip_frames(1, z.shape[1], 1)
    return model(z, jnp.full(z.shape[:2], 500.0), model.read(text), frames, everything(frames, frames))[0]


velocity = quick(forward)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(1, 2, *TINY.grid, TINY.transformer.channels))
    return jnp.asarray(z, jnp.float32), jnp.asarray(rng.normal(size=(1, 1, TINY.transformer.text_len, TINY.transformer.text_dim)), jnp.float32)


# ---- adding --------------------------------------------------------------------------------------------------------------------------------


def test_a_fresh_adapter_changes_nothing(params):
    out = add_lora(params, rank=RANK, key=KEY)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, TINY.transformer.dim)), jnp.float32)
    assert isinstance(out[PATH], LoRA) and np.array_equal(matmul(out[PATH], x), matmul(params[PATH], x))
    assert sum(isinstance(v, LoRA) for v in out.values()) == 10 * TINY.transformer.layers
    assert add_lora(params, [r"blocks\.0\.ffn\.up\.weight"], rank=2, alpha=8, key=KEY)[PATH].scaling == 4


def test_the_first_values_depend_on_key_and_path_alone(params):
    all_of_them, alone = add_lora(params, rank=RANK, key=KEY), add_lora(params, [PATH], rank=RANK, key=KEY)
    assert np.array_equal(all_of_them[PATH].a, alone[PATH].a)
    assert not np.array_equal(all_of_them[PATH].a, all_of_them["blocks.1.ffn.up.weight"].a)
    assert not np.array_equal(alone[PATH].a, add_lora(params, [PATH], rank=RANK, key=jax.random.key(1))[PATH].a)


@pytest.mark.parametrize("init, bound, deviation", [("kaiming", 512**-0.5, (3 * 512) ** -0.5), ("gaussian", np.inf, 1 / 64)])
def test_the_first_values_are_spread_as_stated(init, bound, deviation):
    a = add_lora({"w": jnp.zeros((64, 512))}, ["w"], rank=64, key=KEY, init=init)["w"].a
    assert abs(a).max() <= bound and abs(float(a.std()) / deviation - 1) < 0.02 and abs(float(a.mean())) < 4 * deviation / a.size**0.5


def test_the_published_adapter_of_the_5b_model():
    """Rank 128 over 300 linears: 322.4 M parameters (spec/training.md §4.2)."""
    model = abstract(lambda: VideoTransformer(WAN_5B.transformer, rngs=nnx.Rngs(0)))
    base, _ = rewrite(flat_params(model), published("w4a4"))
    adapters, frozen = split(add_lora(base, rank=128, alpha=128, key=KEY))
    assert len(adapters) == 600 and sum(x.size for x in adapters.values()) == 322_437_120
    assert sum(isinstance(x, LoRA) and x.scaling == 1 for x in frozen.values()) == 300


@pytest.mark.parametrize(
    "targets, options, words",
    [
        ([PATH], {"rank": 0}, "rank=0 must be positive"),
        ([PATH], {"rank": 65}, "rank=65 is more than blocks.0.ffn.up.weight (96, 64) can use; use at most 64"),
        ([PATH], {"init": "zeros"}, "init='zeros' is not known"),
        (["blocks.9.q.weight"], {}, "'blocks.9.q.weight' matches no weight; near it are blocks."),
        ([r"blocks\.0\.norm3\.weight"], {}, "only matrices"),
    ],
)
def test_bad_targets_and_ranks_are_named(params, targets, options, words):
    with pytest.raises(ConfigError) as caught:
        add_lora(params, targets, **{"rank": 2, "key": KEY} | options)
    assert words in str(caught.value)


def test_a_second_adapter_is_refused(adapted):
    with pytest.raises(ConfigError, match="has an adapter already"):
        add_lora(adapted, rank=2, key=KEY)


# ---- training ------------------------------------------------------------------------------------------------------------------------------


def test_the_optimizer_sees_the_adapters_alone(model, params, inputs):
    """Three steps over an FP8 base lower the loss; the base is bit for bit what it was."""
    base, _ = rewrite(params, published("fp8"))
    adapters, frozen = split(add_lora(base, rank=RANK, key=KEY))
    assert set(adapters) == {f"{p}.{side}" for p, x in base.items() if isinstance(x, FP8) for side in "ab"}
    target = velocity(model, *inputs) + 0.3
    loss = lambda adapters, frozen: ((forward(with_params(model, join(frozen, adapters)), *inputs) - target) ** 2).mean()
    optimizer = optax.adam(1e-3)

    @quick
    def step(adapters, state, frozen):
        value, grads = jax.value_and_grad(loss)(adapters, frozen)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(adapters, updates), state, value

    state, values = optimizer.init(adapters), []
    for _ in range(3):
        adapters, state, value = step(adapters, state, frozen)
        values.append(float(value))
    assert values[2] < values[1] < values[0]
    out = join(frozen, adapters)
    assert all(out[p].base is x if isinstance(x, FP8) else out[p] is x for p, x in base.items())


def test_split_and_join(adapted):
    adapters, frozen = split(adapted)
    back = join(frozen, adapters)
    assert all(a is b for a, b in zip(jax.tree.leaves(adapted), jax.tree.leaves(back), strict=True))
    assert not any(x.shape == (RANK, TINY.transformer.dim) for x in jax.tree.leaves(frozen))
    missing = {name: x for name, x in adapters.items() if name != f"{PATH}.a"} | {"more.b": 1}
    with pytest.raises(ConfigError, match=rf"missing \['{PATH}.a'\] \(1\), not known \['more.b'\]"):
        join(frozen, missing)
    with pytest.raises(ConfigError, match="no weight has an adapter"):
        split({"w": jnp.ones(3)})


# ---- merging -------------------------------------------------------------------------------------------------------------------------------


def test_merged_is_unmerged(model, params, adapted, inputs):
    merged = merge(adapted)
    assert all(type(merged[p]) is type(x) and merged[p].dtype == x.dtype for p, x in params.items())
    x = adapted[PATH]
    exact = np.asarray(x.base, float) + x.scaling * np.asarray(x.b, float) @ np.asarray(x.a, float)
    np.testing.assert_allclose(merged[PATH], exact, rtol=0, atol=1e-6)
    with_merged, with_adapters = (velocity(with_params(model, p), *inputs) for p in (merged, adapted))
    assert float(jnp.abs(with_adapters - velocity(model, *inputs)).max()) > 1e-2  # the adapters do something
    scale = float(jnp.abs(with_merged).max())
    assert float(jnp.abs(with_merged - with_adapters).max()) <= 1e-6 * max(scale, 1), scale
    back = unmerge(merged, adapted)
    for p, leaf in adapted.items():
        if isinstance(leaf, LoRA):
            np.testing.assert_allclose(back[p].base, leaf.base, rtol=0, atol=1e-6)
            assert back[p].a is leaf.a and back[p].scaling == leaf.scaling


def test_merging_into_quantised_weights_is_refused(params):
    base, _ = rewrite(params, [(PATH, "fp8")])
    with pytest.raises(ConfigError, match=r"blocks\.0\.ffn\.up\.weight is an adapter over FP8: merge into the dense weight, then rewrite"):
        merge(add_lora(base, [PATH], rank=2, key=KEY))


def test_unmerging_what_was_not_merged_is_refused(adapted):
    with pytest.raises(ConfigError, match=r"the merged weights lack \['blocks\.0\.ffn\.up\.weight'\] \(1\)"):
        unmerge({p: dense(x) for p, x in adapted.items() if p != PATH}, adapted)


# ---- files ---------------------------------------------------------------------------------------------------------------------------------

PREFIX = "base_model.model.blocks.0.ffn.0.lora_"


def test_the_public_layout_is_written_and_read(params, adapted):
    tensors = write_peft(adapted)
    d, f = TINY.transformer.dim, TINY.transformer.ffn_dim
    assert len(tensors) == 20 * TINY.transformer.layers
    assert tensors[f"{PREFIX}A.weight"].shape == (RANK, d) and tensors[f"{PREFIX}B.weight"].shape == (f, RANK)
    assert {"base_model.model.blocks.1.self_attn.q.lora_A.weight", "base_model.model.blocks.1.ffn.2.lora_B.weight"} <= set(tensors)
    out = read_peft(tensors, params, alpha=2)
    assert jax.tree.structure(out) == jax.tree.structure(adapted)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(adapted), strict=True))
    assert read_peft(tensors, params)[PATH].scaling == 1  # the published alpha is the rank


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
        lambda name: name.replace("base_model.model.", "base_model.model.model."),
        lambda name: name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."),
        lambda name: name.removeprefix("base_model.model."),
    ],
)
def test_containers_around_names_are_taken_off(params, adapted, rename):
    out = read_peft({rename(name): x for name, x in write_peft(adapted).items()}, params, alpha=2)
    assert np.array_equal(out[PATH].b, adapted[PATH].b) and np.array_equal(out["blocks.1.ffn.up.weight"].a, adapted["blocks.1.ffn.up.weight"].a)


def test_other_tables_and_any_kind_of_base(params, adapted):
    tensors = write_peft(adapted, table=TRANSFORMER_TABLE_DIFFUSERS)
    assert "base_model.model.blocks.0.attn1.to_out.0.lora_A.weight" in tensors
    base, _ = rewrite(params, [(PATH, "fp8")])
    assert isinstance(read_peft(tensors, base, table=TRANSFORMER_TABLE_DIFFUSERS)[PATH].base, FP8)


def test_an_adapter_of_another_base_is_listed(params, adapted):
    """Everything at once, with rank, names and sizes."""
    tensors = write_peft(adapted)
    d = TINY.transformer.dim
    tensors[f"{PREFIX}A.weight"] = np.zeros((8, 2 * d), np.float32)
    del tensors["base_model.model.blocks.1.ffn.2.lora_B.weight"]
    tensors["base_model.model.blocks.7.self_attn.q.lora_A.weight"] = np.zeros((8, d), np.float32)
    tensors["base_model.model.blocks.0.norm3.bias"] = np.zeros(d, np.float32)
    with pytest.raises(ConversionError) as caught:
        read_peft(tensors, params)
    for words in (
        f"blocks.0.ffn.up.weight is [96, {d}]; {PREFIX}A.weight is of rank 8: A (8, {2 * d}), B (96, {RANK})",
        "half adapters (1)", "blocks.1.ffn.down.weight has lora_A alone",
        "weights that this base lacks (1)", f"base_model.model.blocks.7.self_attn.q.lora_A.weight (8, {d}) -> blocks.7.self_attn.q.weight",
        "names that are no adapter's (1)", "base_model.model.blocks.0.norm3.bias",
    ):  # fmt: skip
        assert words in str(caught.value), (words, str(caught.value))


def test_files_without_adapters_and_second_adapters_are_refused(params, adapted):
    for call, words in (
        (functools.partial(read_peft, {}, params), "holds no lora_A"),
        (functools.partial(write_peft, params), "no weight has an adapter"),
        (functools.partial(read_peft, write_peft(adapted), adapted), "has an adapter already"),
    ):
        with pytest.raises(ConfigError, match=words):
            call()


@pytest.mark.parametrize(
    "side, change, words",
    [
        ("A", lambda a: np.float32(1), r"is of rank none: A \(\), B"),
        ("A", lambda a: a[0], r"is of rank 64: A \(64,\)"),
        ("A", lambda a: a.astype(np.int8), "is int8, its lora_B float32; give an adapter of floating-point numbers"),
        ("B", lambda b: np.where(b == b.max(), np.nan, b), r"lora_B.weight \(96, 5\) holds 1 NaN"),
    ],
)
def test_tensors_that_are_no_adapter_are_named(params, adapted, side, change, words):
    tensors, name = write_peft(adapted), f"{PREFIX}{side}.weight"
    with pytest.raises(ValueError, match=words):
        read_peft(tensors | {name: np.asarray(change(tensors[name]))}, params)
