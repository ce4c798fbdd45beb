"""Access to the golden arrays beside the checkout; tests that need them skip where they are absent."""

import pathlib

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2] / "shared"


def shared(*parts):
    """The path ``shared/<parts>``; skips the calling test when it is not there."""
    path = ROOT.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"reference material shared/{'/'.join(parts)} is not beside this checkout")
    return path


def golden(name):
    """The arrays of ``shared/golden/<name>`` as a dict."""
    with np.load(shared("golden", name), allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}
