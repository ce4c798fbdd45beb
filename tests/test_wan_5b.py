"""The published 5B model at its full size: counted, placed and compiled, never allocated."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import WAN_5B, VideoConfig
from longlive_jax.convert.wan import TRANSFORMER_TABLE
from longlive_jax.sharding import SHARD, TRANSFORMER_RULES, make_mesh, weight_shardings
from longlive_jax.tree import count, flat_params
from tests.aot import compiled
from tests.hlo import dense, large
from tests.programs import shell, streaming, training
from tests.test_convert import transformer_names

GIB = 2**30
PARAMETERS = 4_999_787_712
WINDOW = WAN_5B.stream.window * WAN_5B.tokens * WAN_5B.transformer.dim  # elements of a layer's keys: [1,32,880,24,128]
MOVES = {"copy", "concatenate", "slice", "dynamic-slice", "dynamic-update-slice", "transpose", "gather", "pad", "reverse"}
IN_PLACE = {"parameter", "get-tuple-element", "bitcast", "scatter", "fusion"}


def shapes():
    return {path: x.shape for path, x in flat_params(shell(WAN_5B.transformer, jnp.float32)).items()}


def test_every_source_tensor_has_its_place():
    names = [original for original, *_ in transformer_names(WAN_5B.transformer.layers)]
    paths = [path for name in names for row in TRANSFORMER_TABLE if (path := row.path(name))]
    assert len(names) == len(paths) == 825
    assert set(paths) == set(shapes())
    assert count(shell(WAN_5B.transformer, jnp.bfloat16)) == PARAMETERS


@pytest.mark.parametrize("data, seq", [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (2, 4), (1, 8)])
def test_training_state_divides_over_devices(data, seq):
    """Float32 masters and both moments of AdamW split evenly; the bfloat16 copy is whole on every device."""
    sizes, devices = shapes(), data * seq
    placed = weight_shardings(sizes, TRANSFORMER_RULES, SHARD, make_mesh(data, seq))
    held = sum(np.prod(sharding.shard_shape(sizes[path])) for path, sharding in placed.items())
    print(f"{data} x {seq}: masters and AdamW {12 * held / GIB:.2f} GiB a device, bfloat16 copy {2 * PARAMETERS / GIB:.2f} GiB")
    assert held * devices == PARAMETERS


@pytest.mark.slow
@pytest.mark.parametrize("height, width", [(480, 832), (1280, 704)])
def test_other_sizes_trace(height, width):
    """Any multiple of 32 pixels streams and trains, portrait included."""
    e, mesh = replace(WAN_5B, video=VideoConfig(height=height, width=width)), make_mesh()
    step, args = streaming(mesh, replace(e.transformer, layers=2), e.stream, e.grid, jnp.bfloat16)  # they are all alike
    state, z = jax.eval_shape(step, *args)
    assert z.shape == (1, 8, height // 16, width // 16, 48)
    assert state.memory.layers[-1][0].shape == (1, 32, height * width // 32**2, 24, 128)
    step, args = training(mesh, e.transformer, e.grid, jnp.bfloat16, batch=1, stacked=True)
    value, grads = jax.eval_shape(step, *args)
    assert value.shape == () and count(grads) == PARAMETERS


def in_place(case, buffers):
    """Refuse a compiled step that moves a window: nothing of its size but views and writes into it, and every buffer given back."""
    report = compiled(case)
    found = large(report["text"], WINDOW)
    assert not [op for op in found if op.kind in MOVES]
    kinds = {op.kind for op in found if op.size == WINDOW}
    assert "scatter" in kinds and kinds <= IN_PLACE
    writes = [line for line in report["text"].splitlines() if " scatter(" in line]
    assert all("unique_indices=true" in line for line in writes)  # else by atomic compare-and-swap, for two bytes at a time
    assert report["alias_bytes"] >= buffers * WINDOW * 2
    return report


@pytest.mark.slow
@pytest.mark.parametrize("case, layers", [("stream_4_layers", 4), pytest.param("stream_5b", 30, marks=pytest.mark.exhaustive)])
def test_streaming_step_is_in_place_and_fits(case, layers):
    """In bfloat16 on one H100, a window of 32 latents at 704 x 1280, four UniPC steps; a layer and its memory take 0.64 GiB."""
    report = in_place(case, 2 * layers)
    peak = report["argument_bytes"] + report["temp_bytes"] + report["output_bytes"] - report["alias_bytes"]
    print(f"temporary {report['temp_bytes'] / GIB:.3f} GiB, peak {peak / GIB:.2f} GiB, compiled in {report['compile_s']:.0f} s")
    assert report["temp_bytes"] <= 0.6 * GIB
    assert peak <= (20 - 0.64 * (30 - layers)) * GIB


@pytest.mark.exhaustive
def test_guided_streaming_step_is_in_place():
    """Two memories, known frames and recaching, two layers."""
    assert in_place("stream_guided", 8)["temp_bytes"] <= 0.6 * GIB


@pytest.mark.exhaustive
def test_four_bit_weights_and_memory_fit_a_small_gpu():
    """30 layers in W4A4 with a memory in NVFP4, of which a layer at a time is decoded: codes and scales are written where they lie."""
    report = compiled("stream_nvfp4")
    packed = 30 * 2 * (WINDOW // 2 + WINDOW // 16)
    found = large(report["text"], WINDOW // 2)
    peak = report["argument_bytes"] + report["temp_bytes"] + report["output_bytes"] - report["alias_bytes"]
    print(f"temporary {report['temp_bytes'] / GIB:.3f} GiB, peak {peak / GIB:.2f} GiB, compiled in {report['compile_s']:.0f} s")
    assert not [op for op in found if op.kind in MOVES and op.size in (WINDOW, WINDOW // 2)]
    assert packed <= report["alias_bytes"] <= packed * 1.01
    assert peak <= 6.5 * GIB


WEIGHTS = {3072 * 3072, 3072 * 14336}  # elements of the block linears


@pytest.mark.exhaustive
def test_four_bit_weights_are_multiplied_as_they_lie():
    """On a B200, by the library's block-scaled product: no dense and no transposed copy of a weight."""
    text = compiled("stream_w4a4")["text"]
    assert text.count("__cudnn$blockScaledDot") >= 10
    views = {"parameter", "get-tuple-element", "tuple", "while", "bitcast"}  # of time_embedding.down, which stays bfloat16
    assert {op.kind for op in dense(text, WEIGHTS)} <= views


@pytest.mark.slow
def test_four_bit_weights_are_decoded_one_at_a_time():
    """On an H100, with activations in bfloat16: of all dense weights the program holds one or two of the largest at once."""
    report = compiled("stream_w4a16")
    assert dense(report["text"], WEIGHTS)
    assert report["temp_bytes"] <= 3 * 2 * 3072 * 14336


@pytest.mark.exhaustive
def test_a_chunk_is_decoded_channels_last():
    """8 latents in four passes: no activation is turned round for a convolution, and what the doctor plans for is what is held."""
    report = compiled("decode_5b")
    turned = [op for op in large(report["text"], 2 * 176 * 320 * 512) if op.kind in {"transpose", "copy"}]
    orders = re.findall(r"dim_labels=(\S+?),.*?__cudnn\$conv", report["text"])
    peak = report["argument_bytes"] + report["temp_bytes"] + report["output_bytes"] - report["alias_bytes"]
    assert len(orders) == 35 and all(order.startswith("b0") and order.endswith("f") for order in orders)
    assert not [op for op in turned if "conv" in op.path or "history" in op.path]
    assert peak <= 10.3 * GIB
