"""A restricted reader of torch's files (``.pt``, ``.pth``): tensors in plain containers, and nothing else.

No part of a file is executed. Its pickle is interpreted here, opcode by opcode, and builds dicts, lists, tuples, numbers, strings and unread
tensors; whatever else it names or asks for is an error that says what it was. Both formats are read: the zip container and, before torch
1.6, the sequence of pickles. The bytes of a tensor are read when ``np.asarray`` asks for them.
"""

import math
import pickletools
import zipfile
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from longlive_jax.convert.tensors import Tensor

DTYPES = {
    "float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "int64": np.int64,
    "int32": np.int32, "int16": np.int16, "int8": np.int8, "uint8": np.uint8, "bool": np.bool_,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2,
}  # fmt: skip
STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "LongStorage": "int64",
    "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
ORDERED, TENSOR, TYPED_TENSOR, PARAMETER = (
    "collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_parameter",
)  # fmt: skip
NAMES = (
    {f"torch.{name}": np.dtype(DTYPES[dtype]) for name, dtype in STORAGES.items()}
    | {f"torch.{name}": np.dtype(dtype) for name, dtype in DTYPES.items()}
    | {"torch.storage.UntypedStorage": np.dtype(np.uint8), "torch.UntypedStorage": np.dtype(np.uint8)}
)
ALLOWED = {ORDERED, TENSOR, TYPED_TENSOR, PARAMETER, *NAMES}
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the format before torch 1.6
MARK = object()
PUSHED = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT", "NONE", "NEWTRUE", "NEWFALSE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}


class TorchFileError(ValueError):
    """A torch file is damaged, or holds something that is no tensor in plain containers."""


@dataclass(frozen=True)
class Name:
    """A name of the allow list on the stack."""

    text: str


@dataclass(frozen=True)
class Storage:
    """A run of ``count`` elements in the file, from byte ``start``; ``start`` is None while places are not known."""

    start: int | None
    dtype: np.dtype
    count: int


class Machine:
    """One run over one pickle. ``places``: storage key -> (start, bytes), or None to collect in ``storages`` what is asked for."""

    def __init__(self, path, places):
        self.path, self.places, self.storages = path, places, {}
        self.stack, self.memo = [], {}

    def run(self, file):
        """The object of the pickle at the position of ``file`` (or in bytes), which is left behind its end."""
        try:
            for opcode, value, _ in pickletools.genops(file):
                if opcode.name == "STOP":
                    break
                self.step(opcode.name, value)
            (result,) = self.stack
        except TorchFileError:
            raise
        except (ValueError, TypeError, LookupError, AssertionError) as error:
            raise TorchFileError(f"{self.path} has a damaged pickle ({error}); copy it again") from error
        if isinstance(result, Name):
            raise TorchFileError(f"{self.path} holds the name {result.text} and no tensors")
        return result

    def step(self, op, value):
        stack = self.stack
        if op in PUSHED:
            stack.append(CONSTANTS[op] if op in CONSTANTS else value)
        elif op in EMPTY:
            stack.append(EMPTY[op]())
        elif op == "MARK":
            stack.append(MARK)
        elif op == "TUPLE":
            stack.append(tuple(self.marked()))
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(self.popped(int(op[-1]))))
        elif op in ("SETITEM", "SETITEMS"):
            items = self.popped(2) if op == "SETITEM" else self.marked()
            self.top(dict).update(zip(items[::2], items[1::2], strict=True))
        elif op in ("APPEND", "APPENDS"):
            items = self.popped(1) if op == "APPEND" else self.marked()
            self.top(list).extend(items)
        elif op in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[value] = stack[-1]
        elif op == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[value])
        elif op == "GLOBAL":
            stack.append(self.name(value.replace(" ", ".")))
        elif op == "STACK_GLOBAL":
            stack.append(self.name(".".join(self.popped(2))))
        elif op == "BINPERSID":
            stack.append(self.storage(*self.popped(1)[0]))
        elif op == "REDUCE":
            stack.append(self.reduce(*self.popped(2)))
        elif op == "BUILD":  # attributes of an ordered dict, such as the versions that torch keeps there: no tensors
            self.popped(1)
            self.top(dict)
        elif op not in ("PROTO", "FRAME"):
            raise TorchFileError(f"{self.path} is refused: its pickle uses {op}, which tensors in plain containers do not need")

    def popped(self, count):
        items = self.stack[-count:]
        if len(items) < count or any(item is MARK for item in items):
            raise ValueError("the stack is too short")
        del self.stack[-count:]
        return items

    def marked(self):
        at = next((i for i in reversed(range(len(self.stack))) if self.stack[i] is MARK), None)
        if at is None:
            raise ValueError("there is no mark")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def top(self, kind):
        if not self.stack or type(self.stack[-1]) is not kind:
            raise ValueError(f"no {kind.__name__} to fill")
        return self.stack[-1]

    def name(self, text):
        if text not in ALLOWED:
            raise TorchFileError(
                f"{self.path} is refused: its pickle names {text}, and only tensors in plain containers are read; nothing of it was executed"
            )
        return Name(text)

    def reduce(self, function, args):
        if function == Name(ORDERED):
            return dict(*args)
        if function == Name(TENSOR):
            return self.tensor(*args[:4])
        if function == Name(TYPED_TENSOR):
            return self.tensor(*args[:4], NAMES[args[6].text])
        if function == Name(PARAMETER):
            return args[0]
        raise TorchFileError(f"{self.path} is refused: its pickle calls {function.text if isinstance(function, Name) else repr(function)}")

    def storage(self, word, kind, key, location, count, view=None):
        if word != "storage" or view is not None or count < 0:
            raise ValueError(f"a storage of the unknown kind {word!r}")
        dtype = NAMES[kind.text]
        self.storages[key] = (dtype, count)
        if self.places is None:
            return Storage(None, dtype, count)
        if key not in self.places:
            raise TorchFileError(f"{self.path} lacks storage {key!r} that its tensors need; copy it again")
        start, size = self.places[key]
        if size != count * dtype.itemsize:
            raise TorchFileError(
                f"{self.path} is damaged: storage {key!r} has {size} bytes and needs {count * dtype.itemsize} ({count} x {dtype}); "
                "copy it again"
            )
        return Storage(start, dtype, count)

    def tensor(self, storage, offset, shape, strides, dtype=None):
        """A view of a storage as a ``Tensor``; ``offset`` and ``strides`` in elements."""
        dtype = dtype or storage.dtype
        count = storage.count * storage.dtype.itemsize // dtype.itemsize
        if len(shape) != len(strides) or min((offset, *shape, *strides), default=0) < 0:
            raise ValueError(f"a tensor of shape {shape} with strides {strides} from {offset}")
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides))
        if math.prod(shape) and last >= count:
            raise TorchFileError(f"{self.path} is damaged: a tensor {shape} reaches element {last} of a storage of {count}; copy it again")
        dense, step = [], 1
        for n in reversed(shape):
            dense.append(step)
            step *= n
        plain = all(n == 1 or s == d for n, s, d in zip(shape, strides, reversed(dense)))
        start = None if storage.start is None else storage.start + offset * dtype.itemsize
        return Tensor(self.path, start, tuple(shape), dtype, None if plain else tuple(strides))


