"""Number formats: byte for byte against the public reference, written-out oracles, and what becomes of values that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.quant.formats import RULES, decode_nvfp4, encode_nvfp4, pad_to, swizzle, tensor_amax, tensor_scale, unswizzle
from tests.shared import golden

compiled = jax.jit(encode_nvfp4, static_argnames=("rule", "square"))
BLOCKS = {"1d": False, "2d": True}


@pytest.fixture(scope="module", autouse=True)
def optimised():
    """The order of float32 operations must survive the optimisations of the compiler, so they are on here."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def bits(scales):
    return np.asarray(scales).view(np.uint8)


# ---- the public reference ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encode", [encode_nvfp4, compiled], ids=["eager", "jit"])
def test_nvfp4_is_byte_identical(encode):
    arrays = golden("nvfp4.npz")
    cases = sorted({key.split("/")[0] for key in arrays})
    assert len(cases) == 4
    for case in cases:
        for rule in RULES:
            for name, square in BLOCKS.items():
                want = {k.split("/")[-1]: v for k, v in arrays.items() if k.startswith(f"{case}/{rule}/{name}/")}
                codes, scales, scale = encode(jnp.asarray(arrays[f"{case}/x"]), rule, square=square)
                np.testing.assert_array_equal(codes, want["packed"], f"{case} {rule} {name}")
                np.testing.assert_array_equal(bits(scales), want["scales_e4m3_bits"], f"{case} {rule} {name}")
                np.testing.assert_array_equal(bits(swizzle(scales)), want["scales_blocked_bits"], f"{case} {rule} {name}")
                assert scale == tensor_scale(want["amax"], rule)
                if case != "tiny":  # the others are exact in bfloat16
                    assert tensor_amax(scale, rule) == want["amax"]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("rule", ["static_6", "mse"])
@pytest.mark.parametrize("shape", ["192to128", "72to100"])
def test_packed_linear_layers_load_and_agree(shape, rule, name):
    arrays = golden("packed_linear.npz")
    case = {k.removeprefix(f"{shape}/{rule}/{name}/"): v for k, v in arrays.items() if k.startswith(f"{shape}/{rule}/{name}/")}
    rows, columns, padded_rows, padded_columns = case["quantized_weight_metadata"]
    values, amax = case["quantized_weight_values"], case["quantized_weight_amax"]

    # read
    blocked = jnp.asarray(case["quantized_weight_scale_factors"]).view(jnp.float8_e4m3fn)
    scales = unswizzle(blocked, int(padded_rows), int(padded_columns) // 16)
    np.testing.assert_array_equal(bits(scales), case["weight_scales_natural"])
    weight = decode_nvfp4(jnp.asarray(values), scales, tensor_scale(amax, rule))[:rows, :columns]
    np.testing.assert_allclose(weight, case["weight_dequantized"], rtol=3e-7)

    # written again from the dense weight
    padded = pad_to(pad_to(jnp.asarray(arrays[f"{shape}/weight"]), 64), 128, -2)
    codes, scales, scale = compiled(padded, rule, square=BLOCKS[name])
    np.testing.assert_array_equal(codes, values)
    np.testing.assert_array_equal(bits(swizzle(scales)), case["quantized_weight_scale_factors"])
    assert tensor_amax(scale, rule) == amax

    # the product with an encoded activation
    x = jnp.asarray(arrays[f"{shape}/input"])
    flat = pad_to(pad_to(x.reshape(-1, columns), 64), 128, -2)
    codes, scales, scale = compiled(flat, rule)
    np.testing.assert_array_equal(codes, case["input_values"])
    np.testing.assert_array_equal(bits(swizzle(scales)), case["input_scale_factors"])
    activation = decode_nvfp4(codes, scales, scale)[: x.size // columns, :columns]
    out = (activation @ weight.T + arrays[f"{shape}/bias"]).reshape(case["output_float32"].shape)
    np.testing.assert_allclose(out, case["output_float32"], atol=1e-4)
