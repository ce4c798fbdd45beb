"""Number formats: byte for byte against the public reference, written-out oracles, and what becomes of values that are not finite."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.config import ConfigError
from longlive_jax.quant.formats import (
    E2M1,
    RULES,
    as_float4,
    check_finite,
    decode_fp8,
    decode_mxfp4,
    decode_nvfp4,
    divide,
    encode_fp8,
    encode_mxfp4,
    encode_nvfp4,
    hadamard,
    pack,
    pad_to,
    refine,
    round_e2m1,
    swizzle,
    tensor_amax,
    tensor_scale,
    to_e4m3,
    unpack,
    unswizzle,
    value_e2m1,
)
from tests import hlo, run_folder
from tests.shared import golden

compiled = jax.jit(encode_nvfp4, static_argnames=("rule", "square"))
decode = jax.jit(decode_nvfp4, static_argnames="dtype")
rounded = jax.jit(lambda y, key=None: value_e2m1(round_e2m1(y, key)))
encode_row, decode_row = jax.jit(encode_fp8, static_argnames="axis"), jax.jit(decode_fp8, static_argnames="dtype")
encode_mx, decode_mx = jax.jit(encode_mxfp4, static_argnames="rule"), jax.jit(decode_mxfp4)
BLOCKS = {"1d": False, "2d": True}
SMALL = (32, 64)  # one shape for small tests, so that they share what is compiled


def normal(shape=SMALL, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def bits(scales):
    return np.asarray(scales).view(np.uint8)


# ---- the public reference ------------------------------------------------------------------------------------------------------------------


def compare_with_golden(encode):
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


def test_nvfp4_is_byte_identical():
    compare_with_golden(encode_nvfp4)


@pytest.mark.parametrize("off", [-2, -1, 0, 1, 2])
def test_a_quotient_is_mended(off):
    """``off``: units in the last place by which the device's division is wrong."""
    rng = np.random.default_rng(0)
    a, b = (np.float32(rng.uniform(1, 2, 20000) * 2.0 ** rng.integers(-40, 40, 20000)) for _ in range(2))
    for divisor in (b, *(np.full_like(b, c) for c in (6, 448, 1536, 2688))):
        wanted = a / divisor
        near = (wanted.view(np.int32) + np.int32(off)).view(np.float32)
        np.testing.assert_array_equal(jax.jit(refine)(near, a, divisor), wanted)
    np.testing.assert_array_equal(jax.jit(divide)(a, b), a / b)
    edge = jnp.float32([0, jnp.inf, jnp.nan])
    np.testing.assert_array_equal(divide(edge, 6.0), edge / 6)
    assert divide(jnp.float32(1), jnp.inf) == 0


def test_the_largest_of_many_is_nan_where_one_is():
    x = normal((4, 2048)).at[1, 700].set(jnp.nan).at[2, 3].set(-jnp.inf)
    values, scale = encode_row(x)
    assert np.isnan(scale[1:3]).all() and np.isnan(values[1:3].astype(jnp.float32)).any() and np.isfinite(scale[::3]).all()
    assert np.isnan(encode_nvfp4(x)[2])


def test_rounding_to_e4m3_is_that_of_the_cast():
    values = jnp.asarray(np.arange(1 << 16, dtype=np.uint16).view(jnp.bfloat16), jnp.float32)  # every bfloat16
    for x in (values, jnp.nextafter(values, jnp.float32(10)), jnp.nextafter(values, jnp.float32(-10))):
        expected = jnp.clip(x, -448, 448).astype(jnp.float8_e4m3fn)
        number = ~np.isnan(x)
        np.testing.assert_array_equal(bits(to_e4m3(x))[number], bits(expected)[number])
        assert np.isnan(to_e4m3(x).astype(jnp.float32))[~number].all()


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


# ---- E2M1 -----------------------------------------------------------------------------------------------------------------------------------


