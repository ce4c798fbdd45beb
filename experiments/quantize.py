"""Make a model of low-precision weights, and say what that costs.

    python experiments/quantize.py --rules=w4a4 --out=outputs/toy-w4a4
    python experiments/quantize.py --model=runs/ar/bundle --rules=fp8 --lora=adapter.safetensors --lora_scale=0.5 --out=outputs/fp8
    python experiments/quantize.py --rules=w4a4_static_6 --dense='cross_attn,blocks\\.0\\..*' --dry-run
    python experiments/quantize.py --sensitivity --n=512 --out=outputs/sensitivity
    python experiments/stream.py --config.model=outputs/toy-w4a4

The first three read a bundle, merge adapters into it, quantise what the rules name and write a bundle that opens like any other, with
``layers.json``, ``layers.png`` (error and size of every layer) and what was done in ``record.json``. ``--sensitivity`` plays the toy model in
bfloat16 and quantised, on the same prompts and noise, and finds which groups of layers to leave dense: ``sensitivity.json`` and ``.md``, which
are written after every figure, and a picture.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import math
import pathlib
import re
import shutil
import sys
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.flax import save_file

from longlive_jax.checkpoint import PARTS, RECORD, digest, find_arrays, is_large, load_parts, read_json, save_bundle, save_large_bundle
from longlive_jax.config import ConfigError, require
from longlive_jax.convert.adapters import read_peft
from longlive_jax.convert.packed import convert_packed, export_packed, is_packed, read_header
from longlive_jax.convert.table import ConversionError
from longlive_jax.convert.tensors import open_tensors
from longlive_jax.convert.torchzip import named_tensors, read_torch
from longlive_jax.convert.wan import TRANSFORMER_TABLE, transformer_shapes
from longlive_jax.data import toyeval
from longlive_jax.data.toypaired import paired_rows
from longlive_jax.data.toyplay import model_player, told
from longlive_jax.data.toyprobe import layer_sensitivity
from longlive_jax.metrics import plain, provenance
from longlive_jax.model.transformer import stack_blocks
from longlive_jax.ops.matmul import matmul
from longlive_jax.quant.formats import check_finite
from longlive_jax.quant.leaves import LoRA, dense, flatten, nbytes
from longlive_jax.quant.lora import merge
from longlive_jax.quant.rewrite import KINDS, published, rewrite
from longlive_jax.streaming.bundles import folder_of
from longlive_jax.streaming.charts import grid_picture
from longlive_jax.streaming.writer import OutputError, check_writable, write_record, write_whole
from longlive_jax.tree import Leaf, cast, flat_params, with_params

RULES = [name for name in KINDS if name not in ("dense", "dynamic")]  # each with the published exclusion (quant/rewrite.py)
GROUPS = {
    "self_qk": r"blocks\.(\d+\.)?self_attn\.[qk]\.weight",
    "self_vo": r"blocks\.(\d+\.)?self_attn\.[vo]\.weight",
    "cross_attn": r"blocks\.(\d+\.)?cross_attn\.[qkvo]\.weight",
    "ffn_up": r"blocks\.(\d+\.)?ffn\.up\.weight",
    "ffn_down": r"blocks\.(\d+\.)?ffn\.down\.weight",
    "first_block": r"blocks\.0\..*weight",
    "last_block": r"blocks\.{last}\..*weight",  # the number of the last one is put in
}


# ---- what to make of which weight ----------------------------------------------------------------------------------------------------------


def rules_for(kind, left_dense, layers):
    """The rules of ``kind`` with the groups or patterns ``left_dense`` ahead of them, for a model of ``layers`` blocks."""
    patterns = [GROUPS.get(name, name).replace("{last}", str(layers - 1)) for name in left_dense]
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"--dense={pattern!r} is neither a group ({', '.join(GROUPS)}) nor a regular expression: {error}") from error
    return (*((pattern, "dense") for pattern in patterns), *published(kind))


def merged(params, files, scales):
    """``params`` with the adapters of ``files`` added, in float32; ``scales`` multiply what each adds."""
    params = merge(params)
    for file, scale in zip(files, scales):
        adapted = read_peft(opened(file, "lora", ("generator_lora",))[0], params)
        params = merge({p: dataclasses.replace(x, scaling=scale * x.scaling) if isinstance(x, LoRA) else x for p, x in adapted.items()})
    return params


def unpacked(path, params):
    """The weights of a packed file of the public source in place of ``params``."""
    tensors, header = opened(path, "packed", ("generator_ema", "generator", "model"))
    require(is_packed(tensors), f"--packed={path} holds no packed layers; quantise a model's own weights by --rules")
    packed = convert_packed(TRANSFORMER_TABLE, tensors, params, header=header or None)
    return {path: x if isinstance(x, Leaf) else jnp.asarray(x) for path, x in packed.items()}


def opened(file, option, entries):
    """``(tensors, header)`` of a tensor file, of a torch file the first of ``entries`` that it has; what goes wrong as one kind of error."""
    path = pathlib.Path(file)
    try:
        if path.suffix in (".pt", ".pth"):
            tree = read_torch(path)
            return named_tensors(next((tree[key] for key in entries if key in tree), tree), path), said(tree)
        return open_tensors(path), said(read_header(path)) if path.suffix == ".safetensors" else {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"--{option}={file}: {error}") from error


def said(container):
    """What a container says of its packed tensors."""
    return {key: container[key] for key in ("checkpoint_format", "checkpoint_version", "quantization") if key in container}


# ---- error and size of every layer ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """What became of one weight. ``error``: root of the sum of squares of what changed, over that of the weight; None where it is not known."""

    path: str
    kind: str
    shape: tuple
    before: int
    after: int
    error: float | None


@jax.jit
def relative_error(before, after):
    before, after = before.astype(jnp.float32), dense(after, jnp.float32)
    return jnp.sqrt(jnp.sum((after - before) ** 2) / jnp.maximum(jnp.sum(before**2), 1e-30))


def layers_of(before, after):
    """A ``Layer`` for every weight that is quantised in ``after``; ``before``: the dense ones, as far as they are known."""
    leaves = {path: x for path, x in after.items() if isinstance(x, Leaf)}
    error = lambda path: float(relative_error(before[path], leaves[path])) if path in before else None
    bfloat16 = lambda x: 2 * math.prod(x.shape)  # as bundles hold dense weights
    return [Layer(path, type(x).__name__, tuple(x.shape), bfloat16(x), nbytes(x), error(path)) for path, x in leaves.items()]


def print_layers(layers):
    width = max(len(x.path) for x in layers)
    print(f"{'weight':{width}}  {'kind':6} {'shape':>14} {'KiB before':>11} {'after':>9} {'error':>8}")
    for x in layers:
        error = "" if x.error is None else f"{100 * x.error:.2f} %"
        print(f"{x.path:{width}}  {x.kind:6} {'x'.join(map(str, x.shape)):>14} {x.before / 1024:11.1f} {x.after / 1024:9.1f} {error:>8}")


def layer_grid(layers, value):
    """``grid_picture``'s rows, columns and cells of ``value`` (Layer -> number): a row a block."""
    parts = {x.path: (".".join(x.path.split(".")[:2]), ".".join(x.path.removesuffix(".weight").split(".")[2:])) for x in layers}
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*parts.values()))
    return rows, columns, {parts[x.path]: value(x) for x in layers}


