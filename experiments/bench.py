"""Measure every inference figure of the 5B workload on one GPU, with ceilings measured in the same run.

    python experiments/bench.py --out=runs/bench                                       # all parts
    python experiments/bench.py --parts=ceilings,dit,vae --minutes=3 --profile         # some of them, within three minutes
    python experiments/bench.py --parts=fp8 --keep --out=runs/bench                    # one more, beside what the folder has
    python experiments/bench.py --parts=sequence                                       # several GPUs against one of them
    python experiments/bench.py --model=tiny --parts=dit,vae --repeats=2               # anywhere

Random weights are made on the device. After each figure ``bench.json``, ``bench.md`` and ``bench.png`` are written again, so a run that is
killed keeps what it had. Each part has a share of the minutes; one that stays past it without end says where it is. What each figure counts
stands in docs/benchmarks.md. ``--profile`` adds ``profile.txt``: device time of one chunk by part of the model and by kernel, from a trace.
"""

import argparse
import faulthandler
import functools
import gc
import itertools
import math
import pathlib
import re
import sys
import time
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from longlive_jax.config import ConfigError, MeshConfig, TextConfig, preset, require
from longlive_jax.diffusion.solvers import Solver
from longlive_jax.model.text import TextEncoder
from longlive_jax.model.transformer import VideoTransformer
from longlive_jax.model.vae import VAE
from longlive_jax.quant.rewrite import RULE_SETS, rewrite
from longlive_jax.sharding import make_mesh
from longlive_jax.streaming import ceilings, profiles
from longlive_jax.streaming.bundles import Bundle
from longlive_jax.streaming.ceilings import normal
from longlive_jax.streaming.figures import REFUSED, Figures, say, seconds_of
from longlive_jax.streaming.programs import advance, decode_chunk, encode_clip
from longlive_jax.streaming.session import Session
from longlive_jax.tree import abstract, flat_params, with_params

PARTS = {  # name -> share of the minutes; in this order
    "ceilings": 3,
    "dit": 6,
    "vae": 6,
    "end_to_end": 4,
    "first_frame": 1,
    "fp8": 8,
    "fp8_memory": 8,
    "sequence": 10,
    "profile": 3,
}
SEVERAL = ("sequence",)  # parts that need several devices
GRACE = 20  # seconds past its share after which a part says where it is
PROMPT = "A red star bounces in a meadow."
MOST_STEPS = 4
EARLY = 2  # latents that are decoded before the rest of a first chunk
REST = 3  # seconds, after which a device that was held at its power may be faster for a while
GOALS = {  # of the workload on one H100; times, memory and errors are upper, rates lower bounds
    "DiT forward, bf16": 0.200,
    "DiT forward, FP8 linears": 0.165,
    "DiT forward, FP8 linears and memory": 0.130,
    "VAE decode, steady chunk": 0.85,
    "VAE decode, first chunk": 0.85,
    "VAE encode, first chunk": 0.25,
    "denoise FPS, 4 steps, bf16": 32,
    "denoise FPS, 2 steps, bf16": 53,
    "denoise FPS, 4 steps, FP8 linears": 38,
    "denoise FPS, 2 steps, FP8 linears": 64,
    "denoise FPS, 4 steps, FP8 linears and memory": 49,
    "denoise FPS, 2 steps, FP8 linears and memory": 82,
    "end-to-end FPS, 4 steps, bf16": 17,
    "end-to-end FPS, 4 steps, FP8 linears": 21,
    "end-to-end FPS, 4 steps, bf16, VAE on a second GPU": 31,
    "end-to-end FPS, 4 steps, bf16, step and VAE over 2 GPUs": 29,
    "time to first pixel frame, warm": 1.2,
    "peak memory, DiT part, bf16": 20.0,
    "sequence over 2, times one device": 1.7,
    "sequence over 2, first chunk to one device": 2e-2,
}
KINDS = {  # kind of a model -> its label, and settings of its sessions
    "bf16": ("bf16", {}),
    "fp8": ("FP8 linears", {}),
    "fp8_memory": ("FP8 linears and memory", {"memory": "fp8"}),
}


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
    """A session that takes as many steps a chunk as it is told, by a program that was compiled before."""

    def __init__(self, bundle, **options):
        super().__init__(bundle, steps=MOST_STEPS, guidance=1.0, **options)
        self.full, self.program = self.solver, None
        self.take(MOST_STEPS)

    def take(self, count):
        self.solver = Counted(**vars(self.full), count=jnp.int32(count))

    def arguments(self, state, text):
        """Of ``advance``: those that are data, and those that are not."""
        e = self.experiment
        named = {"stream": e.stream, "shape": (e.stream.chunk, *e.grid, e.transformer.channels)}
        return (self.weights, self.solver, state, text, None, jnp.zeros((1,), bool), jnp.float32(1.0), None, None), named

    def step(self, state, text, **_):
        return self.program(*self.arguments(state, text)[0])


