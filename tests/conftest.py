"""Eight fake CPU devices, exact float32 matmuls and checked shapes for every test; slow tests run last.

Compiling takes most of the time of the tests, so programs are compiled without optimisation and by the quicker of XLA's emitters (the
arithmetic is the same; the fixture ``optimized`` asks for optimisation where running takes longer), and the processes of a run share them.
"""

import os

from tests import run_folder

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {run_folder.FLAGS}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

from tests import shapes

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_compilation_cache_dir", run_folder.PROGRAMS)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
shapes.install()


@pytest.fixture
def optimized():
    """Programs that are first compiled meanwhile are compiled as outside the tests."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def saved_alike(tmp_path):
    """``(session, state, text) -> path`` of the state as it was saved; read again, it makes the same next chunk."""

    def saved(session, state, text):
        session.save(tmp_path / "state", state)
        loaded, _ = session.load(tmp_path / "state")
        a, b = session.step(session.fork(state), text)[1], session.step(loaded, text)[1]
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        return tmp_path / "state"

    return saved


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A worker takes neighbouring tests, which share fixtures and programs, and then from what the other still has."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getvalue("dist") == "load" else None


def pytest_unconfigure():
    run_folder.remove()
