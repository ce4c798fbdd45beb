"""The public source's packed layers: golden bytes both ways, rules told from codes, whole checkpoints, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from longlive_jax.config import TINY, ConfigError
from longlive_jax.convert.packed import (
    FIELDS,
    convert_packed,
    export_packed,
    header_of,
    is_packed,
    read_linear,
    rules_named,
    rules_of,
    write_linear,
)
from longlive_jax.convert.table import ConversionError
from longlive_jax.convert.wan import TRANSFORMER_TABLE, transformer_shapes
from longlive_jax.ops.matmul import matmul
from longlive_jax.quant.formats import CHOOSING, RULES, encode_nvfp4
from longlive_jax.quant.leaves import NVFP4, dense
from longlive_jax.quant.rewrite import RULE_SETS, fp8, published, rewrite, w4a4
from longlive_jax.streaming.bundles import random_bundle
from longlive_jax.tree import cast, flat_params
from tests.shared import golden

compiled = jax.jit(encode_nvfp4, static_argnames=("rule", "square"))
LINEAR, PATH = "blocks.0.ffn.0", "blocks.0.ffn.up.weight"


def layer(arrays, case):
    """The four arrays of a golden layer."""
    return {field: arrays[f"{case}/quantized_weight_{field}"] for field in FIELDS}


# ---- golden layers -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", ["1d", "2d"])
@pytest.mark.parametrize("rule", ["static_6", "mse"])
def test_golden_layers_load_agree_and_are_written_again(rule, blocks):
    arrays = golden("packed_linear.npz")
    case = f"192to128/{rule}/{blocks}"
    buffers = layer(arrays, case)
    leaf = read_linear(buffers)  # the rule is found in the codes
    assert leaf.shape == (128, 192) and leaf.rule == leaf.activations == rule
    np.testing.assert_allclose(leaf.dense(), arrays[f"{case}/weight_dequantized"], rtol=3e-7)
    y = jax.jit(matmul)(leaf, jnp.asarray(arrays["192to128/input"])) + arrays["192to128/bias"]
    np.testing.assert_allclose(y, arrays[f"{case}/output_float32"], atol=1e-4)
    again = write_linear(leaf)
    assert again["scale_factors"].dtype == ml_dtypes.float8_e4m3fn and again["amax"].shape == (1,)
    for field in FIELDS:
        bits = again[field].view(np.uint8) if field == "scale_factors" else again[field]
        np.testing.assert_array_equal(bits.reshape(buffers[field].shape), buffers[field], field)


@pytest.mark.parametrize("blocks", ["1d", "2d"])
@pytest.mark.parametrize("rule", ["static_6", "mse"])
def test_a_golden_layer_with_a_width_that_16_does_not_divide_is_decoded(rule, blocks):
    arrays = golden("packed_linear.npz")
    case = f"72to100/{rule}/{blocks}"
    weight = read_linear(layer(arrays, case), rule)
    assert weight.shape == (100, 72)
    np.testing.assert_allclose(weight, arrays[f"{case}/weight_dequantized"], rtol=3e-7)


@pytest.mark.parametrize("rule", ["static_6", "mse"])
def test_padding_is_written_as_the_reference_writes_it(rule):
    arrays = golden("packed_linear.npz")
    weight = np.pad(arrays["72to100/weight"], ((0, 0), (0, 8)))  # to a multiple of 16
    written, buffers = write_linear(NVFP4.encode(jnp.asarray(weight), rule)), layer(arrays, f"72to100/{rule}/1d")
    np.testing.assert_array_equal(written["values"], buffers["values"])
    np.testing.assert_array_equal(written["scale_factors"].view(np.uint8), buffers["scale_factors"])
    assert written["metadata"].tolist() == [100, 80, 128, 128]


# ---- rules ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_codes_tell_by_which_rule_they_were_made(rule, square):
    wanted = CHOOSING if rule in CHOOSING else (rule,)
    rng = np.random.default_rng(0)
    heavy = rng.standard_t(2, (64, 64)).astype(np.float32)  # scales from one end to the other
    for x in (rng.standard_normal((64, 64)).astype(np.float32), heavy, np.abs(heavy) * 1e-8):
        codes, scales, _ = compiled(jnp.asarray(x), rule, square=square)
        assert rules_of(codes, scales) == wanted
    assert rules_of(np.zeros((16, 8), np.uint8), np.zeros((16, 1))) == RULES  # zeros are zeros by any rule


def test_codes_of_no_rule_are_told():
    codes, scales, _ = compiled(jnp.asarray(np.random.default_rng(0).standard_normal((64, 64)), jnp.float32), "static_6")
    assert rules_of(np.asarray(codes) & 0x11, scales) == ()  # the largest code is .5
    assert rules_of(codes, np.asarray(scales).astype(np.float32) / 2) == ()
    codes, scales, _ = compiled(jnp.asarray(np.random.default_rng(0).standard_normal((64, 64)), jnp.float32), "mse")
    assert rules_of(np.where(np.arange(64)[:, None] == 3, np.asarray(codes) & 0x11, codes), scales) == ()  # one row is damaged


def test_headers():
    assert rules_named(header_of("mse")) == ("mse", "mse") and rules_named(header_of("mse", "static_6")) == ("mse", "static_6")
    assert rules_named(header_of("mse", "none")) == ("mse", "mse")
    public = {"format": "nvfp4", "scale_rule": "static_6", "weight_scale_rule": None, "activation_scale_rule": "mse"}
    assert rules_named(header_of("mse") | {"quantization": public}) == ("static_6", "mse")
    assert rules_named(header_of("mse") | {"checkpoint_version": "1", "quantization": None}) == (None, None)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"checkpoint_format": "longlive_generator_te_nvfp4"}, "'longlive_generator_te_nvfp4' where packed layers have"),
        ({"checkpoint_version": 2}, "checkpoint_version is 2, and this package reads 1; update"),
        ({"quantization": '["mse"]'}, "and not names and rules"),
        ({"quantization": '{"scale_rule"'}, "and not names and rules"),
        ({"quantization": {"scale_rule": "static_5"}}, "names the rule 'static_5'"),
    ],
)
def test_headers_of_other_files_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        rules_named(header_of("mse") | change)
    with pytest.raises(ConfigError, match="static_5"):
        header_of("static_5")


# ---- whole checkpoints ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def model(rule):
    """A TINY transformer's weights, quantised by ``rule``."""
    return rewrite(cast(flat_params(random_bundle(TINY).transformer), jnp.bfloat16), published(w4a4(rule)))[0]


