"""Which checkpoint a file is: the part of the model that it holds, the layout of its names, what its container holds beside it, its family.

Layouts: ``original`` (Wan2.2, umT5 and LongLive's own names) and ``diffusers`` (diffusers, transformers, MG-LightVAE). Nothing here reads
values but ``SourceFile.arrays``, one at a time as they are asked for.
"""

import collections
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from longlive_jax.arrays import Unread
from longlive_jax.config import Experiment, from_config_dict, preset, replace, require
from longlive_jax.convert.packed import is_packed
from longlive_jax.convert.table import ConversionError, invert, plan, plan_export, read
from longlive_jax.convert.tensors import Renamed, open_tensors
from longlive_jax.convert.torchzip import named_tensors, read_torch
from longlive_jax.convert.wan import (
    TRANSFORMER_TABLE,
    TRANSFORMER_TABLE_DIFFUSERS,
    UMT5_IGNORED_DIFFUSERS,
    UMT5_TABLE,
    UMT5_TABLE_DIFFUSERS,
    strip_container,
    transformer_shapes,
)
from longlive_jax.convert.wan_vae import VAE_TABLE_DIFFUSERS, vae_table

TORCH = (".pt", ".pth", ".bin")
FLOATS = ("float32", "bfloat16", "float16")
MARKS = {  # a name that only this part in this layout has
    "head.head.weight": ("transformer", "original"),
    "proj_out.weight": ("transformer", "diffusers"),
    "decoder.conv1.weight": ("vae", "original"),
    "decoder.conv_in.weight": ("vae", "diffusers"),
    "token_embedding.weight": ("text", "original"),
    "shared.weight": ("text", "diffusers"),
}
FAMILIES = {  # width, layers, latent channels in
    (1536, 30, 16): "Wan2.1-T2V-1.3B",
    (1536, 30, 36): "Wan2.1-I2V-1.3B",
    (5120, 40, 16): "Wan2.2-T2V-A14B or Wan2.1-T2V-14B",
    (5120, 40, 36): "Wan2.2-I2V-A14B or Wan2.1-I2V-14B",
    (3072, 30, 48): "Wan2.2-TI2V-5B",
}
HEADS = r"dynamic_feature_projection_heads\..*"  # of MG-LightVAE's distillation


@dataclass(frozen=True)
class SourceFile:
    """A checkpoint, unread. ``tensors`` without what containers put around names; ``beside``: what else is in the file -> how many tensors."""

    path: pathlib.Path
    part: str  # transformer, vae, text or adapter
    layout: str
    container: str
    tensors: Mapping
    beside: Mapping

    @property
    def packed(self):
        return is_packed(self.tensors)

    @property
    def ignored(self):
        return UMT5_IGNORED_DIFFUSERS if (self.part, self.layout) == ("text", "diffusers") else ()

    @property
    def files(self):
        """Every file that holds a tensor of it, and the index that names them."""
        files = sorted({x.path for x in self.tensors.values()})
        return files + sorted({p for f in files for p in f.parent.glob("*.safetensors.index.json") if len(files) > 1})

    def dtypes(self):
        """Name of a dtype -> number of tensors."""
        return dict(collections.Counter(str(np.dtype(x.dtype)) for x in self.tensors.values()))

    def parameters(self):
        return sum(math.prod(x.shape) for x in self.tensors.values())

    def arrays(self, shapes, res_blocks=2, dtype=None):
        """Our path -> ``Unread`` for the parameters ``shapes``; ``dtype`` None keeps the file's. ``ConversionError`` lists all misfits.

        ``res_blocks``: of the VAE, as ``table_of`` says.
        """
        strange = {name: str(np.dtype(x.dtype)) for name, x in self.tensors.items() if str(np.dtype(x.dtype)) not in FLOATS}
        problems = {"wrong dtypes": [f"{name} is {dtype}; give {', '.join(FLOATS)}" for name, dtype in strange.items()]}
        try:
            jobs = plan(table_of(self.part, self.layout, res_blocks), self.tensors, shapes, self.ignored)
        except ConversionError as error:
            problems |= error.problems
        if any(problems.values()):
            raise ConversionError(problems)

        def unread(path, name, to):
            kept = np.dtype(dtype or self.tensors[name].dtype)
            return Unread(tuple(shapes[path].shape), kept, lambda: read(self.tensors, name, to, kept))

        return {path: unread(path, name, to) for path, (name, to) in jobs.items()}


def table_of(part, layout, res_blocks=2):
    """The rows of a part's names in a layout. ``res_blocks``: of the VAE, whose original names count its blocks."""
    if part == "vae":
        return vae_table(res_blocks) if layout == "original" else VAE_TABLE_DIFFUSERS
    tables = {"transformer": (TRANSFORMER_TABLE, TRANSFORMER_TABLE_DIFFUSERS), "text": (UMT5_TABLE, UMT5_TABLE_DIFFUSERS)}
    tables["adapter"] = tables["transformer"]
    return tables[part][layout == "diffusers"]


