"""Compile the GPU kernels for a chip that is not there; print what came out as JSON, one entry a case.

    MOSAIC_GPU_DUMP_TO=folder python -m tests.aot_kernels H100 [case ...]

Needs what ``aot_compile`` needs, and runs in a process of its own for the same reason: one a chip, because the assembler keeps its target.
"""

import collections
import functools
import json
import os
import re
import sys
from pathlib import Path

import jax
import jax.extend.backend
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from longlive_jax.kernels import blackwell, flash, fp8, hopper, norm, nvfp4
from tests.aot_compile import B200, H100

CHIPS = {"H100": H100, "B200": B200}
ROWS, IN, OUT = 7040, 3072, 14336
bf16, f32, u8, f8 = jnp.bfloat16, jnp.float32, jnp.uint8, jnp.float8_e4m3fn
ACTIVATIONS = (((ROWS, OUT), bf16), ((), f32))
FRAMES, PER_FRAME = ((1, 8, 880, IN), bf16), ((1, 8, 1, IN), bf16)


def operand(rows, k):
    return ((rows, k // 2), u8), ((rows, k // 16), f8), ((), f32)


def multiply(*args):
    return blackwell.matmul(args[:3], args[3:])


def fp8_operands(rows, k, out):
    return ((rows, k), f8), ((rows, 1), f32), ((out, k), f8), ((out, 1), f32), ((out,), bf16)


def fp8_product(x, sx, w, sw, *bias, activation=None):
    return hopper.product((x, sx), (w, sw), *bias, activation=activation)


def heads(queries, keys, n):
    return tuple(((1, tokens, n, 128), bf16) for tokens in (queries, keys, keys))


def norm_rows(x, multiplier, addend, *residual):
    return norm.norm_rows(x, multiplier, addend, 1e-6, *residual)


def fp8_rounded(x, sx, w, sw, bias, rounding, activation=None):
    return hopper.product((x, sx), (w, sw), bias, activation, rounding)


def stochastic(x, amax):
    return nvfp4.quantise(x, key=jax.random.key(0), amax=amax)


# name -> (chip, function, shapes and dtypes of its arguments)
CASES = {
    "quantise": ("H100", lambda x, amax: nvfp4.quantise(x, amax=amax), ACTIVATIONS),
    "quantise_mse": ("H100", lambda x, amax: nvfp4.quantise(x, "mse", amax=amax), ACTIVATIONS),
    "quantise_stochastic": ("H100", stochastic, ACTIVATIONS),
    "fp8_rows": ("H100", fp8.quantise_rows, (((ROWS, OUT), bf16),)),
    "fp8_narrow_rows": ("H100", fp8.quantise_rows, (((ROWS, IN), bf16),)),
    "norm_rows": ("H100", norm_rows, (FRAMES, PER_FRAME, PER_FRAME)),
    "norm_rows_residual": ("H100", norm_rows, (FRAMES, PER_FRAME, PER_FRAME, FRAMES, PER_FRAME)),
    "norm_rows_shared": ("H100", norm_rows, (FRAMES, ((IN,), bf16), ((IN,), bf16), FRAMES)),
    "fp8_product": ("H100", fp8_product, fp8_operands(ROWS, IN, IN)[:4]),
    "fp8_product_down": ("H100", fp8_product, fp8_operands(ROWS // 2, OUT, IN)),
    "fp8_product_gelu": ("H100", functools.partial(fp8_product, activation="gelu"), fp8_operands(ROWS, IN, OUT)),
    "fp8_product_rounded": ("H100", functools.partial(fp8_rounded, activation="gelu"), (*fp8_operands(ROWS, IN, OUT), ((ROWS, 1), f32))),
    "fp8_product_narrow": ("H100", fp8_product, fp8_operands(200, 512, 384)),
    "attention": ("H100", flash.attend, heads(ROWS, 4 * ROWS, 24)),
    "attention_odd": ("H100", flash.attend, heads(200, 384, 3)),
    "dequantise": ("H100", nvfp4.dequantise, operand(ROWS, OUT)),
    "quantise_mse_b200": ("B200", lambda x, amax: nvfp4.quantise(x, "mse", amax=amax), ACTIVATIONS),
    "matmul_up": ("B200", multiply, (*operand(ROWS, IN), *operand(OUT, IN))),
    "matmul_down": ("B200", multiply, (*operand(ROWS, OUT), *operand(IN, OUT))),
    "matmul_narrow": ("B200", multiply, (*operand(256, 512), *operand(384, 512))),
}


def main(chip, *names):
    devices = topologies.get_topology_desc(platform="cuda", target_config=CHIPS[chip], topology="1x1x1").devices
    jax.extend.backend.get_default_device = lambda: devices[0]  # Mosaic asks it for the architecture
    mesh = Mesh(np.array(devices), ("x",))
    folder, seen = Path(os.environ["MOSAIC_GPU_DUMP_TO"]), set()
    for name, (where, function, arguments) in CASES.items():
        if where != chip or (names and name not in names):
            continue
        arguments = [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, PartitionSpec())) for s, d in arguments]
        with jax.set_mesh(mesh):
            compiled = jax.jit(function).lower(*arguments).compile()
        ptx = set(folder.glob("*.ptx")) - seen
        seen |= ptx
        text = "\n".join(path.read_text() for path in ptx)
        counts = collections.Counter(
            re.findall(r"\b(?:tcgen05|wgmma\.mma_async|cp\.async\.bulk\.tensor|st\.local|ld\.local|ex2|rcp|div)[\w.:]*", text)
        )
        target = sorted(set(re.findall(r"^\.target (\w+)", text, re.M)))
        tenths = collections.Counter(re.findall(r"([a-z]+)[.\w]*[^;\n]*\b0f3DCCCCCC", text))  # nvfp4.code's third line
        report = {"target": target, "counts": counts, "tenths": tenths, "temp": compiled.memory_analysis().temp_size_in_bytes}
        print(json.dumps({name: report}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
