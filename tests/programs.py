"""The programs whose compiled form is checked, as functions with abstract arguments: nothing of the model's size is ever allocated."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.diffusion.rollout import next_chunk, start_stream
from longlive_jax.diffusion.solvers import make_solver
from longlive_jax.diffusion.teacher_forcing import corrupt, loss_of, predict
from longlive_jax.model.transformer import CrossAttention, VideoTransformer, stack_blocks
from longlive_jax.model.vae import VAE
from longlive_jax.quant.rewrite import published, rewrite
from longlive_jax.sharding import DATA, SEQ, SHARD, TRANSFORMER_RULES, constrain, weight_shardings
from longlive_jax.tree import abstract, cast, flat_params, with_params


def quick(function, **options):
    """``jax.jit`` that spends little on machine code; the arithmetic is the same."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **options)


def place(mesh, tree, *axes):
    """Abstract arrays on ``mesh``, their leading axes split by ``axes``."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(*axes[: x.ndim]))), tree)


def array(mesh, shape, dtype, *axes):
    return place(mesh, jax.ShapeDtypeStruct(shape, dtype), *axes)


def shell(config, dtype, attention=None, stacked=False):
    """A ``VideoTransformer`` without values."""
    model = abstract(lambda: VideoTransformer(config, rngs=nnx.Rngs(0), attention=attention))
    model = jax.eval_shape(functools.partial(cast, dtype=dtype), model)
    return jax.eval_shape(stack_blocks, model) if stacked else model


def loss(model, clean, noise, t, prompts, shards, remat):
    """The teacher-forced loss in Balanced SP order; one prompt a chunk."""
    step = corrupt(clean, noise, t / 1000, t)
    chunk = clean.shape[1] // prompts.shape[1]
    v, frames = predict(model, step, model.read(prompts), chunk=chunk, shards=shards, remat=remat)
    return loss_of(v, frames, step, shards)[0]


def training(mesh, config, grid, dtype, *, batch=2, frames=16, chunks=2, attention=None, stacked=False, gradient=True, masters=False):
    """A teacher-forced pass over clips of ``frames`` latents: the loss or, rematerialised, its gradient with respect to the weights.

    ``masters``: the weights are float32, sharded over the whole mesh, and their copy in ``dtype`` is gathered in the step.
    """
    model = shell(config, jnp.float32 if masters else dtype, attention, stacked and not masters)
    latents = array(mesh, (batch, frames, *grid, config.channels), jnp.float32, DATA, SEQ)
    t = array(mesh, (batch, frames), jnp.float32, DATA, SEQ)
    prompts = array(mesh, (batch, chunks, config.text_len, config.text_dim), dtype, DATA)
    objective = functools.partial(loss, shards=mesh.shape[SEQ], remat=gradient)
    if masters:
        params = flat_params(model)
        shardings = weight_shardings({k: x.shape for k, x in params.items()}, TRANSFORMER_RULES, SHARD, mesh)
        params = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[k]) for k, x in params.items()}

        def with_masters(params, *inputs):
            whole = with_params(model, jax.tree.map(constrain, cast(params, dtype)))
            return objective(stack_blocks(whole) if stacked else whole, *inputs)

        return jax.value_and_grad(with_masters), (params, latents, latents, t, prompts)
    return jax.value_and_grad(objective) if gradient else objective, (place(mesh, model), latents, latents, t, prompts)


def streaming(mesh, config, stream, grid, dtype, *, batch=1, attention=None, guidance=1.0, given=False, steps=4, rules=None):
    """``next_chunk`` and its arguments; the second, the state, is to be donated. ``given``: some frames are known; ``rules`` of ``rewrite``."""
    model = shell(config, dtype, attention)
    model = place(mesh, with_params(model, rewrite(flat_params(model), published(rules))[0]) if rules else model)
    tokens = grid[0] // config.patch[0] * (grid[1] // config.patch[1])
    start = functools.partial(start_stream, config, stream, batch=batch, tokens=tokens, dtype=dtype, guided=guidance != 1.0)
    state = jax.eval_shape(lambda: start(key=jax.random.key(0)))
    heads = lambda layers: place(mesh, layers, DATA, None, None, SEQ)
    split = lambda memory: replace(place(mesh, memory, DATA), layers=heads(memory.layers))
    state = replace(
        place(mesh, state),
        offset=place(mesh, state.offset, DATA),
        memory=split(state.memory),
        unguided=None if state.unguided is None else heads(state.unguided),
    )
    prompt = array(mesh, (batch, 1, config.text_len, config.text_dim), dtype, DATA)
    text = place(mesh, jax.eval_shape(lambda m, p: m.read(p), model, prompt), DATA)
    noise = array(mesh, (batch, stream.chunk, *grid, config.channels), jnp.float32, DATA, SEQ)
    cut = array(mesh, (batch,), bool, DATA)
    known = (noise, array(mesh, (batch, stream.chunk), bool, DATA, SEQ)) if given else None
    solver = make_solver("unipc", steps, 5.0)

    def step(model, state, noise, text, cut, negative, given):
        return next_chunk(model, solver, stream, state, noise, text, cut=cut, negative=negative, guidance=guidance, given=given)

    return step, (model, state, noise, text, cut, None if guidance == 1.0 else text, known)


def cross_gradient(mesh, config, tokens, dtype, *, frames=8, prompts=1, attention=None):
    """The gradient of cross-attention with respect to the keys and values of the text, which every shard of the frames reads."""
    layer = jax.eval_shape(
        functools.partial(cast, dtype=dtype), abstract(lambda: CrossAttention(config, rngs=nnx.Rngs(0), attention=attention))
    )
    x = array(mesh, (2, frames, tokens, config.dim), dtype, DATA, SEQ)
    text = array(mesh, (2, prompts, config.text_len, config.heads, config.head_dim), dtype, DATA)
    reads = array(mesh, (2, frames, prompts), jnp.float32, DATA, SEQ) if prompts > 1 else None

    def total(text, layer, x, reads):
        return jnp.sum(layer(x, text, SimpleNamespace(reads=reads)).astype(jnp.float32) ** 2)

    return jax.grad(total), ((text, text), place(mesh, layer), x, reads)


def decoding(mesh, e, latents):
    """A chunk of ``latents`` of an ``Experiment`` through its VAE's decoder in bfloat16."""
    vae = place(mesh, jax.eval_shape(functools.partial(cast, dtype=jnp.bfloat16), abstract(lambda: VAE(e.vae, rngs=nnx.Rngs(0)))))
    carry = place(mesh, jax.eval_shape(lambda vae: vae.decode_start(1, e.grid), vae))
    z = array(mesh, (1, latents, *e.grid, e.vae.channels), jnp.float32)
    return lambda vae, carry, z: vae.decode_step(carry, z), (vae, carry, z)
