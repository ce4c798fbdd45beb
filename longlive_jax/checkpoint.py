"""Checkpoints of a run (orbax, written behind the training) and bundles: finished weights in a folder of small files.

A checkpoint is a state (any pytree of arrays) and a JSON record. The folder of a step appears under its name only when it is complete, so a run
that is killed at any time, also while it writes, goes on from the last complete one.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import signal
import time

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError
from safetensors.flax import save_file

from longlive_jax.config import ConfigError, Experiment, from_config_dict
from longlive_jax.model.text import TextEncoder
from longlive_jax.model.transformer import VideoTransformer
from longlive_jax.model.vae import VAE
from longlive_jax.quant.leaves import abstract_leaf, flatten, leaf_specs, unflatten
from longlive_jax.sharding import REPLICATE, REPLICATED_RULES, TRANSFORMER_RULES, weight_shardings
from longlive_jax.tensorfile import read_file
from longlive_jax.tree import abstract, cast, flat_params, with_params


class CheckpointError(ConfigError):
    """A checkpoint or bundle is missing, damaged or does not fit; the message lists everything at once."""


# ---- trees that should be equal ------------------------------------------------------------------------------------------------------------


def flat_tree(tree):
    """Slash-joined path -> leaf."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def check_equal(expected, found, where, remedy):
    """Raise ``CheckpointError`` listing every name that is missing, not known or of another shape. Both: name -> array-like."""
    lines = [f"missing {name} {tuple(x.shape)}" for name, x in expected.items() if name not in found]
    lines += [f"not known {name} {tuple(x.shape)}" for name, x in found.items() if name not in expected]
    lines += [
        f"{name} has shape {tuple(found[name].shape)}, needed {tuple(x.shape)}"
        for name, x in expected.items()
        if name in found and tuple(found[name].shape) != tuple(x.shape)
    ]
    if lines:
        raise CheckpointError(f"{where} does not fit: {'; '.join(lines)}. {remedy}")


def check_config(expected, found, ignore, where):
    """Raise ``CheckpointError`` naming the dotted keys whose values differ. ``ignore``: keys that may."""
    keys = [k for k in {**expected, **found} if k not in ignore and expected.get(k) != found.get(k)]
    if keys:
        lines = [f"{k}={expected.get(k)!r} (there {found.get(k)!r})" for k in keys]
        raise CheckpointError(f"{where} was made with another config: {'; '.join(lines)}. Use another --workdir, or the old values")


# ---- checkpoints ---------------------------------------------------------------------------------------------------------------------------


class Reading:
    """Turns whatever goes wrong while a checkpoint is read into one error that names it: orbax raises bare exceptions for damaged files."""

    def __init__(self, folder, remedy="remove that folder to go on from the one before"):
        self.folder, self.remedy = folder, remedy

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, Exception) and not isinstance(error, CheckpointError):
            reason = str(error).splitlines()[0][:200] if str(error) else kind.__name__
            raise CheckpointError(f"checkpoint {str(self.folder)!r} is damaged or incomplete ({reason}); {self.remedy}") from error