@functools.cache
def shapes():
    return {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in model("mse").items()}


def checkpoint(rule="mse"):
    tensors, header = export_packed(TRANSFORMER_TABLE, model(rule), transformer_shapes(TINY.transformer))
    return {f"model.{name}": x for name, x in tensors.items()}, header


read = lambda tensors, **more: convert_packed(TRANSFORMER_TABLE, tensors, shapes(), **more)


def test_a_checkpoint_comes_back_bit_for_bit():
    tensors, header = checkpoint()
    assert is_packed(tensors) and not is_packed(["head.head.weight"])
    assert f"model.{LINEAR}.bias" in tensors and f"model.{LINEAR}.weight" not in tensors
    for options in ({"header": header}, {"rule": "mse"}, {}):
        found = read(tensors, **options)
        assert list(found) == list(shapes()) and found[PATH].rule == "mse"
        for path, weight in model("mse").items():
            assert type(found[path]) is NVFP4 or not isinstance(weight, NVFP4)
            for a, b in zip(jax.tree.leaves(found[path]), jax.tree.leaves(weight), strict=True):
                np.testing.assert_array_equal(np.asarray(a).astype(np.float32), np.asarray(b).astype(np.float32), path)
    assert read(tensors, activations="none")[PATH].activations == "none"


def test_another_rule_than_said_is_refused_with_every_name():
    tensors, _ = checkpoint("static_6")
    with pytest.raises(ConversionError, match="said to be mse, but codes and scales are those of static_6") as error:
        read(tensors, header=header_of("mse"))
    (refused,) = error.value.problems.values()
    assert len(refused) == 10 * TINY.transformer.layers and any(LINEAR in line for line in refused)
    with pytest.raises(ConfigError, match="names the rule 'mse' and rule='static_6' was asked for"):
        read(tensors, header=header_of("mse"), rule="static_6")
    with pytest.raises(ConfigError, match="checkpoint_version is 3"):
        read(tensors, header=header_of("static_6") | {"checkpoint_version": 3})