def test_rounding_to_e2m1_is_to_nearest_with_ties_to_even():
    ties = np.float32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    y = np.concatenate([ties, -ties, np.random.default_rng(0).uniform(-9, 9, 10000).astype(np.float32)])
    out = np.asarray(rounded(y))
    assert out[:7].tolist() == [0, 1, 1, 2, 2, 4, 4] and np.array_equal(out[7:14], -out[:7])
    np.testing.assert_array_equal(out, y.astype(ml_dtypes.float4_e2m1fn).astype(np.float32))
    edge = jnp.float32([7, 1e30, jnp.inf, -jnp.inf, jnp.nan, -0.0, -0.1])
    for key in (None, jax.random.key(0)):
        assert jax.jit(round_e2m1)(edge, key).tolist()[:6] == [7, 7, 7, 15, 0, 0]
    assert jax.jit(round_e2m1)(edge).tolist()[6] == 8


def test_codes_pack_in_the_published_order():
    codes = jnp.arange(16, dtype=jnp.uint8)
    assert value_e2m1(codes).tolist() == [*E2M1, *(-v for v in E2M1)]
    assert pack(codes).tolist() == [codes[2 * j] | codes[2 * j + 1] << 4 for j in range(8)]
    every = jnp.arange(256, dtype=jnp.uint8).reshape(4, 64)
    same, four, values = jax.jit(lambda b: (pack(unpack(b)), as_float4(b).astype(jnp.float32), value_e2m1(unpack(b))))(every)
    np.testing.assert_array_equal(same, every)
    np.testing.assert_array_equal(four, values)


# ---- stochastic rounding -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["static_6", "mse"])
def test_stochastic_bits_differ_between_tiles_and_repeat_with_the_key(rule):
    tile = np.full((16, 16), 2.3, np.float32)
    tile[0, 0] = 6
    x = jnp.asarray(np.tile(tile, (8, 8)))
    codes, scales, scale = compiled(x, rule, square=True, key=jax.random.key(1))
    tiles = np.asarray(unpack(codes)).reshape(8, 16, 8, 16).swapaxes(1, 2).reshape(64, -1)
    assert len(np.unique(tiles, axis=0)) == 64
    again = compiled(x, rule, square=True, key=jax.random.key(1))
    np.testing.assert_array_equal(codes, again[0])
    other = compiled(x, rule, square=True, key=jax.random.key(2))
    assert np.mean(np.asarray(codes) != other[0]) > 0.2
    error = np.asarray(decode_nvfp4(codes, scales, scale) - x)
    assert abs(error.mean()) < 0.02 < np.abs(error).mean()


def test_the_mean_of_stochastic_codes_is_the_value():
    x = normal()
    draw = jax.jit(lambda keys: jax.lax.map(lambda key: decode_nvfp4(*encode_nvfp4(x, "static_6", key=key)), keys).mean(0))
    mean = draw(jax.random.split(jax.random.key(0), 400))
    inside = np.abs(x) < 0.9 * np.abs(x).reshape(32, 4, 16).max(-1).repeat(16, -1)  # a scale rounded down may put the largest past 6
    nearest = decode(*compiled(x, "static_6"))
    assert np.abs(mean - x)[inside].max() < 0.1
    assert np.abs(mean - x)[inside].mean() < 0.2 * np.abs(nearest - x)[inside].mean()


# ---- blocks, amax, layout ------------------------------------------------------------------------------------------------------------------


def test_square_blocks_transpose():
    x = normal((2, *SMALL))
    codes, scales, scale = compiled(x, "mse", square=True)
    other = compiled(x.swapaxes(1, 2), "mse", square=True)
    np.testing.assert_array_equal(decode(codes, scales, scale), decode(*other).swapaxes(1, 2))
    assert (codes.shape, scales.shape, scale.shape) == ((2, 32, 32), (2, 32, 4), ())
    np.testing.assert_array_equal(bits(scales), bits(scales)[:, ::16].repeat(16, 1))


@pytest.mark.parametrize("rule", ["static_4", "mse"])
def test_a_given_amax_sets_the_scale_and_saturates(rule):
    x = normal()
    given = compiled(x, rule, amax=jnp.max(jnp.abs(x)))
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(compiled(x, rule), given))
    wide = compiled(x, rule, amax=jnp.float32(64))
    assert wide[2] == tensor_scale(64.0, rule)
    assert np.abs(decode(*wide) - x).max() < 0.6
    narrow = compiled(1000 * x, rule, amax=jnp.float32(1))
    np.testing.assert_allclose(np.abs(decode(*narrow)).max(), 6 * 448 * narrow[2])


