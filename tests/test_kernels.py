"""GPU kernels against their references: interpreted on the CPU, and compiled ahead of time for chips that are not there."""

import functools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.extend.backend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax import kernels
from longlive_jax.config import ConfigError
from longlive_jax.kernels import blackwell, fp8, hopper, nvfp4
from longlive_jax.ops import low_precision
from longlive_jax.ops.low_precision import encode_blocks, encode_rows
from longlive_jax.ops.matmul import linear, matmul
from longlive_jax.quant.formats import code_e4m3, decode_nvfp4, encode_fp8, encode_nvfp4, round_e2m1, swizzle, value_e2m1, value_e4m3
from longlive_jax.quant.leaves import FP8, NVFP4
from longlive_jax.sharding import make_mesh
from tests import aot
from tests.aot import ROOT, wheels

bf16 = jnp.bfloat16
INTERPRETED = plgpu.InterpretGPUParams(inline_mgpu="ignore", detect_races=True)  # fences are all that is ignored


def default_gpu(monkeypatch, capability="9.0"):
    gpu = SimpleNamespace(platform="gpu", compute_capability=capability, device_kind=f"GPU {capability}")
    monkeypatch.setattr(jax.extend.backend, "get_default_device", lambda: gpu)


def interpreted(function, *args, options=INTERPRETED):
    """``function`` traced anew, its kernels interpreted."""
    with plgpu.force_gpu_interpret_mode(options):
        return jax.jit(lambda *a: function(*a))(*args)


def bits(x):
    return np.atleast_1d(np.asarray(x)).view(np.uint8)


def data(shape, seed=0):
    """Normal values over five orders of magnitude from row to row."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape) * 10 ** rng.uniform(-4, 1, (*shape[:-1], 1)), bf16)


# ---- the number formats, every value --------------------------------------------------------------------------------------------------------


def test_rounding_in_integers_is_that_of_the_formats():
    values = jnp.asarray(np.arange(1 << 16, dtype=np.uint16).view(jnp.bfloat16), jnp.float32)  # every bfloat16
    finite = values[jnp.isfinite(values)]
    near = jnp.concatenate([finite, jnp.nextafter(finite, jnp.float32(10)), jnp.nextafter(finite, jnp.float32(-10))])
    code = jax.jit(lambda x: nvfp4.code(jnp.abs(x), jnp.float32(1), negative=x < 0).astype(jnp.uint8))
    sure = near[jnp.abs(near) != jnp.nextafter(jnp.float32(5), jnp.float32(6))]  # there a CPU may contract a product or not
    np.testing.assert_array_equal(code(sure), round_e2m1(sure))
    past_five = jnp.nextafter(jnp.float32(5), jnp.float32(6)) * jnp.asarray([1, -1])
    assert (abs(code(past_five).astype(int) - round_e2m1(past_five).astype(int)) <= 1).all()
    between = jnp.abs(jnp.abs(near)[:, None] - jnp.asarray([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])).min(1) > 1e-6  # codes
    values = 2.0**24 * jax.jit(nvfp4.near_e2m1)(jnp.abs(near[between]), jnp.float32(1))
    np.testing.assert_array_equal(values, jnp.abs(value_e2m1(round_e2m1(near[between]))))
    for peak in (4, 6):
        large = jnp.abs(finite[jnp.abs(finite) > 2.0**-96])  # a CPU takes subnormal remainders for 0
        np.testing.assert_array_equal(nvfp4.over(large, peak), np.asarray(large) / np.float32(peak))
    np.testing.assert_array_equal(nvfp4.e2m1_value(jnp.arange(16, dtype=jnp.uint32)), value_e2m1(jnp.arange(16, dtype=jnp.uint8)))
    scales = jnp.minimum(jnp.abs(near), 448)
    np.testing.assert_array_equal(code_e4m3(scales), bits(scales.astype(jnp.float8_e4m3fn)))
    values, codes = nvfp4.near_e4m3(jnp.abs(near))
    np.testing.assert_array_equal(values, scales.astype(jnp.float8_e4m3fn).astype(jnp.float32))
    np.testing.assert_array_equal(codes.astype(jnp.uint8), bits(scales.astype(jnp.float8_e4m3fn)))
    codes = np.arange(128, dtype=np.uint8)
    np.testing.assert_array_equal(value_e4m3(jnp.asarray(codes, jnp.uint32)), codes.view(jnp.float8_e4m3fn).astype(np.float32))


# ---- quantise, dequantise: one table --------------------------------------------------------------------------------------------------------

CASES = {  # shape -> rules; numbers of blocks: 9 and 20 are padded, 128 is one tile, 640 five tiles
    (3, 48): ("static_6", "abs_max"),
    (2, 5, 32): ("static_4", "mae"),
    (64, 160): ("mse",),
}
FULL = [(7040, 3072), (7040, 14336), (3072, 3072), (14336, 3072)]  # activations and weights of the 5B model


@pytest.mark.parametrize(("shape", "rule"), [(shape, rule) for shape, rules in CASES.items() for rule in rules])
def test_kernels_are_the_references_bit_for_bit(shape, rule):
    x = data(shape).at[..., :16].set(0)
    expected = encode_nvfp4(x, rule)
    codes, scales, scale = interpreted(lambda x: nvfp4.quantise(x, rule), x)
    np.testing.assert_array_equal(codes, expected[0])
    np.testing.assert_array_equal(bits(scales), bits(expected[1]))
    assert scale == expected[2]
    np.testing.assert_array_equal(bits(interpreted(nvfp4.dequantise, *expected)), bits(decode_nvfp4(*expected, bf16)))


@pytest.mark.parametrize("shape", [(3, 256), (2, 5, 768), (1, 2, 2, 512), (3, 5120)])
def test_rows_in_fp8_are_the_references_bit_for_bit(shape):
    """Narrow rows are taken four at a time, which divides none of these numbers but the third's; the last are wide."""
    x = data(shape).at[..., 0, :].set(0).at[..., 1, 7].set(1e-38)
    values, scales = interpreted(fp8.quantise_rows, x)
    expected = encode_fp8(x, -1)
    np.testing.assert_array_equal(bits(values), bits(expected[0]))
    np.testing.assert_array_equal(scales, expected[1])


