"""LoRA files in the public source's peft layout (spec/names.md §4.3).

Names are ``base_model.model.<linear>.lora_{A,B}.weight``, A ``[rank,in]`` and B ``[out,rank]``. ``alpha`` is not
in the tensors but in the training's configuration: it is an argument.
"""

import re

import jax.numpy as jnp
import numpy as np

from longlive_jax.config import require
from longlive_jax.convert.table import ConversionError
from longlive_jax.convert.wan import TRANSFORMER_TABLE, strip_container
from longlive_jax.quant.formats import check_finite
from longlive_jax.quant.leaves import LoRA

NAME = re.compile(r"(?:base_model\.model\.)?(?:model\.)?(.+)\.lora_([AB])(?:\.\w+)?\.weight")
SIDES = {"A": "a", "B": "b"}


def read_peft(tensors, params, *, alpha=None, table=TRANSFORMER_TABLE, dtype=jnp.float32):
    """``params`` (dotted path -> weight) with the adapters of ``tensors`` (foreign name -> array) over their weights.

    ``alpha``: None takes the rank, as the published training has it. The weights may be of any kind, but not adapted.
    Raises ``ConversionError`` that lists rank, names and sizes of all that does not fit this base.
    """
    out = dict(params)
    for path, pair in adapter_pairs(tensors, params, table).items():
        require(not isinstance(params[path], LoRA), f"{path} has an adapter already; merge it first")
        a, b = (np.asarray(tensors[pair[side]]) for side in "AB")
        floats = all(jnp.issubdtype(x.dtype, jnp.floating) for x in (a, b))
        require(floats, f"{pair['A']} is {a.dtype}, its lora_B {b.dtype}; give an adapter of floating-point numbers")
        check_finite(pair["A"], a), check_finite(pair["B"], b)
        scaling = 1.0 if alpha is None else alpha / len(a)
        out[path] = LoRA(base=params[path], a=jnp.asarray(a, dtype), b=jnp.asarray(b, dtype), scaling=scaling)
    return out


def adapter_pairs(tensors, params, table=TRANSFORMER_TABLE):
    """Path -> side ("A", "B") -> name in ``tensors``, checked against the shapes of ``params``; reads no values. Errors as ``read_peft``."""
    problems = {kind: [] for kind in ("names that are no adapter's", "weights that this base lacks", "half adapters", "sizes of another base")}
    pairs = pairs_of(tensors, params, table, problems)
    for path, pair in pairs.items():
        if len(pair) < 2:
            problems["half adapters"].append(f"{path} has lora_{next(iter(pair))} alone")
            continue
        a, b = (tuple(tensors[pair[side]].shape) for side in "AB")
        if len(a) != 2 or (*b[:1], *a[1:]) != tuple(params[path].shape) or b[1:] != a[:1]:
            found = f"{pair['A']} is of rank {next(iter(a), 'none')}: A {a}, B {b}"
            problems["sizes of another base"].append(f"{path} is {list(params[path].shape)}; {found}")
    if any(problems.values()):
        raise ConversionError(problems)
    require(pairs, "the file holds no lora_A and lora_B tensors; give an adapter file")
    return pairs


def pairs_of(tensors, params, table, problems):
    """Our path -> side ("A", "B") -> name in ``tensors``; what has no place goes into ``problems``."""
    tensors, pairs = strip_container(tensors), {}
    for name, old in tensors.names.items():
        found = NAME.fullmatch(name)
        if found is None:
            problems["names that are no adapter's"].append(old)
            continue
        path = next((p for row in table if (p := row.path(f"{found[1]}.weight")) is not None), None)
        if path not in params:
            problems["weights that this base lacks"].append(f"{old} {tuple(tensors[name].shape)}" + (f" -> {path}" if path else ""))
        else:
            pairs.setdefault(path, {})[found[2]] = old
    return pairs


def write_peft(params, *, table=TRANSFORMER_TABLE):
    """The adapters of ``params`` under the public source's names: foreign name -> array. The scaling is not in it."""
    out = {}
    for path, leaf in params.items():
        if isinstance(leaf, LoRA):
            linear = next(name for row in table if (name := row.name(path)) is not None).removesuffix(".weight")
            out |= {f"base_model.model.{linear}.lora_{side}.weight": np.asarray(vars(leaf)[field]) for side, field in SIDES.items()}
    require(out, "no weight has an adapter; use add_lora first")
    return out