# ---- from a path to a source ---------------------------------------------------------------------------------------------------------------


def open_source(path, ema=False):
    """The ``SourceFile`` at ``path``: a safetensors file, its index, a folder of them, or a torch file. ``ema``: the averaged weights.

    Raises ``ValueError`` for a file of no known layout, and what the readers raise.
    """
    path = pathlib.Path(path)
    torch = path.is_file() and path.suffix in TORCH
    tensors = named_tensors(read_torch(path), path) if torch else open_tensors(path)
    inner, container, beside = unwrap(path, tensors, ema)
    if any(".lora_A." in name for name in inner):
        return SourceFile(path, "adapter", "original", container, inner, beside)
    found = [MARKS[name] for name in MARKS if name in inner]
    if len(found) != 1:
        some = ", ".join(list(inner)[:4])
        raise ValueError(f"{path} is of no known layout: none or several of {', '.join(MARKS)} among its {len(inner)} tensors ({some}, ...)")
    return SourceFile(path, *found[0], container, inner, beside)


def unwrap(path, tensors, ema=False):
    """``(tensors, container, beside)``: the one model in a container, its names without prefixes (spec/names.md §4.3, §5)."""
    container, beside = "", collections.Counter()

    def enter(prefix):
        nonlocal tensors, container
        inside = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
        beside.update(name.split(".")[0] for name in tensors if not name.startswith(prefix))
        tensors, container = Renamed(tensors, inside), container + prefix

    for prefix in ("state_dict.", "gen_model."):
        if any(name.startswith(prefix) for name in tensors):
            enter(prefix)
    tops = {name.split(".")[0] for name in tensors}
    if ema and "generator_ema" not in tops:
        raise ValueError(f"{path} holds no averaged weights (generator_ema) but {', '.join(sorted(tops)[:8])}; leave out --ema")
    choices = ("generator_ema",) if ema else ("generator", "generator_ema", "generator_lora")
    chosen = next((f"{top}." for top in choices if top in tops), None)
    if chosen is None and any(name.startswith("model.model.") for name in tensors):
        chosen = "model."
    if chosen is not None:
        enter(chosen)
    if any(".lora_A." not in name and ".lora_B." not in name for name in tensors):
        tensors = strip_container(tensors)
    beside.update(name.split(".")[0] for name in tensors if re.fullmatch(HEADS, name))
    kept = {name: name for name in tensors if not re.fullmatch(HEADS, name)}
    return Renamed(tensors, kept), container, dict(beside)


def sources_in(path):
    """Paths of the checkpoints at ``path``: itself, or those of a repository's folder in the original or the diffusers layout."""
    path = pathlib.Path(path)
    require(path.exists(), f"{path} does not exist; give a checkpoint file or the folder of its repository")
    if path.is_file():
        return [path]
    found = [path / name for name in ("transformer", "vae", "text_encoder") if (path / name).is_dir()]
    found += [path] if any(path.glob("*.safetensors*")) else []
    found += sorted(p for p in path.iterdir() if p.suffix in TORCH)
    require(found or tokenizer_in(path), f"{path} holds no safetensors and no torch files, nor folders transformer, vae and text_encoder")
    return found


def tokenizer_in(path):
    """The tokenizer's files beside or in ``path``, a folder; empty if there are none."""
    for folder in (path / "google" / "umt5-xxl", path / "tokenizer", path):
        files = [folder / name for name in ("tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json")]
        if files[0].is_file() or files[1].is_file():
            return [f for f in files if f.is_file()]
    return []


def experiment_of(name):
    """The ``Experiment`` to fill: a preset's, or that of a JSON file such as the ``config.json`` of a bundle."""
    if not name.endswith(".json"):
        return preset(name)
    path = pathlib.Path(name)
    require(path.is_file(), f"{name} does not exist; give a preset or the config.json of a bundle")
    return from_config_dict(Experiment, json.loads(path.read_text()))


# ---- is it ours ----------------------------------------------------------------------------------------------------------------------------