# ---- quantising ----------------------------------------------------------------------------------------------------------------------------


def quantise(args, folder):
    """The bundle of ``folder`` as ``args`` say, into ``args.out``; returns the list of ``Layer``, of a dry run an empty one."""
    experiment, parts = read_parts(folder)
    if args.packed:
        before, after = {}, unpacked(args.packed, parts["transformer"])
        print(f"{sum(isinstance(x, Leaf) for x in after.values())} packed layers")
    else:
        before = cast(merged(parts["transformer"], args.lora, args.lora_scale), jnp.bfloat16)
        rules = rules_for(args.rules, args.dense, experiment.transformer.layers)
        print(planned(before, rules))
        after = None if args.dry_run else rewrite(before, rules)[0]
    if args.dry_run:
        print(f"dry run: nothing made; {args.out!r} can be written")
        return []
    layers = layers_of(before, after)
    print_layers(layers)
    write(args, folder, experiment, parts | {"transformer": after}, layers)
    return layers


def read_parts(folder):
    """The experiment and part -> path -> weight of what a bundle has: the transformer in float32, the others as they will be written."""
    experiment, transformer = load_parts(folder, ("transformer",), "float32")
    there = {name.split(".")[0] for name in find_arrays(folder)}
    others = [part for part in PARTS if part in there and part != "transformer"]
    modules = dict(zip(others, load_parts(folder, tuple(others), "bfloat16")[1:])) if others else {}
    return experiment, {part: flat_params(module) for part, module in {"transformer": transformer, **modules}.items()}