@pytest.mark.parametrize("k", [512, 5120])
def test_rows_in_fp8_that_are_not_finite(k):
    x = data((4, k)).at[1, 40].set(jnp.nan).at[2, 16].set(-jnp.inf)
    values, scales = interpreted(fp8.quantise_rows, x)
    expected = encode_fp8(x, -1)
    np.testing.assert_array_equal(scales, expected[1])
    np.testing.assert_array_equal(values.astype(jnp.float32), expected[0].astype(jnp.float32))
    assert np.isnan(scales[1:3]).all() and np.isfinite(scales[::3]).all()


def test_rows_in_fp8_by_the_kernel_where_it_runs(monkeypatch):
    """On a Hopper GPU and for sizes that fit; the product's numbers are those of the reference."""
    x, w = data((2, 3, 4, 512)), FP8.encode(data((64, 512), 1), implementation="emulated")
    expected = matmul(w, x)
    default_gpu(monkeypatch)
    np.testing.assert_array_equal(interpreted(matmul, w, x), expected)
    calls = lambda x: str(jax.make_jaxpr(encode_rows)(x)).count("mosaic") + str(jax.make_jaxpr(encode_rows)(x)).count("mpmd_map")
    assert calls(x) and not calls(x[..., :100]) and not calls(x.astype(jnp.float32))


def test_blocks_in_nvfp4_by_the_kernel_where_it_runs(monkeypatch):
    """On a Hopper GPU, for bfloat16; under a mesh on the local shard, with the largest magnitude of all."""
    x = data((2, 4, 2, 64))
    expected = encode_nvfp4(x)
    default_gpu(monkeypatch)
    for got, want in zip(interpreted(lambda x: encode_blocks(x, "static_6"), x), expected, strict=True):
        np.testing.assert_array_equal(bits(got), bits(want))
    traced = lambda x: str(jax.make_jaxpr(lambda x: encode_blocks(x, "static_6"))(x))
    assert "mpmd_map" in traced(x) and "mpmd_map" not in traced(x.astype(jnp.float32))
    with jax.set_mesh(make_mesh(2, 4)):
        body = traced(x).split("shard_map")[1]
    assert "mpmd_map" in body and "u32[8,8]" in body  # [1, 1, 2, 64]: eight blocks of eight words


