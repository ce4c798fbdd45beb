"""Check and time the low-precision products and kernels at the shapes of the 5B model, each against its reference in the same run.

    python experiments/bench_kernels.py --out=runs/bench_kernels           # on a GPU, under two minutes
    python experiments/bench_kernels.py --small --out=runs/bench_kernels   # anywhere: checks only

Products, rows x in x out: bf16, W8A8 FP8 with the activations' quantisation, by kernels where they run and by XLA, and its ceiling, the same
product of values that are FP8 already. NVFP4 is also compared with the bytes of the public quantiser, where ``../shared/golden/nvfp4.npz`` is.
Formats: GB/s of what has to move, each input and output counted once, and the share of what an elementwise pass (negation) of the same shape
reaches. Calls under ``SHORT`` ms are timed ``COPIES`` a program, each on arrays of its own, because starting a program takes the host about
50 us. A step that fails is a row with its error; so are steps that would start after ``--seconds``. Prints a table and writes ``bench.json``.
"""

import argparse
import functools
import json
import math
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.kernels import KERNEL, matmul, multiply, nvfp4, quantise_rows
from longlive_jax.metrics import plain, provenance
from longlive_jax.ops import low_precision
from longlive_jax.ops.dispatch import capability
from longlive_jax.ops.low_precision import chosen, fp8_product
from longlive_jax.quant.formats import RULES, decode_fp8, decode_nvfp4, encode_fp8, encode_nvfp4
from longlive_jax.quant.leaves import FP8
from longlive_jax.streaming.figures import REFUSED, say

SHAPES = ((7040, 3072, 14336), (7040, 14336, 3072), (7040, 3072, 3072))  # rows, in, out
SMALL = ((160, 96, 128), (160, 128, 96), (160, 96, 96))
PLANE = (7040, 14336)  # of the formats: the widest activations
NARROW = (7040, 3072)  # of FP8 also these
GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "shared" / "golden" / "nvfp4.npz"
CORNER = 128  # rows and columns of a product that are checked
SHORT, COPIES = 0.2, 8  # ms

bf16 = jnp.bfloat16


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/bench_kernels"))
    parser.add_argument("--small", action="store_true", help="small shapes, checks without times")
    parser.add_argument("--seconds", type=float, default=90, help="no step starts later than this")
    options = parser.parse_args()
    start = time.perf_counter()
    say(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; FP8: {chosen('fp8 product')}, NVFP4: {chosen('nvfp4 product')}")
    say(f"{'step':36}{'shape':22}{'ms':>9}{'TFLOP/s':>9}{'GB/s':>8}{'of copy':>9}  check")
    rows = []
    for step in steps(options.small):
        rows.append(guarded(step, not options.small, options.seconds - (time.perf_counter() - start), rows))
        say(line(rows[-1]))
    summary = compare(rows)
    for text in summary:
        say(text)
    seconds = time.perf_counter() - start
    record = {"rows": rows, "summary": summary, "seconds": seconds, "provenance": provenance()}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "bench.json").write_text(json.dumps(plain(record), indent=1))
    bad = [row["step"] for row in rows if row.get("error") or row.get("passed") is False]
    say(f"{len(rows) - len(bad)} of {len(rows)} steps well, {seconds:.1f} s" + (f"; not: {', '.join(bad)}" if bad else ""))
    raise SystemExit(1 if bad else 0)


# ---- steps ---------------------------------------------------------------------------------------------------------------------------------


