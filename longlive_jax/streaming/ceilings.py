"""Rates that a device reaches on the operations of a workload, and the times that they allow for it.

A busy device draws more power and lowers its clocks, by a tenth and more. So the operations take turns, each for ``SPAN`` seconds back to back,
and the first turn, seconds of work that heat the device up, does not count. They are compiled as the step and the decoder are.
"""

import functools
import math
import statistics
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from longlive_jax.ops.attention import dense, has_kernel, pick, whole
from longlive_jax.ops.fp8_attention import by_cudnn
from longlive_jax.sharding import frames_to_heads, heads_to_frames, local, make_mesh, spec
from longlive_jax.streaming.figures import REFUSED, seconds_of
from longlive_jax.streaming.programs import STEP, VAE

SPAN = 0.25  # seconds of one turn of one operation
PASSES = 27  # over [tokens, width] a layer, read or written: norms, modulation, rotary, gates and GELU, each fused into one
bf16, fp8 = jnp.bfloat16, jnp.float8_e4m3fn


@dataclass(frozen=True)
class Case:
    """One operation: the kind of rate, its name in the record, the function and its operands ``((shape, dtype), ...)``, and what it does."""

    kind: str
    name: str
    function: object
    operands: tuple
    amount: float  # operations or bytes of a call
    unit: str = "TFLOP/s"

    @property
    def scale(self):
        """Operations or bytes a second in one ``unit``."""
        return 1e9 if self.unit == "GB/s" else 1e12


def product_of(x, w):
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=bf16)


def attention_of(q, k, v, length=None):
    return dense(q, k, v, pick(None, jnp.dtype(bf16)), length)


def convolution_of(x, w):
    numbers = ("NDHWC", "ODHWI", "NDHWC")
    return jax.lax.conv_general_dilated(x, w, (1, 1, 1), ((0, 0), (1, 1), (1, 1)), dimension_numbers=numbers)


def cases(e):
    """The operations of an ``Experiment``, at its shapes."""
    t, n, keys = e.transformer, e.stream.chunk * e.tokens, e.stream.window * e.tokens
    for kind, dtype in (("bf16", bf16), ("FP8", fp8)):
        for part, inner, out in (("up", t.dim, t.ffn_dim), ("down", t.ffn_dim, t.dim), ("square", t.dim, t.dim)):
            operands = ((n, inner), dtype), ((out, inner), dtype)
            yield Case(f"{kind} {part}", f"{kind} matmul {n} x {inner} x {out}", product_of, operands, 2 * n * inner * out)
    rows = 2**17 if t.dim >= 1024 else 2**10
    yield Case("copy", "copy", jnp.negative, (((rows, 4096), bf16),), 4 * 4096 * rows, "GB/s")
    q, k = ((1, m, t.heads, t.head_dim) for m in (n, keys))
    operands, work = ((q, bf16), (k, bf16), (k, bf16)), 4 * n * keys * t.dim
    full = f"attention bf16 {n} x {keys}"
    own = has_kernel(pick(None, jnp.dtype(bf16)), *(jax.ShapeDtypeStruct(*operand) for operand in operands[:2]))
    yield Case("attention by cuDNN" if own else "attention", full, attention_of, operands, work)
    if own:
        yield Case("attention", f"{full}, by the package", whole, operands, work)
    by_length = functools.partial(jax.jit(attention_of), length=jnp.full((1,), keys, jnp.int32))
    yield Case("attention by length", f"attention bf16 {n} x {keys}, by length", by_length, operands, work)
    narrow = tuple((shape, fp8) for shape in (q, k, k))
    yield Case("attention FP8", f"attention FP8 {n} x {keys}", by_cudnn, narrow, work)
    for frames, height, width, c in decoder_shapes(e):
        operands = ((1, frames + 2, height, width, c), bf16), ((c, 3, 3, 3, c), bf16)
        name = f"conv3d bf16 {frames} x {height} x {width} x {c}"
        yield Case("conv3d", name, convolution_of, operands, 2 * 27 * frames * height * width * c**2)


def decoder_shapes(e):
    """``(frames, height, width, channels)`` of the convolutions between equal channels in the last three stages, at 8 frames."""
    h, w = e.grid
    widths = [e.vae.decoder_dim * m for m in reversed(e.vae.multipliers)]
    return [(8, h * 2**i, w * 2**i, widths[i]) for i in range(len(widths) - 1, 0, -1)]


@functools.partial(jax.jit, static_argnums=(1, 2))
def normal(key, shape, dtype):
    return jax.random.normal(key, shape, bf16).astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def cut(pool, at, shape, dtype):
    return jax.lax.slice(pool, (at,), (at + math.prod(shape),)).reshape(shape).astype(dtype)