def planned(params, rules):
    """The ``Report`` of a rewrite, after every rule, size and value has been checked and before anything is encoded."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    plan, report = rewrite(shapes, rules)
    require(set(report.rows) != {"other"}, "--dense leaves no weight to quantise; name fewer groups or patterns")
    for path, leaf in plan.items():
        if leaf is not shapes[path]:
            check_finite(path, params[path])
    return report


def write(args, folder, experiment, parts, layers):
    """The bundle, the report of its layers, and the public packed file where one was asked for."""
    out = check_writable(pathlib.Path(args.out))
    sizes = {part: sum(nbytes(x) for x in cast(weights, jnp.bfloat16).values()) for part, weights in parts.items()}
    done = {"rules": args.rules, "dense": args.dense, "lora": [pathlib.Path(f).name for f in args.lora], "lora_scale": args.lora_scale}
    done = {"packed": pathlib.Path(args.packed).name} if args.packed else done
    errors = [x.error for x in layers if x.error is not None]
    summary = {"quantised": done, "bytes": sizes}
    if errors:
        summary["relative_error"] = {"mean": sum(errors) / len(errors), "largest": max(errors)}
    write_record(out / "layers.json", summary | {"layers": [dataclasses.asdict(x) for x in layers]})
    if errors:
        grid_picture(out / "layers.png", f"relative error of the weights, {args.rules}", *layer_grid(layers, lambda x: 100 * x.error))
    if args.export:
        tensors, header = export_packed(TRANSFORMER_TABLE, parts["transformer"], transformer_shapes(experiment.transformer))
        text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in header.items()}
        save_file({name: jnp.asarray(x) for name, x in tensors.items()}, args.export, metadata=text)
    source = {"model": folder.name, "sha256": digest(folder), "record": read_json(folder, RECORD)}
    about = {"what": "Low-precision weights made by experiments/quantize.py", **summary, "made_with": provenance(), "made_from": source}
    if is_large(folder):
        weights = {f"{part}.{path}": x for part, leaves in parts.items() for path, x in leaves.items()}
        save_large_bundle(out, experiment, *flatten(cast(weights, jnp.bfloat16)), about)
    else:
        save_bundle(out, experiment, parts, about)
    if folder.joinpath("tokenizer").is_dir():
        shutil.copytree(folder.joinpath("tokenizer"), out / "tokenizer")
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    print(f"{out}: {size / 2**20:.2f} MiB, of which the transformer {sizes['transformer'] / 2**20:.2f}; {len(layers)} layers are quantised")
    print(f"make a video of it: experiments/stream.py --config.model={out}")


# ---- sensitivity: by the pixels of videos --------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Switch(Leaf):
    """A dense weight, and ``other``, which products use where ``on``: one program for every choice of layers."""

    weight: jax.Array  # [out, in]
    other: Leaf
    on: jax.Array  # []

    shape = property(lambda self: self.weight.shape)
    dtype = property(lambda self: self.weight.dtype)

    def cast(self, dtype):
        return dataclasses.replace(self, weight=self.weight.astype(dtype), other=self.other.cast(dtype))


@matmul.register(Switch)
def switched(w, x):
    return jnp.where(w.on, matmul(w.other, x), matmul(w.weight, x))


def variants(args, bundle, note):
    """``measure(cases, n)`` for the toy model: case (kind, groups left dense) -> its Rows, by the dense one's first ``n`` prompts.

    A kind is one program, which the dense model shares; scanned blocks compile in a fraction of the time. ``note(rows)``: after every case.
    """
    experiment, transformer, vae, text = bundle
    scenes = toyeval.prompts(np.random.default_rng([args.seed, 7919, 4242]), args.n, 3)
    params = cast(flat_params(transformer), jnp.bfloat16)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    quantised = {kind: rewrite(params, published(kind))[0] for kind in args.kinds}
    title = lambda kind, left: kind if left == () else f"{kind}, dense: {'all' if left is None else ', '.join(left)}"

    def play(kind, left, n):
        plan = rewrite(shapes, rules_for(kind, left, experiment.transformer.layers))[0] if left is not None else {}
        on = lambda path: jnp.asarray(isinstance(plan.get(path), Leaf))
        weights = {path: Switch(params[path], x, on(path)) if isinstance(x, Leaf) else x for path, x in quantised[kind].items()}
        model = stack_blocks(with_params(transformer, weights))
        player = model_player(experiment, model, vae, text, batch=args.batch, seed=args.seed)
        return toyeval.observe(told(player, title(kind, left), 3 * -(-n // args.batch)), scenes[:n], range(3))

    first = lambda kind: (play(kind, None, args.n) if kind == args.kinds[0] else None, play(kind, (), args.n))
    pool = concurrent.futures.ThreadPoolExecutor(args.threads)  # programs of the kinds are compiled side by side
    started = {kind: pool.submit(first, kind) for kind in args.kinds}

    def measure(cases, n):
        jobs = {(kind, left): pool.submit(play, kind, left, n) for kind, left in cases if left}
        out, reference = {}, started[args.kinds[0]].result()[0]
        for kind, left in cases:
            seen = jobs[kind, left].result() if left else started[kind].result()[1]
            before = reference._replace(scenes=scenes[:n], readings={k: toyeval.take(r, slice(n)) for k, r in reference.readings.items()})
            out[kind, left] = paired_rows(title(kind, left), before, seen)
            note(out[kind, left])
        return out

    return measure


def upper(rows, measure="four, loss"):
    return next(row.high for row in rows if row.measure == measure)


def leave_out(args, measure):
    """All cases measured, and for every kind the groups to leave dense so that all four attributes lose at most ``args.within`` points.

    Single groups, which decide the order alone, are measured on ``args.group_n`` prompts.
    """
    found = measure([(kind, ()) for kind in args.kinds], args.n)
    answer = dict.fromkeys(args.kinds)
    for kind in args.kinds:
        if upper(found[kind, ()]) <= args.within and not args.all_groups:
            answer[kind] = []
            continue
        alone = measure([(kind, (group,)) for group in GROUPS], args.group_n)
        order = sorted(GROUPS, key=lambda group: upper(alone[kind, (group,)]))
        found |= alone
        for count in range(len(GROUPS) + 1):
            left = tuple(order[:count])
            if count > 1 or (count == 1 and args.group_n < args.n):
                found |= measure([(kind, left)], args.n)
            if upper(found[kind, left]) <= args.within:
                answer[kind] = list(left)
                break
    return found, answer


def sensitivity(args, folder):
    """``leave_out`` and ``layer_sensitivity`` into ``args.out``, written after every figure; returns the record."""
    start = time.monotonic()
    bundle = load_parts(folder, dtype="float32")
    if args.dry_run:
        print(f"dry run: {args.n} prompts of 3 chunks for {', '.join(args.kinds)}; nothing made")
        return None
    out = check_writable(pathlib.Path(args.out))
    record = {"settings": {name: vars(args)[name] for name in ("n", "group_n", "seed", "within")}, "complete": False, "leave_dense": {}}
    record |= {"rows": [], "layers": {}, "provenance": provenance()}

    def note(rows=()):
        record["seconds"] = time.monotonic() - start
        record["rows"] += [row._asdict() for row in rows]
        write_record(out / "sensitivity.json", plain(record))
        write_whole(out / "sensitivity.md", markdown(record).encode(), "report")
        for row in rows:
            text = f"{row.value:6.2f} {row.unit}, at most {row.high:.2f} (95 %), {row.n} streams, {record['seconds']:.0f} s"
            print(f"{row.group:40} {row.measure:20} {text}", flush=True)

    measure = variants(args, bundle, note)  # compiles while the layers are looked at
    for kind, errors in layer_sensitivity(bundle, args.kinds, seed=args.seed).items():
        record["layers"][kind] = errors
        worst = sorted(errors, key=errors.get, reverse=True)[:5]
        note()
        print(f"{kind}: relative error of a layer's product {100 * np.mean(list(errors.values())):.2f} % on average; largest:")
        print(*(f"  {100 * errors[path]:6.2f} %  {path}" for path in worst), sep="\n", flush=True)
        layers = [Layer(path, kind, (), 0, 0, error) for path, error in errors.items()]
        grid_picture(out / f"layers-{kind}.png", f"relative error of the products, {kind}", *layer_grid(layers, lambda x: 100 * x.error))
    found, answer = leave_out(args, measure)
    cells = {(rows[0].group, row.measure): row.high for rows in found.values() for row in rows}
    columns = list(dict.fromkeys(column for _, column in cells))
    title = "upper 95 % bound of what is lost against bfloat16: points of adherence, per cent of mean motion"
    grid_picture(out / "sensitivity.png", title, list(dict.fromkeys(row for row, _ in cells)), columns, cells, unit="", cell=(150, 24))
    for kind, left in answer.items():
        text = "no group helps" if left is None else f"leave dense: {', '.join(left) or 'nothing'}"
        print(f"{kind}: within {args.within:g} points (95 %) in all four attributes: {text}", flush=True)
    record |= {"complete": True, "leave_dense": answer}
    note()
    return record


def markdown(record):
    """The record's rows as a table."""
    about = f"{'Complete' if record['complete'] else 'Not complete'}, {record['seconds']:.0f} s. Leave dense: {record['leave_dense']}."
    lines = [about, "", "| weights | measure | loss | at most (95 %) | streams |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {r['group']} | {r['measure']} | {r['value']:.2f} {r['unit']} | {r['high']:.2f} | {r['n']} |" for r in record["rows"]]
    return "\n".join(lines) + "\n"