def steps(small):
    """What is measured, in order: dictionaries of a name, a shape, ``build() -> (function, arguments)``, and what counts.

    ``check(result, arguments)`` gives ``(figure, limit)``. ``macs`` and ``bytes``: of one call.
    """
    shapes = SMALL if small else SHAPES
    plane, narrow = ((160, 256), (160, 512)) if small else (PLANE, NARROW)
    quantised = lambda x, w: (x, *encode_fp8(w, -1))
    for shape in shapes:
        yield product("bf16", shape, lambda x, w: dot(x, w), lambda x, w: (x, w), dense)
        yield product("W8A8 FP8", shape, w8a8, quantised, w8a8_reference)
        yield product("W8A8 FP8, product by XLA", shape, multiplied_by_xla, quantised, w8a8_reference)
        yield product("W8A8 FP8, all by XLA", shape, w8a8_by_xla, quantised, w8a8_reference)
        if shape[2] > shape[1]:  # as the MLP's first product
            yield product("W8A8 FP8 and GELU", shape, w8a8_gelu, quantised, gelu_reference)
            yield product("W8A8 FP8 and GELU, product by XLA", shape, gelu_by_xla, quantised, gelu_reference)
        yield product("FP8 ceiling", shape, dot, lambda x, w: (encode_fp8(x)[0], encode_fp8(w)[0]), dense)
        if 10 <= capability() < 11:
            by_kernel, by_reference = lambda *a: matmul(a[:3], a[3:], KERNEL), lambda *a: multiply(a[:3], a[3:])
            yield product("NVFP4 by the tcgen05 kernel", shape, by_kernel, lambda x, w: (*encode_nvfp4(x), *encode_nvfp4(w)), by_reference)
    yield copy(plane)  # when the device is at its clocks
    yield from formats(plane)
    yield copy(narrow)
    yield from rows_in_fp8(narrow)
    if GOLDEN.exists():
        yield from public_bytes()


def product(name, shape, function, operands, reference):
    """``function(x, w)`` of ``operands(x [rows, in], w [out, in])``, checked in its first rows and columns."""
    rows, inner, out = shape

    def check(y, args):
        corner = jax.jit(lambda y, args: (y[:CORNER, :CORNER], [a[:CORNER] if a.ndim else a for a in args]))
        y, args = corner(y, args)
        return relative(y, reference(*args)), 2e-2

    build = lambda: (function, jax.jit(operands)(normal(0, (rows, inner)), normal(1, (out, inner)) * 0.02))
    return {"step": name, "shape": shape, "build": build, "check": check, "macs": rows * inner * out}


def dot(x, w):
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=bf16)


def dense(x, w):
    return np.asarray(x, np.float32) @ np.asarray(w, np.float32).T


def w8a8(x, values, scale):
    return fp8_product(FP8(values=values, scale=scale), x)


def multiplied_by_xla(x, values, scale):
    """``fp8_product`` without the kernel of the product."""
    return w8a8_by_xla(x, values, scale, low_precision.encode_rows)


def w8a8_by_xla(x, values, scale, encode=encode_fp8):
    """``fp8_product`` without kernels."""
    q, s = encode(x)
    wide = bf16 if chosen("fp8 product") == low_precision.EMULATED else q.dtype
    y = low_precision.dot(q.astype(wide), values.astype(wide), bf16)
    return (y.astype(jnp.float32) * s * scale[:, 0]).astype(bf16)


def w8a8_gelu(x, values, scale):
    """With a bias too: the weight's scales, which are small."""
    return fp8_product(FP8(values=values, scale=scale), x, scale[:, 0].astype(bf16), "gelu")


def gelu_by_xla(x, values, scale):
    return jax.nn.gelu(multiplied_by_xla(x, values, scale) + scale[:, 0].astype(bf16))


def w8a8_reference(x, values, scale):
    """Decoded on the host, multiplied in float32."""
    q, s = (np.asarray(a, np.float32) for a in jax.jit(encode_fp8)(x))
    return dense(q * s, np.asarray(values, np.float32) * np.asarray(scale))


def gelu_reference(x, values, scale):
    return np.asarray(jax.nn.gelu(w8a8_reference(x, values, scale) + np.asarray(scale)[:, 0]))


def copy(plane):
    build = lambda: (jnp.negative, (normal(0, plane),))
    return {"step": "copy (negate bf16)", "shape": plane, "build": build, "check": lambda y, a: same([y], [-a[0]]), "copy": True}


def formats(plane):
    """The encoders and decoders as XLA compiles them, which are the references of the kernels: checked by what they decode to."""
    x = functools.cache(lambda: normal(0, plane))
    amax = lambda: jnp.max(jnp.abs(x())).astype(jnp.float32)
    step = lambda name, build, check: {"step": name, "shape": plane, "build": build, "check": check}
    error = lambda limit: lambda y, a: (relative(decode(y), a[0]), limit)
    decode = jax.jit(lambda encoded: (decode_fp8 if len(encoded) == 2 else decode_nvfp4)(*encoded))

    yield from rows_in_fp8(plane)
    yield step("XLA encode_nvfp4 static_6, amax", lambda: (lambda y, a: encode_nvfp4(y, amax=a), (x(), amax())), error(0.11))
    yield step("XLA encode_nvfp4 static_6", lambda: (encode_nvfp4, (x(),)), error(0.11))
    yield step("XLA encode_nvfp4 mse, amax", lambda: (lambda y, a: encode_nvfp4(y, "mse", amax=a), (x(), amax())), error(0.10))
    nvfp4 = lambda: jax.jit(encode_nvfp4)(x())
    if 9 <= capability() < 11:
        yield from kernels(plane, x, amax, step)
    yield step("XLA decode_nvfp4", lambda: (functools.partial(decode_nvfp4, dtype=bf16), nvfp4()), lambda y, a: (relative(y, x()), 0.11))


