import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.ops import convolution
from longlive_jax.ops.convolution import IMPLEMENTATIONS, UPSAMPLINGS, conv2d, history_frames

causal_conv3d = jax.jit(convolution.causal_conv3d, static_argnames=("time_stride", "implementation"))
upsample_conv2d = jax.jit(convolution.upsample_conv2d, static_argnames="implementation")


def reference(x, weight, bias, history, time_stride):
    """The sum written out, in float64."""
    x, weight, history = (np.asarray(a, np.float64) for a in (x, weight, history))
    kt, kh, kw, _, outputs = weight.shape
    x = np.concatenate([history, x], 1)
    x = np.pad(x, ((0, 0), (0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0)))
    batch, frames, height, width, _ = x.shape
    n, height, width = (frames - kt) // time_stride + 1, height - kh + 1, width - kw + 1
    y = np.zeros((batch, n, height, width, outputs))
    for t in range(n):
        for a in range(kt):
            for b in range(kh):
                for c in range(kw):
                    y[:, t] += x[:, t * time_stride + a, b : b + height, c : c + width] @ weight[a, b, c]
    return y + np.asarray(bias, np.float64)


def case(kernel, time_stride, frames=4, inputs=3, outputs=5):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    x, weight = normal(2, frames, 4, 5, inputs), 0.3 * normal(*kernel, inputs, outputs)
    return x, weight, normal(outputs), normal(2, history_frames(weight, time_stride), 4, 5, inputs)


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
@pytest.mark.parametrize("kernel,time_stride", [((3, 3, 3), 1), ((3, 1, 1), 1), ((3, 1, 1), 2), ((1, 3, 3), 1)])
def test_equals_the_written_out_sum(implementation, kernel, time_stride):
    x, weight, bias, history = case(kernel, time_stride)
    y, after = causal_conv3d(x, weight, bias, history, time_stride=time_stride, implementation=implementation)
    np.testing.assert_allclose(y, reference(x, weight, bias, history, time_stride), atol=1e-5)
    past = history.shape[1]
    np.testing.assert_array_equal(after, np.concatenate([history, x], 1)[:, x.shape[1] :][:, :past])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_history_is_zeros_and_a_short_call_keeps_older_frames(implementation):
    x, weight, bias, history = case((3, 3, 3), 1)
    zeros = jnp.zeros_like(history)
    y, _ = causal_conv3d(x, weight, bias, implementation=implementation)
    np.testing.assert_allclose(y, reference(x, weight, bias, zeros, 1), atol=1e-5)
    first, after = causal_conv3d(x[:, :1], weight, bias, zeros, implementation=implementation)
    np.testing.assert_array_equal(after, jnp.stack([zeros[:, 0], x[:, 0]], 1))
    rest, _ = causal_conv3d(x[:, 1:], weight, bias, after, implementation=implementation)
    np.testing.assert_allclose(jnp.concatenate([first, rest], 1), y, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("kernel,time_stride", [((3, 3, 3), 1), ((3, 1, 1), 2)])
def test_gradients_agree(implementation, kernel, time_stride):
    args = case(kernel, time_stride)

    def loss(args, name):
        y, after = causal_conv3d(*args, time_stride=time_stride, implementation=name)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(after))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    for ours, wanted in zip(gradient(args, implementation), gradient(args, "conv3d")):
        np.testing.assert_allclose(ours, wanted, atol=1e-4)


def test_conv2d_strides_and_pads_each_frame():
    x, weight, bias, _ = case((3, 3, 3), 1)
    y = conv2d(x, weight[0], bias, stride=2, padding=((0, 1), (0, 1)))
    padded = np.pad(np.asarray(x), ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)))
    assert y.shape == (2, 4, 2, 2, 5)
    wanted = np.einsum("btijc,ijco->bto", padded[:, :, 2:5, 2:5], weight[0]) + np.asarray(bias)
    np.testing.assert_allclose(y[:, :, 1, 1], wanted, atol=1e-5)


@pytest.mark.parametrize("implementation", [None, *UPSAMPLINGS])
@pytest.mark.parametrize("size", [(1, 1), (4, 5)], ids=str)
def test_upsampling_is_a_convolution_of_repeated_pixels(implementation, size):
    x, weight, bias, _ = case((1, 3, 3), 1)
    x = x[:, :, : size[0], : size[1]]
    large = np.repeat(np.repeat(x, 2, 2), 2, 3)
    y = upsample_conv2d(x, weight[0], bias, implementation=implementation)
    np.testing.assert_allclose(y, reference(large, weight, bias, large[:, :0], 1), atol=1e-5)


def test_gradients_of_upsampling_agree():
    x, weight, bias, _ = case((1, 3, 3), 1)
    gradient = jax.jit(jax.grad(lambda args, name: jnp.sum(jnp.sin(upsample_conv2d(*args, implementation=name)))), static_argnums=1)
    ours, wanted = (gradient((x, weight[0], bias), name) for name in ("phases", "plain"))
    for a, b in zip(ours, wanted):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_phases_sum_the_taps_before_they_are_rounded():
    """In bfloat16 both forms differ from float32 by the rounding of inputs, weights and result."""
    x, weight, bias, _ = case((1, 3, 3), 1, inputs=16)
    wanted = upsample_conv2d(x, weight[0], bias, implementation="plain")
    errors = {name: jnp.std(upsample_conv2d(x.astype(jnp.bfloat16), weight[0], bias, implementation=name) - wanted) for name in UPSAMPLINGS}
    assert errors["phases"] < 1.2 * errors["plain"] < 0.01 * jnp.std(wanted)


def test_errors():
    x, weight, bias, history = case((3, 1, 1), 2)
    with pytest.raises(ValueError, match="3 frames, not a multiple of time_stride=2"):
        causal_conv3d(x[:, :3], weight, bias, history, time_stride=2)
    with pytest.raises(ValueError, match=r"needs \(2, 2, 4, 5, 3\)"):
        causal_conv3d(x, weight, bias, history)
    with pytest.raises(ValueError, match="no implementation 'conv4d'"):
        causal_conv3d(x, weight, bias, history, time_stride=2, implementation="conv4d")
    with pytest.raises(ValueError, match=r"upsample_conv2d got a kernel of \(3, 1\); it takes 3 x 3"):
        convolution.upsample_conv2d(x, weight[:, 0])
    with pytest.raises(ValueError, match="no implementation 'bilinear'; use one of plain, phases"):
        convolution.upsample_conv2d(x, case((1, 3, 3), 1)[1][0], implementation="bilinear")