def test_given_amax_and_what_is_not_finite():
    x = data((8, 256)).at[1, 40].set(jnp.nan).at[2, 16].set(-jnp.inf)
    expected = encode_nvfp4(x, amax=2.0)
    got = interpreted(lambda x: nvfp4.quantise(x, amax=2.0), x)
    np.testing.assert_array_equal(bits(got[1]), bits(expected[1]))
    values = interpreted(nvfp4.dequantise, *got).astype(jnp.float32)
    np.testing.assert_array_equal(values, decode_nvfp4(*expected, bf16).astype(jnp.float32))
    assert jnp.isnan(values).sum() == 2 * 16


@pytest.mark.parametrize("shape", FULL)
def test_shapes_of_the_5b_model(shape):
    x = jax.ShapeDtypeStruct(shape, bf16)
    got, expected = (jax.eval_shape(f, x) for f in (nvfp4.quantise, encode_nvfp4))
    assert [(y.shape, y.dtype) for y in got] == [(y.shape, y.dtype) for y in expected]
    assert jax.eval_shape(nvfp4.dequantise, *got).shape == shape


def test_stochastic_rounding_is_unbiased_and_differs_between_tiles():
    wanted = np.float32([0.1, 0.3, 0.75, 1.1, 1.8, 2.3, 3.7, 4.5, 5.9])
    rows = np.repeat(wanted, 64 * 40).reshape(-1, 16)  # 16 equal values a block, 1,440 blocks
    x = jnp.asarray(rows, bf16).at[:, 0].set(6)  # block scale 1
    codes, scales, scale = interpreted(lambda x: nvfp4.quantise(x, key=jax.random.key(5), amax=6.0 * 448), x)
    assert scale == 1 and jnp.all(scales.astype(jnp.float32) == 1)
    values = np.asarray(decode_nvfp4(codes, scales, scale))[:, 1:].reshape(len(wanted), -1)
    exact = np.asarray(x.astype(jnp.float32))[:, 1:].reshape(len(wanted), -1)[:, 0]
    error = (values.mean(1) - exact) / (values.std(1) / np.sqrt(values.shape[1]))
    assert np.abs(error).max() < 4, error
    assert np.all([len(np.unique(v)) == 2 for v in values])  # both neighbours, nothing else
    tiles = interpreted(lambda x: nvfp4.quantise(x, key=jax.random.key(5), amax=6.0 * 448), jnp.full((256, 16), 2.7, bf16).at[:, 0].set(6))[0]
    assert 0.3 < np.mean(np.asarray(tiles[:128]) != np.asarray(tiles[128:])) < 0.9


REFUSED = {
    "float32": (lambda: nvfp4.quantise(jnp.zeros((16, 32))), r"bfloat16 .* not float32 \(16, 32\)"),
    "block": (lambda: nvfp4.quantise(jnp.zeros((16, 40), bf16)), r"multiple of 16\], not bfloat16 \(16, 40\)"),
    "empty": (lambda: nvfp4.quantise(jnp.zeros((0, 32), bf16)), r"\(0, 32\)"),
    "rows in float32": (lambda: fp8.quantise_rows(jnp.zeros((4, 512))), r"bfloat16 .* not float32 \(4, 512\)"),
    "narrow rows": (lambda: fp8.quantise_rows(jnp.zeros((4, 320), bf16)), r"a multiple of 256 .* not bfloat16 \(4, 320\)"),
    "wide rows": (lambda: fp8.quantise_rows(jnp.zeros((4, 4352), bf16)), r"or of 1024 up to 16384, not bfloat16 \(4, 4352\)"),
    "rule": (lambda: nvfp4.quantise(jnp.zeros((16, 32), bf16), "static_5"), "rule='static_5'"),
    "scales": (lambda: nvfp4.dequantise(jnp.zeros((4, 8), jnp.uint8), jnp.zeros((4, 2), jnp.float8_e4m3fn), 1.0), r"\(4, 8\) and"),
    "rows": (lambda: blackwell.Plan(7000, 3072, 3072), "rows in multiples of 128, not 7000: pad it to 7040"),
    "out": (lambda: blackwell.Plan(128, 100, 256), "out in multiples of 128, not 100"),
    "in": (lambda: blackwell.Plan(128, 128, 3200), "in in multiples of 256, not 3200: pad it to 3328"),
    "nothing": (lambda: blackwell.Plan(0, 128, 256), "rows in multiples of 128, not 0"),
    "inner": (lambda: blackwell.matmul(zeros(128, 256), zeros(128, 512)), r"not \(128, 128\) and \(128, 256\)"),
    "operand": (lambda: blackwell.matmul((zeros(128, 256)[0], *zeros(128, 512)[1:]), zeros(128, 256)), r"need scales .* \(128, 16\)"),
    "by name": (lambda: kernels.quantise(jnp.zeros((16, 32), bf16), implementation="kernel"), "needs a Hopper or Blackwell GPU"),
    "matmul by name": (lambda: kernels.matmul(zeros(128, 256), zeros(128, 256), "kernel"), "needs a Blackwell GPU with tcgen05"),
    "no such": (lambda: kernels.dequantise(*zeros(128, 256), implementation="cuda"), "no implementation 'cuda'"),
}


