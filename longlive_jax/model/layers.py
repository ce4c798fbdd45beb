"""Linear, norms and the two-layer MLP. Statistics are float32; everything else is in the dtype of the input."""

import jax
import jax.numpy as jnp
from flax import nnx

from longlive_jax.ops.matmul import linear


class Linear(nnx.Module):
    """``[..., inputs] -> [..., outputs]``; ``weight [outputs, inputs]`` may be any kind of weight leaf that ``ops.matmul`` knows."""

    def __init__(self, inputs, outputs, bias=True, *, rngs, std=None):
        std = inputs**-0.5 if std is None else std
        self.weight = nnx.Param(std * jax.random.normal(rngs.params(), (outputs, inputs)))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    def __call__(self, x, activation=None, then=None):
        """``x``: an array, or ``Rows`` for a weight in FP8. ``activation``: as in ``ops.matmul.linear``. ``then``: its only reader."""
        then = None if then is None else then.weight.get_value()
        return linear(self.weight.get_value(), x, None if self.bias is None else self.bias[...], activation, then)


class RMSNorm(nnx.Module):
    """``x / rms(x) * weight`` over the last axis; the normalised value is rounded before the gain, as the checkpoints were trained.

    ``apart``: the statistic in a pass of its own, so that the rest is fused with what follows, rotary positions and a write."""

    def __init__(self, dim, eps=1e-6, apart=False):
        self.weight = nnx.Param(jnp.ones(dim))
        self.eps, self.apart = eps, apart

    def __call__(self, x):
        wide = x.astype(jnp.float32)
        r = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
        y = wide * (jax.lax.optimization_barrier(r) if self.apart else r)
        return y.astype(x.dtype) * self.weight[...].astype(x.dtype)


class Affine(nnx.Module):
    """Gain and bias ``[D]`` of a norm."""

    def __init__(self, dim):
        self.weight = nnx.Param(jnp.ones(dim))
        self.bias = nnx.Param(jnp.zeros(dim))

    def __call__(self, dtype):
        return self.weight[...].astype(dtype), self.bias[...].astype(dtype)


class MLP(nnx.Module):
    """``down(activation(up(x)))``."""

    def __init__(self, inputs, hidden, outputs, activation="gelu", *, rngs):
        self.up = Linear(inputs, hidden, rngs=rngs)
        self.down = Linear(hidden, outputs, rngs=rngs)
        self.activation = activation

    def __call__(self, x):
        return self.down(self.up(x, self.activation, self.down))