def test_tensor_amax_inverts_tensor_scale():
    rng = np.random.default_rng(0)
    exact = (rng.uniform(0.5, 2, 500) * 10.0 ** rng.integers(-8, 8, 500)).astype(ml_dtypes.bfloat16).astype(np.float32)
    close = rng.uniform(1e-3, 1e3, 500).astype(np.float32)
    for rule in RULES:
        np.testing.assert_array_equal(tensor_amax(tensor_scale(exact, rule), rule), exact)
        back = tensor_amax(tensor_scale(close, rule), rule)
        np.testing.assert_array_equal(tensor_scale(back, rule), tensor_scale(close, rule))
        np.testing.assert_allclose(back, close, rtol=1.3e-7)


def test_blocked_scales_stand_where_the_hardware_reads_them():
    rows, columns = 130, 6
    scales = jnp.asarray(np.random.default_rng(0).integers(0, 120, (2, rows, columns)), jnp.uint8)
    flat = np.asarray(swizzle(scales))
    assert flat.shape == (2, 256 * 8)
    r, c = np.mgrid[:rows, :columns]
    at = ((r // 128) * 2 + c // 4) * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4
    np.testing.assert_array_equal(flat[:, at], scales)
    assert flat.sum() == np.asarray(scales).sum()  # the rest is zero
    np.testing.assert_array_equal(unswizzle(jnp.asarray(flat), rows, columns), scales)


def test_hadamard_is_orthogonal_and_has_the_published_signs():
    matrix = np.asarray(hadamard(jnp.eye(16)))
    assert np.sign(matrix[:, 0]).astype(int).tolist() == [1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1]
    np.testing.assert_array_equal(np.abs(matrix), 0.25)
    np.testing.assert_array_equal(matrix @ matrix.T, np.eye(16))
    np.testing.assert_array_equal(np.sign(matrix[0]), 1)
    np.testing.assert_array_equal(np.sign(matrix[1]), [(-1) ** j for j in range(16)])
    a, b = normal(), normal(seed=1)
    np.testing.assert_allclose(hadamard(hadamard(a), inverse=True), a, atol=1e-6)
    np.testing.assert_allclose(hadamard(a) @ hadamard(b).T, a @ b.T, atol=1e-5)
    np.testing.assert_allclose(hadamard(a)[:, 16:32], a[:, 16:32] @ matrix, atol=1e-6)
    assert hadamard(a.astype(jnp.bfloat16)).dtype == jnp.bfloat16


# ---- MXFP4 and FP8 -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule, peak", [("static_6", 6.0), ("static_4", 4.0)])
def test_mxfp4_scales_are_the_least_powers_of_two_that_do_not_saturate(rule, peak):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 128)) * 10.0 ** rng.integers(-10, 10, (64, 1))).astype(np.float32)
    x[0, :] = 0
    edges = np.nextafter(np.float32(peak * 8), np.float32([0, 0, np.inf]))
    x[1, 0], x[1, 32], x[1, 64] = edges[0], peak * 8, edges[2]
    codes, scales = encode_mx(jnp.asarray(x), rule)
    largest = np.abs(x.astype(np.float64)).reshape(64, 4, 32).max(-1)
    with np.errstate(divide="ignore"):
        want = np.where(largest == 0, 2.0**-127, 2.0 ** np.ceil(np.log2(largest / peak)))
    np.testing.assert_array_equal(np.asarray(scales).astype(np.float64), want)
    scaled = x.reshape(64, 4, 32) / np.where(largest == 0, 1, want)[..., None]
    values = scaled.astype(np.float32).astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * want[..., None]
    np.testing.assert_array_equal(decode_mx(codes, scales), np.where(largest[..., None] == 0, 0, values).reshape(x.shape).astype(np.float32))
    assert codes.shape == (64, 64) and scales.shape == (64, 4) and scales.dtype == jnp.float8_e8m0fnu


