"""Tensor files written as a stream: safetensors, sharded safetensors with an index, and torch's zip container.

Every writer takes ``entries``: name -> anything with ``shape`` and ``dtype`` that ``np.asarray`` turns into an array. Headers need only shapes;
values are read one at a time, in the order of the file. A file appears under its name only when it is whole.
"""

import json
import math
import pathlib
import shutil
import zipfile

import numpy as np

from longlive_jax.convert.tensors import DTYPES
from longlive_jax.convert.torchzip import DTYPES as TORCH_DTYPES
from longlive_jax.convert.torchzip import ORDERED, STORAGES, TENSOR

SAFETENSORS_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
TORCH_NAMES = {np.dtype(TORCH_DTYPES[dtype]): name for name, dtype in STORAGES.items()}


class WriteError(ValueError):
    """A tensor cannot be written in this format."""


def nbytes(x):
    return math.prod(x.shape) * np.dtype(x.dtype).itemsize


def raw(x):
    """The bytes of an entry, as a buffer; reads it."""
    return np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.uint8).data


class Whole:
    """A temporary path beside ``path``, of a file or a folder, that becomes ``path`` when the block ends well, and goes away when not."""

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.temporary = self.path.with_name(self.path.name + ".unfinished")

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.remove()
        return self.temporary

    def __exit__(self, kind, error, trace):
        if kind is None:
            self.temporary.replace(self.path)
        else:
            self.remove()

    def remove(self):
        if self.temporary.is_dir():
            shutil.rmtree(self.temporary)
        self.temporary.unlink(missing_ok=True)


def known_dtype(names, path, name, x):
    if np.dtype(x.dtype) not in names:
        raise WriteError(f"{path}: tensor {name!r} is {np.dtype(x.dtype)}; the format takes {', '.join(sorted(map(str, names)))}")
    return names[np.dtype(x.dtype)]


# ---- safetensors ---------------------------------------------------------------------------------------------------------------------------


def write_safetensors(path, entries):
    """One safetensors file, wider dtypes first and names sorted, as the common library writes them."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    order = sorted(entries, key=lambda name: (-np.dtype(entries[name].dtype).itemsize, name))
    for name in order:
        x = entries[name]
        kind = known_dtype(SAFETENSORS_NAMES, path, name, x)
        header[name] = {"dtype": kind, "shape": list(x.shape), "data_offsets": [at, at + nbytes(x)]}
        at += nbytes(x)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with Whole(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(raw(entries[name]))


def shards(entries, limit):
    """``entries`` in consecutive groups of at most ``limit`` bytes (or one entry), in their order."""
    groups, size = [{}], 0
    for name, x in entries.items():
        if groups[-1] and size + nbytes(x) > limit:
            groups.append({})
            size = 0
        groups[-1][name] = x
        size += nbytes(x)
    return groups


def write_sharded(folder, stem, entries, limit):
    """``stem-0000i-of-0000n.safetensors`` and their index in ``folder``, or ``stem.safetensors`` alone if ``limit`` bytes hold everything."""
    folder, groups = pathlib.Path(folder), shards(entries, limit)
    if len(groups) == 1:
        write_safetensors(folder / f"{stem}.safetensors", entries)
        return
    places = {}
    for i, group in enumerate(groups):
        file = f"{stem}-{i + 1:05}-of-{len(groups):05}.safetensors"
        write_safetensors(folder / file, group)
        places |= dict.fromkeys(group, file)
    index = {"metadata": {"total_size": sum(nbytes(x) for x in entries.values())}, "weight_map": dict(sorted(places.items()))}
    with Whole(folder / f"{stem}.safetensors.index.json") as temporary:
        temporary.write_text(json.dumps(index, indent=2) + "\n")


# ---- torch's zip container -----------------------------------------------------------------------------------------------------------------


def write_torch(path, tree):
    """A ``.pt`` file of ``tree``: nested dicts with string keys; their values are entries, strings, integers or None."""
    path, storages = pathlib.Path(path), []
    text = b"\x80\x02" + pickled(path, tree, storages) + b"."
    with Whole(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.writestr(f"{path.stem}/data.pkl", text)
        archive.writestr(f"{path.stem}/byteorder", "little")
        for key, x in enumerate(storages):
            with archive.open(f"{path.stem}/data/{key}", "w", force_zip64=nbytes(x) > 1 << 30) as file:
                file.write(raw(x))
        archive.writestr(f"{path.stem}/version", "3\n")


def pickled(path, value, storages, name=""):
    """The opcodes (protocol 2) of ``value``; the tensors it meets go into ``storages``."""
    if isinstance(value, dict):
        items = b"".join(pickled(path, key, storages) + pickled(path, inner, storages, key) for key, inner in value.items())
        return b"}(" + items + b"u"
    if value is None:
        return b"N"
    if isinstance(value, str):
        return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()
    if isinstance(value, int):
        size = value.bit_length() // 8 + 1
        return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
    kind = known_dtype(TORCH_NAMES, path, name, value)
    strides = [math.prod(value.shape[i + 1 :]) for i in range(len(value.shape))]
    part = lambda x: pickled(path, x, storages)
    row = lambda xs: b"(" + b"".join(part(int(x)) for x in xs) + b"t"
    count = math.prod(value.shape)
    storage = b"(" + part("storage") + named(f"torch.{kind}") + part(str(len(storages))) + part("cpu") + part(count) + b"tQ"
    storages.append(value)
    view = part(0) + row(value.shape) + row(strides) + b"\x89" + named(ORDERED) + b")R"
    return named(TENSOR) + b"(" + storage + view + b"tR"


def named(text):
    module, _, name = text.rpartition(".")
    return f"c{module}\n{name}\n".encode()
