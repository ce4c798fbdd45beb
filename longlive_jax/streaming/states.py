"""A dict of pytrees of arrays in one file (safetensors), complete or not at all."""

import contextlib
import os
import pathlib

import jax
import jax.numpy as jnp
from safetensors import SafetensorError
from safetensors.flax import save_file

from longlive_jax.config import ConfigError
from longlive_jax.streaming.writer import OutputError
from longlive_jax.tensorfile import read_file


def named(tree):
    """Leaves by path; typed PRNG keys as their data."""
    leaves, shape = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}, shape


def is_key(leaf):
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def save_arrays(path, tree):
    """Write ``tree`` to ``path`` under a temporary name first. Raises ``OutputError``; what stood there before is then unchanged."""
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")
    arrays = {n: jax.random.key_data(x) if is_key(x) else x for n, x in named(tree)[0].items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OutputError(f"state {str(path)!r} cannot be written: {error}; free space or give another path") from error


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
