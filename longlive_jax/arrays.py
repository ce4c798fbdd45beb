"""Named arrays in an Orbax directory: written one at a time, read in parts.

Every array is cut along its first axis, so that a device that holds rows of it reads those rows and no others.
"""

import contextlib
import logging
import math
import pathlib
from dataclasses import dataclass

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers

PIECES = 8  # of an array, if its rows divide by it
LEAST, MOST = 1 << 20, 64 << 20  # bytes of a piece, about
ON_THE_WAY = 1e9  # bytes that a host holds while devices are filled, or twice the largest array where that is more


@dataclass(frozen=True)
class Unread:
    """An array that ``read()`` makes when its turn comes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: object

    @property
    def size(self):
        return math.prod(self.shape)

    @property
    def nbytes(self):
        return self.size * np.dtype(self.dtype).itemsize

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.read(), dtype)


def piece(shape, itemsize):
    """The shape of the pieces of an array: a divisor of its rows, whole otherwise."""
    if not shape or math.prod(shape) == 0:
        return tuple(max(n, 1) for n in shape)
    rows, size = shape[0], math.prod(shape) * itemsize
    wanted = max(1, min(PIECES, size // LEAST), math.ceil(size / MOST))
    pieces = next(n for n in range(wanted, rows + 1) if rows % n == 0) if wanted <= rows else rows
    return (rows // pieces, *shape[1:])


class OneByOne(type_handlers.NumpyHandler):
    """Writes ``Unread`` arrays so that one at a time is in memory."""

    async def _background_serialize(self, values, infos, args=None):
        for value, info in zip(values, infos):
            await info.await_path_creation()
            x = np.asarray(value)
            spec = type_handlers.get_json_tspec_write(
                info, use_ocdbt=False, global_shape=x.shape, local_shape=piece(x.shape, x.itemsize), dtype=x.dtype
            )
            store = await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)
            await store.write(x, can_reference_source_data_indefinitely=True)

    async def serialize(self, values, infos, args=None):
        job = self._background_serialize(values, infos, args)
        return [ocp.future.CommitFutureAwaitingContractedSignals(job, name="one by one")]


@contextlib.contextmanager
def quiet():
    """Orbax warns about what is absent here on purpose."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def save_arrays(folder, arrays):
    """Write ``arrays`` (name -> array or ``Unread``) as the new Orbax directory ``folder``, which appears when it is complete."""
    registry = type_handlers.create_type_handler_registry((Unread, OneByOne()))
    unread = {name: x if isinstance(x, Unread) else Unread(tuple(x.shape), x.dtype, lambda x=x: np.asarray(x)) for name, x in arrays.items()}
    with quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)) as checkpointer:
        checkpointer.save(pathlib.Path(folder).absolute(), args=ocp.args.PyTreeSave(unread))


def array_shapes(folder):
    """Name -> ``ShapeDtypeStruct`` of an Orbax directory."""
    with quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        found = checkpointer.metadata(pathlib.Path(folder).absolute()).item_metadata.tree
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in found.items()}


def load_arrays(folder, like):
    """``like``: name -> ``ShapeDtypeStruct``, which may be fewer than there are. With a sharding, the devices read their parts in the dtype
    asked for and get a ``jax.Array``; without one a numpy array comes back.
    """
    args = {name: restore_args(x) for name, x in like.items()}
    largest = max((math.prod(x.shape) * 8 for x in like.values()), default=0)  # two of them, in float32 as a file may hold them
    limit = math.ceil(max(ON_THE_WAY, largest) / 1e9)
    with quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(restore_concurrent_gb=limit)) as checkpointer:
        args = ocp.args.PyTreeRestore(item=dict(like), restore_args=args, partial_restore=True)
        return checkpointer.restore(pathlib.Path(folder).absolute(), args=args)


class Reader:
    """Arrays of an Orbax directory as ``Unread``: name -> ``entries[name]``. Small ones are read in groups, of which the last is kept."""

    def __init__(self, folder, shapes):
        self.folder, self.group, self.groups = folder, {}, {}
        members, size = {}, 0
        for name in sorted(shapes):
            x = shapes[name]
            nbytes = math.prod(x.shape) * np.dtype(x.dtype).itemsize
            if size + nbytes > MOST:
                members, size = {}, 0
            members[name], size = x, size + nbytes
            self.groups[name] = members
        self.entries = {name: Unread(tuple(x.shape), x.dtype, lambda name=name: self.read(name)) for name, x in shapes.items()}

    def read(self, name):
        if name not in self.group:
            self.group = {}  # before the next one comes
            self.group = load_arrays(self.folder, self.groups[name])
        return self.group[name]


def restore_args(x):
    if x.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=x.dtype)
    return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=x.sharding, global_shape=x.shape, dtype=x.dtype, strict=True)
