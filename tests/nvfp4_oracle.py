"""NVFP4, FP8 and their products written out once more, in numpy: the scalar steps in float32 as stated, every sum in float64."""

import ml_dtypes
import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
SIGNS = [1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1]


def static_6(x, square=False):
    """What ``x [rows, K]`` is after quantisation by the rule static_6, float64 (spec/inference.md §4.5)."""
    f, one = np.float32, np.float32(1)
    x = np.asarray(x, f)
    rows = 16 if square else 1
    blocks = x.reshape(x.shape[0] // rows, rows, -1, 16)
    amax = np.abs(x).max()
    encode = f(6 * 448) / amax
    scale = (np.abs(blocks).max((1, 3), keepdims=True) / f(6) * encode).astype(ml_dtypes.float8_e4m3fn).astype(f)
    y = blocks * (one / (one / encode * np.where(scale == 0, one, scale)))
    codes = np.where(scale == 0, 0, y).astype(ml_dtypes.float4_e2m1fn).astype(f)
    return (codes.astype(float) * scale * (amax / f(6 * 448))).reshape(x.shape)


def nvfp4(codes, scales, scale):
    """What stored codes stand for, float64."""
    codes = np.asarray(codes)
    values = E2M1[np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1)]
    return values * np.repeat(np.asarray(scales).astype(float), 16, -1) * float(scale)


def fp8(x):
    """What the rows of ``x`` are after quantisation to e4m3, float64."""
    x = np.asarray(x, np.float32)
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(448)
    return (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(float) * scale


def hadamard(x):
    """Groups of 16 of the last axis times the signed Hadamard matrix, float64: entry (i, j) is sign_i (-1)^popcount(i & j) / 4."""
    h = np.array([[SIGNS[i] * (-1) ** bin(i & j).count("1") / 4 for j in range(16)] for i in range(16)])
    return (np.asarray(x, float).reshape(*x.shape[:-1], -1, 16) @ h).reshape(x.shape)


def error(found, expected):
    """Relative error in the Euclidean norm."""
    return np.linalg.norm(np.asarray(found, float) - expected) / np.linalg.norm(expected)
