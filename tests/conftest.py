"""Eight fake CPU devices, exact float32 matmuls and checked shapes for every test; slow tests run last."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from tests import shapes

jax.config.update("jax_default_matmul_precision", "highest")
shapes.install()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