def measure(record, cases, repeats, span=SPAN):
    """Every case's rates, as ceilings of ``record``. One that fails is noted, and no reason to stop."""
    most = max(math.prod(shape) for case in cases for shape, _ in case.operands)
    pool = normal(jax.random.key(0), (most + 2048,), bf16)
    ready = [(case, *made) for case in cases if (made := prepare(record, case, span, pool))]
    samples = {case.name: [] for case, *_ in ready}
    for _ in record.turns(repeats + 1, least=4):
        for case, run, calls in ready:
            samples[case.name] += [case.amount * calls / s / case.scale for s in seconds_of(run, 1)]
    for case, *_ in ready:
        record.ceiling(case.name, samples[case.name][1:], case.unit)
    kinds = {}
    for case, *_ in ready:
        kinds.setdefault(case.kind, []).append(record.ceilings[case.name]["value"] * case.scale)
    record.rates = {kind: statistics.mean(values) for kind, values in kinds.items()}
    record.write()


def prepare(record, case, span, pool):
    """One turn of a case on numbers of ``pool``, and how many calls it makes; None if it cannot run."""
    try:
        record.need(2, case.name)
        args = [cut(pool, 997 * i, *operand) for i, operand in enumerate(case.operands)]
        began, lowered = record.clock(), jax.jit(case.function).lower(*args)
        function = lowered.compile(compiler_options=STEP | VAE)
        record.grant(record.clock() - began)
        once = min(seconds_of(lambda: function(*args), 3))
    except REFUSED as error:
        record.failed(case.name, error)
        return None
    calls = max(1, min(500, math.ceil(span / once)))
    return functools.partial(again, function, args, calls), calls


def again(function, args, calls):
    """``calls`` calls back to back; a result is let go when the next one is under way."""
    for _ in range(calls):
        y = function(*args)
    return y


def exchange(record, e, shards, repeats):
    """Queries, keys and values of a layer from frames to heads, and a result back: bytes that leave a device, a second; ``shards`` devices."""
    mesh = make_mesh(1, shards)
    frames, heads = ("batch", "frames", None, None, None), ("batch", None, None, "heads", None)
    size = (1, e.stream.chunk, e.tokens, e.transformer.heads, e.transformer.head_dim)
    there = lambda x: frames_to_heads(x, frames=2, heads=4)
    back = lambda x: heads_to_frames(x, frames=1, heads=3)
    stacked = lambda names: (None, *names)
    cases = {"frames to heads": (there, stacked(frames), stacked(heads), (3, *size)), "heads to frames": (back, heads, frames, size)}
    for name, (body, inputs, outputs, shape) in cases.items():
        with jax.set_mesh(mesh):
            x = jax.device_put(jnp.ones(shape, jnp.dtype(e.dtype)), NamedSharding(mesh, spec(*inputs)))
            function = jax.jit(local(body, (inputs,), outputs)).lower(x).compile()
            seconds = seconds_of(functools.partial(again, function, [x], 20), repeats + 1)[1:]
        leaving = x.nbytes * (shards - 1) / shards**2
        record.ceiling(f"{name}, {shards} devices, {leaving / 1e6:.1f} MB each", [20 * leaving / s / 1e9 for s in seconds], "GB/s")


def floors(rates, e, kind):
    """Seconds of one forward and of the remember pass at these rates, each product at that of its shape; ``(None, None)`` without them."""
    t, n, square = e.transformer, e.stream.chunk * e.tokens, 4 * e.stream.chunk * e.tokens * e.transformer.dim**2
    name, attend = ("bf16" if kind == "bf16" else "FP8"), ("attention FP8" if kind == "fp8_memory" else "attention")
    if not {f"{name} up", f"{name} down", f"{name} square", attend, "copy"} <= rates.keys():
        return None, None
    ffn = 2 * n * t.dim * t.ffn_dim
    attention = 4 * n * t.dim * (e.stream.window * e.tokens + t.text_len) / rates[attend]
    products = 3 * square / rates[f"{name} square"] + ffn / rates[f"{name} up"] + ffn / rates[f"{name} down"]
    layer = products + attention + PASSES * n * t.dim * 2 / rates["copy"]
    last = products - square / rates[f"{name} square"] + attention  # only its keys and values are needed
    return t.layers * layer, t.layers * layer - last


def both_floors(record, frames, label, steps, options):
    """FPS that the floors of the step and of decoding allow, one after the other, side by side, or shared out without loss."""
    rows = [record.figures.get(name, {}).get("floor") for name in (f"streaming step, {steps} steps, {label}", "VAE decode, steady chunk")]
    return frames / (max(rows) if "vae_device" in options else sum(rows) / options.get("shards", 1)) if all(rows) else None


__all__ = ["Case", "both_floors", "cases", "exchange", "floors", "measure", "normal"]
