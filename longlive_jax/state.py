"""Training state as a value: float32 masters, optimizer, EMA; one function that makes the next state from gradients.

``params`` are nested one deep, part -> dotted path -> array, e.g. ``{"transformer": {...}, "text": {...}}``: what is trained. The optimizer
works on leaves stacked by shape (``Groups``): a few large kernels in place of hundreds of small ones.
"""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.model.frames import pytree

MATRIX = re.compile(r"blocks\.\d+\..*\.weight")  # of two axes: what Muon takes
LEAST_MATRIX = 16  # rows and columns of the smallest one


@pytree()
class TrainState:
    """Everything that changes in training; nothing else is needed to go on."""

    step: jax.Array  # [] int32, steps done
    params: dict  # part -> path -> float32
    ema: dict  # like params
    optimizer: tuple


# ---- groups of equal leaves ----------------------------------------------------------------------------------------------------------------


def groups_of(params):
    """Name -> [(part, path)] of leaves that are stacked: one group per part, shape and kind ("matrix" or "other")."""
    out = {}
    for part, leaves in params.items():
        for path, x in leaves.items():
            matrix = x.ndim == 2 and min(x.shape) >= LEAST_MATRIX and MATRIX.fullmatch(path)
            name = f"{part}/{'matrix' if matrix else 'other'}/{'x'.join(map(str, x.shape)) or 'scalar'}"
            out.setdefault(name, []).append((part, path))
    return out


def pack(tree, groups):
    """``params``-like tree -> group name -> ``[n, ...]``."""
    return {name: jnp.stack([tree[part][path] for part, path in members]) for name, members in groups.items()}


def unpack(packed, groups):
    """The inverse of ``pack``."""
    out = {}
    for name, members in groups.items():
        for i, (part, path) in enumerate(members):
            out.setdefault(part, {})[path] = packed[name][i]
    return out


# ---- optimizer -----------------------------------------------------------------------------------------------------------------------------


def learning_rate(config, done):
    """Rate when the share ``done`` in 0..1 of the run is behind: linear warm-up, plateau, linear decay to 0."""
    rise = jnp.minimum(1.0, done / config.warmup) if config.warmup else 1.0
    fall = jnp.clip((1 - done) / config.decay, 0, 1) if config.decay else 1.0
    return config.lr * rise * fall


def make_optimizer(config):
    """The optax transformation of an ``OptimizerConfig``, of packed trees and for a learning rate of 1."""
    if config.kind == "adamw":
        inner = optax.adamw(
            1.0,
            config.b1,
            config.b2,
            weight_decay=config.weight_decay,
            mask=lambda packed: {name: x.ndim > 2 for name, x in packed.items()},  # gains and biases are not decayed
        )
    else:
        matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=2, output_axis=1)
        inner = optax.contrib.muon(
            1.0,
            adam_b1=config.b1,
            adam_b2=config.b2,
            weight_decay=config.weight_decay,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=lambda packed: {name: matrix if "/matrix/" in name else None for name in packed},
        )
    return inner


def init_state(params, optimizer):
    """The state before the first step, of copies: a step may take the state's memory and leave ``params``."""
    copy = lambda: jax.tree.map(jnp.copy, params)
    return TrainState(step=jnp.int32(0), params=copy(), ema=copy(), optimizer=optimizer.init(pack(params, groups_of(params))))


def next_state(state, grads, optimizer, config, total):
    """The state after a step with ``grads``, in a run of ``total`` steps (may be traced), and what to report: lr, grad_norm."""
    groups = groups_of(grads)
    grads = pack(grads, groups)
    norm = optax.tree.norm(grads)
    grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, config.clip / (norm + 1e-6)), grads)
    updates, inner = optimizer.update(grads, state.optimizer, pack(state.params, groups))
    lr = learning_rate(config, (state.step + 0.5) / total)
    params = jax.tree.map(lambda p, u: p + lr * u, state.params, unpack(updates, groups))
    n = state.step.astype(jnp.float32) + 1
    keep = jnp.minimum(config.ema, (1 + n) / (10 + n))  # short memory at first
    ema = jax.tree.map(lambda e, p: e + (1 - keep) * (p - e), state.ema, params)
    return replace(state, step=state.step + 1, params=params, ema=ema, optimizer=inner), {"lr": lr, "grad_norm": norm}


# ---- where it lives ------------------------------------------------------------------------------------------------------------------------


def state_shardings(abstract, weights, mesh):
    """A ``TrainState`` of ``NamedSharding`` for an abstract state. ``weights``: part -> path -> ``NamedSharding`` of the weights.

    Stacked optimizer leaves follow the first member of their group; everything else is on every device.
    """
    everywhere = NamedSharding(mesh, P())
    members = {name: weights[part][path] for name, ((part, path), *_) in groups_of(abstract.params).items()}

    def of(keys, leaf):
        name = next((k.key for k in reversed(keys) if isinstance(k, jax.tree_util.DictKey) and k.key in members), None)
        return everywhere if name is None or leaf.ndim == 0 else NamedSharding(mesh, P(None, *members[name].spec))

    return TrainState(
        step=everywhere,
        params=weights,
        ema=weights,
        optimizer=jax.tree_util.tree_map_with_path(of, abstract.optimizer),
    )


def with_shardings(abstract, shardings):
    """Abstract arrays that know where they live: what ``checkpoint.restore`` is given."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
