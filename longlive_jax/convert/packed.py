"""The public source's packed NVFP4 linear layers, four tensors in place of a weight: read into ``NVFP4`` leaves, and written.

Rows are padded to 128 and columns to 64 with zeros; block scales are in the blocked order of the hardware (spec/inference.md §4.6-4.7).

==============================  ========  ========================================  ==============================
``<linear>.quantized_weight_``  dtype     shape                                     holds
==============================  ========  ========================================  ==============================
``values``                      uint8     [padded out, padded in / 2]               codes, the even one in the low nibble
``scale_factors``               e4m3      [padded out * padded in / 16]             block scales (uint8: their bits)
``amax``                        float32   [1], or []                                the largest magnitude of the weight
``metadata``                    int32     [4]                                       out, in, padded out, padded in
==============================  ========  ========================================  ==============================

The tensor scale is amax over a constant of the rule, so a file that is decoded by another rule is wrong by 1.5 to 1.75 everywhere. The public
loader takes the rule from its configuration. Here the codes are asked: ``rules_of`` says which rules can have made them.
"""

import contextlib
import json
import logging
import pathlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from longlive_jax.config import require
from longlive_jax.convert.table import ConversionError, convert, export
from longlive_jax.convert.tensors import Renamed
from longlive_jax.convert.wan import strip_container
from longlive_jax.quant.formats import (
    BLOCK,
    CHOOSING,
    E2M1,
    E4M3_MAX,
    ROW_TILE,
    RULES,
    STATIC,
    require_rule,
    swizzle,
    tensor_amax,
    tensor_scale,
    unswizzle,
)
from longlive_jax.quant.leaves import NONE, NVFP4
from longlive_jax.tree import Leaf

log = logging.getLogger("longlive_jax")

FORMAT, VERSION = "longlive_generator_nvfp4", 1
PREFIX = "quantized_weight_"
FIELDS = ("values", "scale_factors", "amax", "metadata")
COLUMN_PAD = 64
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
NORMAL = 2.0**-6  # below it E4M3 scales are so coarse that the largest code of a block may be any
LARGEST = np.array([max(E2M1[byte & 7], E2M1[byte >> 4 & 7]) for byte in range(256)], np.float32)  # magnitude of the two codes of a byte


def is_packed(names):
    """Whether tensors of these names hold packed layers."""
    return any(name.endswith(f"{PREFIX}values") for name in names)


# ---- the rule ------------------------------------------------------------------------------------------------------------------------------


def rules_of(values, scales):
    """The rules of ``quant.formats.RULES`` that can have made codes ``[R,K/2]`` and scales ``[R,K/16]``, on the host.

    A rule leaves two traces: the scale of the block with the largest value (448; where a rule chooses, 256 with a code 6 or 384 with a 4), and
    the largest code of every block: 6, 4, or either. The three rules that choose leave the same traces, and decode alike.
    """
    scales = np.asarray(scales).astype(np.float32)
    largest = LARGEST[np.asarray(values)].reshape(*scales.shape, -1).max(-1)
    if len(scales) % BLOCK == 0:
        groups = scales.reshape(-1, BLOCK, scales.shape[-1])
        if (groups == groups[:, :1]).all():  # 16 x 16 blocks: one scale for 16 rows
            scales, largest = groups[:, 0], largest.reshape(groups.shape).max(1)
    top = scales.max(initial=0.0)
    if top == 0:
        return RULES
    six, four = (set(largest[scales >= NORMAL].tolist()) == {peak} for peak in (6.0, 4.0))
    if top == E4M3_MAX:
        return tuple(rule for rule, peak in STATIC.items() if {6.0: six, 4.0: four}[peak])
    sixes, fours = largest == 6, largest == 4
    fits = (sixes & (scales <= 256)) | (fours & (scales <= 384)) | (scales < NORMAL)
    return CHOOSING if fits.all() and ((sixes & (scales == 256)) | (fours & (scales == 384))).any() else ()


def header_of(rule, activations=None):
    """What a container of packed tensors says about them; ``activations``: their rule, by default the same. It has no word for W4A16."""
    require_rule(rule)
    activations = rule if activations in (None, NONE) else activations
    quantization = {"format": "nvfp4", "backend": "fouroversix", "materialized": True, "dtype": "bfloat16"}
    quantization |= {"scale_rule": rule, "weight_scale_rule": rule, "activation_scale_rule": activations}
    return {"checkpoint_format": FORMAT, "checkpoint_version": VERSION, "quantization": quantization}


