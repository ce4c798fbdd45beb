"""What this machine can run, on one screen: devices, libraries, what of each precision is real here, and what fits. Nothing is compiled.

    python experiments/doctor.py [--models=wan_5b,toy] [--bytes=80e9]

``--bytes``: plan for a device with that much memory instead of the one found.
"""

import argparse
import importlib.metadata
import os
import pathlib
import platform
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec

import av
import jax
import jax.extend.backend
import jax.numpy as jnp
from flax import nnx

from longlive_jax.config import ConfigError, preset, require
from longlive_jax.kernels import AUTOMATIC, HARDWARE
from longlive_jax.model.memory import empty_memory
from longlive_jax.model.transformer import VideoTransformer
from longlive_jax.model.vae import VAE, count_passes
from longlive_jax.ops.attention import library, pick
from longlive_jax.ops.dispatch import capability
from longlive_jax.ops.low_precision import EMULATED, NATIVE, chosen
from longlive_jax.quant.leaves import nbytes
from longlive_jax.quant.rewrite import RULE_SETS, rewrite
from longlive_jax.streaming.bundles import bundled
from longlive_jax.streaming.states import device_memory, host_memory
from longlive_jax.tree import abstract, cast, flat_params

GIB = 2**30
KINDS = {"bf16": None, "FP8": "fp8", "NVFP4": "w4a16"}  # of the block linears; what else there is stays bf16
LIBRARIES = ("longlive-jax", "jax", "jaxlib", "flax", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "numpy", "av")
WINDOWS = (16, 32, 64, 128, 256, 512)  # latent frames
WORKING = 0.5 * GIB  # of a streaming step besides weights and memory, as compiled for the largest preset
DECODING = 2.75  # widest activations that a pass of the decoder holds, as compiled for the largest preset: 4.73 GiB for two latents


def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine():
    """Lines on hardware and libraries."""
    devices, memory = jax.devices(), device_memory()
    client = jax.extend.backend.get_backend()
    capability = f", compute capability {devices[0].compute_capability}" if devices[0].platform == "gpu" else ""
    kind = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}{capability})"
    yield f"devices      {kind}, {memory / GIB:.1f} GiB each; {os.cpu_count()} CPU cores, {host_memory() / GIB:.1f} GiB on the host"
    driver = pathlib.Path("/proc/driver/nvidia/version")
    words = driver.read_text().splitlines()[0].split("  ") if driver.is_file() else []
    runtime = " ".join(client.platform_version.split())[:60]
    yield f"driver       {words[1] if len(words) > 1 else 'no NVIDIA driver'}; runtime {runtime}"
    yield f"libraries    python {platform.python_version()}, " + ", ".join(f"{n} {version(n)}" for n in LIBRARIES if version(n))


def precisions():
    """Lines on what of each precision is hardware here, and why."""
    attention = pick(None, jnp.dtype(jnp.bfloat16))
    why = {"cudnn": "", "flash": ": cuDNN, and the package's kernel for full windows"}.get(attention, ": cuDNN needs an NVIDIA GPU")
    yield f"bf16           attention by {attention}{why}"
    for operation, (native, least, hardware) in NATIVE.items():
        name = chosen(operation)
        why = f"{native} needs {hardware}" if name == EMULATED else f"{native}, compute capability {least} or higher"
        yield f"{operation:14} {'emulated, same numbers and no faster' if name == EMULATED else 'in hardware'}: {why}"
    for operation, (least, below, hardware) in HARDWARE.items():
        usual = "by default it runs on Hopper" if operation in AUTOMATIC else "by default its reference runs"
        yield f"{operation:24} {'can be asked for by name' if least <= capability() < below else 'not here'}: needs {hardware}; {usual}"
    kernel = "emulated" if library(attention) != "cudnn" else "by cuDNN" if capability() >= 9 else "in the activations' dtype"
    yield f"FP8 memory     stream.memory='fp8', attention to it {kernel}"
    yield "FP4 memory     stream.memory='nvfp4', decoded for attention in the activations' dtype"


