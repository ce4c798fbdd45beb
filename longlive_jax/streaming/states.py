"""A dict of pytrees of arrays in one file (safetensors), complete or not at all."""

import math
import os
import pathlib

import jax
import jax.numpy as jnp
from safetensors import SafetensorError
from safetensors.flax import save_file

from longlive_jax.config import ConfigError, require
from longlive_jax.streaming.writer import whole_file
from longlive_jax.tensorfile import read_file


def named(tree):
    """Leaves by path; typed PRNG keys as their data."""
    leaves, shape = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}, shape


def is_key(leaf):
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def save_arrays(path, tree):
    """Write ``tree`` to ``path`` under a temporary name first. Raises ``OutputError``; what stood there before is then unchanged."""
    with whole_file(path, "state") as temporary:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        save_file({n: jax.random.key_data(x) if is_key(x) else x for n, x in named(tree)[0].items()}, temporary)


def load_arrays(path, like, optional=()):
    """The dict that ``save_arrays`` wrote, in the structure of ``like`` (arrays or ``ShapeDtypeStruct``); its ``optional`` keys may be None.

    Raises ``ConfigError`` naming the file if it is missing or truncated, or every array that is missing, extra or of another shape or dtype.
    """
    if not pathlib.Path(path).is_file():
        raise ConfigError(f"no saved state at {path}; save one with Session.save, or check the path")
    try:
        found = read_file(path)
    except (SafetensorError, KeyError) as error:
        raise ConfigError(f"saved state {path} cannot be read ({error}); it is truncated or no saved state: save it again") from error
    absent = [key for key in optional if not any(name.startswith(f"[{key!r}]") for name in found)]
    like = {**like, **dict.fromkeys(absent)}
    wanted, shape = named(like)
    bare = {n: jax.eval_shape(jax.random.key_data, x) if is_key(x) else x for n, x in wanted.items()}
    wrong = [f"{n}: not in the file" for n in bare if n not in found] + [f"{n}: not in this session" for n in found if n not in bare]
    wrong += [
        f"{n}: file has {found[n].dtype}{list(found[n].shape)}, this session {x.dtype}{list(x.shape)}"
        for n, x in bare.items()
        if n in found and (found[n].shape, found[n].dtype) != (x.shape, x.dtype)
    ]
    if wrong:
        lines = "\n  ".join(wrong)
        raise ConfigError(f"saved state {path} is of another model or other settings ({len(wrong)} arrays differ):\n  {lines}")
    values = [jax.random.wrap_key_data(jnp.asarray(found[n])) if is_key(x) else jnp.asarray(found[n]) for n, x in wanted.items()]
    return jax.tree.unflatten(shape, values)


def device_memory():
    """Bytes that programs may use on the first device; on a CPU, the host's."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit") or host_memory()


def host_memory():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_fits(state, stream, weights, shards):
    """Refuse a window whose memory is larger than what ``weights``, a tree of arrays, leave of a device; ``state``: shapes, over ``shards``.

    A lower bound: what programs hold beside the two is not counted (experiments/doctor.py plans with it).
    """
    free = device_memory() - sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(weights))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim == 5) / shards
    most = max(0, int(free / held * stream.window)) // stream.chunk * stream.chunk
    require(
        held <= free,
        f"stream.window={stream.window} takes {held / 2**30:.1f} GiB and a device has {free / 2**30:.1f} beside the weights; "
        + (f"a window of {most} fits" if most > stream.sink + stream.chunk else "no window fits: use a smaller batch or model"),
    )
