"""Safetensors files: the dtypes they may hold, and a whole one as numpy arrays."""

import pathlib

import ml_dtypes
import numpy as np
from safetensors import deserialize

DTYPES = {  # of the files, by their names
    "BOOL": np.bool_, "U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64, "I8": np.int8, "I16": np.int16, "I32": np.int32,
    "I64": np.int64, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip


def read_file(path):
    """Name -> numpy array of a safetensors file. Raises ``SafetensorError`` for a damaged one, ``KeyError`` for a dtype not in ``DTYPES``."""
    return {name: np.frombuffer(x["data"], DTYPES[x["dtype"]]).reshape(x["shape"]) for name, x in deserialize(pathlib.Path(path).read_bytes())}