def test_fp8_by_row_and_by_tensor():
    x = np.random.default_rng(0).standard_normal((3, 8, 32)).astype(np.float32)
    x[0, 0] = 0
    for axis, shape in ((-1, (3, 8, 1)), ((1, 2), (3, 1, 1)), (None, ())):
        values, scale = encode_row(jnp.asarray(x), axis)
        assert scale.shape == shape and values.shape == x.shape and values.dtype == jnp.float8_e4m3fn
        np.testing.assert_allclose(scale, np.abs(x).max(axis, keepdims=axis is not None) / 448, rtol=1e-7)
        assert np.abs(values.astype(np.float32)).max() == 448
        dense = decode_row(values, scale)
        # Half a step of three mantissa bits, or half the smallest subnormal step, 2**-9.
        assert np.all(np.abs(dense - x) <= np.maximum(np.abs(x) / 16, np.asarray(scale) * 2.0**-10) * 1.0001)
        np.testing.assert_array_equal(np.asarray(decode_row(values, scale, jnp.bfloat16)), np.asarray(dense).astype(jnp.bfloat16))
    grid = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)  # every finite magnitude
    values, scale = encode_row(jnp.asarray(grid), None)
    assert scale == 1 and np.array_equal(values.astype(np.float32), grid)
    values, scale = encode_row(jnp.float32([1, 100, -1e30]), amax=jnp.float32([4.48]))
    np.testing.assert_allclose(decode_row(values, scale), [1, 4.48, -4.48], rtol=0.05)


# ---- values that are not finite, or next to nothing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_what_shares_its_scale(bad):
    x, one = jnp.ones(SMALL).at[1, 20].set(bad), jnp.float32(1)
    for rule in ("static_6", "mse"):
        assert np.isnan(decode(*compiled(x, rule))).all()
        spoilt = np.isnan(decode(*compiled(x, rule, amax=one)))
        assert spoilt[1, 16:32].all() and spoilt.sum() == 16
    assert np.isnan(decode(*compiled(jnp.ones(SMALL), "mse", amax=jnp.float32(abs(bad))))).all()
    spoilt = np.isnan(decode_mx(*encode_mx(x)))
    assert spoilt[1, :32].all() and spoilt.sum() == 32
    spoilt = np.isnan(decode_row(*encode_row(x)))
    assert spoilt[1].all() and spoilt.sum() == 64
    assert np.isnan(decode_row(*encode_row(x, None))).all()
    given = decode_row(*encode_row(x, None, amax=2 * one))
    assert np.isnan(given).sum() == np.isnan(bad)
    assert np.isnan(bad) or given[1, 20] == np.sign(bad) * 2


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-31])
def test_next_to_nothing_is_zero(size):
    x = jnp.full(SMALL, size, jnp.float32).at[0, 3].set(-size)
    for rule in ("static_4", "static_6", "mse"):
        codes, scales, scale = compiled(x, rule)
        assert not codes.any() and not bits(scales).any() and scale == 0
        assert not decode(codes, scales, scale).any()
    values, scale = encode_row(x)
    assert not np.asarray(values).astype(np.float32).any() and not scale.any()
    assert np.abs(decode_mx(*encode_mx(x)) - x).max() <= size / 8 + 1e-37
    # A block that is nothing beside its tensor: its scale rounds to 0, and so do its codes.
    codes, scales, _ = compiled(x.at[1].set(1e20), "mse")
    assert not codes[0].any() and not bits(scales)[0].any()


