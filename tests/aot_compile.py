"""Compile one named case for GPUs that are not there; print its memory and time as JSON and write its HLO.

    python -m tests.aot_compile stream_5b out.hlo

Needs jax-cuda13-plugin and jax-cuda13-pjrt of jax's own version, and nvidia-cudnn-cu13, where Python finds them. Runs in a process of its own:
the platform is chosen once per process, and the CPU tests have theirs.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.extend.backend
import jax.numpy as jnp
from jax.experimental import topologies

from longlive_jax.config import WAN_5B
from longlive_jax.sharding import make_mesh
from longlive_jax.streaming.programs import STEP, VAE
from tests.programs import cross_gradient, decoding, streaming, training

# Facts about the chip, all that a compiler asks of it.
H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_address_bits: 64 name: "NVIDIA H100 80GB HBM3" driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

B200 = (
    H100.replace("NVIDIA H100 80GB HBM3", "NVIDIA B200")
    .replace("major: 9 minor: 0", "major: 10 minor: 0")
    .replace("core_count: 132", "core_count: 148")
    .replace("3352320000000", "7672320000000")
    .replace("l2_cache_size: 52428800", "l2_cache_size: 132644864")
    .replace("84942979072", "191514411008")
    .replace("1.98", "1.965")
)

BF16 = {"dtype": jnp.bfloat16, "attention": "cudnn"}
SMALL = (16, 16)  # a latent grid: collectives do not depend on it
QUICK = {"xla_gpu_enable_triton_gemm": False}  # fewer kernels to generate; communication is decided before


def config(layers):
    return replace(WAN_5B.transformer, layers=layers)


def mesh_of(chip, data=1, seq=1):
    """A mesh of chips that are not there, which are also what ``quant`` and Pallas take for the device."""
    devices = topologies.get_topology_desc(platform="cuda", target_config=chip, topology=f"1x1x{data * seq}").devices
    jax.extend.backend.get_default_device = lambda *_, **__: devices[0]
    return make_mesh(data, seq, devices)


def stream(mesh, layers, grid=WAN_5B.grid, memory="model", **options):
    rules = replace(WAN_5B.stream, clean_recache=bool(options.get("given")), memory=memory)
    attention = "flash" if mesh.devices.flat[0].compute_capability == "9.0" else "cudnn"
    return streaming(mesh, config(layers), rules, grid, **BF16 | {"attention": attention}, **options)


def train(mesh, layers=2, **options):
    return training(mesh, config(layers), SMALL, **BF16, **options)


def cross(mesh, prompts):
    return cross_gradient(mesh, config(1), 64, prompts=prompts, **BF16)


def decode(mesh, latents):
    """A chunk through the VAE's decoder, with the convolutions of a GPU."""
    jax.default_backend = lambda: "gpu"
    return decoding(mesh, WAN_5B, latents)


def unmarked(build, *args):
    """The same program without the marking of inputs as varying that ``sharding.local`` does."""
    jax.lax.pcast = lambda x, axes, to: x
    return build(*args)


# name -> (mesh, builder of the function and its arguments, arguments to donate, compiler options)
CASES = {
    "stream_5b": ((1, 1), lambda m: stream(m, 30), 1, STEP),
    "stream_4_layers": ((1, 1), lambda m: stream(m, 4), 1, STEP),
    "decode_5b": ((1, 1), lambda m: decode(m, 8), 1, VAE),
    "stream_guided": ((1, 1), lambda m: stream(m, 2, guidance=3.0, given=True), 1, QUICK),
    "stream_seq": ((2, 4), lambda m: stream(m, 2, SMALL, batch=2), 1, QUICK),
    "stream_fp8_memory": ((1, 1), lambda m: stream(m, 1, memory="fp8"), 1, QUICK),
    "stream_nvfp4": ((1, 1), lambda m: stream(m, 30, memory="nvfp4", rules="w4a4"), 1, STEP),
    "stream_fp8_seq": ((1, 2), lambda m: stream(m, 1, SMALL, memory="fp8"), 1, QUICK),
    "train": ((2, 4), lambda m: train(m, layers=1), (), QUICK),
    "train_stacked": ((2, 4), lambda m: train(m, stacked=True), (), QUICK),
    "stream_fp8": ((1, 1), lambda m: stream(m, 2, rules="fp8"), 1, STEP),
    "stream_w4a16": ((1, 1), lambda m: stream(m, 1, SMALL, rules="w4a16"), 1, QUICK),
    "stream_w4a4": ((1, 1), lambda m: stream(m, 1, SMALL, rules="w4a4_static_6"), 1, QUICK),
    "cross_one": ((2, 4), lambda m: cross(m, 1), (), QUICK),
    "cross_two": ((2, 4), lambda m: cross(m, 2), (), QUICK),
    "cross_one_unmarked": ((2, 4), lambda m: unmarked(cross, m, 1), (), QUICK),
}


CHIPS = {"stream_w4a4": B200}  # the others are for an H100


def main(case, path):
    shape, build, donated, options = CASES[case]
    mesh = mesh_of(CHIPS.get(case, H100), *shape)
    with jax.set_mesh(mesh):
        function, args = build(mesh)
        start = time.perf_counter()
        lowered = jax.jit(function, donate_argnums=donated, keep_unused=True).lower(*args)
        middle = time.perf_counter()
        compiled = lowered.compile(compiler_options=options)
    Path(path).write_text(compiled.as_text())
    m = compiled.memory_analysis()
    report = {
        "trace_s": middle - start,
        "compile_s": time.perf_counter() - middle,
        "argument_bytes": m.argument_size_in_bytes,
        "temp_bytes": m.temp_size_in_bytes,
        "output_bytes": m.output_size_in_bytes,
        "alias_bytes": m.alias_size_in_bytes,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