def test_one_layer_of_another_rule_is_named():
    tensors, header = checkpoint()
    other = write_linear(model("static_4")[PATH])
    with pytest.raises(ConversionError, match=rf"{LINEAR}: .* those of static_4; name the rule") as error:
        read(tensors | {f"model.{LINEAR}.quantized_weight_{field}": x for field, x in other.items()}, header=header)
    assert [len(lines) for lines in error.value.problems.values()] == [1]


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("amax", lambda x: x.astype(ml_dtypes.bfloat16), "amax is bfloat16, not float32"),
        ("amax", lambda x: x * np.nan, "not one finite magnitude"),
        ("scale_factors", lambda x: x.astype(ml_dtypes.bfloat16), "scale_factors is bfloat16, not float8_e4m3fn"),
        ("scale_factors", lambda x: x[:-1], r"scale_factors is \(\d+,\), and metadata"),
        ("scale_factors", lambda x: x.view(np.uint8) | 0x7F, "NaN or negative"),
        ("values", lambda x: x[:-1], "values is"),
        ("values", lambda x: x & 0x33, "those of no rule that is known"),
        ("metadata", lambda x: x + np.int32([0, 0, 128, 0]), "is not .out, in, out padded to 128"),
        ("metadata", lambda x: x + np.int32([-1, 0, 0, 0]), "blocks.0.ffn.up.weight is"),
        ("metadata", None, "lacks quantized_weight_metadata"),
    ],
)
def test_damaged_layers_are_named(field, value, message):
    tensors, header = checkpoint()
    name = f"model.{LINEAR}.quantized_weight_{field}"
    x = tensors.pop(name)
    with pytest.raises(ConversionError, match=message) as error:
        read(tensors if value is None else tensors | {name: value(x)}, header=header)
    assert LINEAR in str(error.value)


def test_layers_without_a_place_and_arrays_that_do_not_belong_together():
    tensors, _ = checkpoint()
    extra = {f"model.blocks.9.ffn.0.quantized_weight_{field}": tensors[f"model.{LINEAR}.quantized_weight_{field}"] for field in FIELDS}
    with pytest.raises(ConversionError, match=r"no place \(1\):\n  blocks.9.ffn.0 -> blocks.9.ffn.up.weight"):
        read(tensors | extra)
    with pytest.raises(ConfigError, match="packed layer: lacks quantized_weight_values"):
        read_linear({})


def test_what_the_packed_layout_does_not_hold():
    params = cast(flat_params(random_bundle(TINY).transformer), jnp.bfloat16)
    with pytest.raises(ConfigError, match="no weight is NVFP4"):
        export_packed(TRANSFORMER_TABLE, params)
    with pytest.raises(ConversionError, match=rf"{PATH} is FP8"):
        export_packed(TRANSFORMER_TABLE, rewrite(params, published(fp8()))[0])
    with pytest.raises(ConfigError, match="several rules"):
        export_packed(TRANSFORMER_TABLE, model("mse") | {PATH: model("static_4")[PATH]}, transformer_shapes(TINY.transformer))


def test_weights_without_activations_are_written_too():
    params = rewrite(cast(flat_params(random_bundle(TINY).transformer), jnp.bfloat16), RULE_SETS["w4a16"])[0]
    tensors, header = export_packed(TRANSFORMER_TABLE, params, transformer_shapes(TINY.transformer))
    found = read(tensors, header=header, activations="none")
    np.testing.assert_array_equal(dense(found[PATH]), dense(params[PATH]))
    assert found[PATH].activations == "none"
