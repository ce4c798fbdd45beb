"""The shape checks of the tests are on: a wrong shape or rank is refused at the function that states it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jaxtyping import TypeCheckError

from longlive_jax.config import TINY
from longlive_jax.model import rope
from longlive_jax.model.frames import one_chunk
from longlive_jax.model.transformer import VideoTransformer
from longlive_jax.ops.attention import attend, attend_filled
from longlive_jax.tree import abstract

q = jnp.ones((1, 2, 3, 4, 8))


@pytest.mark.parametrize(
    "call",
    [
        lambda: attend(q, q, q[:, :1], [[True] * 2] * 2),  # keys of two frames, values of one
        lambda: attend(q, q, q[..., :4], [[True] * 2] * 2),  # another head size
        lambda: attend_filled(q, q, q, jnp.ones(2, int)),  # a length for each of two samples, one sample
        lambda: attend_filled(q, q, q, jnp.ones(1)),  # a length that is no whole number
        lambda: rope.sinusoid(jnp.ones(3), 8),  # times without a batch axis
        lambda: rope.rotate(q[0], 1.0, 0.0),
    ],
)
def test_a_wrong_shape_is_refused(call):
    with pytest.raises(TypeCheckError):
        call()


def test_a_wrong_shape_is_refused_while_tracing():
    model = abstract(lambda: VideoTransformer(TINY.transformer, rngs=nnx.Rngs(0)))
    z, t = jax.ShapeDtypeStruct((1, 2, 2, 4, 4), jnp.float32), jax.ShapeDtypeStruct((1, 3), jnp.float32)
    with pytest.raises(TypeCheckError):
        jax.eval_shape(lambda model, z, t: model(z, t, None, one_chunk(t)), model, z, t)


def test_pytrees_still_map():
    """Fields of a pytree hold whatever JAX maps them to."""
    frames = one_chunk(jnp.zeros((1, 2)))
    named = jax.tree.map(lambda x: str(x.shape), frames)
    assert dataclasses.asdict(named) | {"chunk": 0} == {"time": "(1, 2)", "prompt": "(1, 2)", "chunk": 0, "noisy": (True, True)}
