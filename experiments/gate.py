"""Judge a memory in FP8 or NVFP4, and the attention that reads it, before it is switched on: ``stream.memory`` against the model's own dtype.

    python experiments/gate.py --out=outputs/gate                        # FP8, the toy model; minutes on a GPU
    python experiments/gate.py --memory=nvfp4 --out=outputs/gate4
    python experiments/gate.py --model=models/longlive --parts=error     # any bundle that reads prompts
    python experiments/gate.py --n=16 --chunks=3                         # a short look, anywhere

- error: chunk by chunk, both are given the same history (what the model made with its own memory) and the same noise. Relative difference of
  what one forward makes of the noise, and beside it that of bfloat16 against float32. Once as the model is, once with planted outliers: 8
  channels of the keys and 8 of the values of every layer times 64, taken back in queries and output, which changes nothing in the model's own
  dtype.
- adherence: the toy model's videos under both memories, same prompts and noise, read off the pixels; paired, with upper 95 % bounds.

It passes if adherence (all four attributes at once) loses at most ``LIMIT`` points by its upper bound, and the error does not grow: that of the
last chunks at most ``GROWTH`` times that of the first ones with a full window. Writes ``gate.json`` and ``gate.png``.
"""

import argparse
import pathlib
import sys
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.checkpoint import load_parts
from longlive_jax.config import MEMORIES, ConfigError, require
from longlive_jax.data import toyeval
from longlive_jax.data.toypaired import paired_rows
from longlive_jax.data.toyplay import model_player
from longlive_jax.metrics import plain, provenance
from longlive_jax.quant.balance import balance, self_attentions
from longlive_jax.streaming.bundles import Bundle, folder_of
from longlive_jax.streaming.charts import grid_picture
from longlive_jax.streaming.session import Session
from longlive_jax.streaming.writer import OutputError, check_writable, write_record
from longlive_jax.tree import flat_params, with_params

PARTS = ("error", "adherence")
LIMIT, GROWTH = 1.0, 1.5
OUTLIERS, FACTOR = 8, 64.0  # channels a layer, and how many times larger: a power of two, so that nothing else changes
STORY = (
    "A big red star slides slowly from side to side in front of a sunset.",
    "The scene transitions. A small blue ring stands still in a meadow.",
)


# ---- error ---------------------------------------------------------------------------------------------------------------------------------


