"""The compiled functions of a session, shared by all sessions: what differs between calls is data. ``weights``: a ``deferred`` transformer."""

import functools

import jax
import jax.numpy as jnp

from longlive_jax.diffusion.rollout import next_chunk, recache, remember_chunk, start_stream
from longlive_jax.model.text import encode_prompts

# Read where the platform is a GPU. cuBLASLt adds the bias in every product and applies GELU in the one before it, which Triton's products leave
# to passes of their own; products that share their input stay apart, for joining them copies their weights in every forward.
STEP = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}
# Convolutions in the order of the arrays, channels last, which is also that of cuDNN's fast kernels: no pass turns anything round. Level 2
# leaves out the checks of cuDNN's candidates against each other, which on arrays of gigabytes take minutes.
VAE = {"xla_gpu_force_conv_nhwc": True, "xla_gpu_autotune_level": 2}


@functools.partial(jax.jit, static_argnames=("experiment", "guided"))
def first_state(seeds, *, experiment, guided):
    """The state before the first chunk of samples with ``seeds [B]``: one program, where array by array would be one each."""
    e = experiment
    keys = jax.vmap(jax.random.key)(seeds)
    return start_stream(e.transformer, e.stream, keys, len(seeds), e.tokens, jnp.dtype(e.dtype), guided, e.grid)


@functools.partial(jax.jit, static_argnames=("batch", "grid"))
def first_carry(vae, *, batch, grid):
    """The decoder's carry before a video, likewise."""
    return vae.decode_start(batch, grid)


@functools.partial(jax.jit, static_argnames=("stream", "shape"), donate_argnames=("state",), compiler_options=STEP)
def advance(weights, solver, state, text, negative, cut, guidance, noise, given, *, stream, shape):
    """The next chunk of latents ``[B,F,h,w,C]``; noise is drawn from the state's keys unless given."""
    if noise is None:
        noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, state.chunk), shape))(state.key)
    return next_chunk(weights(), solver, stream, state, noise, text, cut=cut, negative=negative, guidance=guidance, given=given)


@functools.partial(jax.jit, static_argnames=("stream",), donate_argnames=("state",), compiler_options=STEP)
def take_in(weights, state, z, text, negative, cut, *, stream):
    """The state after a chunk of known latents ``z [B,F,h,w,C]``."""
    return remember_chunk(weights(), stream, state, z, text, cut=cut, negative=negative)


@functools.partial(jax.jit, static_argnames=("stream",), donate_argnames=("state",), compiler_options=STEP)
def rebuild(weights, state, text, changed, *, stream):
    """The state with the current shot under another prompt, where ``changed [B]``."""
    return recache(weights(), stream, state, text, changed=changed)


@jax.jit
def embed_prompts(encoder, ids, mask):
    return encode_prompts(encoder, ids, mask)


@jax.jit
def read_rows(transformer, embeddings):
    return transformer.read(embeddings)


@functools.partial(jax.jit, donate_argnames=("carry",), compiler_options=VAE)
def decode_chunk(vae, carry, z):
    return vae.decode_step(carry, z)


@functools.partial(jax.jit, compiler_options=VAE)
def encode_clip(vae, video):
    return vae.encode(video)


@functools.partial(jax.jit, donate_argnames=("carry",), compiler_options=VAE)
def encode_piece(vae, carry, pixels):
    """The next latent ``[B,1,h,w,C]`` of a video, from its uint8 frames ``[B,4,H,W,3]``."""
    return vae.encode_step(carry, pixels.astype(jnp.float32) / 127.5 - 1)
