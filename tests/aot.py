"""Compiled GPU programs for tests on machines without a GPU; see ``aot_compile``.

The plugin is looked for in the environment, then in the folder that ``CUDA_WHEELS`` names. Without it the tests skip; a ``CUDA_WHEELS`` that
does not hold it is an error.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[1]


def wheels():
    """Folders to put on the path of the compiling process; skips the calling test when there is nothing to compile with."""
    named = os.environ.get("CUDA_WHEELS")
    if named:
        if not (Path(named) / "jax_plugins" / "xla_cuda13").is_dir():
            raise FileNotFoundError(f"CUDA_WHEELS={named} holds no jax_plugins/xla_cuda13; install jax-cuda13-plugin and jax-cuda13-pjrt there")
        return [named]
    if find_spec("jax_cuda13_plugin") is None:
        pytest.skip(
            f"compiling for a GPU needs jax-cuda13-plugin and jax-cuda13-pjrt {jax.__version__} and nvidia-cudnn-cu13, here or in $CUDA_WHEELS"
        )
    return []


@functools.cache
def compiled(case):
    """The memory and times of ``aot_compile``'s ``case``, in bytes and seconds, and its HLO under ``text``. Compiled once a session."""
    path = [*wheels(), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(path)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.hlo"
        done = subprocess.run([sys.executable, "-m", "tests.aot_compile", case, path], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        report = json.loads(done.stdout.splitlines()[-1]) | {"text": path.read_text()}
    times = ", ".join(f"{k} {v:.1f}" if k.endswith("_s") else f"{k} {v / 2**30:.3f} GiB" for k, v in report.items() if k != "text")
    print(f"{case}: {times}")
    return report