# ---- the program ---------------------------------------------------------------------------------------------------------------------------


words = lambda text: [word for word in text.split(",") if word]


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="toy", help="a bundled model, or a folder with a bundle, or a run that has one")
    parser.add_argument("--out", default="outputs/quantised", help="folder for the result; it must not hold anything")
    parser.add_argument("--rules", default=None, help=f"what the linears of the blocks become: {', '.join(RULES)}; w4a4 where not said")
    parser.add_argument("--dense", type=words, default=[], help=f"what to leave: groups ({', '.join(GROUPS)}) or patterns, with commas between")
    parser.add_argument("--lora", type=words, default=[], help="adapter files to merge first, with commas between")
    parser.add_argument("--lora_scale", type=words, default=["1"], help="how strongly, one for all or one a file; times alpha / rank")
    parser.add_argument("--packed", default="", help="take the weights from a packed file of the public source, as they are")
    parser.add_argument("--export", default="", help="also write the public source's packed layout, to this .safetensors file")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="check everything, say what would be made, and stop")
    parser.add_argument("--sensitivity", action="store_true", help="measure what quantising costs, and what to leave dense")
    parser.add_argument("--kinds", type=words, default=["fp8", "w4a4"], help="of --sensitivity")
    parser.add_argument("--n", type=int, default=512, help="prompts of --sensitivity")
    parser.add_argument("--group_n", type=int, default=128, help="prompts by which single groups are put in order")
    parser.add_argument("--batch", type=int, default=64, help="videos made at once")
    parser.add_argument("--threads", type=int, default=1, help="variants at once; on a GPU with XLA_FLAGS=--xla_gpu_enable_command_buffer=")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and noise")
    parser.add_argument("--within", type=float, default=1.0, help="points of adherence that may be lost, upper 95 %% bound")
    parser.add_argument("--all_groups", action="store_true", help="leave out every group in turn also where nothing needs to be left out")
    args = parser.parse_args(argv)
    for name in ("n", "group_n", "batch", "threads"):
        require(vars(args)[name] >= 1, f"--{name}={vars(args)[name]} must be at least 1")
    require(args.seed >= 0 and args.kinds, f"--seed={args.seed} must not be negative, and --kinds={','.join(args.kinds)} must name some")
    require(not (args.packed and args.rules), f"--packed weights are quantised already: leave --rules={args.rules} out")
    args.rules = args.rules or "w4a4"
    for kind in [args.rules, *args.kinds]:
        require(kind in RULES, f"unknown rules {kind!r}; known: {', '.join(RULES)}")
    args.batch, args.group_n = min(args.batch, args.n), min(args.group_n, args.n)
    return check(args)