def planted(model, seed=0):
    """``model`` with outliers among its keys and values. Those of the keys come in the pairs that rotary positions turn."""
    params, rng = flat_params(model), np.random.default_rng(seed)
    for name in self_attentions(params):
        width = params[name + "norm_k.weight"].shape[-1]
        pairs = 2 * rng.choice(width // 2, OUTLIERS // 2, replace=False)
        for give, take, channels in (
            (("norm_k.weight",), "norm_q.weight", np.concatenate([pairs, pairs + 1])),
            (("v.weight", "v.bias"), "o.weight", rng.choice(width, OUTLIERS, replace=False)),
        ):
            gain = np.ones(width, np.float32)
            gain[channels] = FACTOR
            for path in give:
                x = params[name + path]
                params[name + path] = x * jnp.asarray(gain if x.ndim == 1 else gain[:, None], x.dtype)
            params[name + take] = params[name + take] / jnp.asarray(gain, params[name + take].dtype)
    return with_params(model, params)


def errors(bundle, memory, dtype, chunks, batch, seed):
    """Name -> relative error of each chunk as one forward predicts it from noise ``[chunks]``; all with one history."""
    make = lambda dtype, **settings: Session(bundle._replace(experiment=replace(bundle.experiment, dtype=dtype)), **settings)
    own, one = make(dtype), {"steps": 1, "guidance": 1.0}
    looks = {"": make(dtype, **one), f"{memory} memory": make(dtype, memory=memory, **one)}
    if dtype != "float32":
        looks["float32"] = make("float32", **one)
    texts = {name: [session.read(prompt) for prompt in STORY] for name, session in looks.items()}
    told = [own.read(prompt) for prompt in STORY]
    state, states = own.start(seed, batch), {name: s.start(seed, batch) for name, s in looks.items()}
    out = {name: [] for name in looks if name}
    for c in range(chunks):
        shot = 2 * c // chunks
        cut, found = c > 0 and shot != 2 * (c - 1) // chunks, {}
        state, z = own.step(state, told[shot], cut=cut)
        for name, session in looks.items():
            text = texts[name][shot]
            found[name] = np.asarray(session.step(session.fork(states[name]), text, cut=cut)[1], np.float32)
            states[name] = session.remember(states[name], z, text, cut=cut)
        for name, values in out.items():
            values.append(float(np.linalg.norm(found[name] - found[""]) / np.linalg.norm(found[""])))
    return out


def error_part(bundle, options):
    """Prints and returns the errors of the model as it is and with outliers."""
    out = {}
    for title, model in (("as it is", bundle.transformer), ("with outliers", planted(bundle.transformer))):
        told = options.memory, options.dtype, options.chunks, options.batch, options.seed
        found = errors(Bundle(bundle.experiment, model, None, bundle.text), *told)
        for name, values in found.items():
            out[f"{title}, {name}"] = values
            print(f"{title + ', ' + name:32}" + " ".join(f"{100 * v:6.2f}" for v in values) + "  %, chunk by chunk", flush=True)
    return out


def growth(values, full):
    """The mean error of the last third of the chunks with a full window over that of the first third."""
    steady = values[full:]
    third = max(1, len(steady) // 3)
    return float(np.mean(steady[-third:]) / np.mean(steady[:third])) if steady else float("nan")


# ---- adherence -----------------------------------------------------------------------------------------------------------------------------


def adherence_part(bundle, options):
    scenes = toyeval.prompts(np.random.default_rng([options.seed, 4243]), options.n, options.read)
    small = replace(bundle.experiment, stream=replace(bundle.experiment.stream, memory=options.memory))
    seen = []
    for experiment, model in ((bundle.experiment, bundle.transformer), (small, balance(bundle.transformer))):
        began, memory = time.perf_counter(), experiment.stream.memory
        print(f"adherence, memory {memory}: {options.n} streams in batches of {options.batch}", flush=True)
        player = model_player(experiment, model, bundle.vae, bundle.text, batch=min(options.batch, options.n), seed=options.seed)
        seen.append(toyeval.observe(player, scenes, range(options.read)))
        print(f"adherence, memory {memory}: read in {time.perf_counter() - began:.0f} s", flush=True)
    rows = paired_rows(f"{options.memory} memory", *seen)
    for row in rows:
        print(f"{row.group:14}{row.measure:20}{row.value:7.2f} {row.unit}, at most {row.high:.2f} (95 %), {row.n} streams", flush=True)
    return rows


# ---- the run -------------------------------------------------------------------------------------------------------------------------------


def verdict(record, rows, full):
    """Sentences that say what passed, and whether all did."""
    passed, said = True, []
    for name, values in record.get("error", {}).items():
        if name.endswith(" memory"):
            grown = growth(values, full)
            passed &= not grown > GROWTH
            said.append(f"{name}: mean error {100 * np.mean(values):.2f} %, grows {grown:.2f} times (at most {GROWTH})")
    for row in rows:
        if row.measure == "four, loss":
            passed &= row.high <= LIMIT
            said.append(f"all four attributes lose {row.value:.2f} points, upper 95 % bound {row.high:.2f} (at most {LIMIT})")
    return said, bool(passed)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toy", help="a bundled model, or a folder with a bundle")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("outputs/gate"))
    parser.add_argument("--memory", choices=MEMORIES[1:], default="fp8")
    parser.add_argument("--parts", default=",".join(PARTS), help="any of " + ",".join(PARTS))
    parser.add_argument("--dtype", default="", help="the model's; default: bfloat16, on a CPU float32")
    parser.add_argument("--chunks", type=int, default=24, help="of the error part, half before a cut and half behind it")
    parser.add_argument("--n", type=int, default=768, help="streams of the adherence part")
    parser.add_argument("--read", type=int, default=3, help="chunks of each of them")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    parts = options.parts.split(",")
    require(set(parts) <= set(PARTS), f"--parts={options.parts} has unknown names; known: {', '.join(PARTS)}")
    for name in ("chunks", "n", "read", "batch"):
        require(vars(options)[name] > 0, f"--{name}={vars(options)[name]} must be positive")
    options.dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    bundle = Bundle(*load_parts(folder_of(options.model), dtype="float32"))
    out = check_writable(options.out)
    record, rows = {"provenance": provenance(), "settings": {k: str(v) for k, v in vars(options).items() if k not in ("model", "out")}}, []

    write = lambda: write_record(out / "gate.json", plain(record))
    if "error" in parts:
        record["error"] = error_part(bundle, options)
        write()
        cells = {(name, str(c)): 100 * v for name, values in record["error"].items() for c, v in enumerate(values)}
        grid_picture(
            out / "gate.png",
            "Error of a chunk, by one forward from noise",
            list(record["error"]),
            [str(c) for c in range(options.chunks)],
            cells,
        )
    if "adherence" in parts:
        rows = adherence_part(bundle, options)
        record["adherence"] = rows
    stream = bundle.experiment.stream
    record["verdict"], record["passed"] = verdict(record, rows, stream.window // stream.chunk)
    write()
    print(*record["verdict"], sep="\n")
    print(f"{out / 'gate.json'}: " + ("passed" if record["passed"] else "NOT passed"))
    return record


def run():
    try:
        sys.exit(0 if main()["passed"] else 1)
    except (ConfigError, OutputError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()
