"""What compiled programs send between devices, on eight CPU devices and, compiled ahead of time with cuDNN, on eight H100s."""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import TINY, WAN_5B
from longlive_jax.sharding import make_mesh
from longlive_jax.tree import flat_params
from tests.aot import compiled
from tests.hlo import collectives, counts, of
from tests.programs import cross_gradient, quick, shell, streaming, training

pytestmark = pytest.mark.slow

CONFIG = replace(TINY.transformer, channels=8)  # its head divides over eight devices
LAYERS = CONFIG.layers
STREAM = replace(TINY.stream, chunk=4, sink=4, window=16)
MESH = (2, 4)
EXCHANGE = "self_attn/shard_map/all_to_all"


def on_cpu(build, donate=()):
    """The collectives of a program on a data x seq mesh of CPU devices."""
    mesh = make_mesh(*MESH)
    with jax.set_mesh(mesh):
        function, args = build(mesh)
        return collectives(quick(function, donate_argnums=donate).lower(*args).compile().as_text())


def forward_and_backward(ops):
    """All-to-alls of the forward pass, of its repetition and of the backward pass, each ``(qkv, output)`` by the rank of what is sent."""
    parts = {"forward": Counter(), "again": Counter(), "backward": Counter()}
    for op in of(ops, "all-to-all", EXCHANGE):
        part = "again" if "rematted_computation" in op.path else "backward" if "transpose" in op.path else "forward"
        parts[part][len(op.shapes[0])] += 1
    return {name: (ranks[6], ranks[5]) for name, ranks in parts.items()}


# ---- CPU -----------------------------------------------------------------------------------------------------------------------------------


def test_forward_sends_two_all_to_alls_a_layer():
    ops = on_cpu(lambda mesh: training(mesh, CONFIG, TINY.grid, jnp.float32, frames=8, gradient=False))
    assert counts(ops).keys() <= {"all-to-all", "all-reduce"}
    assert forward_and_backward(ops)["forward"] == (LAYERS, LAYERS)
    assert len(of(ops, "all-to-all")) == 2 * LAYERS
    assert all(op.size == 1 for op in of(ops, "all-reduce"))  # the loss


@pytest.mark.parametrize("stacked", [False, True])
def test_training_step_sends_six_all_to_alls_a_layer_and_gathers_weights_once(stacked):
    ops = on_cpu(lambda mesh: training(mesh, CONFIG, TINY.grid, jnp.float32, frames=8, stacked=stacked, masters=True))
    assert counts(ops).keys() <= {"all-to-all", "all-reduce", "all-gather", "reduce-scatter"}
    layers = 1 if stacked else LAYERS  # the body of a scan stands once
    assert forward_and_backward(ops) == dict.fromkeys(("forward", "again", "backward"), (layers, layers))
    assert len(of(ops, "all-to-all")) == 6 * layers
    weights = Counter(x.shape for x in flat_params(shell(CONFIG, jnp.float32)).values())
    assert Counter(op.shapes[0] for op in of(ops, "all-gather")) == weights  # every weight once, and nothing else


@pytest.mark.parametrize("relative", [False, True])
def test_streaming_sends_two_all_to_alls_a_layer_and_forward(relative):
    stream = replace(STREAM, relative=relative)
    ops = on_cpu(lambda mesh: streaming(mesh, CONFIG, stream, TINY.grid, jnp.float32, batch=2), donate=1)
    assert counts(ops).keys() == {"all-to-all"}
    assert len(of(ops, "all-to-all", "solve/")) == 2 * LAYERS  # the loop's body stands once
    assert len(of(ops, "all-to-all", "remember/")) == 2 * LAYERS - 1  # the last layer only leaves its keys and values


@pytest.mark.parametrize("prompts", [1, 2])
def test_text_gradient_is_summed_over_the_frames_of_all_devices(prompts):
    """Every shard of the frames reads the same keys and values of the text."""
    mesh, rng = make_mesh(*MESH), np.random.default_rng(0)
    function, args = cross_gradient(mesh, CONFIG, 4, jnp.float32, prompts=prompts)
    args = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), args)
    expected = quick(function)(*args)
    with jax.set_mesh(mesh):
        found = quick(function)(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), found, expected)


# ---- H100, ahead of time -------------------------------------------------------------------------------------------------------------------

GPU_LAYERS = 2


def text_elements(prompts):
    """Keys and values of one sample's text, in one layer."""
    return 2 * prompts * WAN_5B.transformer.text_len * WAN_5B.transformer.dim


@pytest.mark.parametrize("case", ["train", pytest.param("train_stacked", marks=pytest.mark.exhaustive)])
def test_gpu_training_step(case):
    """One layer that is written out, and two that are scanned, whose body stands once."""
    text = compiled(case)["text"]
    assert "__cudnn$fmhaSoftmaxBackward" in text
    ops = collectives(text)
    assert counts(ops).keys() == {"all-to-all", "all-reduce"}
    assert forward_and_backward(ops) == dict.fromkeys(("forward", "again", "backward"), (1, 1))
    assert len(of(ops, "all-to-all")) == 6
    assert sum(op.size for op in of(ops, "all-reduce", "cross_attn/shard_map")) == text_elements(2)


def test_gpu_streaming_step():
    text = compiled("stream_seq")["text"]
    assert "mosaic_gpu" in text  # attention to a full window, on the local heads
    ops = collectives(text)
    assert counts(ops).keys() == {"all-to-all"}
    assert len(of(ops, "all-to-all", "solve/")) == 2 * GPU_LAYERS
    assert len(of(ops, "all-to-all", "remember/")) == 2 * GPU_LAYERS - 1


@pytest.mark.parametrize("case, summed", [("cross_one", 1), ("cross_two", 2), ("cross_one_unmarked", 0)])
def test_gpu_text_gradient_is_summed_because_local_marks_its_inputs(case, summed):
    """Without the mark the cuDNN call loses the sum over devices, and nothing says so."""
    text = compiled(case)["text"]
    assert "__cudnn$fmhaSoftmaxBackward" in text
    ops = collectives(text)
    assert sum(op.size for op in of(ops, "all-reduce")) == text_elements(summed)
    assert len(ops) == (1 if summed else 0)
