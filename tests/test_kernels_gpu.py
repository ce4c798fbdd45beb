"""The number formats and the kernels on a GPU: the bytes of the public quantiser, and of a CPU; attention by the kernel for Hopper.

JAX_PLATFORMS=cuda pytest --noconftest tests/test_kernels_gpu.py
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from longlive_jax import kernels
from longlive_jax.kernels import norm, nvfp4
from longlive_jax.ops.attention import dense, has_kernel, whole
from longlive_jax.ops.low_precision import fp8_rows
from longlive_jax.ops.matmul import linear
from longlive_jax.quant.formats import RULES, decode_nvfp4, encode_fp8, encode_nvfp4
from longlive_jax.quant.leaves import FP8
from tests.shared import golden

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU; set JAX_PLATFORMS=cuda on a machine with one")


def needs(below, name):
    """Skips on GPUs but those from Hopper on below a compute capability."""
    other = jax.default_backend() == "gpu" and not 9 <= float(jax.devices()[0].compute_capability) < below
    return pytest.mark.skipif(other, reason=f"needs a {name} GPU")


needs_kernels, needs_hopper = needs(11, "Hopper or Blackwell"), needs(10, "Hopper")
CASES = ("normal", "heavy", "tiny", "zeros_blocks")
SHARE = 1e-3  # of bytes that may differ
bits = lambda x: np.atleast_1d(np.asarray(x)).view(np.uint8)
differ = lambda got, expected: float(np.mean(bits(got) != bits(expected)))


def check_golden(encode, case, rule, block):
    want = {k.split("/")[-1]: v for k, v in golden("nvfp4.npz").items() if k.startswith(f"{case}/{rule}/{block}/")}
    codes, scales, _ = encode(jnp.asarray(golden("nvfp4.npz")[f"{case}/x"]))
    shares = differ(codes, want["packed"]), differ(scales, want["scales_e4m3_bits"])
    print(case, rule, block, "codes, scales that differ:", *shares)
    assert max(shares) <= SHARE


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CASES)
def test_reference_has_the_bytes_of_the_public_quantiser(case, rule):
    for block, square in (("1d", False), ("2d", True)):
        check_golden(jax.jit(functools.partial(encode_nvfp4, rule=rule, square=square)), case, rule, block)


@needs_kernels
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", ["normal", "heavy", "zeros_blocks"])  # exact in bfloat16
def test_kernel_has_the_bytes_of_the_public_quantiser(case, rule):
    check_golden(jax.jit(lambda x: nvfp4.quantise(x.astype(jnp.bfloat16), rule)), case, rule, "1d")


@needs_kernels
@pytest.mark.parametrize("amax", [None, 5.25, 3.0])  # the second: scales of 1/512, where many values lie between two codes
@pytest.mark.parametrize("rule", RULES)
def test_kernel_and_reference_are_alike(rule, amax):
    x = jax.random.normal(jax.random.key(0), (1024, 14336)).astype(jnp.bfloat16)
    got = jax.jit(lambda x: nvfp4.quantise(x, rule, amax=amax))(x)
    expected = jax.jit(lambda x: encode_nvfp4(x, rule, amax=amax))(x)
    shares = [differ(a, b) for a, b in zip(got, expected, strict=True)]
    print(rule, amax, shares)
    assert max(shares) <= (0 if rule.startswith("static") else SHARE)
    decoded = kernels.dequantise(*got, kernels.KERNEL)
    assert differ(decoded, jax.jit(lambda y: decode_nvfp4(*y, jnp.bfloat16))(got)) == 0


@needs_kernels
@pytest.mark.parametrize("shape", [(7040, 3072), (513, 14336), (2, 3, 5, 256)])
def test_rows_in_fp8_are_those_of_numpy(shape):
    """By the kernel on Hopper, and as XLA compiles them."""
    x = (jax.random.normal(jax.random.key(1), shape) * 3).astype(jnp.bfloat16)
    wide = np.asarray(x.astype(jnp.float32))
    scale = np.abs(wide).max(-1, keepdims=True) / np.float32(448)
    expected = (wide * (np.float32(1) / scale)).astype(ml_dtypes.float8_e4m3fn), scale
    for encode in (lambda x: encode_fp8(x, -1), kernels.quantise_rows):
        values, scales = jax.jit(encode)(x)
        np.testing.assert_array_equal(np.asarray(scales), expected[1])
        assert differ(values, expected[0]) == 0


@needs_kernels
@pytest.mark.parametrize("gated", [True, False])
def test_norm_in_fp8_is_that_of_float64(gated):
    """Residual, norm and rounding of ``[1, 8, 880, 3072]`` by the kernel: half a step of E4M3 from the exact norm of the rounded sum."""
    shapes = {"x": (1, 8, 880, 3072), "multiplier": (1, 8, 1, 3072), "addend": (1, 8, 1, 3072), "y": (1, 8, 880, 3072), "gate": (1, 8, 1, 3072)}
    arrays = {n: jax.random.normal(jax.random.key(i), s, jnp.bfloat16) for i, (n, s) in enumerate(shapes.items()) if gated or n != "gate"}
    total, values, scale = jax.jit(lambda arrays: norm.norm_rows(eps=1e-6, **arrays))(arrays)
    x, multiplier, addend, y, *gate = (np.asarray(a, np.float64) for a in arrays.values())
    rounded = np.asarray(total, np.float64)
    assert np.all(np.abs(rounded - (x + y * (gate[0] if gated else 1))) <= 2**-8 * np.abs(rounded) + 1e-5)
    centred = rounded - rounded.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * multiplier + addend
    np.testing.assert_allclose(np.asarray(scale)[..., 0], np.abs(expected).max(-1) / 448, rtol=1e-4)
    error = np.abs(np.asarray(values, np.float64) * scale - expected)
    assert np.all(error <= np.maximum(2**-4 * np.abs(expected), 2**-10 * scale) * 1.01 + 1e-4 * scale)


@needs_kernels
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize(
    ("rows", "inner", "out"), [(7040, 3072, 3072), (3520, 14336, 3072), (1000, 3072, 14336), (1001, 3072, 512), (200, 512, 384)]
)
def test_linear_in_fp8_is_that_of_the_decoded_operands(rows, inner, out, activation):
    """Scales, bias and activation in the product's kernel on Hopper, rounded once. Tensor cores sum FP8 with fewer bits than float32.

    1,001 rows do not fit the kernel: XLA's form rounds the product to bfloat16 first.
    """
    key = jax.random.key(2)
    x, w, bias = (jax.random.normal(jax.random.fold_in(key, i), s, jnp.bfloat16) for i, s in enumerate([(rows, inner), (out, inner), (out,)]))
    w = FP8.encode(w * inner**-0.5)
    got = np.asarray(jax.jit(lambda w, x, b: linear(w, x, b, activation))(w, x, bias)[-128:], np.float32)
    values, scale = (np.asarray(v, np.float32) for v in encode_fp8(x[-128:], -1))
    expected = (values * scale) @ np.asarray(w.dense()).T + np.asarray(bias, np.float32)
    expected = np.asarray(jax.nn.gelu(expected)) if activation else expected
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    values, scale = (v[-128:] for v in jax.jit(lambda w, x, b: fp8_rows(w, x, b, activation)[:2])(w, x, bias))
    share = differ(values, encode_fp8(expected, amax=448 * scale)[0])
    print(rows, inner, out, activation, error, share)
    assert error <= 6e-3 and share <= (0.06 if rows % 8 == 0 else 0.12)  # how often an error of 0.003 crosses the middle between two values


@needs_hopper
@pytest.mark.parametrize("late", [1, 50])
@pytest.mark.parametrize(("samples", "queries", "keys", "heads"), [(1, 880, 3584, 24), (2, 200, 384, 3), (1, 128, 256, 1), (1, 1000, 2048, 2)])
def test_attention_is_that_of_the_softmax(samples, queries, keys, heads, late):
    """Tiles of a head even and odd in number, heads too, and rows that are made twice. Its gradients are cuDNN's, which sums in any order.

    ``late``: keys past the first 128 with scores that no float32 holds next to those of the first ones, in some rows.
    """
    size = lambda n: (samples, n, heads, 128)
    q, k, v = (jax.random.normal(jax.random.key(i), size(n), jnp.bfloat16) for i, n in enumerate((queries, keys, keys)))
    q, k = 3 * q, k.at[:, 5].multiply(4).at[:, 150].multiply(late)  # sharp rows too
    assert has_kernel("flash", q, k)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    expected = jax.jit(functools.partial(jax.nn.dot_product_attention, implementation="xla"))(*wide)
    value, (_, back) = jax.jit(whole)(q, k, v), jax.vjp(jax.jit(whole), q, k, v)  # with gradients the values are cuDNN's too
    error = lambda x, y: float(jnp.linalg.norm(x.astype(jnp.float32) - y.astype(jnp.float32)) / jnp.linalg.norm(y.astype(jnp.float32)))
    cudnn, cudnn_back = jax.vjp(jax.jit(lambda q, k, v: dense(q, k, v, "cudnn")), q, k, v)
    errors = error(value, expected), error(cudnn, expected), *map(error, back(value), cudnn_back(value))
    print(samples, queries, keys, heads, late, errors)
    assert errors[0] <= 1.2 * errors[1] + 1e-4 < 6e-3 and max(errors[2:]) <= 1e-4