def zeros(rows, k):
    return jnp.zeros((rows, k // 2), jnp.uint8), jnp.zeros((rows, k // 16), jnp.float8_e4m3fn), jnp.float32(1)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError if case == "no such" else ConfigError, match=message):
        call()


# ---- choice ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "quantised", "multiplied"),
    [("8.0", False, False), ("9.0", True, False), ("10.0", True, True), ("12.0", False, False)],
)
def test_choice_by_hardware(monkeypatch, capability, quantised, multiplied):
    default_gpu(monkeypatch, capability)
    for operation in (kernels.FP8_ROWS, kernels.FP8_NORM, kernels.FP8_PRODUCT):
        assert kernels.chosen(operation, None) == ("kernel" if capability == "9.0" else "reference")
    for operation, real in ((kernels.NVFP4_BLOCKS, quantised), (kernels.NVFP4_VALUES, quantised), ("nvfp4 matmul kernel", multiplied)):
        automatic = capability == "9.0" and operation != "nvfp4 matmul kernel"
        assert kernels.chosen(operation, None) == ("kernel" if automatic else "reference")
        assert kernels.chosen(operation, "reference") == "reference"
        if real:
            assert kernels.chosen(operation, "kernel") == "kernel"
        else:
            with pytest.raises(ConfigError, match=f"{operation} needs .* GPU {capability}"):
                kernels.chosen(operation, "kernel")


def test_by_default_the_reference_runs():
    x = data((16, 64))
    encoded = kernels.quantise(x, "mse")
    for got, expected in zip(encoded, encode_nvfp4(x, "mse"), strict=True):
        np.testing.assert_array_equal(bits(got), bits(expected))
    np.testing.assert_array_equal(kernels.dequantise(*encoded), decode_nvfp4(*encoded, bf16))


# ---- the FP8 product for Hopper -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "out", "inner", "biased", "activation"),
    [(256, 256, 640, False, None), (200, 128, 512, True, "gelu")],
)
def test_fp8_product_for_hopper(rows, out, inner, biased, activation):
    """Steps that the ring's four stages do not divide; rows that two tiles write alike, which the race detector would report."""
    x, w, bias = data((rows, inner)), FP8.encode(data((out, inner), 1), implementation="emulated"), data((out,), 2) if biased else None
    operands = encode_fp8(x, -1), (w.values, w.scale)
    options = replace(INTERPRETED, detect_races=rows % 128 == 0)
    y = interpreted(lambda x, w, b: hopper.product(x, w, b, activation), *operands, bias, options=options)
    decoded = [np.multiply(*(np.asarray(v, np.float64) for v in operand)) for operand in operands]
    sums = decoded[0] @ decoded[1].T + (np.asarray(bias, np.float64) if biased else 0)
    exact = sums / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (sums + 0.044715 * sums**3))) if activation else sums
    assert y.dtype == bf16
    assert np.all(np.abs(np.asarray(y, np.float64) - exact) <= 2**-8 * np.abs(exact) + 1e-5 * np.abs(sums).max(1, keepdims=True))
    by_xla = np.asarray(linear(w, x, bias, activation), np.float32)
    assert np.linalg.norm(np.asarray(y, np.float32) - by_xla) <= 4e-3 * np.linalg.norm(by_xla)  # rounded once and three times