def check(args):
    """Refuse what cannot work, before anything is read."""
    try:
        args.lora_scale = [float(word) for word in args.lora_scale]
    except ValueError as error:
        raise ConfigError(f"--lora_scale={','.join(args.lora_scale)} is not a number a file: {error}") from error
    args.lora_scale = args.lora_scale * max(1, len(args.lora)) if len(args.lora_scale) == 1 else args.lora_scale
    require(len(args.lora_scale) == max(1, len(args.lora)), f"{len(args.lora_scale)} values of --lora_scale for {len(args.lora)} adapters")
    require(all(map(math.isfinite, args.lora_scale)), f"--lora_scale={args.lora_scale} must be finite")
    require(not args.packed or not (args.lora or args.dense), "--packed weights are quantised already: leave --lora and --dense out")
    alone = not (args.lora or args.packed or args.dense or args.export)
    require(alone or not args.sensitivity, "--sensitivity measures --kinds: leave --lora, --packed, --dense and --export out")
    require(not args.export or args.export.endswith(".safetensors"), f"--export={args.export} must end in .safetensors")
    require(not args.export or args.rules[:2] == "w4", f"--export holds NVFP4 weights alone, and --rules={args.rules} makes others; use w4a4")
    empty = not (out := pathlib.Path(args.out)).exists() or (out.is_dir() and not any(out.iterdir()))
    require(empty, f"--out={args.out} is there already; give another folder, or remove it")
    for path in (out, *([pathlib.Path(args.export).parent] if args.export else [])):
        check_writable(next(p for p in (path, *path.absolute().parents) if p.exists()))
    return args


def source(model):
    """The folder of the bundle: a run's is inside it."""
    inner = (folder := folder_of(model)).joinpath("bundle")
    return inner if not folder.joinpath("config.json").is_file() and inner.joinpath("config.json").is_file() else folder


def main(argv=None):
    """Quantise or measure; returns what ``quantise`` or ``sensitivity`` does."""
    args = arguments(argv)
    return (sensitivity if args.sensitivity else quantise)(args, source(args.model))


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, ConversionError, OutputError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: what is in --out is not whole; remove that folder, or give another")
