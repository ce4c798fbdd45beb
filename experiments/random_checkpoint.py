"""Random checkpoints in the layouts that are published: true names, shapes, dtypes, containers and shards, values drawn at random.

    experiments/random_checkpoint.py LAYOUT --to=FOLDER [--model=wan_5b] [--part=transformer]

Layouts: wan (Wan2.2-TI2V-5B, original names), diffusers (the same for diffusers), longlive (model_bf16.pt), training (model.pt with
generator and generator_ema), lora (generator_lora), lightvae and lightvae_v2 (MG-LightVAE). For trials of the converter where the real files
are not at hand. At full size wan takes 34 GB of disk, diffusers as much, training 40 GB, longlive 10 GB; memory holds one tensor at a time.
"""

import argparse
import hashlib
import pathlib
import shutil
import sys

import ml_dtypes
import numpy as np

from longlive_jax.arrays import Unread
from longlive_jax.checkpoint import abstract_part
from longlive_jax.config import ConfigError, replace, require
from longlive_jax.convert.layouts import experiment_of, foreign
from longlive_jax.convert.writers import nbytes, write_sharded, write_torch
from longlive_jax.tree import flat_params

BF16 = np.dtype(ml_dtypes.bfloat16)
PRUNED = {"lightvae": 0.5, "lightvae_v2": 0.75}


def drawn(name, shape, dtype):
    """A random tensor of the scale that a layer of its width has; the same for the same name."""

    def read():
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
        scale = np.float32(max(1, shape[-1] if len(shape) == 2 else np.prod(shape[1:])) ** -0.5 if len(shape) > 1 else 0.1)
        out = np.empty(int(np.prod(shape)), dtype)
        for at in range(0, out.size, 1 << 24):
            part = out[at : at + (1 << 24)]
            part[:] = rng.standard_normal(part.size, np.float32) * scale
        return out.reshape(shape)

    return Unread(tuple(shape), np.dtype(dtype), read)


def part_of(experiment, part, layout, dtype, prefix=""):
    """Foreign name -> random tensor of one part in a layout."""
    config = {"transformer": experiment.transformer, "vae": experiment.vae, "text": experiment.text}[part]
    shapes = flat_params(abstract_part(part, config))
    return {f"{prefix}{name}": drawn(prefix + name, x.shape, dtype) for name, x in foreign(part, layout, shapes, experiment).items()}


def adapters(experiment, rank):
    """The LoRA of every linear layer of every block, under peft's names."""
    linears = {
        n: x for n, x in part_of(experiment, "transformer", "original", np.float32).items() if n.startswith("blocks.") and len(x.shape) == 2
    }
    out = {}
    for name, x in linears.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        for side, shape in (("A", (rank, x.shape[1])), ("B", (x.shape[0], rank))):
            out[f"{stem}.lora_{side}.weight"] = drawn(f"{stem}.{side}", shape, np.float32)
    return out


def pruned(experiment, p):
    v = experiment.vae
    return replace(experiment, vae=replace(v, dim=round(v.dim * (1 - p)), decoder_dim=round(v.decoder_dim * (1 - p))))


REPOSITORIES = {  # layout -> part -> file, or folder/stem of shards, its dtype, GB of a shard
    "wan": {
        "transformer": ("diffusion_pytorch_model", np.float32, 10),
        "vae": ("Wan2.2_VAE.pth", np.float32, 0),
        "text": ("models_t5_umt5-xxl-enc-bf16.pth", BF16, 0),
    },
    "diffusers": {
        "transformer": ("transformer/diffusion_pytorch_model", np.float32, 5),
        "vae": ("vae/diffusion_pytorch_model", np.float32, 10),
        "text": ("text_encoder/model", BF16, 5),
    },
}


def plan(layout, experiment, rank=128, part=None):
    """[(file or folder, tree of tensors, GB of a shard)] of a layout; a folder is sharded safetensors called ``folder/stem``.

    ``part``: of a repository, that part alone.
    """
    e, wide = experiment, np.dtype(np.float32)
    require(part is None or part in REPOSITORIES.get(layout, {}), f"--part={part}: {layout} is one file; wan and diffusers have parts")
    if layout in REPOSITORIES:
        names = "original" if layout == "wan" else "diffusers"
        chosen = {p: file for p, file in REPOSITORIES[layout].items() if part in (None, p)}
        return [(name, part_of(e, p, names, dtype), limit) for p, (name, dtype, limit) in chosen.items()]
    if layout == "longlive":
        return [("model_bf16.pt", {"generator": part_of(e, "transformer", "original", BF16, "model."), "dtype": "bfloat16"}, 0)]
    if layout == "training":
        average = part_of(e, "transformer", "original", wide, "model._fsdp_wrapped_module.")
        tree = {"generator": part_of(e, "transformer", "original", wide, "model."), "generator_ema": average, "step": 3000}
        return [("model.pt", tree, 0)]
    if layout == "lora":
        return [("lora.pt", {"generator_lora": adapters(e, rank), "step": 1000}, 0)]
    require(layout in PRUNED, f"unknown layout {layout!r}; known: wan, diffusers, longlive, training, lora, {', '.join(PRUNED)}")
    name = {"lightvae": "MG-LightVAE.pth", "lightvae_v2": "MG-LightVAE_v2.pth"}[layout]
    heads = {f"dynamic_feature_projection_heads.{i}.weight": drawn(f"head{i}", (8, 8), wide) for i in range(2)}
    return [(name, {"gen_model": part_of(pruned(e, PRUNED[layout]), "vae", "diffusers", wide) | heads, "epoch": 1}, 0)]


def total(tree):
    return sum(total(x) if isinstance(x, dict) else nbytes(x) if isinstance(x, Unread) else 0 for x in tree.values())


def write(layout, to, experiment, rank=128, shard_gb=None, part=None):
    """The files of ``layout`` in the folder ``to``; returns the bytes of their tensors."""
    to, files = pathlib.Path(to), plan(layout, experiment, rank, part)
    size = sum(total(tree) for _, tree, _ in files)
    free = shutil.disk_usage(next(p for p in (to.absolute(), *to.absolute().parents) if p.exists())).free
    require(size < 0.98 * free, f"{layout} needs {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free at {to}")
    to.mkdir(parents=True, exist_ok=True)
    for name, tree, limit in files:
        if limit:
            write_sharded(to / pathlib.Path(name).parent, pathlib.Path(name).name, tree, int((shard_gb or limit) * 1e9))
        else:
            write_torch(to / name, tree)
    return size


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layout", help="wan, diffusers, longlive, training, lora, lightvae or lightvae_v2")
    parser.add_argument("--to", required=True, help="the folder to write into")
    parser.add_argument("--model", default="wan_5b", help="sizes: a preset, or a config.json of an Experiment")
    parser.add_argument("--shard-gb", type=float, help="largest shard, in GB; default: as published")
    parser.add_argument("--rank", type=int, default=128, help="rank of the LoRA")
    parser.add_argument("--part", choices=list(REPOSITORIES["wan"]), help="one part of wan or diffusers alone")
    args = parser.parse_args(argv)
    size = write(args.layout, args.to, experiment_of(args.model), args.rank, args.shard_gb, args.part)
    print(f"{args.to}: {args.layout}, {size / 1e9:.2f} GB of random tensors")


def run():
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()