def rows_in_fp8(plane):
    """FP8 by row, by XLA and by the kernel, which has to have the same bits."""
    build = lambda function: lambda: (function, (normal(0, plane),))
    error = lambda y, a: (relative(jax.jit(decode_fp8)(*y), a[0]), 0.04)
    yield {"step": "XLA encode_fp8 by row", "shape": plane, "build": build(encode_fp8), "check": error}
    if 9 <= capability() < 10:
        by_kernel = functools.partial(quantise_rows, implementation=KERNEL)
        check = lambda y, a: same(y, jax.jit(encode_fp8)(a[0]))
        yield {"step": "kernel encode_fp8 by row", "shape": plane, "build": build(by_kernel), "check": check}


def public_bytes():
    """Codes and scales of the public quantiser: those of the reference, and of the kernel where the input is exact in bfloat16."""
    arrays = dict(np.load(GOLDEN))
    cases = sorted({key.split("/")[0] for key in arrays})
    rounded = lambda x: np.asarray(jnp.asarray(x, bf16), np.float32)
    sides = {"XLA": (cases, encode_nvfp4)}
    if 9 <= capability() < 11:
        exact = [case for case in cases if np.array_equal(rounded(arrays[f"{case}/x"]), arrays[f"{case}/x"])]
        sides["kernel"] = (exact, lambda x, rule: nvfp4.quantise(x.astype(bf16), rule))
    for side, (cases, encode) in sides.items():
        keys = [f"{case}/{rule}/1d" for case in cases for rule in RULES]
        found = lambda *xs, encode=encode: [encode(x, rule)[:2] for x in xs for rule in RULES]
        wanted = [(arrays[f"{key}/packed"], arrays[f"{key}/scales_e4m3_bits"]) for key in keys]
        check = lambda y, a, wanted=wanted: (max(same([c, bytes_of(s)], w)[0] for (c, s), w in zip(y, wanted, strict=True)), 1e-3)
        xs = tuple(jnp.asarray(arrays[f"{case}/x"]) for case in cases)
        yield {
            "step": f"{side} NVFP4, public bytes",
            "shape": xs[0].shape,
            "build": lambda f=found, xs=xs: (f, xs),
            "check": check,
            "timed": False,
        }


def bytes_of(a):
    return jax.lax.bitcast_convert_type(a, jnp.uint8)


def kernels(plane, x, amax, step):
    """Our kernels, each checked against the reference bit by bit, in the share of elements that differ."""
    for rule in ("static_6", "mse"):
        reference = jax.jit(functools.partial(encode_nvfp4, rule=rule))
        check = lambda y, a, reference=reference: same(y, reference(a[0], amax=a[1]))
        yield step(f"kernel quantise {rule}, amax", lambda r=rule: (lambda y, a: nvfp4.quantise(y, r, amax=a), (x(), amax())), check)
    key = lambda: jax.random.key(3)
    unbiased = lambda y, a: (relative(jax.jit(decode_nvfp4)(*y), a[0]), 0.16)
    yield step("kernel quantise stochastic, amax", lambda: (lambda y, a: nvfp4.quantise(y, key=key(), amax=a), (x(), amax())), unbiased)
    decode = jax.jit(functools.partial(decode_nvfp4, dtype=bf16))
    yield step("kernel dequantise", lambda: (nvfp4.dequantise, jax.jit(encode_nvfp4)(x())), lambda y, a: same([y], [decode(*a)]))


# ---- measuring -----------------------------------------------------------------------------------------------------------------------------


