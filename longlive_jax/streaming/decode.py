"""Pipelined decoding: while the device works on chunk k, a thread brings chunk k - 1 to the host and hands it on.

JAX returns from a jitted call before the device has finished, so decoding overlaps with denoising as soon as nobody waits; the only thread
is the one that does wait. At most ``depth`` chunks are under way, which bounds memory and holds the producer back when the sink is slow.
"""

import collections
import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import NamedSharding

from longlive_jax.config import require
from longlive_jax.model.vae import to_uint8
from longlive_jax.sharding import SEQ, spec

quantize = jax.jit(to_uint8)  # on the device: a quarter of the bytes travels to the host


def placement(mesh, height):
    """Where a decoder's weights live: on all of a mesh if each can decode rows of its own (one row XLA partitions wrongly), or on the first."""
    rows = height / mesh.shape[SEQ]
    return NamedSharding(mesh, spec()) if rows > 1 and rows.is_integer() else mesh.devices.flat[0]


def on_mesh_of(device):
    """The mesh that decodes as context; one device needs none."""
    return jax.set_mesh(device.mesh) if isinstance(device, NamedSharding) else contextlib.nullcontext()


def put(tree, device):
    """A carry or latents where the weights are; on a mesh, samples over ``data`` and the rows of pictures over ``seq``."""
    if isinstance(device, NamedSharding):
        rows = NamedSharding(device.mesh, spec("batch", None, "height"))
        return jax.tree.map(lambda x: jax.device_put(x, rows if x.ndim else device), tree)
    return tree if device is None else jax.device_put(tree, device)


class DecodePipeline:
    """Decode latent chunks in order and give every chunk's frames to ``sink``, in order, from one worker thread.

    step(carry, z [B,f,h,w,C]) -> (carry, pixels [B,T,H,W,3]): jitted; pixels are floats, [-1, 1] in range, or uint8. Pure: it may be shared.
    carry: the decoder's state at the start; afterwards ``self.carry``.
    sink(frames): called with uint8 [B,T,H,W,3]; what it raises is raised again by the next ``submit`` or by ``close``, and no chunk follows.
    depth: chunks under way (submitted, not yet through ``sink``). device: that ``carry`` and the latents are ``put`` on.
    drop: leading pixel frames of the first chunk that are no part of the video (3 for the VAE's first latent frame).
    """

    def __init__(self, step, carry, sink, *, depth=2, device=None, drop=0):
        require(depth >= 1, f"depth={depth} must be at least 1 chunk under way")
        require(drop >= 0, f"drop={drop} must not be negative")
        self.step, self.sink, self.depth, self.device, self.drop = step, sink, depth, device, drop
        self.carry = put(carry, device)
        self.submitted = self.delivered = self.frames = 0  # chunks, chunks, pixel frames of one video that went through the sink
        self.latents_at = 0.0  # time.perf_counter() when the latents of the chunk that is in the sink were computed
        self.fetch_seconds = self.sink_seconds = 0.0  # of the worker: waiting for the device and copying; inside the sink
        self.under_way = collections.deque()
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")
        self.closed = False

    def submit(self, z):
        """Start decoding latents z [B,f,h,w,C]; waits while ``depth`` chunks are under way. Raises what the sink or the device raised."""
        require(not self.closed, f"the pipeline is closed after {self.submitted} chunks; make a new one")
        while self.under_way and (len(self.under_way) >= self.depth or self.under_way[0].done()):
            error = self.settle()
            if error is not None:
                raise error
        z = put(z, self.device)
        self.carry, pixels = self.step(self.carry, z)
        if pixels.dtype != np.uint8:
            pixels = quantize(pixels)
        before = self.under_way[-1] if self.under_way else None
        self.under_way.append(self.worker.submit(self.deliver, before, z, pixels, 0 if self.submitted else self.drop))
        self.submitted += 1

    def settle(self):
        """Wait for the oldest chunk under way; if it failed, end the pipeline and return the error."""
        error = self.under_way[0].exception()
        self.under_way.popleft()
        if error is not None:
            self.abort()
        return error

    def deliver(self, before, z, pixels, drop):
        if before is not None:
            before.result()  # done, this being the only worker; raises if the chunk before failed, so that no gap is written
        start = time.perf_counter()
        jax.block_until_ready(z)
        self.latents_at = time.perf_counter()
        frames = np.asarray(pixels)[:, drop:]
        fetched = time.perf_counter()
        self.sink(frames)
        self.fetch_seconds += fetched - start
        self.sink_seconds += time.perf_counter() - fetched
        self.frames += frames.shape[1]
        self.delivered += 1

    def drain(self):
        """Wait until everything submitted is through the sink, and end the pipeline; returns what failed, or None."""
        error = None
        try:
            while self.under_way:
                error = self.settle()
        finally:
            self.abort()
        return error

    def close(self):
        """Wait until everything submitted is through the sink; raises what failed. A second call does nothing."""
        error = self.drain()
        if error is not None:
            raise error

    def abort(self):
        """Drop what is not yet in the sink; waits only for the call of the sink that is running."""
        self.closed = True
        self.worker.shutdown(wait=True, cancel_futures=True)
        self.under_way.clear()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Drain, also when the producer failed or was interrupted: what was submitted is good. A failure on the way is noted on the first."""
        failure = self.drain()
        if failure is not None and error is None:
            raise failure
        if failure is not None:
            error.add_note(f"decoding failed as well: {failure!r}")