def read_torch(path):
    """The object in a torch file: nested dicts, lists, tuples, numbers and strings, with a lazy ``Tensor`` for every tensor.

    Raises ``TorchFileError`` that names the file and what is wrong: truncated, damaged, or refused.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(4)
        if start != b"PK\x03\x04":
            file.seek(0)
            return read_sequence(path, file, size)
        try:
            archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, ValueError, RuntimeError) as error:
            reason = f"{size} bytes without the table at their end ({error})"
            raise TorchFileError(f"{path} is truncated or damaged: {reason}; copy it again") from error
        return read_archive(path, file, archive, size)


def read_archive(path, file, archive, size):
    """The object of the zip container."""
    names = archive.namelist()
    roots = [name.removesuffix("data.pkl") for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1 or any(name.startswith(f"{roots[0]}code/") for name in names):
        raise TorchFileError(f"{path} is no torch file of tensors but another zip archive, of {len(names)} records such as {names[:3]}")
    places = {name.removeprefix(roots[0]): place(path, file, archive.getinfo(name), size) for name in names if name.startswith(roots[0])}
    start, length = places["data.pkl"]
    if "byteorder" in places and content(file, *places["byteorder"]).strip() != b"little":
        raise TorchFileError(f"{path} was written on a big-endian machine; write it again on a common one")
    storages = {name.removeprefix("data/"): at for name, at in places.items() if name.startswith("data/")}
    return Machine(path, storages).run(content(file, start, length))


def place(path, file, info, size):
    """(start, bytes) of a record, which lies in the file as it is."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise TorchFileError(f"{path} is refused: record {info.filename!r} is compressed or encrypted, which torch never writes")
    header = content(file, info.header_offset, 30)
    start = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if header[:4] != b"PK\x03\x04" or start + info.file_size > size:
        raise TorchFileError(f"{path} is damaged: record {info.filename!r} does not lie where the table says; copy it again")
    return start, info.file_size


def content(file, start, length):
    file.seek(start)
    return file.read(length)


def read_sequence(path, file, size):
    """The object of the format before torch 1.6: magic, protocol, system, object and storage keys, pickled in a row, then the storages."""
    try:
        known = Machine(path, {}).run(file) == MAGIC and Machine(path, {}).run(file) == PROTOCOL
        system = Machine(path, {}).run(file) if known else {}
    except TorchFileError:
        known = False
    if not known or not isinstance(system, dict) or not system.get("little_endian", True):
        raise TorchFileError(f"{path} is not a torch file: it is neither a zip container nor the older sequence of pickles")
    begin, first = file.tell(), Machine(path, None)
    first.run(file)
    keys, places = Machine(path, {}).run(file), {}
    at = file.tell()
    for key in keys:
        dtype, count = first.storages.get(key, (None, 0))
        stored = int.from_bytes(content(file, at, 8), "little")
        if dtype is None or stored != count or at + 8 + count * dtype.itemsize > size:
            raise TorchFileError(f"{path} is truncated or damaged: storage {key!r} of {stored} elements at byte {at} of {size}; copy it again")
        places[key] = (at + 8, count * dtype.itemsize)
        at += 8 + count * dtype.itemsize
    file.seek(begin)
    return Machine(path, places).run(file)


def named_tensors(tree, path):
    """Dotted name -> ``Tensor`` of all tensors in what ``read_torch`` gave. Numbers and strings are left out, shared containers come once."""
    out, seen, todo = {}, set(), [("", tree)]
    while todo:
        name, value = todo.pop()
        if isinstance(value, Tensor):
            if name in out:
                raise TorchFileError(f"{path} holds two tensors called {name!r}")
            out[name] = value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            todo += reversed([(f"{name}.{key}" if name else str(key), inner) for key, inner in items])
    return out