def rules_named(header):
    """``(weight rule, activation rule)`` that a container names, None where it names none. Raises ``ConfigError`` for another kind of file."""
    kind, version = header.get("checkpoint_format"), header.get("checkpoint_version")
    require(kind == FORMAT, f"checkpoint_format is {kind!r} where packed layers have {FORMAT!r}; give the packed file of the public source")
    require(str(version) == str(VERSION), f"checkpoint_version is {version!r}, and this package reads {VERSION}; update the package")
    quantization = header.get("quantization") or {}
    with contextlib.suppress(ValueError):
        quantization = json.loads(quantization) if isinstance(quantization, str) else quantization
    require(isinstance(quantization, dict), f"the file's quantization is {quantization!r}, and not names and rules; copy the file again")
    names = [quantization.get(f"{side}_scale_rule") or quantization.get("scale_rule") for side in ("weight", "activation")]
    for name in names:
        require(name is None or name in RULES, f"the file names the rule {name!r}; known are {', '.join(RULES)}: update the package")
    return tuple(names)


def read_header(path):
    """The header that ``write_packed`` put into a safetensors file, as strings; empty where there is none."""
    with pathlib.Path(path).open("rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__", {})


# ---- one layer -----------------------------------------------------------------------------------------------------------------------------


def write_linear(leaf):
    """The four arrays of an ``NVFP4`` weight ``[out, in]``: field of ``FIELDS`` -> numpy array."""
    rows, columns = leaf.shape
    padded_rows, padded_columns = -(-rows // ROW_TILE) * ROW_TILE, -(-columns // COLUMN_PAD) * COLUMN_PAD
    values = np.pad(np.asarray(leaf.codes), ((0, padded_rows - rows), (0, (padded_columns - columns) // 2)))
    return {
        "values": values,
        "scale_factors": np.asarray(swizzle(leaf.scales)),
        "amax": tensor_amax(leaf.scale, leaf.rule).reshape(1),
        "metadata": np.array([rows, columns, padded_rows, padded_columns], np.int32),
    }


def layout_problem(buffers):
    """What is wrong with dtypes and sizes of the four arrays of a layer, by field; None if nothing is."""
    missing = [field for field in FIELDS if field not in buffers]
    if missing:
        return f"lacks {', '.join(PREFIX + field for field in missing)}"
    allowed = {"values": (np.uint8,), "scale_factors": (E4M3, np.uint8), "amax": (np.float32,), "metadata": (np.int32,)}
    for field, dtypes in allowed.items():
        if np.dtype(buffers[field].dtype) not in map(np.dtype, dtypes):
            return f"{field} is {buffers[field].dtype}, not {np.dtype(dtypes[0])}; values that were cast are lost: make the file again"
    sizes = np.asarray(buffers["metadata"]).tolist()
    if np.shape(sizes) != (4,) or min(sizes) < 1 or sizes[2:] != [-(-n // pad) * pad for n, pad in zip(sizes, (ROW_TILE, COLUMN_PAD))]:
        return f"metadata {sizes} is not [out, in, out padded to {ROW_TILE}, in padded to {COLUMN_PAD}]"
    wanted = {"values": (sizes[2], sizes[3] // 2), "scale_factors": (sizes[2] * sizes[3] // BLOCK,)}
    for field, shape in wanted.items():
        if tuple(buffers[field].shape) != shape:
            return f"{field} is {tuple(buffers[field].shape)}, and metadata {sizes} needs {shape}"
    amax = np.asarray(buffers["amax"])
    return None if amax.size == 1 and np.isfinite(amax).all() and amax >= 0 else f"amax {amax.tolist()} is not one finite magnitude"


def read_linear(buffers, rule=None, activations=None):
    """The ``NVFP4`` weight ``[out, in]`` of the four arrays (``FIELDS`` -> array) of a layer; ``rule`` None: what its codes say.

    Where 16 does not divide ``in``, padding cannot be taken off the codes: the decoded float32 array ``[out, in]`` in place of a leaf.
    ``activations``: their rule, or ``"none"``; None: that of the weight. Raises ``ConfigError`` for codes of another rule and arrays that do
    not belong together.
    """
    problem = layout_problem(buffers)
    require(problem is None, f"packed layer: {problem}")
    rows, columns, padded_rows, padded_columns = np.asarray(buffers["metadata"]).tolist()
    values = np.asarray(buffers["values"])
    blocked = np.asarray(buffers["scale_factors"]).view(E4M3)
    numbers = blocked.astype(np.float32)
    require(np.isfinite(numbers).all() and (numbers >= 0).all(), "packed layer: block scales hold NaN or negative numbers; copy the file again")
    scales = unswizzle(blocked, padded_rows, padded_columns // BLOCK)
    found = rules_of(values, scales)
    rule = rule or (found[0] if found else None)
    fits = "those of " + " or ".join(found) if found else "those of no rule that is known"
    require(rule in found, f"packed layer: the rule is said to be {rule}, but codes and scales are {fits}; name the rule it was made with")
    whole = -(-columns // BLOCK) * BLOCK
    leaf = NVFP4(
        codes=jnp.asarray(values[:rows, : whole // 2]),
        scales=jnp.asarray(scales[:rows, : whole // BLOCK]),
        scale=tensor_scale(np.asarray(buffers["amax"]).reshape(()), rule),
        rule=rule,
        activations=activations or rule,
    )
    return leaf if whole == columns else leaf.dense()[:, :columns]


# ---- whole checkpoints ---------------------------------------------------------------------------------------------------------------------


def convert_packed(table, tensors, shapes, *, header=None, rule=None, activations=None, ignored=(), dtype=None):
    """``table.convert`` for a checkpoint with packed layers: our path -> array, or ``NVFP4`` leaf.

    ``header``: what the container says beside the tensors (None: nothing). ``rule``, ``activations``: expected rules; None: those that the
    header names, else those of the codes. Raises ``ConfigError`` for another format or version, ``ConversionError`` that lists every layer
    whose codes are of another rule, and all that has no place.
    """
    named = (None, None) if header is None else rules_named(header)
    rule, activations = rule or named[0], activations or named[1]
    require(named[0] in (None, rule), f"the file names the rule {named[0]!r} and rule={rule!r} was asked for; leave it out to take the file's")
    tensors = strip_container(tensors)
    layers, paths, problems = layers_of(tensors), {}, {"packed layers that have no place": [], "packed layers that do not fit": []}
    for linear, buffers in layers.items():
        path = next((p for row in table if (p := row.path(f"{linear}.weight")) is not None), None)
        wrong = layout_problem(buffers)
        if path not in shapes:
            problems["packed layers that have no place"].append(f"{linear}" + (f" -> {path}" if path else ""))
        elif wrong:
            problems["packed layers that do not fit"].append(f"{linear}: {wrong}")
        elif tuple(np.asarray(buffers["metadata"])[:2].tolist()) != tuple(shapes[path].shape):
            sizes = np.asarray(buffers["metadata"])[:2].tolist()
            problems["packed layers that do not fit"].append(f"{linear} is {sizes}; {path} is {list(shapes[path].shape)}")
        else:
            paths[linear] = path
    if any(problems.values()):
        raise ConversionError(problems)
    plain = Renamed(tensors, {name: name for name in tensors if f".{PREFIX}" not in name})
    out = convert(table, plain, {p: x for p, x in shapes.items() if p not in paths.values()}, ignored, dtype)
    out |= read_layers(layers, paths, rule, activations)
    return {path: out[path] for path in shapes}


def layers_of(tensors):
    """Name of a linear layer -> field -> its tensor, for the packed layers of ``tensors``."""
    layers = {}
    for name in tensors:
        linear, found, field = name.rpartition(f".{PREFIX}")
        if found:
            layers.setdefault(linear, {})[field] = tensors[name]
    return layers


def read_layers(layers, paths, rule, activations):
    """``read_linear`` of all layers, as path -> weight; one error for all that are refused."""
    out, refused = {}, []
    for linear, path in paths.items():
        try:
            out[path] = read_linear(layers[linear], rule, activations)
        except ValueError as error:
            refused.append(f"{linear}: {error}".replace("packed layer: ", ""))
    if refused:
        raise ConversionError({"packed layers that are refused": refused})
    whole = [path for path, x in out.items() if not isinstance(x, NVFP4)]
    if whole:
        log.warning("%d packed layers have a width that 16 does not divide and were decoded: %s", len(whole), ", ".join(whole[:8]))
    return out


def export_packed(table, params, shapes=None):
    """``(tensors, header)`` in the public layout: ``NVFP4`` leaves as packed layers, arrays as ``table.export`` writes them.

    Raises ``ConversionError`` for a leaf of another kind or a stack of layers, ``ConfigError`` where leaves are of several rules.
    """
    leaves = {path: x for path, x in params.items() if isinstance(x, NVFP4)}
    misfits = {path: x for path, x in params.items() if isinstance(x, Leaf) and (path not in leaves or x.ndim != 2)}
    others = [f"{path} is {type(x).__name__} {tuple(x.shape)}" for path, x in misfits.items()]
    if others:
        raise ConversionError({"weights that the packed layout does not hold": others})
    require(leaves, "no weight is NVFP4; quantise by a w4a4 or w4a16 rule first")
    rules = sorted({(x.rule, x.activations) for x in leaves.values()})
    require(len(rules) == 1, f"weights are of several rules {rules}; the packed layout names one")
    tensors = export(table, {p: x for p, x in params.items() if p not in leaves}, shapes or {})
    for path, leaf in leaves.items():
        linear = next(name for row in table if (name := row.name(path)) is not None).removesuffix(".weight")
        tensors |= {f"{linear}.{PREFIX}{field}": x for field, x in write_linear(leaf).items()}
    return tensors, header_of(*rules[0])
