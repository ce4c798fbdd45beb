"""Where the time of compiled programs goes, read from a profiler's trace, and how much arithmetic a function asks for."""

import math
import pathlib
import re
import tempfile

import jax
from jax.extend.core import jaxprs_in_params

FOLDED = re.compile(r"(jit|jvp|transpose|vmap|body|while|cond|branch|closed_call|checkpoint|shard_map|custom_\w+)\b")


def flops(function, *args):
    """Operations of the convolutions and products of ``function``, multiplications and additions counted apart; kernels' own are not seen."""
    return counted(jax.make_jaxpr(function)(*args).jaxpr)


def counted(jaxpr):
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            spec, kernel = eqn.params["dimension_numbers"].rhs_spec, eqn.invars[1].aval.shape  # (out, in, spatial...)
            total += 2 * eqn.outvars[0].aval.size * math.prod(kernel[i] for i in spec[1:])
        elif eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += times * sum(counted(inner) for inner in jaxprs_in_params(eqn.params))
    return total


def traced(call):
    """``{(module, instruction, kernel): (nanoseconds, calls)}`` of what ran on devices, or on the host where there are none, in ``call()``."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(trace))
    planes, out = list(data.planes), {}
    for plane in [p for p in planes if p.name.startswith("/device:GPU")] or planes:
        for line in plane.lines:
            for event in line.events:
                facts = {str(k): v for k, v in event.stats}
                kernel = line.name.startswith("Stream")  # one of a CUDA graph does not say which instruction it is
                if kernel or ("hlo_op" in facts and not event.name.startswith("end:")):
                    key = (str(facts.get("hlo_module", "")), str(facts.get("hlo_op", event.name)), event.name)
                    time, calls = out.get(key, (0, 0))
                    out[key] = (time + event.duration_ns, calls + 1)
    return out


def scopes(text):
    """``{(module, instruction): named scopes}`` from an HLO text; blocks are folded into one, and what tracing adds is left out."""
    module = re.match(r"HloModule ([^,\s]+)", text)[1]
    found = re.findall(r'^\s+(?:ROOT )?%?([\w.-]+) = .*?metadata=\{[^}]*?op_name="([^"]*)"', text, re.M)
    return {(module, name): fold(path) for name, path in found}


def fold(path):
    return "/".join(re.sub(r"^block_\d+$", "block", word) for word in path.split("/") if not FOLDED.match(word))


def report(rows, names, most=60):
    """Tables of the slowest scopes and kernels as text: ``rows`` from ``traced``, ``names`` from ``scopes``."""
    total = sum(t for t, _ in rows.values()) or 1
    by_scope, by_kernel = {}, {}
    by_name = {re.sub(r"\W", "_", op): scope for (_, op), scope in names.items()}  # kernels of fusions are called after them
    for (module, op, kernel), (t, calls) in rows.items():
        scope = names.get((module, op)) or by_name.get(kernel) or op[:70]
        for tables, key in ((by_scope, f"{module} {scope}"), (by_kernel, f"{kernel[:70]} | {scope[-90:]}")):
            before = tables.get(key, (0, 0))
            tables[key] = (before[0] + t, before[1] + calls)
    lines = [f"{total / 1e6:.2f} ms in {sum(calls for _, calls in rows.values())} calls"]
    for title, rows_of in (("by scope", by_scope), ("by kernel", by_kernel)):
        lines += ["", title, f"{'ms':>10}{'share':>8}{'calls':>8}"]
        for key, (t, calls) in sorted(rows_of.items(), key=lambda x: -x[1][0])[:most]:
            lines.append(f"{t / 1e6:10.3f}{t / total:8.1%}{calls:8d}  {key}")
    return "\n".join(lines) + "\n"


__all__ = ["flops", "report", "scopes", "traced"]