@pytest.mark.parametrize(("rows", "activation"), [(128, None), (200, "gelu")])
def test_fp8_product_for_hopper_in_fp8(rows, activation):
    """Those of the reference in float32 but for ones between two of E4M3's; a row without a scale is zeros, one with NaN is NaN."""
    x, w = data((rows, 512)).at[3].set(0).at[5, 7].set(jnp.nan), FP8.encode(data((128, 512), 1), implementation="emulated")
    bias = None if activation is None else data((128,), 2)
    values, scale, dense = jax.jit(lambda x: low_precision.fp8_rows(w, x, bias, activation))(x.astype(jnp.float32))
    options = replace(INTERPRETED, detect_races=rows % 128 == 0)
    kernel = lambda x, s: hopper.product(x, (w.values, w.scale), bias, activation, s)
    got = interpreted(kernel, encode_fp8(x, -1), scale, options=options)
    assert got.dtype == values.dtype and np.mean(bits(got) != bits(values)) < 1e-3
    close = jnp.abs(got.astype(jnp.float32) * scale - dense) <= 1.01 * (2**-4 * jnp.abs(dense) + 2**-10 * scale)
    assert np.array_equal(close.all(-1), np.arange(rows) != 5) and jnp.isnan(got[5].astype(jnp.float32)).all()
    assert bias is not None or (scale[3] == 0 and (got[3] == 0).all())


def test_hidden_activations_of_an_mlp_in_fp8_by_the_kernel_where_it_runs(monkeypatch):
    """On a Hopper GPU the up product writes E4M3 and nothing quantises its result; under a mesh on the local shard."""
    w, v = (jax.eval_shape(FP8.encode, jax.ShapeDtypeStruct(shape, bf16)) for shape in ((1024, 512), (512, 1024)))
    x, bias = jax.ShapeDtypeStruct((1, 4, 128, 512), bf16), jax.ShapeDtypeStruct((1024,), bf16)
    chain = lambda x, w, v, b: linear(v, linear(w, x, b, "gelu", then=v))
    default_gpu(monkeypatch)

    names = re.findall(r"name=(encode_shards|product_shards)\b", str(jax.make_jaxpr(chain)(x, w, v, bias)))
    assert names.count("encode_shards") == 1 and names.count("product_shards") == 3  # one of them for ``dense``, which nobody reads
    with jax.set_mesh(make_mesh(1, 4)):
        text = str(jax.make_jaxpr(chain)(x, w, v, bias))
        assert "Ref<gmem>{f8_e4m3fn[128,1024]" in text and "f8_e4m3fn[1,1,128,1024]" in text


def test_fp8_product_by_the_kernel_where_it_runs(monkeypatch):
    """On a Hopper GPU, in bfloat16, for sizes that fit; under a mesh on the local shard of activations that all of it share."""
    x, w = data((2, 4, 64, 512)), jax.eval_shape(FP8.encode, jax.ShapeDtypeStruct((256, 512), bf16))
    traced = lambda x, w=w, activation="gelu": str(jax.make_jaxpr(lambda w, x: linear(w, x, None, activation))(w, x))
    by_kernel = lambda *args: ("wgmma_ref" in traced(*args), "dot_general" in traced(*args))
    assert by_kernel(x) == (False, True)
    default_gpu(monkeypatch)
    assert by_kernel(x) == by_kernel(x, w, None) == (True, False)
    narrow = jax.eval_shape(FP8.encode, jax.ShapeDtypeStruct((96, 512), bf16))
    others = (
        (x[:1, :1], w),
        (x[:1, :, :33], w),
        (x.astype(jnp.float32), w),
        (x, replace(w, implementation="emulated")),
        (x, narrow),
        (x, w, "silu"),
    )
    assert all(by_kernel(*args) == (False, True) for args in others)
    with jax.set_mesh(make_mesh(1, 4)):
        text = traced(data((1, 4, 128, 512)))
        assert "wgmma_ref" in text and "Ref<gmem>{f8_e4m3fn[128,512]" in text
        assert by_kernel(data((1, 4, 96, 512))) == by_kernel(data((1, 3, 512, 512))) == (False, True)  # short; not split
    default_gpu(monkeypatch, "10.0")
    assert by_kernel(x) == (False, True)