def test_check_finite_names_the_weight():
    check_finite("blocks.0.q.weight", np.ones((2, 2)))
    check_finite("blocks.0.q.weight", jnp.ones((2, 2), jnp.bfloat16))
    for kind in (np.asarray, jnp.asarray, lambda x: jnp.asarray(x, jnp.bfloat16)):
        with pytest.raises(ConfigError, match=r"blocks\.3\.q\.weight \(2, 3\) holds 2 NaN and 1 inf.*leave this weight out"):
            check_finite("blocks.3.q.weight", kind(np.float32([[1, np.nan, 0], [-np.inf, 2, np.nan]])))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: encode_nvfp4(jnp.ones((4, 20))), r"NVFP4 \(static_6\): axis -1 of shape \(4, 20\) has size 20.*multiple of 16; pad it to 32"),
        (lambda: encode_nvfp4(jnp.ones((20, 32)), square=True), r"16x16 blocks: axis -2 of shape \(20, 32\).*pad_to\(x, 16, -2\)"),
        (lambda: encode_nvfp4(jnp.ones(32), square=True), r"axis -2 of shape \(32,\)"),
        (lambda: encode_nvfp4(jnp.ones((4, 16)), "l1_norm"), "rule='l1_norm' is not one of static_6, static_4, mse, mae, abs_max"),
        (lambda: tensor_scale(1.0, "six"), "rule='six'"),
        (lambda: encode_mxfp4(jnp.ones((4, 48))), r"MXFP4 \(static_6\).*size 48.*multiple of 32; pad it to 64"),
        (lambda: encode_mxfp4(jnp.ones((4, 32)), "mse"), "rule='mse' is not one of static_6, static_4"),
        (lambda: hadamard(jnp.ones((4, 8))), "Hadamard transform.*size 8.*multiple of 16"),
        (lambda: pack(jnp.ones(3, jnp.uint8)), "pack.*size 3.*multiple of 2"),
        (lambda: unswizzle(jnp.ones(512), 129, 4), r"shape \(512,\) cannot be those of 129 x 4, which are 1024 long"),
    ],
)
def test_errors_name_value_rule_and_remedy(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_bfloat16_is_computed_in_float32():
    x = normal().astype(jnp.bfloat16)
    wide = x.astype(jnp.float32)
    for short, long in ((compiled(x, "mse"), compiled(wide, "mse")), (encode_row(x), encode_row(wide)), (encode_mx(x), encode_mx(wide))):
        assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(short, long))


def test_padding_changes_nothing_else():
    x = normal()
    whole = compiled(x, "mse")
    padded = pad_to(pad_to(x[:30, :56], 16), 32, -2)
    assert padded.shape == SMALL and pad_to(padded, 16).shape == SMALL
    codes, scales, scale = compiled(padded, "mse", amax=jnp.max(jnp.abs(x)))
    np.testing.assert_array_equal(codes[:30, :24], whole[0][:30, :24])
    np.testing.assert_array_equal(bits(scales)[:30, :3], bits(whole[1])[:30, :3])
    dense = decode(codes, scales, scale)
    assert not dense[:, 56:].any() and not dense[30:].any() and scale == whole[2]


# ---- transformations -----------------------------------------------------------------------------------------------------------------------


def test_vmap_gives_one_tensor_scale_each():
    x = normal((3, *SMALL)) * jnp.float32([1, 10, 100])[:, None, None]
    codes, scales, scale = jax.jit(jax.vmap(lambda x: encode_nvfp4(x, "mse")))(x)
    assert scale.shape == (3,)
    for i in range(3):
        one = compiled(x[i], "mse")
        np.testing.assert_array_equal(codes[i], one[0])
        np.testing.assert_array_equal(bits(scales)[i], bits(one[1]))
        assert scale[i] == one[2]
    np.testing.assert_array_equal(jax.jit(jax.vmap(decode_nvfp4))(codes, scales, scale)[2], decode(*one))


@pytest.mark.parametrize("spec, square", [(P("a", None), True), (P("a", "b"), False), (P("a", "b"), True)])
def test_sharded_is_single_and_moves_no_tensor(spec, square):
    """The one thing that devices tell each other is the largest magnitude."""
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("a", "b"))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 256)), jnp.float32)
    given = jax.device_put(x, NamedSharding(mesh, spec))
    key = jax.random.key(0)
    encode = jax.jit(lambda x: encode_nvfp4(x, "static_6", square=square, key=key)).lower(given).compile()
    sharded = encode(given)
    for a, b in zip(sharded, jax.jit(lambda x: encode_nvfp4(x, "static_6", square=square, key=key))(x)):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    decode = jax.jit(decode_nvfp4).lower(*sharded).compile()
    np.testing.assert_array_equal(decode(*sharded), decode_nvfp4(*(jnp.asarray(np.asarray(a)) for a in sharded)))
    assert all(op.kind == "all-reduce" and op.size == 1 for op in hlo.collectives(encode.as_text()))
    assert hlo.collectives(decode.as_text()) == []
    assert decode(*sharded).sharding.is_equivalent_to(given.sharding, 2)