def surroundings(cache="~/.cache/longlive_jax"):
    """Lines on files and codecs."""
    folder = pathlib.Path(jax.config.jax_compilation_cache_dir or cache).expanduser()
    files = [f for f in folder.rglob("*") if f.is_file()] if folder.is_dir() else []
    size = sum(f.stat().st_size for f in files) / 2**20
    yield f"cache        {len(files)} files, {size:.0f} MiB of compiled programs in {folder}"
    encoders = [n for n in ("libx264", "h264_nvenc", "libx265", "libsvtav1", "ffv1") if has_encoder(n)]
    needed = "" if "libx264" in encoders else "; videos need libx264: reinstall av from a wheel"
    ffmpeg = shutil.which("ffmpeg") or "not found, not needed"
    yield f"video        PyAV {av.__version__} encodes {', '.join(encoders) or 'nothing that is known here'}{needed}; ffmpeg {ffmpeg}"
    files = {n: "yes" if find_spec(n) else "no" for n in ("tokenizers", "ftfy")}
    yield f"models       bundled: {', '.join(bundled()) or 'none'}; umT5 text: " + ", ".join(f"{n} {there}" for n, there in files.items())


def has_encoder(name):
    try:
        return av.codec.Codec(name, "w").is_encoder
    except (ValueError, av.FFmpegError):
        return False


def fits(name, memory):
    """Lines on what a preset needs and which windows fit into ``memory`` bytes."""
    e = preset(name)
    dtype = jnp.dtype(e.dtype)
    held = lambda tree: sum(nbytes(x) for x in jax.tree.leaves(tree))
    params = flat_params(jax.eval_shape(lambda m: cast(m, dtype), abstract(lambda: VideoTransformer(e.transformer, rngs=nnx.Rngs(0)))))
    weights = {kind: sum(map(nbytes, (rewrite(params, RULE_SETS[rules])[0] if rules else params).values())) for kind, rules in KINDS.items()}
    slot = held(jax.eval_shape(lambda: empty_memory(e.transformer, e.stream, 1, e.tokens, dtype)).layers) / e.stream.window
    vae = jax.eval_shape(lambda m: cast(m, dtype), abstract(lambda: VAE(e.vae, rngs=nnx.Rngs(0))))
    carry = held(jax.eval_shape(lambda v: v.decode_start(1, e.grid), vae))
    frames, widest = e.stream.chunk, vae.widest_decoded(1, e.grid)
    pixels = 3 * e.vae.time_stride * frames * e.video.height * e.video.width
    activations = DECODING * widest * frames / count_passes(frames, widest) + pixels
    decoding = carry + held(vae) + held(vae.decoder) + activations * dtype.itemsize  # the kernels turned for the convolutions, once a chunk
    show = lambda kinds: ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in kinds.items())
    yield f"{name}: {e.video.height} x {e.video.width}, chunks of {e.stream.chunk} latent frames, GiB in {e.dtype} unless said otherwise"
    dense = "bf16" if dtype.itemsize == 2 else e.dtype
    yield f"  weights    {show({dense if kind == 'bf16' else kind: size for kind, size in weights.items()})}; VAE {held(vae) / GIB:.2f}"
    yield f"  memory     {slot / GIB:.3f} a latent frame, {slot * e.stream.window / GIB:.2f} for the window of {e.stream.window}"
    yield f"  decoder    carry {carry / GIB:.2f}; weights, carry and one step about {decoding / GIB:.1f}"
    for kind, size in weights.items():
        rest = memory - size - WORKING
        alone, both = (max((w for w in WINDOWS if possible(e.stream, w) and w * slot <= left), default=0) for left in (rest, rest - decoding))
        say = lambda window: f"window {window}" if window else "does not fit"
        label = dense if kind == "bf16" else kind
        yield f"  {label:10} fits with: transformer alone {say(alone)}; with the decoder on the same device {say(both)}"


def possible(stream, window):
    """Whether the schema takes a window of that many latent frames."""
    try:
        replace(stream, window=window)
    except ConfigError:
        return False
    return True


def report(models, memory=None):
    """All lines; ``memory`` bytes to plan for, None: those of the device."""
    yield from machine()
    yield from precisions()
    yield from surroundings()
    planned = device_memory() if memory is None else memory
    yield f"into {planned / GIB:.1f} GiB fit, of the windows {', '.join(map(str, WINDOWS))}:"
    for name in models:
        yield from fits(name, planned)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="wan_5b,toy", help="presets to plan for")
    parser.add_argument("--bytes", type=float, help="plan for a device with this much memory")
    options = parser.parse_args(argv)
    require(options.bytes is None or options.bytes > 0, f"--bytes={options.bytes} must be positive")
    for line in report([name for name in options.models.split(",") if name], options.bytes):
        print(line, flush=True)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