def guarded(step, timed, left, rows):
    """One row: figures of a step, or why there are none. ``left``: seconds until no step starts."""
    row = {"step": step["step"], "shape": list(step["shape"])}
    if left < 0:
        return row | {"error": "no time left"}
    try:
        function, args = step["build"]()
        function = jax.jit(function)
        y = jax.block_until_ready(function(*args))
        figure, limit = step["check"](y, args)
        row |= {"figure": figure, "limit": limit, "passed": bool(figure <= limit)}
        if timed and step.get("timed", True):
            row["ms"] = device_ms(function, args)
            row |= rates(row["ms"], step, nbytes(args) + nbytes(y), rows)
    except REFUSED as error:
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return row


def device_ms(function, args):
    """Milliseconds a call without what the host takes: of short calls, several in one program."""
    ms = median_ms(function, args)
    if ms >= SHORT:
        return ms
    many = jax.jit(lambda *copies: [function(*args) for args in copies])
    return median_ms(many, [jax.tree.map(jnp.copy, args) for _ in range(COPIES)]) / COPIES


def median_ms(function, args, repeats=5, seconds=0.05):
    """Milliseconds a call, the median of ``repeats`` runs of as many calls as fit into ``seconds``; calls overlap with their dispatch."""

    def run(calls):
        start = time.perf_counter()
        for _ in range(calls):
            y = function(*args)
        jax.block_until_ready(y)
        return (time.perf_counter() - start) / calls

    run(1)  # compiles
    calls = max(3, min(200, math.ceil(seconds / run(3))))
    return 1e3 * statistics.median(run(calls) for _ in range(repeats))


def rates(ms, step, moved, rows):
    out = {}
    if "macs" in step:
        return {"tflops": 2 * step["macs"] / ms / 1e9}
    out["gbs"] = moved / ms / 1e6
    copies = [r["gbs"] for r in rows if r["step"].startswith("copy") and r["shape"] == list(step["shape"]) and "gbs" in r]
    best = out["gbs"] if "copy" in step else next(iter(copies), None)
    return out | ({"of_copy": out["gbs"] / best} if best else {})


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@functools.partial(jax.jit, static_argnums=(0, 1))
def normal(seed, shape):
    """bf16, from bits that are quick to draw."""
    return jax.random.normal(jax.random.key(seed, impl="rbg"), shape, bf16)


def relative(y, expected):
    """Relative root mean square difference."""
    return float(difference(y, expected))


@jax.jit
def difference(y, expected):
    y, expected = y.astype(jnp.float32), expected.astype(jnp.float32)
    return jnp.sqrt(jnp.sum((y - expected) ** 2) / jnp.sum(expected**2))


def same(got, expected):
    """The largest share of elements of an array whose bits differ, and the limit."""
    bits = lambda a: jax.lax.bitcast_convert_type(a, jnp.dtype(f"uint{8 * a.dtype.itemsize}"))
    shares = jax.jit(lambda got, expected: [jnp.mean(bits(a) != bits(b)) for a, b in zip(got, expected, strict=True)])
    return max(float(share) for share in shares(got, expected)), 1e-3


# ---- report --------------------------------------------------------------------------------------------------------------------------------


def line(row):
    cell = lambda key, form, width: f"{format(row[key], form) if key in row else '':>{width}}"
    text = f"{row['step']:36}{' x '.join(map(str, row['shape'])):22}"
    text += cell("ms", ".4f", 9) + cell("tflops", ".1f", 9) + cell("gbs", ".0f", 8) + cell("of_copy", ".1%", 9)
    if "figure" in row:
        text += f"  {row['figure']:.2e} <= {row['limit']:g}{'' if row['passed'] else '  FAILED'}"
    return text + (f"  {row['error']}" if "error" in row else "")


def compare(rows):
    """The targets of W8A8, shape by shape."""
    ms = {(r["step"], tuple(r["shape"])): r["ms"] for r in rows if "ms" in r}
    out = []
    for name, shape in list(ms):
        parts = [ms.get((other, shape)) for other in ("bf16", "FP8 ceiling")]
        if name == "W8A8 FP8" and all(parts):
            speed, share = parts[0] / ms[name, shape], parts[1] / ms[name, shape]
            verdict = "met" if speed >= 1.35 and share >= 0.7 else "NOT MET"
            out.append(
                f"W8A8 {' x '.join(map(str, shape))}: {speed:.2f} x bf16 (target 1.35), {share:.2f} of the FP8 ceiling (target 0.7): {verdict}"
            )
    return out


if __name__ == "__main__":
    main()
