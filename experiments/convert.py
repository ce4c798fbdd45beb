"""Checkpoints in and out: files of the public sources to a folder that ``longlive_jax.load`` opens, and back under their own names.

    experiments/convert.py SOURCE [SOURCE ...] --to=FOLDER       a repository's folder, or files: transformer, VAE, text encoder, LoRA
    experiments/convert.py inspect SOURCE                        what is in it: part, layout, family, names, shapes, dtypes
    experiments/convert.py export FOLDER --part=vae --to=FILE    .safetensors, .pt or .pth; a folder name: shards of 10 GB and their index

A file that is named wins over the same part of a folder: ``convert.py Wan2.2-TI2V-5B model_bf16.pt --to=longlive`` takes the transformer from
the file. Weights are read and written one at a time, in the dtypes they have; nothing of a file is executed.
"""

import argparse
import math
import pathlib
import shutil
import sys

import numpy as np

from longlive_jax.arrays import Reader, Unread, array_shapes
from longlive_jax.checkpoint import ARRAYS, PARTS, RECORD, abstract_part, read_experiment, read_json, read_kinds, save_large_bundle
from longlive_jax.config import ConfigError, require
from longlive_jax.convert.adapters import adapter_pairs
from longlive_jax.convert.layouts import (
    check_family,
    experiment_of,
    family,
    fingerprint,
    fit_vae,
    foreign,
    licence_of,
    open_source,
    sources_in,
    tokenizer_in,
)
from longlive_jax.convert.table import ConversionError
from longlive_jax.convert.writers import Whole, write_safetensors, write_sharded, write_torch
from longlive_jax.metrics import provenance
from longlive_jax.tree import flat_params

# ---- in ------------------------------------------------------------------------------------------------------------------------------------


def collect(paths, ema=False):
    """Part -> ``SourceFile``, and the tokenizer's files, of everything at ``paths``; named files win over folders."""
    chosen, named, tokenizer = {}, {}, []
    for path in map(pathlib.Path, paths):
        inside = sources_in(path)
        if path.is_dir():
            tokenizer = tokenizer_in(path) or tokenizer
        for at in inside:
            source, alone = open_source(at), path.is_file() or inside == [path]
            source = open_source(at, ema=True) if ema and path.is_file() and source.part == "transformer" else source
            old = (named if alone else chosen).get(source.part)
            require(old is None, f"{at} and {old and old.path} both hold the {source.part}; name one of them")
            (named if alone else chosen)[source.part] = source
    return chosen | named, tokenizer


def weights_of(sources, experiment, dtype=None, alpha=None):
    """``(experiment, part.path -> Unread)`` of all parts; one ``ConversionError`` lists what does not fit in any of them."""
    configs = lambda e: {"transformer": e.transformer, "vae": e.vae, "text": e.text}
    arrays, problems = {}, {}
    for part in (p for p in PARTS if p in sources):
        source = sources[part]
        check_family(source, experiment)
        experiment = fit_vae(experiment, source) if part == "vae" else experiment
        require(not source.packed, f"{source.path} holds packed 4-bit layers; experiments/quantize.py --packed reads it")
        shapes = flat_params(abstract_part(part, configs(experiment)[part]))
        try:
            own = source.arrays(shapes, experiment.vae.res_blocks, dtype)
            own = adapted(own, sources["adapter"], alpha) if part == "transformer" and "adapter" in sources else own
            arrays |= {f"{part}.{path}": x for path, x in own.items()}
        except ConversionError as error:
            problems |= {f"{part}: {kind}": lines for kind, lines in error.problems.items()}
    if problems:
        raise ConversionError(problems)
    return experiment, arrays


def adapted(arrays, adapter, alpha=None):
    """``arrays`` with ``W + alpha / rank · B A`` (in float32) in place of every ``W`` that ``adapter`` changes."""
    out, tensors = dict(arrays), adapter.tensors

    def merged(x, pair):
        a, b = (np.asarray(tensors[pair[side]], np.float32) for side in "AB")
        scaling = 1.0 if alpha is None else alpha / len(a)
        total = np.asarray(x, np.float32)
        for at in range(0, len(total), 1024):  # in rows, so that no second matrix of this size is made
            total[at : at + 1024] += scaling * (b[at : at + 1024] @ a)
        return total.astype(x.dtype)

    for path, pair in adapter_pairs(tensors, arrays).items():
        x = arrays[path]
        out[path] = Unread(x.shape, x.dtype, lambda x=x, pair=pair: merged(x, pair))
    return out


def convert(paths, to, *, model="wan_5b", ema=False, alpha=None, dtype=None):
    """The checkpoints at ``paths`` as the bundle ``to``, which appears when it is whole. Returns its record."""
    to = pathlib.Path(to)
    require(not to.exists(), f"--to={to} exists; name a new folder")
    sources, tokenizer = collect(paths, ema)
    require(set(sources) - {"adapter"} or not sources, "a LoRA needs the transformer it was trained on; name that too")
    require(sources, "the sources hold no weights")
    experiment, arrays = weights_of(sources, experiment_of(model), dtype, alpha)
    size, free = sum(x.nbytes for x in arrays.values()), shutil.disk_usage(next(p for p in to.absolute().parents if p.exists())).free
    require(size < 0.98 * free, f"--to={to} needs up to {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free there")
    record = {"what": "Converted by experiments/convert.py", "parts": {p: about(s) for p, s in sources.items()}}
    record |= {"tokenizer": [fingerprint(f) for f in tokenizer], "dtype": dtype, "made_with": provenance()}
    if "adapter" in sources:
        record["parts"]["adapter"]["alpha"] = alpha
    with Whole(to) as unfinished:
        unfinished.mkdir()
        for file in tokenizer:
            (unfinished / "tokenizer").mkdir(exist_ok=True)
            shutil.copyfile(file, unfinished / "tokenizer" / file.name)
        save_large_bundle(unfinished, experiment, arrays, {}, record)
    return record


