"""Residual, LayerNorm and modulation ahead of linears: the plain form's bits, and the kernel that rounds to FP8 against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import TransformerConfig
from longlive_jax.kernels import norm
from longlive_jax.model.frames import block_causal, clip_frames
from longlive_jax.ops.low_precision import Rows
from longlive_jax.ops.matmul import matmul
from longlive_jax.ops.norm import layer_norm, normed
from longlive_jax.quant.leaves import FP8
from longlive_jax.quant.rewrite import RULE_SETS, rewrite
from longlive_jax.sharding import make_mesh
from longlive_jax.tree import flat_params, with_params
from tests.programs import shell
from tests.test_kernels import bf16, bits, data, default_gpu, interpreted

EPS = 1e-6
wide = lambda x: np.asarray(x, np.float64)


def operands(b, f, t, d, gated=True, by_frame=True, dtype=bf16):
    """x, multiplier, addend, y, gate."""
    shape = (b, f, 1, d) if by_frame else (d,)
    x, y = data((b, f, t, d)), data((b, f, t, d), 1)
    return [a.astype(dtype) for a in (x, *(data(shape, i) for i in (2, 3)), y)] + [data((b, f, 1, d), 4).astype(dtype) if gated else None]


def exact(x, multiplier, addend, y=None, gate=None):
    """In float64: the sum, and the norm of the sum rounded to bfloat16."""
    total = wide(x) + (0 if y is None else wide(y) if gate is None else wide(y) * wide(gate))
    rounded = wide(jnp.asarray(total, jnp.float32).astype(bf16))
    centred = rounded - rounded.mean(-1, keepdims=True)
    return total, centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS) * wide(multiplier) + wide(addend)


def check(rows, expected):
    """Half a step of E4M3: 2**-4 of a value, or 2**-10 scales where the value is small."""
    scale = wide(rows.scale)
    np.testing.assert_allclose(scale[..., 0], np.abs(expected).max(-1) / 448, rtol=2e-5)
    error = np.abs(wide(rows.values.astype(jnp.float32)) * scale - expected)
    assert np.all(error <= np.maximum(2**-4 * np.abs(expected), 2**-10 * scale) * 1.01 + 1e-5 * scale)


# ---- the kernel ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "residual", "gated", "by_frame"),
    [
        ((1, 2, 3, 1024), False, False, True),
        ((2, 2, 3, 1024), True, True, True),
        ((1, 2, 1, 2048), True, False, False),
        ((1, 3, 2, 1024), True, True, False),
    ],
)
def test_kernel_against_float64(shape, residual, gated, by_frame):
    """Modulation of the row's own frame, or one for all; tokens of a frame in any number."""
    x, multiplier, addend, y, gate = operands(*shape, gated, by_frame)
    y, gate = (y, gate) if residual else (None, None)
    total, values, scale = interpreted(lambda *a: norm.norm_rows(*a[:3], EPS, *a[3:]), x, multiplier, addend, y, gate)
    exactly, expected = exact(x, multiplier, addend, y, gate)
    np.testing.assert_array_equal(bits(total), bits(jnp.asarray(exactly, jnp.float32).astype(bf16)))
    check(Rows(values, scale, None), expected)


def test_rows_that_are_not_finite():
    x, multiplier, addend, y, gate = operands(1, 1, 4, 1024)
    x, y = x.at[0, 0, 1, 40].set(jnp.nan), y.at[0, 0, 2, 16].set(-jnp.inf)
    total, values, scale = interpreted(lambda *a: norm.norm_rows(*a[:3], EPS, *a[3:]), x, multiplier, addend, y, gate)
    np.testing.assert_array_equal(np.isnan(scale[0, 0, :, 0]), [False, True, True, False])
    np.testing.assert_array_equal(np.isnan(wide(values.astype(jnp.float32))).all(-1), np.isnan(wide(values.astype(jnp.float32))).any(-1))
    assert np.isnan(wide(values.astype(jnp.float32)))[0, 0, 1:3].all() and jnp.isneginf(total[0, 0, 2, 16] * gate[0, 0, 0, 16])


