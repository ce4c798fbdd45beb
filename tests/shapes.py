"""Shape checks in tests: the annotations of the numerical packages are enforced by an import hook; production runs without it."""

import beartype
from jaxtyping import install_import_hook

CHECKED = ("longlive_jax.model", "longlive_jax.ops", "longlive_jax.diffusion")


def check(function):
    """Beartype for every function but ``__init__``: fields of a pytree also hold shardings, paths or None while JAX maps over it."""
    return function if function.__name__ == "__init__" else beartype.beartype(function)


def install():
    """Check ``CHECKED`` from their first import on; call it before anything imports them."""
    install_import_hook(CHECKED, f"{__name__}.check")
