"""Choosing an implementation: strict by name, automatic by None and then said once."""

import functools
import logging

import jax
import jax.extend.backend

log = logging.getLogger("longlive_jax")


@functools.cache
def announce(operation, implementation, platform):
    """Log an automatic choice, once per process."""
    log.info("%s: %s on %s", operation, implementation, platform)


def capability(device=None):
    """Compute capability of a device, by default the default one, 9.0 for a Hopper GPU; 0 for what is no GPU."""
    device = device or jax.extend.backend.get_default_device()
    return float(device.compute_capability) if device.platform == "gpu" else 0.0


def choose(operation, implementation, known, automatic):
    """The implementation to run: ``implementation`` if named, else ``automatic(platform)``.

    Raises ``ValueError`` for a name that is not in ``known``.
    """
    if implementation is None:
        platform = jax.default_backend()
        implementation = automatic(platform)
        announce(operation, implementation, platform)
    if implementation not in known:
        raise ValueError(
            f"{operation} has no implementation {implementation!r}; use one of {', '.join(known)}, or None to choose automatically"
        )
    return implementation