def test_gradient_of_a_linear_by_the_kernel(monkeypatch):
    """The straight-through gradient is that of the XLA form, of the bias too."""
    x, w, bias = data((128, 512)), FP8.encode(data((128, 512), 1)), data((128,), 2)
    loss = lambda x, bias, w: (linear(w, x, bias, "gelu").astype(jnp.float32) ** 2).mean()
    expected = jax.grad(loss, (0, 1))(x, bias, replace(w, implementation="emulated"))
    default_gpu(monkeypatch)
    got = interpreted(jax.grad(loss, (0, 1)), x, bias, w)
    for a, b in zip(got, expected, strict=True):
        assert jnp.linalg.norm((a - b).astype(jnp.float32)) <= 1e-2 * jnp.linalg.norm(b.astype(jnp.float32))


# ---- the product for Blackwell --------------------------------------------------------------------------------------------------------------


def test_reference_product_is_that_of_the_decoded_operands():
    a, b = encode_nvfp4(data((128, 256), 1)), encode_nvfp4(data((128, 256), 2), "mse")
    x, w = (np.asarray(decode_nvfp4(*y), np.float64) for y in (a, b))
    y = np.asarray(kernels.matmul(a, b), np.float64)
    assert np.linalg.norm(y - x @ w.T) <= 3e-3 * np.linalg.norm(x @ w.T)  # one rounding to bfloat16


def test_product_by_name_reaches_the_kernel(monkeypatch):
    """``NVFP4.implementation`` names it; here the kernel is its reference."""
    monkeypatch.setattr(blackwell, "matmul", kernels.multiply)
    x, w = data((2, 64, 256)), NVFP4.encode(data((128, 256), 2), implementation="tcgen05")
    with pytest.raises(ConfigError, match="needs a Blackwell GPU with tcgen05"):
        matmul(w, x)
    default_gpu(monkeypatch, "10.0")
    y, expected = matmul(w, x), matmul(replace(w, implementation="emulated"), x)
    assert y.shape == expected.shape and y.dtype == bf16
    assert jnp.linalg.norm((y - expected).astype(jnp.float32)) <= 4e-3 * jnp.linalg.norm(expected.astype(jnp.float32))


@pytest.mark.parametrize(("m", "n", "k"), [(256, 384, 384), (128, 512, 320)])
def test_schedule_interpreted(m, n, k):
    """Six tiles with two accumulators and 6 steps through 5 stages, and two tiles with one accumulator and 5 steps through 3."""
    x, w = jax.random.normal(jax.random.key(0), (m, k), bf16), jax.random.normal(jax.random.key(1), (n, k), bf16)
    plan = blackwell.Plan(m, n, k, scaled=False)
    assert plan.stages < k // plan.tile_k
    y = interpreted(lambda x, w: blackwell.schedule(x, w, 0.5), x, w)
    expected = 0.5 * np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    assert np.linalg.norm(np.asarray(y, np.float64) - expected) <= 3e-3 * np.linalg.norm(expected)


def test_scales_travel_in_the_blocked_layout():
    scales = jnp.arange(256 * 16, dtype=jnp.float32).reshape(256, 16)
    np.testing.assert_array_equal(blackwell.blocked(scales).reshape(-1), swizzle(scales))
    assert blackwell.blocked(scales)[1, 2, 5, 7] == scales[128 + 32 + 5, 2 * 4 + 3]


@pytest.mark.parametrize(
    ("rows", "inner", "out", "tile_n"), [(7040, 3072, 14336, 256), (7040, 14336, 3072, 256), (7040, 3072, 3072, 256), (128, 256, 128, 128)]
)
def test_plans(rows, inner, out, tile_n):
    plan = blackwell.Plan(rows, out, inner)
    assert plan.tile_n == tile_n
    columns = plan.accumulators * plan.tile_n + 16 + 16 * tile_n // 128  # of tensor memory: float32 sums, and the scales of 256 codes
    assert columns <= 512
    a, b = (tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.eval_shape(lambda r=r: zeros(r, inner))) for r in (rows, out))
    y = jax.eval_shape(blackwell.matmul, a, b)
    assert (y.shape, y.dtype) == ((rows, out), bf16)