def about(source):
    """What the record keeps of a source."""
    kept = {"family": family(source), "layout": source.layout, "container": source.container, "tensors": len(source.tensors)}
    kept |= {"parameters": source.parameters(), "dtypes": source.dtypes(), "beside": source.beside}
    return kept | {"licence": licence_of(source.path), "files": [fingerprint(f) for f in source.files]}


# ---- out -----------------------------------------------------------------------------------------------------------------------------------


def export(folder, to, part=None, shard_gb=10.0):
    """One part of a converted bundle in the names and shapes that its files had, bit for bit, at ``to``."""
    folder, to = pathlib.Path(folder), pathlib.Path(to)
    require((folder / ARRAYS).is_dir(), f"{folder} has no {ARRAYS}/, so it is not what convert.py wrote")
    require(not to.exists(), f"--to={to} exists; name a new file or folder")
    require(0 < shard_gb < math.inf, f"--shard-gb={shard_gb} must be positive and finite")
    record, experiment, shapes = read_json(folder, RECORD), read_experiment(folder), array_shapes(folder / ARRAYS)
    there = [p for p in PARTS if p in record["parts"]]
    require(part in there or (part is None and len(there) == 1), f"--part={part}: {folder} holds {', '.join(there)}; name one of them")
    part = part or there[0]
    params = {name.removeprefix(f"{part}."): name for name in shapes if name.startswith(f"{part}.")}
    require(not read_kinds(folder, shapes), f"{folder} holds quantised weights; experiments/quantize.py --export writes those")
    stored = Reader(folder / ARRAYS, {name: shapes[name] for name in params.values()}).entries
    entries = foreign(part, record["parts"][part]["layout"], {path: stored[name] for path, name in params.items()}, experiment)
    if to.suffix == ".safetensors":
        write_safetensors(to, entries)
    elif to.suffix in (".pt", ".pth"):
        write_torch(to, entries)
    else:
        require(not to.suffix, f"--to={to} has an unknown format; give .safetensors, .pt, .pth, or a folder")
        stem = "model" if part == "text" else "diffusion_pytorch_model"
        with Whole(to) as unfinished:
            write_sharded(unfinished, stem, entries, int(shard_gb * 1e9))
    return sorted(entries)


# ---- what is it ----------------------------------------------------------------------------------------------------------------------------


def inspect(path):
    """Print what a checkpoint holds."""
    for at in sources_in(path):
        source = open_source(at)
        files = ", ".join(f"{f.name} ({f.stat().st_size:,} bytes)" for f in source.files)
        inside = f" in {source.container[:-1]}" if source.container else ""
        print(f"{at}: {family(source)}{inside}; {source.part}, {source.layout} names{', packed' if source.packed else ''}")
        print(f"  {files}; {len(source.tensors)} tensors, {source.parameters():,} parameters, {source.dtypes()}")
        if source.beside:
            print(f"  beside it: {source.beside}")
        for name, x in source.tensors.items():
            print(f"  {name:<60} {np.dtype(x.dtype)!s:<10} {list(x.shape)}")


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="SOURCE", help="files and folders; or: inspect SOURCE; or: export FOLDER")
    parser.add_argument("--to", help="where to write: a new folder, or for export a file")
    parser.add_argument("--model", default="wan_5b", help="the model to fill: a preset, or a config.json of an Experiment")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights (generator_ema) of a training checkpoint")
    parser.add_argument("--alpha", type=float, help="alpha of the LoRA; default: its rank")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="write the weights in this dtype; default: as they are")
    parser.add_argument("--part", choices=list(PARTS), help="which part to export")
    parser.add_argument("--shard-gb", type=float, default=10.0, help="largest shard of an exported folder, in GB (1e9 bytes)")
    return parser


def main(argv=None):
    args = options().parse_args(argv)
    command, *words = args.words
    if command == "inspect":
        require(len(words) == 1, "inspect takes one file or folder")
        inspect(words[0])
        return
    require(args.to, "say where to write: --to=...")
    if command == "export":
        require(len(words) == 1, "export takes one folder that convert.py wrote")
        print(f"{args.to}: {len(export(words[0], args.to, args.part, args.shard_gb))} tensors")
        return
    record = convert(args.words, args.to, model=args.model, ema=args.ema, alpha=args.alpha, dtype=args.dtype)
    for part, kept in record["parts"].items():
        print(f"{part}: {kept['family']}, {kept['layout']} names, {kept['parameters']:,} parameters, licence {kept['licence'] or 'not stated'}")
    print(f"{args.to} is ready: longlive_jax.load({args.to!r}), or experiments/stream.py --config.model={args.to}")


def run():
    try:
        main()
    except (ConfigError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)  # what was half written is gone


if __name__ == "__main__":
    run()