# ---- how far off -----------------------------------------------------------------------------------------------------------------------------


def sample_data():
    """Normal, heavy-tailed (Student t, 3 degrees of freedom) and normal with 8 of 3,072 channels times 50, ``[64, 3072]``."""
    rng = np.random.default_rng(0)
    normal, heavy = rng.standard_normal((64, 3072)), rng.standard_t(3, (64, 3072))
    outliers = rng.standard_normal((64, 3072))
    outliers[:, rng.permutation(3072)[:8]] *= 50
    return {"normal": normal, "heavy-tailed": heavy, "outliers": outliers}


def test_error_table():
    """Relative mean squared error of every rule and format; docs/low_precision.md holds what this prints."""
    ways = {
        f"NVFP4 {rule}{', 16x16' * square}": lambda x, rule=rule, square=square: decode(*compiled(x, rule, square=square))
        for square in (False, True)
        for rule in RULES
    }
    ways |= {"MXFP4 static_6": lambda x: decode_mx(*encode_mx(x))}
    ways |= {"FP8 by row": lambda x: decode_row(*encode_row(x)), "FP8 by tensor": lambda x: decode_row(*encode_row(x, None))}
    data = sample_data()
    error = lambda f, x: np.sum((np.asarray(f(jnp.asarray(x, jnp.float32))) - x) ** 2) / np.sum(x * x)
    table = {way: {name: error(f, x) for name, x in data.items()} for way, f in ways.items()}
    print(f"\n| format | {' | '.join(data)} |\n| --- |{' --- |' * len(data)}")
    page = (pathlib.Path(__file__).parents[1] / "docs" / "low_precision.md").read_text()
    for way, row in table.items():
        print(f"| {way} | {' | '.join(f'{e:.5f}' for e in row.values())} |")
        written = re.search(rf"^\| {way} \|(.*)\|$", page, re.M)[1].split("|")
        np.testing.assert_allclose([float(e) for e in written], list(row.values()), atol=2e-5)
    for name in data:
        for suffix in ("", ", 16x16"):
            of = {rule: table[f"NVFP4 {rule}{suffix}"][name] for rule in RULES}
            assert min(of, key=of.get) == "mse", name
            assert of["mse"] <= of["mae"] < of["abs_max"] and of["static_6"] < of["static_4"], name
            assert all(table[f"NVFP4 {rule}"][name] < table[f"NVFP4 {rule}, 16x16"][name] for rule in RULES)
        assert table["NVFP4 mse"][name] < 0.93 * table["NVFP4 static_6"][name]
        assert table["FP8 by row"][name] < 0.2 * table["NVFP4 mse"][name] < table["MXFP4 static_6"][name] * 0.2


# ---- compiled as outside the tests; last, because programs stay optimised from here on -------------------------------------------------------

outside = functools.partial(jax.jit, compiler_options=run_folder.DEFAULT)
optimized_encode = outside(lambda x, rule, square=False: encode_nvfp4(x, rule, square=square), static_argnames=("rule", "square"))


def test_compiled_nvfp4_is_byte_identical(optimized):
    compare_with_golden(optimized_encode)