def family(source):
    """What the sizes of a transformer or VAE say it is: a published model's name, or its sizes."""
    if source.part == "transformer":
        width, channels = source.tensors["patch_embedding.weight"].shape[:2]
        layers = len({name.split(".")[1] for name in source.tensors if name.startswith("blocks.")})
        return FAMILIES.get((width, layers, channels), f"a transformer of width {width}, {layers} layers and {channels} latent channels")
    names = {"vae": "conv2.weight" if source.layout == "original" else "post_quant_conv.weight"}
    if source.part == "vae":
        channels = source.tensors[names["vae"]].shape[0] if names["vae"] in source.tensors else 0
        width = source.tensors[f"decoder.{'conv1' if source.layout == 'original' else 'conv_in'}.weight"].shape[0]
        known = {(48, 1024): "Wan2.2 VAE", (48, 512): "MG-LightVAE", (48, 256): "MG-LightVAE v2"}
        if channels == 16:
            return "the VAE of Wan2.1 and A14B (16 latent channels)"
        name = known.get((channels, width), f"a VAE of {channels} latent channels and decoder width {width}")
        return name if encodes(source) else f"{name}, decoder only"
    return {"text": "umT5 encoder", "adapter": "LoRA"}[source.part]


def encodes(source):
    """Whether a VAE has an encoder."""
    return any(name.startswith("encoder.") for name in source.tensors)


def check_family(source, experiment):
    """Refuse a published model other than the experiment's, by name, in place of a list of all its tensors."""
    t = experiment.transformer
    wanted = FAMILIES.get((t.dim, t.layers, t.channels))
    found = family(source)
    if source.part == "transformer" and found in FAMILIES.values() and found != wanted:
        needed = wanted or f"width {t.dim}, {t.layers} layers and {t.channels} latent channels"
        raise ConversionError({"another model": [f"{source.path} is {found}, and the model to fill is {needed}; give that one's files"]})
    if source.part == "vae" and found.startswith("the VAE of Wan2.1") and experiment.vae.channels != 16:
        raise ConversionError({"another model": [f"{source.path} is {found}, and the model to fill has {experiment.vae.channels}"]})


def fit_vae(experiment, source):
    """The experiment with the widths of a pruned VAE (MG-LightVAE), read off its first convolutions; encoder width 0 if it only decodes."""
    stem = "conv1" if source.layout == "original" else "conv_in"
    names = [f"{side}.{stem}.weight" for side in ("encoder", "decoder")]
    v = experiment.vae
    if not encodes(source):
        width = source.tensors[names[1]].shape[0]
        narrower = width % v.multipliers[-1] == 0 and width <= v.decoder_dim * v.multipliers[-1]
        return replace(experiment, vae=replace(v, dim=0, decoder_dim=width // v.multipliers[-1])) if narrower else experiment
    if not all(name in source.tensors for name in names):
        return experiment  # reported with everything else that is missing
    encoder, decoder = (source.tensors[name].shape[0] for name in names)
    same = encoder * v.decoder_dim * v.multipliers[-1] == decoder * v.dim * v.multipliers[0]  # both sides are pruned by one factor
    pruned = encoder % v.multipliers[0] == 0 and decoder % v.multipliers[-1] == 0 and encoder < v.dim * v.multipliers[0]
    if not (same and pruned):
        return experiment
    return replace(experiment, vae=replace(v, dim=encoder // v.multipliers[0], decoder_dim=decoder // v.multipliers[-1]))


# ---- the way back --------------------------------------------------------------------------------------------------------------------------


def foreign(part, layout, params, experiment):
    """``params`` (our path -> array, ``Unread`` or shape) under the names and shapes of a layout: name -> ``Unread``, bit for bit."""
    shapes = transformer_shapes(experiment.transformer) if part == "transformer" else {}
    jobs = plan_export(table_of(part, layout, experiment.vae.res_blocks), params, shapes)
    unread = lambda path, to, shape: Unread(shape, params[path].dtype, lambda: invert(to, np.asarray(params[path]), shape))
    return {name: unread(*job) for name, job in jobs.items()}


# ---- where it comes from -------------------------------------------------------------------------------------------------------------------


def fingerprint(path):
    """Name, bytes and SHA-256 of a file."""
    path = pathlib.Path(path)
    with path.open("rb") as file:
        return {"name": path.name, "bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def licence_of(path):
    """What a repository says of its licence: ``license:`` in the head of its README, and the first line of a LICENSE file; None if nothing."""
    folder = pathlib.Path(path) if pathlib.Path(path).is_dir() else pathlib.Path(path).parent
    said = {}
    for where in (folder, folder.parent):
        card = where / "README.md"
        head = re.match(r"---\n(.*?)\n---", card.read_text(errors="replace"), re.DOTALL) if card.is_file() else None
        named = re.search(r"^license(?:_name)?:\s*(\S.*)$", head[1], re.MULTILINE) if head else None
        texts = sorted(p for p in where.glob("LICENSE*") if p.is_file())
        if named:
            said["README.md"] = named[1].strip()
        if texts:
            lines = texts[0].read_text(errors="replace").split("\n")
            said[texts[0].name] = next((line.strip() for line in lines if line.strip()), "")
        if said:
            return said
    return None
