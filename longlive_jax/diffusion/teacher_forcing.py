"""The autoregressive objective: clean history and noisy targets in one forward (spec/model.md §2, spec/training.md §1).

Under a sequence mesh the two streams are interleaved shard by shard (Balanced SP): every shard owns as many clean as noisy frames, its own VAE
window and its own part of the loss. Nothing is put back in order; the loss weighs rows by ``frames.noisy`` and is a sum of numerators over a
sum of denominators.
"""

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.model.frames import clip_frames, interleave, pytree, teacher_forcing, unweave, weave


@pytree()
class Corruption:
    """What one training step feeds the model, per frame. All latents are ``[B,F,h,w,C]``."""

    clean: jax.Array  # clean history as the model sees it
    clean_t: jax.Array  # [B,F] its times, 0 unless the history is noised on purpose
    noisy: jax.Array
    t: jax.Array  # [B,F], one value per chunk; 0 for given frames
    target: jax.Array  # velocity
    weight: jax.Array  # [B,F] loss weight, 0 for given or padded frames
    counted: jax.Array  # [B,F] what a frame adds to the denominator


def expand(x):
    return x[..., None, None, None]


def corrupt(clean, noise, sigma, t, *, weight=None, mask=None, history=None, history_t=None, errors=None, given=None):
    """Noisy latents, targets and weights of a step.

    ``clean``, ``noise`` ``[B,F,h,w,C]``; ``sigma``, ``t``, ``weight``, ``mask`` ``[B,F]``. ``history``: another clean half (noised or with
    recycled errors), at times ``history_t``. ``errors = (latent, noise)``: recycled errors added to the latents that are noised (not to
    the target's) and to the noise (also the target's). ``given``: bool ``[F]`` or ``[B,F]``, frames that are known (image to video): t = 0, no
    noise, zero target, out of numerator and denominator.
    """
    latent_error, noise_error = (0.0, 0.0) if errors is None else errors
    noise = noise + noise_error
    s = expand(sigma)
    noisy = (1 - s) * (clean + latent_error) + s * noise
    target = noise - clean
    history = clean if history is None else history
    history_t = jnp.zeros_like(t) if history_t is None else history_t
    counted = jnp.ones_like(t) if mask is None else mask.astype(t.dtype)
    if given is not None:
        given = jnp.broadcast_to(given, t.shape)
        t, history_t, counted = jnp.where(given, 0.0, t), jnp.where(given, 0.0, history_t), jnp.where(given, 0.0, counted)
        noisy, history = jnp.where(expand(given), clean, noisy), jnp.where(expand(given), clean, history)
        target = jnp.where(expand(given), 0.0, target)
    weight = counted if weight is None else weight * counted
    return Corruption(clean=history, clean_t=history_t, noisy=noisy, t=t, target=target, weight=weight, counted=counted)


def predict(model, step, text, *, chunk, time=None, prompt=None, past=None, shards=1, visible=teacher_forcing, remat=False):
    """Velocity of both streams ``[B,2F,h,w,C]`` in interleaved order, and the frames in that order.

    ``text``: ``model.read`` of one row per chunk (or what ``prompt [B,F]`` says); ``past [B,F]``: the rows that the clean history reads, where
    they are others (``rebuilt``); ``time [B,F]`` rotary time, 0, 1, ... by default; ``visible``: a visibility rule, ``teacher_forcing`` or a
    narrower one.
    """
    batch, n = step.t.shape
    rows = {False: prompt if past is None else past, True: prompt}
    frames = interleave(*(clip_frames(batch, n, chunk, time=time, prompt=row, noisy=noisy) for noisy, row in rows.items()), shards)
    z, t = weave(step.clean, step.noisy, shards), weave(step.clean_t, step.t, shards)
    v, _ = model(z, t, text, frames, visible(frames, frames), remat=remat)
    return v, frames


def rebuilt(change, cut):
    """The chunk ``[B,chunks]`` whose prompt a chunk reads in a memory that was rebuilt at the last change inside its shot; its own without one.

    ``change``, ``cut`` bool ``[B,chunks]``: the prompt changes inside a shot; a later shot begins. As ``rollout.recache``: what is held of a
    shot, sinks too, reads the new prompt, earlier shots keep theirs. It is exact while all of the shot is held (spec/inference.md §2.7). A
    chunk before the change must have no loss: its history speaks of the future.
    """
    shot, own = jnp.cumsum(cut, 1), jnp.arange(cut.shape[1])
    changes = change[:, None] & (shot[:, :, None] == shot[:, None])  # [B, of a chunk, at a chunk]
    return jnp.maximum(own, jnp.where(changes, own, 0).max(2))


def loss_of(velocity, frames, step, shards=1):
    """Weighted mean squared velocity error and, apart, its numerators ``[B,2F]`` (zero for clean rows).

    The loss is ``sum(mse * weight) / max(1, sum(counted))`` over noisy rows; a row's mse is its mean over h, w, C in float32.
    """
    noisy = jnp.asarray(np.asarray(frames.noisy), jnp.float32)
    both = lambda x: weave(jnp.zeros_like(x), x, shards)
    error = velocity.astype(jnp.float32) - both(step.target).astype(jnp.float32)
    numerator = jnp.mean(error * error, (2, 3, 4)) * both(step.weight) * noisy
    return numerator.sum() / jnp.maximum(1.0, step.counted.sum()), numerator


def noisy_rows(x, shards=1):
    """The noisy stream of interleaved rows, in time order; for reports, not for the loss."""
    return unweave(x, shards)[1]


def chunk_draws(key, batch, chunks, chunk, sample):
    """``sample(key, (batch, chunks))`` repeated over the frames of a chunk -> ``[B,F]``."""
    return jnp.repeat(sample(key, (batch, chunks)), chunk, axis=1)
