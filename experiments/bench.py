"""Measure every inference figure of the 5B workload on one GPU, with ceilings measured in the same run.

    python experiments/bench.py --out=runs/bench                                       # all parts
    python experiments/bench.py --parts=ceilings,dit,vae --minutes=3 --profile         # some of them, within three minutes
    python experiments/bench.py --model=tiny --parts=dit,vae --repeats=2               # anywhere

Random weights are made on the device. After each figure ``bench.json``, ``bench.md`` and ``bench.png`` are written again, so a run that is
killed keeps what it had. What each figure counts stands in docs/benchmarks.md. ``--profile`` adds ``profile.txt``: device time of one chunk by
part of the model and by kernel, from a trace.
"""

import argparse
import functools
import gc
import itertools
import math
import pathlib
import re
import statistics
import sys
import time
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx

from longlive_jax.config import ConfigError, TextConfig, preset, require
from longlive_jax.diffusion.solvers import Solver
from longlive_jax.model.text import TextEncoder
from longlive_jax.model.transformer import VideoTransformer
from longlive_jax.model.vae import VAE
from longlive_jax.ops.attention import dense, pick
from longlive_jax.quant.rewrite import RULE_SETS, rewrite
from longlive_jax.streaming import profiles
from longlive_jax.streaming.bundles import Bundle
from longlive_jax.streaming.figures import Figures, say, seconds_of
from longlive_jax.streaming.programs import advance, decode_chunk, encode_clip
from longlive_jax.streaming.session import Session
from longlive_jax.tree import abstract, flat_params, with_params

PARTS = ("ceilings", "dit", "vae", "first_frame", "end_to_end", "fp8")  # in this order: what is known least and costs least comes first
PROMPT = "A red star bounces in a meadow."
PASSES = 27  # over [tokens, width] a layer, read or written: norms, modulation, rotary, gates and GELU, each fused into one
MOST_STEPS = 4
REFUSED = (RuntimeError, ValueError)  # of the compiler, the device or the package: JaxRuntimeError is a RuntimeError
GOALS = {  # of the workload on one H100; times and memory are upper, rates lower bounds
    "DiT forward, bf16": 0.200,
    "DiT forward, FP8 linears": 0.165,
    "VAE decode, steady chunk": 0.85,
    "VAE decode, first chunk": 0.85,
    "VAE encode, first chunk": 0.25,
    "denoise FPS, 4 steps, bf16": 32,
    "denoise FPS, 2 steps, bf16": 53,
    "denoise FPS, 4 steps, FP8 linears": 38,
    "denoise FPS, 2 steps, FP8 linears": 64,
    "end-to-end FPS, 4 steps, bf16": 17,
    "end-to-end FPS, 4 steps, FP8 linears": 21,
    "end-to-end FPS, 4 steps, bf16, VAE on a second GPU": 31,
    "time to first pixel frame, warm": 1.2,
    "peak memory, DiT part, bf16": 20.0,
}
LABELS = {"bf16": "bf16", "fp8": "FP8 linears"}
bf16, fp8 = jnp.bfloat16, jnp.float8_e4m3fn


# ---- ceilings ------------------------------------------------------------------------------------------------------------------------------


def product_of(x, w):
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=bf16)


def convolution_of(layout):
    numbers = (layout, "DHWIO" if layout == "NDHWC" else "OIDHW", layout)
    return lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1, 1), ((0, 0), (1, 1), (1, 1)), dimension_numbers=numbers)


