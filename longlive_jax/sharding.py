"""Where arrays live: the mesh, one table of logical names, and the two ways to use it.

``constrain`` pins an activation outside attention; ``local`` runs a body on local shapes (attention), where ``frames_to_heads`` and
``heads_to_frames`` are the only two places that talk to other devices. Weights follow ordered path rules under a policy.
Without a mesh everything runs as on a 1 x 1 mesh.
"""

import math
import re

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.config import ConfigError

DATA, SEQ = "data", "seq"

# logical name -> mesh axis. ``frames`` and ``heads`` share an axis: attention moves from one to the other by all-to-all. ``height``: the VAE's.
AXES = {"batch": DATA, "frames": SEQ, "heads": SEQ, "height": SEQ}

# Weights: ordered (regex over the dotted path, logical names of the axes). First match wins.
TRANSFORMER_RULES = (
    (r".*\.norm(_q|_k|3)\.(weight|bias)", ("width",)),
    (r"(.*\.)?modulation", (None, "width")),
    (r".*\.weight", ("rows", None)),
    (r".*\.bias", ("rows",)),
)
REPLICATED_RULES = ((r".*", ()),)  # text encoder and VAE

# Policies: logical weight name -> mesh axes.
REPLICATE = {}
SHARD = {"rows": (DATA, SEQ), "width": (DATA, SEQ)}


def make_mesh(data=1, seq=1, devices=None):
    """A ``(data, seq)`` mesh over the first ``data * seq`` devices."""
    devices = jax.devices() if devices is None else devices
    need = data * seq
    if len(devices) < need:
        raise ConfigError(
            f"mesh data={data} x seq={seq} needs {need} devices and {len(devices)} are there; lower mesh.data or mesh.seq, "
            "or on the CPU set XLA_FLAGS=--xla_force_host_platform_device_count"
        )
    return jax.sharding.Mesh(np.asarray(devices[:need]).reshape(data, seq), (DATA, SEQ), axis_types=(AxisType.Auto,) * 2)


def axis_size(name):
    """Devices along the mesh axis of a logical name, 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(AXES.get(name, name), 1)


def spec(*names):
    """The ``PartitionSpec`` of an activation from logical names (None: not sharded)."""
    return P(*(AXES[n] if n is not None else None for n in names))


def constrain(x, *names):
    """Pin ``x`` to the layout ``names``; nothing without a mesh of several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*names))


def local(body, inputs, outputs):
    """``body`` on the local shard of every argument.

    ``inputs``: one tuple of logical names per argument (an argument may be a pytree whose leaves share them); ``outputs``: the same for the
    result. Every input is marked as varying over the whole mesh first: a library kernel would otherwise silently drop the all-reduce of the
    gradient of a replicated input.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return body
    specs = tuple(spec(*names) for names in inputs)

    def vary(x, s):
        missing = tuple(a for a in mesh.axis_names if a not in s)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    def wrapped(*args):
        args = [jax.tree.map(lambda x, s=s: vary(x, s), arg) for arg, s in zip(args, specs, strict=True)]
        return body(*args)

    out = jax.tree.map(
        lambda names: spec(*names),
        outputs,
        is_leaf=lambda n: isinstance(n, tuple) and all(isinstance(v, str | None) for v in n),
    )
    return jax.shard_map(wrapped, in_specs=specs, out_specs=out)


def vary_like(x, like):
    """What a kernel made in ``local``, marked as varying over the axes that ``like`` varies over; ``x`` itself outside of it."""
    axes = tuple(jax.typeof(like).manual_axis_type.varying)
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def frames_to_heads(x, frames, heads):
    """Inside ``local``: gather the axis ``frames``, scatter the axis ``heads`` (DeepSpeed-Ulysses, one all-to-all)."""
    return x if axis_size("frames") == 1 else jax.lax.all_to_all(x, SEQ, split_axis=heads, concat_axis=frames, tiled=True)


def heads_to_frames(x, frames, heads):
    """The inverse of ``frames_to_heads``."""
    return x if axis_size("frames") == 1 else jax.lax.all_to_all(x, SEQ, split_axis=frames, concat_axis=heads, tiled=True)


def weight_specs(shapes, rules, policy):
    """``PartitionSpec`` per weight. ``shapes``: dotted path -> shape.

    Raises ``ConfigError`` for a weight without a rule and for a rule without a weight.
    """
    out, used = {}, set()
    for path, shape in shapes.items():
        rule = next((r for r in rules if re.fullmatch(r[0], path)), None)
        if rule is None:
            raise ConfigError(f"no sharding rule matches weight {path!r} of shape {tuple(shape)}; add one to the rules in sharding.py")
        used.add(rule[0])
        out[path] = P(*(policy.get(name) for name in rule[1])) if policy else P()
    unused = [r[0] for r in rules if r[0] not in used]
    if unused:
        raise ConfigError(f"sharding rules that match no weight: {unused}; remove them or mend the pattern")
    return out


def check_divides(shapes, specs, mesh_shape):
    """Refuse a weight axis that its mesh axes do not divide, naming all of them at once."""
    bad = []
    for path, s in specs.items():
        for size, axes in zip(shapes[path], s, strict=False):
            axes = (axes,) if isinstance(axes, str) else axes or ()
            parts = math.prod(mesh_shape[a] for a in axes)
            if size % parts:
                bad.append(f"{path}: axis of {size} over {parts} devices")
    if bad:
        raise ConfigError("weights do not divide over the mesh: " + "; ".join(bad) + "; use fewer devices or the REPLICATE policy")


def weight_shardings(shapes, rules, policy, mesh):
    """``NamedSharding`` per weight on ``mesh``, checked to divide."""
    specs = weight_specs(shapes, rules, policy)
    check_divides(shapes, specs, mesh.shape)
    return {path: NamedSharding(mesh, s) for path, s in specs.items()}