def bench_experiment(name):
    """The workload of a preset, with a word-reading encoder small enough not to count."""
    e = preset(name)
    text = TextConfig(vocab=256, dim=e.text.dim, attention_dim=64, ffn_dim=64, heads=1, layers=1, tokenizer="words")
    return replace(e, text=text, sampler=replace(e.sampler, guidance=1.0, steps=MOST_STEPS, negative_prompt=""))


class Workload:
    """What parts share: models, made when first asked for, compiled steps, and sessions over them."""

    def __init__(self, e):
        self.e, self.dtype, self.steps = e, jnp.dtype(e.dtype), {}
        self.frames, self.big = e.stream.chunk * e.vae.time_stride, e.transformer.dim >= 1024

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

    def open(self, record, kind="bf16", *, vae=True, shards=1, **options):
        """A session whose step is compiled, the state before its first chunk, and its text."""
        (label, settings), e = KINDS[kind], self.e
        record.stage(f"weights, {label}")
        model = jax.block_until_ready(self.transformer if kind == "bf16" else self.quantised)
        if shards > 1:
            label, e = f"{label}, sequence over {shards}", replace(e, mesh=MeshConfig(1, shards))
            model = jax.device_put(model, NamedSharding(make_mesh(1, shards), PartitionSpec()))
        session = Bench(Bundle(e, model, self.vae if vae else None, self.text), **settings, **options)
        state, text = session.start(), session.read(PROMPT)
        if label not in self.steps:
            record.need(12 if self.big else 1, f"the step, {label}")
            args, named = session.arguments(state, text)
            with session.on_mesh():
                self.steps[label] = record.compile(f"streaming step, {label}", advance.lower(*args, **named))
        session.program = self.steps[label]
        return session, state, text

    def filled(self, session, state, text):
        """The state with a full window, by chunks of one step."""
        session.take(1)
        for _ in range(self.e.stream.window // self.e.stream.chunk):
            state, z = session.step(state, text)
        jax.block_until_ready(z)
        session.take(MOST_STEPS)
        return state


# ---- parts ---------------------------------------------------------------------------------------------------------------------------------


def measure_ceilings(record, work, repeats):
    ceilings.measure(record, list(ceilings.cases(work.e)), repeats, ceilings.SPAN if work.big else 1e-3)


def timed_steps(record, session, state, text, repeats, counts=(4, 2), rest=0):
    """``(state, {count: seconds})`` of chunks of so many steps, in turn, each after ``rest`` seconds in which the device does nothing."""
    samples = {count: [] for count in counts}
    for _ in record.turns(repeats):
        for count, times in samples.items():
            session.take(count)
            time.sleep(rest)
            start = time.perf_counter()
            state, z = session.step(state, text)
            jax.block_until_ready(z)
            times.append(time.perf_counter() - start)
    require(bool(jnp.isfinite(z).all()), "latents are not finite; the random weights are at fault")
    return state, samples


def dit(record, work, repeats, kind="bf16"):
    """The streaming step with a full window, at 4 and at 2 steps; their difference is two forwards."""
    e, label, before = work.e, KINDS[kind][0], used("peak_bytes_in_use")
    session, state, text = work.open(record, kind, vae=False)
    record.stage("fill the window")
    state = work.filled(session, state, text)
    state, samples = timed_steps(record, session, state, text, repeats)
    compute, remember = ceilings.floors(record.rates, e, kind)
    frames = work.frames
    forward = record.add(f"DiT forward, {label}", [(a - b) / 2 for a, b in zip(samples[4], samples[2])], "s", compute)
    for steps, times in samples.items():
        floor = steps * compute + remember if compute else None
        record.add(f"streaming step, {steps} steps, {label}", times, "s", floor)
        record.add(f"denoise FPS, {steps} steps, {label}", [frames / s for s in times], "FPS", frames / floor if floor else None)
    record.add(f"remember pass, {label}", [s - 2 * forward for s in samples[2]], "s", remember)
    for steps, times in timed_steps(record, session, state, text, 1, rest=REST)[1].items() if work.big else ():
        record.add(f"denoise FPS, {steps} steps, {label}, a chunk after {REST} s of rest", [frames / s for s in times], "FPS")
    peak = used("peak_bytes_in_use")
    if peak > before:  # else something else in this process held more
        record.add(f"peak memory, DiT part, {label}", [peak / 2**30], "GiB", before=before / 2**30)


def used(what="bytes_in_use"):
    """Of the first device's memory, in bytes; 0 where it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get(what, 0)


def vae(record, work, repeats):
    """Decoding of a chunk and encoding of a first chunk, on the device."""
    e, conv = work.e, record.rates.get("conv3d")
    record.stage("weights, VAE")
    model, start = jax.block_until_ready(work.vae), lambda: work.vae.decode_start(1, e.grid)
    carry, z = start(), normal(jax.random.key(1), (1, e.stream.chunk, *e.grid, e.vae.channels), jnp.float32)
    record.need(12 if work.big else 1, "decoding")
    decode = record.compile("VAE decode", decode_chunk.lower(model, carry, z))
    work_of = lambda function, *args: {"tflop": (n := profiles.flops(function, *args) / 1e12), "floor": n * 1e12 / conv if conv else None}
    amount, times = work_of(lambda v, c, z: v.decode_step(c, z), model, carry, z), {"first chunk": [], "steady chunk": []}
    for turn in record.turns(repeats + 1):
        carry = jax.block_until_ready(start())
        for name, samples in times.items():
            began = time.perf_counter()
            carry, pixels = jax.block_until_ready(decode(model, carry, z))
            samples.append(time.perf_counter() - began)
            if turn == 0:
                record.stage(f"{name}: {samples[0]:.2f} s when called first")
    for name, samples in reversed(times.items()):
        record.add(f"VAE decode, {name}", samples[1:], "s", **amount)
    require(bool(jnp.isfinite(pixels).all()), "pixels are not finite; the random weights are at fault")
    del carry, pixels
    record.need(4 if work.big else 1, "encoding")
    video = normal(jax.random.key(2), (1, e.pixel_frames(e.stream.chunk), e.video.height, e.video.width, 3), jnp.float32)
    encode = record.compile("VAE encode", encode_clip.lower(model, video))
    record.stage(f"first chunk: {seconds_of(lambda: encode(model, video), 1)[0]:.2f} s when called first")
    times = [seconds_of(lambda: encode(model, video), 1)[0] for _ in record.turns(repeats)]
    record.add("VAE encode, first chunk", times, "s", **work_of(lambda v, x: v.encode(x), model, video))


def first_frame(record, work, repeats):
    """From the call to the first frames on the host, compiled before: text, five forwards, decoding of two latents, copy; and to the chunk."""
    session, samples = work.open(record)[0], []
    for turn in record.turns(repeats + 1):
        start = time.perf_counter()
        marks = [time.perf_counter() - start for _ in session.stream([PROMPT], seed=turn, early=EARLY)]
        samples.append((marks[0], marks[-1]))
        if turn == 0:
            record.stage(f"first frames: {marks[0]:.2f} s when called first, all of the chunk {marks[-1]:.2f}")
    for name, times in zip(("pixel frame", "chunk"), zip(*samples[1:])):
        record.add(f"time to first {name}, warm", times, "s")


def end_to_end(record, work, repeats, kind="bf16"):
    """``Session.stream`` with a full window: frames over the time from a chunk on the host to one six or more later.

    The first two chunks compile and fill the pipeline, the last one finds it empty: both are left out. With several GPUs also: all of them at
    the step and then at decoding, the second one at decoding alone; ``off``: how far the first chunk's pixels are from those of one device.
    """
    label, frames, first = KINDS[kind][0], work.frames, []
    places = {"": {}} | {f", step and VAE over {n} GPUs": {"shards": n} for n in shares(work.e)[-1:]}
    places |= {", VAE on a second GPU": {"vae_device": jax.devices()[1]}} if len(jax.devices()) > 1 else {}
    for place, options in places.items():
        session, state, text = work.open(record, kind, **options)
        state, marks, began = work.filled(session, state, text), [], time.perf_counter()
        prompts = (PROMPT for _ in record.turns(repeats + 4, least=9))
        for chunk in session.stream(prompts, state=state, carry=session.decode_start()):
            marks.append(time.perf_counter())
            if len(marks) == 1:
                first.append(np.asarray(chunk.frames, np.float64))
                record.grant(marks[0] - began)
                record.stage(f"the first chunk is there{place}")
        del session, state
        rate, floor = frames * (len(marks) - 3) / (marks[-2] - marks[1]), ceilings.both_floors(record, frames, label, MOST_STEPS, options)
        more = {"off": np.std(first[-1] - first[0]) / np.std(first[0]), "seconds_between_chunks": [b - a for a, b in itertools.pairwise(marks)]}
        record.add(f"end-to-end FPS, {MOST_STEPS} steps, {label}{place}", [rate], "FPS", floor, **more)


def shares(e):
    """Numbers of devices, of those here, that divide the frames of a chunk and the heads."""
    return [n for n in range(2, len(jax.devices()) + 1) if e.stream.chunk % n == 0 and e.transformer.heads % n == 0]


def quantised(record, work, repeats, kind, whole):
    """The step of another kind of model and, with ``whole``, the end-to-end rate."""
    dit(record, work, repeats, kind)
    if whole:
        end_to_end(record, work, repeats, kind)


def sequence(record, work, repeats):
    """The step with its frames over several devices against one of them: the exchange alone, the time of a chunk, the first one's values."""
    e, there, fits = work.e, len(jax.devices()), shares(work.e)
    require(fits, f"sequence needs 2 or more devices that divide a chunk of {e.stream.chunk} and {e.transformer.heads} heads; {there} are here")
    n = fits[-1]
    ceilings.exchange(record, e, n, repeats)
    times, first = {}, {}
    for shards in (1, n):
        session, state, text = work.open(record, vae=False, shards=shards)
        state, z = session.step(state, text)
        first[shards] = np.asarray(z, np.float64)
        state = work.filled(session, state, text)
        state, samples = timed_steps(record, session, state, text, repeats, (MOST_STEPS,))
        times[shards] = samples[MOST_STEPS]
        where = "one device" if shards == 1 else f"sequence over {shards}"
        record.add(f"denoise FPS, {MOST_STEPS} steps, bf16, {where}", [work.frames / s for s in times[shards]], "FPS")
        del session, state
    record.add(f"sequence over {n}, times one device", [a / b for a, b in zip(times[1], times[n])], "x")
    difference = np.linalg.norm(first[n] - first[1]) / np.linalg.norm(first[1])
    record.add(f"sequence over {n}, first chunk to one device", [float(difference)], "error")


# ---- the run -------------------------------------------------------------------------------------------------------------------------------


def profile(record, work, repeats):
    """``profile.txt``: device time of one steady chunk by scope and by kernel; ``repeats`` is not read."""
    vars(work).pop("quantised", None)  # room for the decoder
    session, state, text = work.open(record)
    state = work.filled(session, state, text)
    carry, z = session.decode_start(), normal(jax.random.key(1), (1, work.e.stream.chunk, *work.e.grid, work.e.vae.channels), jnp.float32)
    decode = record.compile("VAE decode, profiled", decode_chunk.lower(session.vae, carry, z))
    names = profiles.scopes(session.program.as_text()) | profiles.scopes(decode.as_text())
    carry, _ = jax.block_until_ready(decode(session.vae, carry, z))

    def chunk():
        new, z = session.step(state, text)
        return new.chunk, decode(session.vae, carry, z)[1]

    text_of = profiles.report(profiles.traced(chunk), names)
    (record.out / "profile.txt").write_text(text_of)
    say(text_of[:4000])


def attempt(record, name, call, until=math.inf):
    """A part, which has until so many seconds after the start; what it raises is a row of the record."""
    record.begin(name, until)
    faulthandler.dump_traceback_later(max(0, record.left()) + GRACE, file=sys.__stderr__)
    try:
        record.need(1, name)
        call()
    except REFUSED as error:
        record.failed(name, error)
    finally:
        faulthandler.cancel_dump_traceback_later()
    gc.collect()


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/bench"))
    parser.add_argument("--model", default="wan_5b", help="sizes of the workload: wan_5b, toy or tiny")
    parser.add_argument("--parts", default="", help=f"any of {','.join(PARTS)}; empty: all that this machine has the devices for")
    parser.add_argument("--minutes", type=float, default=15, help="budget without compiling: only what fits into its part's share starts")
    parser.add_argument("--repeats", type=int, default=5, help="of every measurement")
    parser.add_argument("--profile", action="store_true", help="also profile.txt, where the time of a chunk goes")
    parser.add_argument(
        "--keep", action="store_true", help="go on with the figures and ceilings in --out, those of another process of the same run"
    )
    parser.add_argument("--cache", default="", help="folder for compiled programs; empty: none, so that compile times are those of a first run")
    options = parser.parse_args(argv)
    several = len(jax.devices()) > 1
    names = options.parts.split(",") if options.parts else [p for p in PARTS if p != "profile" and (several or p not in SEVERAL)]
    require(set(names) <= set(PARTS), f"--parts={options.parts} has unknown names; known: {', '.join(PARTS)}")
    require(options.repeats > 0, f"--repeats={options.repeats} must be positive")
    return options, [p for p in PARTS if p in names or (p == "profile" and options.profile)]


def main(argv=None):
    options, parts = arguments(argv)
    if options.cache:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(options.cache).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    work, goals = Workload(bench_experiment(options.model)), GOALS if options.model == "wan_5b" else {}
    record = Figures(options.out, options.model, goals, options.minutes, keep=options.keep)
    say(f"{options.model} on {jax.devices()[0].device_kind}, jax {jax.__version__}")
    calls = {"ceilings": measure_ceilings, "dit": dit, "vae": vae, "first_frame": first_frame, "end_to_end": end_to_end, "sequence": sequence}
    other = lambda kind: functools.partial(quantised, kind=kind, whole="end_to_end" in parts)
    calls |= {"fp8": other("fp8"), "fp8_memory": other("fp8_memory"), "profile": profile}
    shares = list(itertools.accumulate(PARTS[p] for p in parts))
    for name, share in zip(parts, shares):
        attempt(record, name, lambda: calls[name](record, work, options.repeats), 60 * options.minutes * share / shares[-1])  # noqa: B023
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