# ---- compiled ahead of time -----------------------------------------------------------------------------------------------------------------


@functools.cache
def compiled(chip, folder, *names):
    """Case -> what ``aot_kernels`` found; of ``names``, or of all."""
    path = [*wheels(), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(path), "MOSAIC_GPU_DUMP_TO": str(folder)}
    done = subprocess.run([sys.executable, "-m", "tests.aot_kernels", chip, *names], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    cases = functools.reduce(lambda a, b: a | b, (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")))
    for name, case in cases.items():
        print(name, case)
        assert not any(".local" in count for count in case["counts"]), (name, "spills")
    return cases


ONE_OF_EACH = "quantise_mse quantise_stochastic dequantise fp8_rows norm_rows_residual fp8_product_gelu fp8_product_rounded attention".split()
OTHERS = "quantise fp8_narrow_rows norm_rows norm_rows_shared fp8_product fp8_product_down fp8_product_narrow attention_odd".split()


@pytest.mark.parametrize("names", [pytest.param(ONE_OF_EACH, marks=pytest.mark.slow), pytest.param(OTHERS, marks=pytest.mark.exhaustive)])
def test_compiled_for_hopper(names, tmp_path):
    cases = compiled("H100", tmp_path, *names)
    assert set(cases) == set(names)
    for name, case in cases.items():
        kinds = {c.removeprefix("wgmma.mma_async.sync.aligned.").split(".", 1)[1] for c in case["counts"] if c.startswith("wgmma")}
        assert kinds == ({"f32.e4m3.e4m3"} if name.startswith("fp8_product") else {"f32.bf16.bf16"} if name.startswith("attention") else set())
        assert case["target"] == ["sm_90a"], name
        assert case["tenths"].keys() == ({"fma"} if name in ("quantise", "quantise_mse") else set()), (name, case["tenths"])
        assert case["temp"] < 4096, name  # words, codes and scales change their types in place


def test_every_case_is_compiled_somewhere():
    from tests.aot_kernels import CASES

    assert {*ONE_OF_EACH, *OTHERS} == {name for name, (chip, *_) in CASES.items() if chip == "H100"}


@pytest.mark.slow
def test_compiled_for_blackwell(tmp_path):
    cases = compiled("B200", tmp_path)
    assert set(cases) == {"quantise_mse_b200", "matmul_up", "matmul_down", "matmul_narrow"}
    assert all(case["target"] == ["sm_100a"] for case in cases.values())
    for name in ("matmul_up", "matmul_down", "matmul_narrow"):
        counts = cases[name]["counts"]
        products = [c for c in counts if c.startswith("tcgen05.mma")]
        assert products == ["tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.scale_vec::4X"], (name, counts)
        for copied in ("tcgen05.cp", "tcgen05.ld", "cp.async.bulk.tensor"):  # scales, accumulators, tiles
            assert any(c.startswith(copied) for c in counts), (name, copied)


@pytest.mark.exhaustive
def test_a_step_of_the_5b_model_in_fp8():
    """Two layers, five forwards that share two bodies: all products but the text's keys and values by the kernel, read and written as they lie.

    The last forward is there for its keys and values: its last layer ends at k and v.
    """
    text = aot.compiled("stream_fp8")["text"]
    calls = [line.split("custom-call")[0] for line in text.splitlines() if "mosaic_gpu" in line and "custom-call(" in line]
    attended = [call for call in calls if "= bf16[1,7040,24,128]" in call]
    assert len(attended) == 3  # to a full window, in each body's two layers but the last one's
    assert sum("= bf16[" in call or "= f8e4m3fn[" in call for call in calls) == len(attended) + 2 * 8 + 8 + 2
    assert sum("= f8e4m3fn[7040,14336]" in call for call in calls) == 3 and not any("= (f8e4m3fn[7040,14336]" in call for call in calls)
    assert sum("norm_shards" in line and "mosaic_gpu" in line for line in text.splitlines()) == 2 * 6 - 2  # before q, q and up; no fusions
    shapes = re.findall(r"= (\S+) (?:fusion|copy|transpose|convert)\(", text)
    assert not [shape for shape in shapes if re.match(r"f8e4m3fn|bf16\[(1,8,880|7040),14336\]|\w+\[(3072|14336),(3072|14336)\]", shape)]