class Checkpoints:
    """The checkpoints of a run in ``folder``, the last ``keep`` of them; saving returns before the files are written."""

    def __init__(self, folder, keep=2):
        import orbax.checkpoint as ocp  # slow, and nothing that bundles of small files need

        self.folder, self.args = pathlib.Path(folder).absolute(), ocp.args
        self.manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
            item_handlers={"state": ocp.StandardCheckpointHandler(), "record": ocp.JsonCheckpointHandler()},
        )

    def latest(self):
        """Step of the newest complete checkpoint, or None."""
        return self.manager.latest_step()

    def save(self, step, state, record):
        """Write ``state`` (arrays) and ``record`` (JSON) as the checkpoint of ``step``; the state may be donated at once. Again: nothing."""
        if step not in self.manager.all_steps():
            args = self.args.Composite(state=self.args.StandardSave(flat_tree(state)), record=self.args.JsonSave(record))
            self.manager.save(step, args=args, force=True)

    def record(self, step=None):
        """The JSON record of a checkpoint, by default the newest."""
        step = self.existing(step)
        with Reading(self.folder / str(step)):
            return self.manager.restore(step, args=self.args.Composite(record=self.args.JsonRestore()))["record"]

    def restore(self, like, step=None):
        """The state of a checkpoint, by default the newest, as the tree ``like``: ``ShapeDtypeStruct`` leaves with their shardings."""
        step = self.existing(step)
        folder, expected = self.folder / str(step), flat_tree(like)
        with Reading(folder):
            found = self.manager.item_metadata(step)["state"].tree
            check_equal(expected, dict(found), f"checkpoint {str(folder)!r}", "Use the config it was made with, or another --workdir")
            state = self.manager.restore(step, args=self.args.Composite(state=self.args.StandardRestore(expected)))["state"]
        return jax.tree.unflatten(jax.tree.structure(like), [state[name] for name in expected])

    def existing(self, step):
        self.manager.wait_until_finished()
        step = self.latest() if step is None else step
        if step is None or step not in self.manager.all_steps():
            raise CheckpointError(f"{str(self.folder)!r} holds no checkpoint of step {step}; there are {sorted(self.manager.all_steps())}")
        return step

    def close(self):
        """Wait until everything is on the disk."""
        self.manager.wait_until_finished()
        self.manager.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close()