def ceilings(record, work, repeats):
    """Rates of the operations that the workload is made of, at its shapes."""
    e = work.e
    t, n = e.transformer, e.stream.chunk * e.tokens
    square = 8192 if t.dim >= 1024 else 256
    shapes = ((n, t.dim, t.ffn_dim), (n, t.ffn_dim, t.dim), (n, t.dim, t.dim), (square, square, square))
    for kind, dtype in (("bf16", bf16), ("FP8", fp8)):
        for rows, inner, out in shapes:
            name = f"{kind} matmul {rows} x {inner} x {out}"
            rate(record, name, product_of, (((rows, inner), dtype), ((out, inner), dtype)), 2 * rows * inner * out, "TFLOP/s", repeats)
    copied = (64 * square, square // 2)
    rate(record, "copy", jnp.negative, ((copied, bf16),), 4 * math.prod(copied), "GB/s", repeats)
    q, k = ((1, m, t.heads, t.head_dim) for m in (n, e.stream.window * e.tokens))
    attend = lambda q, k, v: dense(q, k, v, pick(None, jnp.dtype(bf16)))
    operations = 4 * n * e.stream.window * e.tokens * t.dim
    rate(record, f"attention bf16 {q[1]} x {k[1]}", attend, ((q, bf16), (k, bf16), (k, bf16)), operations, "TFLOP/s", repeats)
    for frames, height, width, channels in decoder_shapes(e):
        for layout in ("NDHWC", "NCDHW"):
            x = (1, frames + 2, height, width, channels) if layout == "NDHWC" else (1, channels, frames + 2, height, width)
            w = (3, 3, 3, channels, channels) if layout == "NDHWC" else (channels, channels, 3, 3, 3)
            name = f"conv3d bf16 {layout} {frames} x {height} x {width} x {channels}"
            operations = 2 * 27 * frames * height * width * channels**2
            rate(record, name, convolution_of(layout), ((x, bf16), (w, bf16)), operations, "TFLOP/s", repeats)
    summarise(record)


def decoder_shapes(e):
    """``(frames, height, width, channels)`` of the convolutions between equal channels in the last three stages; 8 frames are enough."""
    h, w = e.grid
    stages = len(e.vae.multipliers)
    widths = [e.vae.decoder_dim * m for m in reversed(e.vae.multipliers)]
    return [(8, h * 2**i, w * 2**i, widths[i]) for i in range(stages - 1, 0, -1)]


def rate(record, name, function, operands, amount, unit, repeats):
    """A ceiling: ``amount`` of operations or bytes over the time of one call, several in a run. Failing is noted, and no reason to stop."""
    record.need(4, name)
    function = jax.jit(function)
    try:
        args = [normal(jax.random.key(i), *operand) for i, operand in enumerate(operands)]
        once = min(seconds_of(lambda: function(*args), 3))
        calls = max(1, min(50, int(0.03 / once)))
        run = lambda: [function(*args) for _ in range(calls)][-1]
        samples = [amount * calls / s / (1e12 if unit == "TFLOP/s" else 1e9) for s in seconds_of(run, repeats)]
    except REFUSED as error:
        record.failed(name, error)
        return
    record.ceiling(name, samples, unit)


@functools.partial(jax.jit, static_argnums=(1, 2))
def normal(key, shape, dtype):
    return jax.random.normal(key, shape, bf16).astype(dtype)


def summarise(record):
    """The rates that floors are made of, a second: the best of each kind; of convolutions the mean over shapes of the better layout."""
    values = {name: row["value"] for name, row in record.ceilings.items()}
    best = {}
    for name, value in values.items():
        if name.startswith("conv3d"):
            shape = name.split(" ", 3)[3]
            best[shape] = max(best.get(shape, 0), value)
    kinds = {kind: [v for name, v in values.items() if name.startswith(kind)] for kind in ("bf16 matmul", "FP8 matmul", "attention", "copy")}
    record.rates = {kind: max(v) * (1e9 if kind == "copy" else 1e12) for kind, v in kinds.items() if v}
    if best:
        record.rates["conv3d"] = statistics.mean(best.values()) * 1e12


# ---- the model -----------------------------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(1, 2))
def draw(key, specs, dtype):
    """Weights for ``specs``, pairs of a name and a shape: unit gain for products, near 1 for gains; all from one row of random numbers."""
    pool = jax.random.normal(key, (max(math.prod(shape) for _, shape in specs) + 997 * len(specs),), dtype)
    out = {}
    for i, (name, shape) in enumerate(specs):
        x = jax.lax.slice(pool, (997 * i,), (997 * i + math.prod(shape),)).reshape(shape)
        fan = math.prod(shape[:-1]) if len(shape) > 3 else shape[-1]
        gain = len(shape) == 1 and not name.endswith("bias")
        out[name] = (x * 0.02 if len(shape) == 1 else x * fan**-0.5) + jnp.asarray(1 if gain else 0, dtype)
    return out


def random_model(build, dtype, seed=0):
    """A model of random weights made on the device, block by block, equal blocks by one program."""
    shell = abstract(build)
    groups = {}
    for path, x in flat_params(shell).items():
        prefix, name = re.match(r"(blocks\.\d+\.|[a-z]+coder\.|)(.*)", path).groups()
        groups.setdefault(prefix, []).append((name, x.shape))
    values = {}
    for i, (prefix, specs) in enumerate(groups.items()):
        made = draw(jax.random.fold_in(jax.random.key(seed), i), tuple(specs), dtype)
        values |= {prefix + name: x for name, x in made.items()}
    return with_params(shell, values)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Counted(Solver):
    """A solver of which the first ``count`` steps are taken: the bound is data, so one program measures any number of steps."""

    count: jax.Array  # [] int32

    @property
    def steps(self):
        return self.count


class Bench(Session):
    """A session that takes ``count`` steps a chunk."""

    def __init__(self, bundle, count=MOST_STEPS, **options):
        super().__init__(bundle, steps=MOST_STEPS, guidance=1.0, **options)
        self.full = self.solver
        self.take(count)

    def take(self, count):
        self.solver = Counted(**vars(self.full), count=jnp.int32(count))


def bench_experiment(name):
    """The workload of a preset, with a word-reading encoder small enough not to count."""
    e = preset(name)
    text = TextConfig(vocab=256, dim=e.text.dim, attention_dim=64, ffn_dim=64, heads=1, layers=1, tokenizer="words")
    return replace(e, text=text, sampler=replace(e.sampler, guidance=1.0, steps=MOST_STEPS, negative_prompt=""))


class Workload:
    """What parts share: models, made when first asked for, and sessions over them."""

    def __init__(self, e):
        self.e, self.dtype = e, jnp.dtype(e.dtype)

    @functools.cached_property
    def transformer(self):
        return random_model(lambda: VideoTransformer(self.e.transformer, rngs=nnx.Rngs(0)), self.dtype)

    @functools.cached_property
    def quantised(self):
        model = with_params(self.transformer, rewrite(flat_params(self.transformer), RULE_SETS["fp8"])[0])
        del self.transformer  # both at once would crowd out the decoder
        return model

    @functools.cached_property
    def vae(self):
        return random_model(lambda: VAE(self.e.vae, rngs=nnx.Rngs(0)), self.dtype)

    @functools.cached_property
    def text(self):
        return random_model(lambda: TextEncoder(self.e.text, rngs=nnx.Rngs(0)), self.dtype)

    def session(self, kind="bf16", vae=True, **options):
        model = self.transformer if kind == "bf16" else self.quantised
        return Bench(Bundle(self.e, model, self.vae if vae else None, self.text), **options)

    def full_window(self, session, state=None):
        """A state whose window is full, and its text."""
        state, text = session.start() if state is None else state, session.read(PROMPT)
        session.take(1)
        for _ in range(self.e.stream.window // self.e.stream.chunk):
            state, z = session.step(state, text)
        jax.block_until_ready(z)
        session.take(MOST_STEPS)
        return state, text


# ---- parts ---------------------------------------------------------------------------------------------------------------------------------


def step_arguments(session, state, text):
    e = session.experiment
    named = {"stream": e.stream, "shape": (e.stream.chunk, *e.grid, e.transformer.channels)}
    return (session.transformer, session.solver, state, text, None, jnp.zeros((1,), bool), jnp.float32(1.0), None, None), named


def dit(record, work, repeats, kind="bf16"):
    """The streaming step with a full window, at 4 and at 2 steps; their difference is two forwards."""
    e, label = work.e, LABELS[kind]
    session = work.session(kind, vae=False)
    jax.block_until_ready(jax.tree.leaves(session.transformer))
    weights = used()
    record.need(45 if e.transformer.dim >= 1024 else 1, f"the step, {label}")
    state = session.start()
    args, named = step_arguments(session, state, session.read(PROMPT))
    record.compile(f"streaming step, {label}", advance.lower(*args, **named))
    del args
    state, text = work.full_window(session, state)
    samples = {4: [], 2: []}
    for _ in range(repeats):
        for steps, times in samples.items():
            session.take(steps)
            start = time.perf_counter()
            state, z = session.step(state, text)
            jax.block_until_ready(z)
            times.append(time.perf_counter() - start)
    require(bool(jnp.isfinite(z).all()), "latents are not finite; the random weights are at fault")
    compute, remember = floors(record, e, kind)
    frames = e.stream.chunk * e.vae.time_stride
    forward = record.add(f"DiT forward, {label}", [(a - b) / 2 for a, b in zip(samples[4], samples[2])], "s", compute)
    for steps, times in samples.items():
        floor = steps * compute + remember if compute else None
        record.add(f"streaming step, {steps} steps, {label}", times, "s", floor)
        record.add(f"denoise FPS, {steps} steps, {label}", [frames / s for s in times], "FPS", frames / floor if floor else None)
    record.add(f"remember pass, {label}", [s - 2 * forward for s in samples[2]], "s", remember)
    if kind == "bf16" and used("peak_bytes_in_use"):
        record.add(f"peak memory, DiT part, {label}", [used("peak_bytes_in_use") / 2**30], "GiB", weights_and_before=weights / 2**30)


def used(what="bytes_in_use"):
    """Of the first device's memory, in bytes; 0 where it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get(what, 0)


def floors(record, e, kind):
    """Seconds of one forward and of the remember pass at this run's ceilings; ``(None, None)`` without them."""
    rates, t, n = record.rates, e.transformer, e.stream.chunk * e.tokens
    matmul = rates.get("bf16 matmul" if kind == "bf16" else "FP8 matmul")
    if not matmul or not {"attention", "copy"} <= rates.keys():
        return None, None
    ffn = 4 * n * t.dim * t.ffn_dim
    linears = 12 * n * t.dim**2 + ffn
    attention = 4 * n * t.dim * (e.stream.window * e.tokens + t.text_len)
    layer = linears / matmul + attention / rates["attention"] + PASSES * n * t.dim * 2 / rates["copy"]
    last = (linears - 4 * n * t.dim**2) / matmul + attention / rates["attention"]  # only its keys and values are needed
    return t.layers * layer, t.layers * layer - last


def vae(record, work, repeats):
    """Decoding of a chunk and encoding of a first chunk, on the device."""
    e, f, big = work.e, work.e.stream.chunk, work.e.transformer.dim >= 1024
    start = lambda: work.vae.decode_start(1, e.grid)
    carry, z = start(), normal(jax.random.key(1), (1, f, *e.grid, e.vae.channels), jnp.float32)
    record.need(30 if big else 1, "decoding")
    record.compile("VAE decode", decode_chunk.lower(work.vae, carry, z))
    conv = record.rates.get("conv3d")
    work_of = lambda function, *args: {"tflop": (n := profiles.flops(function, *args) / 1e12), "floor": n * 1e12 / conv if conv else None}
    amount, times = work_of(lambda v, c, z: v.decode_step(c, z), work.vae, carry, z), []
    for i in range(2 * repeats + 2):  # first and steady chunks in turn, the first two to warm up
        carry = jax.block_until_ready(start() if i % 2 == 0 else carry)
        began = time.perf_counter()
        carry, pixels = decode_chunk(work.vae, carry, z)
        jax.block_until_ready(pixels)
        times.append(time.perf_counter() - began)
    record.add("VAE decode, steady chunk", times[3::2], "s", **amount)
    record.add("VAE decode, first chunk", times[2::2], "s", **amount)
    require(bool(jnp.isfinite(pixels).all()), "pixels are not finite; the random weights are at fault")
    del carry, pixels
    record.need(20 if big else 1, "encoding")
    video = normal(jax.random.key(2), (1, e.pixel_frames(f), e.video.height, e.video.width, 3), jnp.float32)
    record.compile("VAE encode", encode_clip.lower(work.vae, video))
    jax.block_until_ready(encode_clip(work.vae, video))
    times = seconds_of(lambda: encode_clip(work.vae, video), repeats)
    record.add("VAE encode, first chunk", times, "s", **work_of(lambda v, x: v.encode(x), work.vae, video))


def first_frame(record, work, repeats):
    """From the call to the first chunk on the host, compiled before: text, five forwards, decoding, copy."""
    session, samples = work.session(), []
    for chunk in session.stream([PROMPT]):
        say(f"  first chunk: {chunk.frames.shape[0]} pixel frames")
    for seed in range(repeats):
        start = time.perf_counter()
        for _ in session.stream([PROMPT], seed=seed):
            samples.append(time.perf_counter() - start)
    record.add("time to first pixel frame, warm", samples, "s")


def end_to_end(record, work, repeats, kind="bf16"):
    """``Session.stream`` with a full window: from one chunk on the host to the next."""
    label, frames, places = LABELS[kind], work.e.stream.chunk * work.e.vae.time_stride, {"": {}}
    if len(jax.devices()) > 1:
        places[", VAE on a second GPU"] = {"vae_device": jax.devices()[1]}
    for place, options in places.items():
        session, marks = work.session(kind, **options), []
        state, _ = work.full_window(session)
        for _ in session.stream([PROMPT] * (repeats + 2), state=state, carry=session.decode_start()):
            marks.append(time.perf_counter())
        samples = [frames / (b - a) for a, b in itertools.pairwise(marks[1:])]
        record.add(f"end-to-end FPS, {MOST_STEPS} steps, {label}{place}", samples, "FPS", both_floors(record, frames, label, place))


def both_floors(record, frames, label, place):
    """FPS that the floors of the step and of decoding allow, one after the other or side by side."""
    rows = [record.figures.get(name, {}).get("floor") for name in (f"streaming step, {MOST_STEPS} steps, {label}", "VAE decode, steady chunk")]
    return frames / (max(rows) if place else sum(rows)) if all(rows) else None


def quantised(record, work, repeats, whole):
    """The step with FP8 linears and, with ``whole``, the end-to-end rate."""
    dit(record, work, repeats, "fp8")
    if whole:
        end_to_end(record, work, repeats, "fp8")


# ---- the run -------------------------------------------------------------------------------------------------------------------------------


def profile(record, work):
    """``profile.txt``: device time of one steady chunk by scope and by kernel."""
    vars(work).pop("quantised", None)  # room for the decoder
    session = work.session()
    state, text = work.full_window(session)
    carry, z = session.decode_start(), normal(jax.random.key(1), (1, work.e.stream.chunk, *work.e.grid, work.e.vae.channels), jnp.float32)
    args, named = step_arguments(session, state, text)
    names = profiles.scopes(advance.lower(*args, **named).compile().as_text())
    names |= profiles.scopes(decode_chunk.lower(session.vae, carry, z).compile().as_text())
    carry, pixels = session.decode_step(carry, z)
    jax.block_until_ready((state, pixels))

    def chunk():
        new, z = session.step(state, text)
        return new.chunk, session.decode_step(carry, z)[1]

    text_of = profiles.report(profiles.traced(chunk), names)
    (record.out / "profile.txt").write_text(text_of)
    say(text_of[:4000])


def attempt(record, name, call):
    """A part; what it raises is a row of the record."""
    say(f"{name}: {record.left():.0f} s left")
    try:
        record.need(1, name)
        call()
    except REFUSED as error:
        record.failed(name, error)
    gc.collect()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/bench"))
    parser.add_argument("--model", default="wan_5b", help="sizes of the workload: wan_5b, toy or tiny")
    parser.add_argument("--parts", default=",".join(PARTS), help="any of " + ",".join(PARTS))
    parser.add_argument("--minutes", type=float, default=15, help="budget: nothing is started that does not fit into it")
    parser.add_argument("--repeats", type=int, default=5, help="of every measurement")
    parser.add_argument("--profile", action="store_true", help="also profile.txt, where the time of a chunk goes")
    parser.add_argument("--cache", default="", help="folder for compiled programs; empty: none, so that compile times are those of a first run")
    options = parser.parse_args(argv)
    parts = options.parts.split(",")
    require(set(parts) <= set(PARTS), f"--parts={options.parts} has unknown names; known: {', '.join(PARTS)}")
    require(options.repeats > 0, f"--repeats={options.repeats} must be positive")
    if options.cache:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(options.cache).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    work = Workload(bench_experiment(options.model))
    record = Figures(options.out, options.model, GOALS if options.model == "wan_5b" else {}, options.minutes)
    say(f"{options.model} on {jax.devices()[0].device_kind}, jax {jax.__version__}")
    calls = {"dit": dit, "vae": vae, "first_frame": first_frame, "end_to_end": end_to_end, "ceilings": ceilings}
    calls["fp8"] = functools.partial(quantised, whole="end_to_end" in parts)
    for name in (p for p in PARTS if p in parts):
        attempt(record, name, lambda: calls[name](record, work, options.repeats))  # noqa: B023
    if options.profile:
        attempt(record, "profile", lambda: profile(record, work))
    record.picture()
    say(f"{record.out}: bench.json, bench.md, bench.png; {time.perf_counter() - record.start:.0f} s")
    return record


def run():
    try:
        sys.exit(1 if main().errors else 0)
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()