def test_amax_that_is_a_constant_of_the_program(optimized):
    """Compilers multiply constants with each other first: here the stretch of the second try with the factor of the scales."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 512)), jnp.bfloat16)
    constant = outside(lambda x: encode_nvfp4(x, "mse", amax=5.25))(x)
    for got, expected in zip(constant, outside(lambda x, amax: encode_nvfp4(x, "mse", amax=amax))(x, jnp.float32(5.25)), strict=True):
        np.testing.assert_array_equal(got, expected)


def oracle(x, rule):
    """Values and E4M3 scales by the algorithm of spec/inference.md §4.5 in numpy float32, 1x16 blocks, saturating at 6."""
    f = np.float32
    peak, top = {"static_6": (6, 448), "static_4": (4, 448)}.get(rule, (6, 256))
    amax, full = np.abs(x).max(), f(peak * top)
    blocks = x.reshape(*x.shape[:-1], -1, 16)
    wanted = np.abs(blocks).max(-1, keepdims=True) / f(peak) * (full / amax)

    def attempt(stretch):
        scales = (wanted * f(stretch)).astype(ml_dtypes.float8_e4m3fn)
        s = scales.astype(f)
        with np.errstate(divide="ignore", invalid="ignore"):
            y = np.where(s == 0, f(0), blocks * (f(1) / (f(1) / (full / amax) * s)))
        q = np.clip(y, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(f)
        return q * s * amax / full, q, s

    (six, q6, s6), (four, q4, s4) = attempt(1), attempt(1.5)
    error = {"mse": lambda e: (e * e).sum(-1, keepdims=True), "mae": lambda e: np.abs(e).sum(-1, keepdims=True)}.get(
        rule, lambda e: np.abs(e).max(-1, keepdims=True)
    )
    better = error(four - blocks) < error(six - blocks) if peak == 6 and top == 256 else np.zeros_like(s6, bool)
    return np.where(better, q4, q6).reshape(x.shape), np.where(better, s4, s6)[..., 0]


def hard(rng):
    """[64,256] with blocks of zeros, blocks whose scale underflows or rounds far down, and exact ties between codes."""
    x = rng.standard_normal((64, 256)).astype(np.float32)
    x[:8] *= np.float32(10) ** rng.uniform(-6.5, -3, (8, 256)).astype(np.float32)
    x[8:24, ::16] *= 1 + np.arange(16, dtype=np.float32)[:, None] ** 2
    x[24:40] = rng.integers(-24, 25, (16, 256)) / 4
    x[40:44] = 0
    x[44:48] = rng.uniform(3e-6, 1.5e-5, (4, 16)).repeat(16, 1) * rng.uniform(0.8, 1, (4, 256)) * np.abs(x).max()  # past 6 before saturation
    return x


@pytest.mark.parametrize("rule", RULES)
def test_compiled_nvfp4_keeps_the_order_of_float32_operations(rule, optimized):
    x = hard(np.random.default_rng(0))
    values, scales = oracle(x, rule)
    codes, got, scale = optimized_encode(jnp.asarray(x), rule)
    np.testing.assert_array_equal(got.astype(np.float32), scales)
    np.testing.assert_array_equal(value_e2m1(unpack(codes)), values)
    full = 6 * 448 if rule == "static_6" else 4 * 448 if rule == "static_4" else 6 * 256
    assert scale == np.abs(x).max() / np.float32(full)
    dense = decode_nvfp4(codes, got, scale)
    np.testing.assert_array_equal(dense, values * np.repeat(scales, 16, -1) * np.asarray(scale))
    np.testing.assert_array_equal(
        decode_nvfp4(codes, got, scale, jnp.bfloat16).astype(np.float32), dense.astype(jnp.bfloat16).astype(np.float32)
    )


def test_stochastic_rounding_is_unbiased(optimized):
    """Over a million draws a value: on the grid, between its points, and on both sides of each midpoint."""
    grid = np.asarray(E2M1)
    middle = (grid[1:] + grid[:-1]) / 2
    gap = np.diff(grid)
    values = np.concatenate([grid[[1, -1]], middle - 0.02 * gap, middle, middle + 0.02 * gap, middle + 0.495 * gap])
    values = (values * np.resize([1, -1], values.shape)).astype(np.float32)
    draws = 1_000_000
    mean = lambda y, key: jnp.mean(value_e2m1(round_e2m1(jnp.broadcast_to(y, (draws,)), key)) - y)
    keys = jax.random.split(jax.random.key(0), len(values))
    bias = np.asarray(outside(lambda v, k: jax.lax.map(lambda vk: mean(*vk), (v, k)))(jnp.asarray(values), keys))
    below = np.searchsorted(grid, np.abs(values), "right") - 1
    spacing = np.append(gap, 1)[below]
    up = (np.abs(values) - grid[below]) / spacing
    error = spacing * np.sqrt(up * (1 - up) / draws)
    print(f"largest |bias| {np.max(np.abs(bias)[error > 0] / error[error > 0]):.2f} standard errors over {np.sum(error > 0)} values")
    assert np.all(np.abs(bias) <= 4 * error + 1e-12)