class Deadline:
    """``over()`` says when to write a checkpoint and leave: after ``minutes`` (0: never), on SIGTERM, or on the first Ctrl-C."""

    def __init__(self, minutes=0.0, clock=time.monotonic):
        self.end, self.clock, self.signal, self.handlers = clock() + 60 * minutes if minutes else math.inf, clock, None, {}

    def over(self):
        return self.signal is not None or self.clock() >= self.end

    @property
    def reason(self):
        return "" if not self.over() else "time is up" if self.signal is None else signal.Signals(self.signal).name

    def take(self, number, frame):
        self.signal = number
        signal.signal(number, self.handlers[number])  # a second one acts at once

    def __enter__(self):
        self.handlers = {number: signal.signal(number, self.take) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


# ---- bundles -------------------------------------------------------------------------------------------------------------------------------

SHARD_BYTES = 15 << 20
PARTS = {"transformer": VideoTransformer, "vae": VAE, "text": TextEncoder}
RULES = {"transformer": TRANSFORMER_RULES, "vae": REPLICATED_RULES, "text": REPLICATED_RULES}  # of sharding
CONFIG, RECORD, KINDS, ARRAYS = "config.json", "record.json", "kinds.json", "arrays"


def save_bundle(folder, experiment, parts, record):
    """Write ``parts`` (part -> dotted path -> weight) as safetensors of at most 15 MiB, ``config.json`` and ``record.json``.

    ``parts``: any of ``PARTS``. Arrays and adapters are written in bfloat16, quantised weights as they are, array by array, with what they are
    in ``kinds.json``. The config comes last, so a folder without one is an unfinished bundle. Returns the bytes written.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in (folder / CONFIG, folder / KINDS, *folder.glob("*.safetensors")):
        old.unlink(missing_ok=True)
    weights = {f"{part}.{path}": jax.tree.map(jnp.asarray, x) for part, leaves in parts.items() for path, x in leaves.items()}
    flat, kinds = flatten(cast(weights, jnp.bfloat16))
    shards = split(flat)
    for i, shard in enumerate(shards):
        save_file(shard, folder / f"weights-{i + 1:05}-of-{len(shards):05}.safetensors")
    finish_bundle(folder, experiment, kinds, record)
    return sum(f.stat().st_size for f in folder.iterdir())


def save_large_bundle(folder, experiment, arrays, kinds, record):
    """Write a bundle whose weights are the Orbax directory ``arrays``, of which a device reads its part.

    ``arrays``: ``part.path`` -> array or ``arrays.Unread``, written one at a time in the dtypes they have; ``kinds`` as ``flatten`` gives them.
    """
    from longlive_jax.arrays import save_arrays  # Orbax, as in Checkpoints

    folder = pathlib.Path(folder)
    save_arrays(folder / ARRAYS, arrays)
    finish_bundle(folder, experiment, kinds, record)


def finish_bundle(folder, experiment, kinds, record):
    if kinds:
        (folder / KINDS).write_text(json.dumps(kinds, indent=1))
    (folder / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False))
    (folder / CONFIG).write_text(json.dumps(dataclasses.asdict(experiment), indent=1, ensure_ascii=False))


def split(arrays):
    """Consecutive groups of a mapping, each of at most ``SHARD_BYTES`` (or a single array)."""
    out, size = [{}], 0
    for name, x in arrays.items():
        if out[-1] and size + x.nbytes > SHARD_BYTES - (1 << 17):  # room for the header
            out.append({})
            size = 0
        out[-1][name] = x
        size += x.nbytes
    return out


def read_experiment(folder):
    """The ``Experiment`` of a bundle."""
    return from_config_dict(Experiment, read_json(folder, CONFIG))


def read_json(folder, name):
    path = pathlib.Path(folder) / name
    if not path.is_file():
        raise CheckpointError(f"{str(path)!r} is missing, so {str(folder)!r} is not a finished bundle; run the training to its end")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} is damaged ({error}); copy the bundle again") from error


def read_weights(folder):
    """``part.path`` -> numpy array of all shards. Raises ``CheckpointError`` naming the missing or damaged file."""
    paths = sorted(pathlib.Path(folder).glob("weights-*.safetensors"))
    if not paths:
        raise CheckpointError(f"{str(folder)!r} holds no weights-*.safetensors; copy the bundle again")
    total = int(paths[0].stem.split("-")[-1])
    names = [f"weights-{i + 1:05}-of-{total:05}.safetensors" for i in range(total)]
    missing = sorted(set(names) - {p.name for p in paths})
    if missing:
        raise CheckpointError(f"{str(folder)!r} lacks {', '.join(missing)}; copy the bundle again")
    out = {}
    for name in names:
        path = pathlib.Path(folder) / name
        try:
            out |= read_file(path)
        except (SafetensorError, OSError, KeyError) as error:
            raise CheckpointError(f"{str(path)!r} is damaged or truncated ({error}); copy the bundle again") from error
    return out


def load_parts(folder, parts=tuple(PARTS), dtype=None, mesh=None, policy=REPLICATE):
    """The experiment of a bundle and the modules of ``parts``, in ``dtype`` (None: the experiment's); nothing is initialised at random.

    ``mesh``: put the weights on it, whole on every device (``REPLICATE``) or in parts (``SHARD``); None: on the default device.
    """
    experiment = read_experiment(folder)
    configs = {"transformer": experiment.transformer, "vae": experiment.vae, "text": experiment.text}
    modules = {part: abstract_part(part, configs[part]) for part in parts}
    plain = {f"{part}.{path}": x for part, module in modules.items() for path, x in flat_params(module).items()}
    kinds = read_kinds(folder, plain)
    leaves = plain | {path: abstract_leaf(kind, plain[path].shape) for path, kind in kinds.items()}
    expected, _ = flatten(leaves)
    found = {name: x for name, x in find_arrays(folder).items() if name.split(".")[0] in parts}
    check_equal(expected, found, f"bundle {str(folder)!r}", "Its config.json and its weights are of different models; copy the bundle again")
    dtype = jnp.dtype(dtype or experiment.dtype)
    places = places_of(modules, leaves, mesh, policy)
    if is_large(folder):
        narrow = {name: dtype if name in plain and jnp.issubdtype(x.dtype, jnp.floating) else x.dtype for name, x in found.items()}
        like = {name: jax.ShapeDtypeStruct(x.shape, narrow[name], sharding=places[name]) for name, x in found.items()}
        from longlive_jax.arrays import load_arrays  # Orbax, as in Checkpoints

        with Reading(folder, "copy or convert it again"):
            arrays = load_arrays(pathlib.Path(folder) / ARRAYS, like)
    else:
        plainly = lambda name, x: x.astype(dtype) if name in plain and jnp.issubdtype(x.dtype, jnp.floating) else x  # no program to compile
        arrays = jax.device_put({name: plainly(name, x) for name, x in found.items()}, None if mesh is None else places)
    weights = cast(unflatten(arrays, kinds), dtype)
    values = lambda part: {path: weights[f"{part}.{path}"] for path in flat_params(modules[part])}
    return experiment, *(with_params(module, values(part)) for part, module in modules.items())


def is_large(folder):
    return (pathlib.Path(folder) / ARRAYS).is_dir()


def find_arrays(folder):
    """``part.path`` -> array, or its ``ShapeDtypeStruct`` where the weights are an Orbax directory."""
    if not is_large(folder):
        return read_weights(folder)
    from longlive_jax.arrays import array_shapes  # Orbax, as in Checkpoints

    with Reading(folder, "copy or convert it again"):
        return array_shapes(pathlib.Path(folder) / ARRAYS)


def places_of(modules, leaves, mesh, policy):
    """``part.path`` (and ``.field`` where a weight is no plain array) -> sharding on ``mesh``."""
    out = {}
    for part, module in modules.items():
        shapes = {path: x.shape for path, x in flat_params(module).items()}
        placed = {} if mesh is None else weight_shardings(shapes, RULES[part], policy, mesh)
        for path in shapes:
            leaf = leaves[f"{part}.{path}"]
            specs = leaf_specs(leaf, placed[path].spec) if placed else jax.tree.map(lambda x: P(), leaf)
            specs = jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, P))
            place = lambda s: SingleDeviceSharding(jax.devices()[0]) if mesh is None else NamedSharding(mesh, s)
            out |= {name: place(s) for name, s in zip(flatten({f"{part}.{path}": leaf})[0], specs, strict=True)}
    return out


def read_kinds(folder, weights):
    """``part.path`` -> record of every weight of ``weights`` that is no plain array in the bundle."""
    if not (pathlib.Path(folder) / KINDS).is_file():
        return {}
    kinds = read_json(folder, KINDS)
    parts = {name.split(".")[0] for name in weights}
    strange = [name for name in kinds if name not in weights and name.split(".")[0] in parts]
    if strange:
        raise CheckpointError(f"{KINDS} in {str(folder)!r} names weights that its model lacks: {', '.join(strange[:8])}; copy the bundle again")
    return {name: kind for name, kind in kinds.items() if name in weights}


def load_bundle(folder, dtype=None, mesh=None, policy=REPLICATE):
    """``(Experiment, VideoTransformer, VAE, TextEncoder)`` of a bundle; None for a part that a converted bundle does not have."""
    parts = parts_of(folder)
    experiment, *modules = load_parts(folder, parts, dtype, mesh, policy)
    return experiment, *map(dict(zip(parts, modules)).get, PARTS)


def parts_of(folder):
    """The parts whose weights are in a bundle's folder, in the order of ``PARTS``."""
    there = {name.split(".")[0] for name in find_arrays(folder)} if is_large(folder) else PARTS
    return tuple(part for part in PARTS if part in there)


def abstract_part(part, config):
    """The module of a part with shapes in place of arrays."""
    return abstract(lambda: PARTS[part](config, rngs=nnx.Rngs(0)))


def digest(folder):
    """SHA-256 over the weights of a bundle: says whether two folders hold the same."""
    total = hashlib.sha256()
    folder = pathlib.Path(folder)
    for path in sorted(p for p in (*folder.glob("weights-*.safetensors"), *(folder / ARRAYS).glob("*.*/*")) if p.is_file()):
        total.update(path.read_bytes())
    return total.hexdigest()