def test_what_the_kernel_takes():
    fits = lambda *shape, dtype=bf16: norm.fits(jax.ShapeDtypeStruct(shape, dtype))
    assert fits(1, 8, 880, 3072) and fits(1, 1, 1, 1024)
    assert not any((fits(1, 8, 880, 512), fits(8, 880, 3072), fits(1, 0, 4, 1024), fits(1, 8, 880, 3072, dtype=jnp.float32)))


# ---- the operation -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, bf16])
def test_plain_form_has_the_bits_of_its_expressions(dtype):
    """Anywhere but on Hopper, and there for other weights."""
    x, scale, shift, y, gate = operands(1, 2, 3, 64, dtype=dtype)
    readers = [FP8.encode(data((32, 64)))]
    norm_of = lambda x: layer_norm(x, EPS) * (1 + scale) + shift
    for got, expected in (
        (normed(readers, x, 1 + scale, shift, EPS), (x, norm_of(x))),
        (normed(readers, x, 1 + scale, shift, EPS, y), (x + y, norm_of(x + y))),
        (normed(readers, x, 1 + scale, shift, EPS, y, gate), (x + y * gate, norm_of(x + y * gate))),
    ):
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_array_equal(bits(a), bits(b))


def test_by_the_kernel_values_are_near_and_gradients_are_those_of_the_plain_form(monkeypatch):
    arrays, w = operands(1, 2, 3, 1024), FP8.encode(data((64, 1024), 9))
    forward = lambda x, multiplier, addend, y, gate: normed([w], x, multiplier, addend, EPS, y, gate)

    def gradients(*arrays):
        out, back = jax.vjp(lambda *a: (lambda x, h: (x, matmul(w, h)))(*forward(*a)), *arrays)
        return out, back(tuple(data(o.shape, 7) for o in out))

    plain, expected = jax.jit(gradients)(*arrays)
    default_gpu(monkeypatch)
    assert isinstance(jax.eval_shape(forward, *arrays)[1], Rows)
    out, got = interpreted(gradients, *arrays)
    apart = lambda a, b: np.linalg.norm(wide(a) - wide(b)) / np.linalg.norm(wide(b))
    assert apart(out[0], plain[0]) <= 2**-8 and apart(out[1], plain[1]) <= 3e-2  # the codes are of values that were rounded to bfloat16
    for a, b in zip(got, expected, strict=True):
        assert apart(a, b) <= 1e-2


SMALL = TransformerConfig(dim=1024, ffn_dim=1024, heads=8, layers=1, channels=4, text_dim=64, text_len=8, freq_dim=32)


def traced(rules, dtype=bf16):
    """The jaxpr of a forward of four frames of eight tokens."""
    model = shell(SMALL, dtype)
    model = with_params(model, rewrite(flat_params(model), rules)[0])
    frames = clip_frames(1, 4, 4)
    forward = lambda model, z, t, text: model(z, t, model.read(text), frames, block_causal(frames, frames))
    like = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
    return str(jax.make_jaxpr(forward)(model, like(1, 4, 4, 8, 4), like(1, 4), like(1, 1, 8, 64)))


def test_where_a_block_runs_the_kernel(monkeypatch):
    """Three times on Hopper in bfloat16, each where all that read the result are FP8; under a mesh on the local shard."""
    calls = lambda *args: traced(*args).count("name=norm_shards")
    fp8 = RULE_SETS["fp8"]
    assert calls(fp8) == 0
    default_gpu(monkeypatch)
    assert calls(fp8) == 3
    assert calls((("blocks.0.self_attn.k.weight", "dense"), *fp8)) == 2
    assert calls(fp8, jnp.float32) == calls(RULE_SETS["w4a16"]) == 0
    with jax.set_mesh(make_mesh(1, 4)):
        body = traced(fp8).split("name=norm_shards")[1].split("shard_map")[1]
    assert "bf16[8,1024]" in body and "bf16[32,1024]" not in body
