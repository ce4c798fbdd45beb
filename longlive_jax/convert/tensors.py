"""Lazy readers of tensor files: names, shapes and dtypes at once, values only when asked for.

``open_tensors`` returns a mapping from tensor name to ``Tensor``; ``np.asarray(tensor)`` reads one. Files are never unpickled.
"""

import json
import math
import pathlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from longlive_jax.tensorfile import DTYPES


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file, unread: ``offset`` in bytes from the start of the file; ``strides`` in elements, None: dense."""

    path: pathlib.Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    strides: tuple[int, ...] | None = None

    def __array__(self, dtype=None, copy=None):
        size = math.prod(self.shape)
        if self.strides is None or size == 0:
            values = np.fromfile(self.path, self.dtype, size, offset=self.offset).reshape(self.shape)
        else:  # a view: the part of its storage from its first to its last element
            span = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides))
            row = np.fromfile(self.path, self.dtype, span, offset=self.offset)
            strides = [s * row.itemsize for s in self.strides]
            values = np.ascontiguousarray(np.lib.stride_tricks.as_strided(row, self.shape, strides, writeable=False))
        return values if dtype is None else values.astype(dtype, copy=False)


class Renamed(Mapping):
    """A view of the mapping ``tensors`` under other names: ``names`` is new name to old."""

    def __init__(self, tensors, names):
        self.tensors, self.names = tensors, names

    def __getitem__(self, name):
        return self.tensors[self.names[name]]

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)


class Npz(Mapping):
    """The arrays of an npz file; each access reads one."""

    def __init__(self, path):
        self.path = path
        try:
            with np.load(path, allow_pickle=False) as arrays:
                self.names = tuple(arrays.files)
        except (zipfile.BadZipFile, EOFError, ValueError) as error:
            raise ValueError(f"{path} is not a whole npz file: {error}") from error

    def __getitem__(self, name):
        if name not in self.names:
            raise KeyError(name)
        with np.load(self.path, allow_pickle=False) as arrays:
            return arrays[name]

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)


def open_tensors(path, prefix=""):
    """The tensors of a ``.safetensors`` file, of a folder of them (by its index when sharded), of an index file, or of an ``.npz`` file.

    ``prefix``: keep only names that start with it, without it. Raises ``FileNotFoundError`` or ``ValueError`` that name the file.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a .safetensors or .npz file, or a folder of .safetensors files")
    if path.is_dir():
        tensors = read_folder(path)
    elif path.suffix == ".safetensors":
        tensors = read_safetensors(path)
    elif path.name.endswith(".safetensors.index.json"):
        tensors = read_index(path)
    elif path.suffix == ".npz":
        tensors = Npz(path)
    else:
        raise ValueError(f"{path} has an unknown format; give a .safetensors or .npz file, or a folder of .safetensors files")
    if not prefix:
        return tensors
    names = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
    if not names:
        raise ValueError(f"{path} has no tensor whose name starts with {prefix!r}; it has {', '.join(sorted(tensors)[:3])}, ...")
    return Renamed(tensors, names)


def read_safetensors(path):
    """Name to ``Tensor`` for one safetensors file. The whole header is checked against the size of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + length > size:
            raise ValueError(f"{path} is not a whole safetensors file: {size} bytes, its header alone needs {8 + length}; copy it again")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} is not a safetensors file: its header is not JSON ({error})") from error
    out = {}
    wanted = {"dtype", "shape", "data_offsets"}
    if not isinstance(header, dict) or not all(isinstance(e, dict) and e.keys() >= wanted for n, e in header.items() if n != "__metadata__"):
        raise ValueError(f"{path} is not a safetensors file: its header names no dtype, shape and place of every tensor; copy it again")
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: tensor {name!r} has dtype {entry['dtype']}; known are {', '.join(DTYPES)}")
        dtype, shape, (start, end) = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"]), entry["data_offsets"]
        if end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: tensor {name!r} {shape} {dtype} has {end - start} bytes instead of {math.prod(shape) * dtype.itemsize}")
        if 8 + length + end > size:
            raise ValueError(f"{path} is truncated: {size} bytes, tensor {name!r} ends at {8 + length + end}; copy it again")
        out[name] = Tensor(path, 8 + length + start, shape, dtype)
    return out


def read_index(path):
    """Name to ``Tensor`` for the sharded model whose index is the file ``path``."""
    try:
        places = dict(json.loads(path.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no whole index of shards ({error!r}); copy it again") from error
    files = sorted(set(places.values()))
    missing = [file for file in files if not (path.parent / file).exists()]
    if missing:
        raise FileNotFoundError(f"{path} names {len(files)} files of which {len(missing)} are missing: {', '.join(missing)}")
    shards = {file: read_safetensors(path.parent / file) for file in files}
    absent = [f"{name} in {file}" for name, file in places.items() if name not in shards[file]]
    if absent:
        raise ValueError(f"{path} names {len(absent)} tensors that are not in their file: {', '.join(absent[:8])}")
    return {name: shards[file][name] for name, file in places.items()}


def read_folder(path):
    """Name to ``Tensor`` for a folder with one index, or with one safetensors file."""
    indices, files = sorted(path.glob("*.safetensors.index.json")), sorted(path.glob("*.safetensors"))
    if len(indices) == 1:
        return read_index(indices[0])
    if not indices and len(files) == 1:
        return read_safetensors(files[0])
    raise ValueError(f"{path} holds {len(indices)} index files and {len(files)} .safetensors files; name the file or the index to read")
