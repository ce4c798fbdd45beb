"""A given video as the start of one that goes on: its frames are encoded and remembered chunk by chunk, as if they had been generated.

The encoder and the decoder carry what they need from piece to piece, so a prefix of any length takes the memory of one chunk. The decoder
plays the prefix too, because the first new frame joins on to its carry.
"""

import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.config import require
from longlive_jax.model.vae import to_uint8
from longlive_jax.streaming.programs import encode_piece
from longlive_jax.streaming.schedules import cuts, one_a_chunk

log = logging.getLogger("longlive_jax")


def extend(session, video, prompts, seed, batch, shown):
    """``Session.extend``."""
    e, vae = session.experiment, session.vae
    require(vae is not None, "this session has no VAE, so it cannot read a video; use remember for latents")
    vae.check_encoder()
    session.check_batch(seed, batch)
    sizes = vae.pixel_frames(True, e.stream.chunk), vae.pixel_frames(False, e.stream.chunk)
    told = prompts if isinstance(prompts, str) else list(one_a_chunk(prompts, batch))
    session.check([told] if isinstance(told, str) else told)
    if isinstance(video, np.ndarray | jax.Array | list | tuple):
        check_prompts(told, count_chunks(len(video), sizes))
    state, carry, encoder, index = session.start(seed, batch), session.decode_start(), vae.encode_start(1, e.grid), 0
    for index, part in enumerate(whole_chunks(map(session.check_image, video), sizes), 1):
        check_prompts(told, index, more=True)
        prompt = told if isinstance(told, str) else told[index - 1]
        encoder, z = encode_chunk(vae, encoder, part)
        cut = cuts(prompt, e.stream.cut_prefix, index - 1)
        state = session.remember(state, jax.device_get(z), session.read(prompt), cut=cut)
        carry, pixels = session.decode_step(carry, z)
        if shown is not None:
            shown(np.asarray(to_uint8(pixels))[0, -len(part) :])
    check_prompts(told, index)
    return state, jax.tree.map(lambda x: jnp.repeat(x, batch, 0) if x.ndim else x, carry)


def count_chunks(frames, sizes):
    """Whole chunks in a video of so many pixel frames; ``sizes``: the frames of a first chunk and of a later one. Refuses less than one."""
    first, later = sizes
    require(
        frames >= first,
        f"the video has {frames} pixel frames and the first chunk takes {first} (each further one {later}); give at least {first} frames",
    )
    return 1 + (frames - first) // later


def whole_chunks(frames, sizes):
    """``frames``, an iterator of uint8 ``[H,W,3]``, in lists of whole chunks; says in the log how many are left over at the end."""
    done, size = 0, sizes[0]
    while len(part := list(itertools.islice(frames, size))) == size:
        yield part
        done, size = done + size, sizes[1]
    count_chunks(done + len(part), sizes)
    if part:
        log.warning("the video's last %d frames do not fill a chunk of %d and are dropped: it goes on after frame %d", len(part), size, done)


def check_prompts(told, chunks, more=False):
    """Refuse a list of prompts that is not one per chunk; ``more``: chunks may follow."""
    if not isinstance(told, str):
        ok = len(told) >= chunks if more else len(told) == chunks
        least = "at least " if more else ""
        require(ok, f"{len(told)} prompts for {least}{chunks} chunks of the given video; give one for each, or one string for all")


def encode_chunk(vae, carry, part):
    """``(carry, latents [1,F,h,w,C])`` of a chunk's frames, a latent at a time; before a first chunk's single frame come copies of it."""
    stride = vae.config.time_stride
    lead = -len(part) % stride
    frames = np.stack(part[:1] * lead + part)
    latents = []
    for piece in np.split(frames, len(frames) // stride):
        carry, z = encode_piece(vae, carry, piece[None])
        latents.append(z)
    return carry, jnp.concatenate(latents, 1)


__all__ = ["extend"]
