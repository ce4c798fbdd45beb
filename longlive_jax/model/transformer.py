"""The video diffusion transformer of LongLive-2.0 / Wan2.2-TI2V-5B: one forward, what a mode changes is data (spec/model.md §1).

Teacher forcing, causal and bidirectional passes, streaming with a memory, image conditioning and prompt switches differ only in the
arguments ``frames``, ``visible``, ``memory`` and ``t``.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longlive_jax.config import require
from longlive_jax.model import memory as slots_of
from longlive_jax.model import rope
from longlive_jax.model.frames import pytree
from longlive_jax.model.layers import MLP, Affine, Linear, RMSNorm
from longlive_jax.ops.attention import attend, attend_filled, dense, flat, pick
from longlive_jax.ops.low_precision import Rows
from longlive_jax.ops.norm import RESIDUAL, layer_norm, normed
from longlive_jax.sharding import axis_size, constrain, frames_to_heads, heads_to_frames, local

FRAMES = ("batch", "frames", None, None, None)  # [B,F,T,N,Dh], frames sharded
HEADS = ("batch", None, None, "heads", None)  # [B,F,T,N,Dh], heads sharded
BATCH = ("batch",)


@pytree()
class Call:
    """What all blocks of one forward share."""

    modulation: jax.Array  # [B,F,6,D]
    cos: jax.Array  # [B,F,T,Dh/2] rotary of the own frames
    sin: jax.Array
    reads: jax.Array | None  # [B,F,P] one-hot: the text row of each frame; None when there is one row
    slots: jax.Array | None  # [B,F] where own keys go in the memory
    count: jax.Array | None  # [B] filled slots
    read_cos: jax.Array | None  # [B,S,T,Dh/2] rotary of the slots, relative mode
    read_sin: jax.Array | None


class SelfAttention(nnx.Module):
    """Full attention over the frames that are visible; frames -> heads -> frames by two all-to-alls under a sequence mesh."""

    def __init__(self, config, *, rngs, attention=None):
        d = config.dim
        self.q, self.k, self.v, self.o = (Linear(d, d, rngs=rngs) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(d, config.eps, apart=True), RMSNorm(d, config.eps, apart=True)
        self.heads, self.attention = config.heads, attention

    def __call__(self, x: Float[Array, "B F T D"] | Rows, call, visible, layer):
        split = lambda y: y.reshape(*y.shape[:-1], self.heads, -1)
        q, k, v = split(self.norm_q(self.q(x))), split(self.norm_k(self.k(x))), split(self.v(x))
        q = rope.rotate(q, call.cos, call.sin)
        if call.read_cos is None:
            k = rope.rotate(k, call.cos, call.sin)
        if layer is None:
            y = local(lambda q, k, v: self.among(q, k, v, visible), (FRAMES,) * 3, FRAMES)(q, k, v)
        else:
            body = local(
                self.remembering,
                (FRAMES, FRAMES, FRAMES, HEADS, BATCH, BATCH, BATCH, BATCH),
                (FRAMES, (HEADS, HEADS)),
            )
            y, layer = body(q, k, v, layer, call.slots, call.count, call.read_cos, call.read_sin)
        return self.o(y.reshape(*y.shape[:-2], -1)), layer

    def exchange(self, q, k, v):
        """Local frames of all heads to all frames of local heads, q, k and v in one all-to-all."""
        if axis_size("frames") == 1:
            return q, k, v
        q, k, v = frames_to_heads(jnp.stack([q, k, v]), frames=2, heads=4)
        return q, k, v

    def among(self, q, k, v, visible):
        q, k, v = self.exchange(q, k, v)
        return heads_to_frames(attend(q, k, v, visible, self.attention), frames=1, heads=3)

    def remembering(self, q, k, v, layer, slots, count, read_cos, read_sin):
        q, k, v = self.exchange(q, k, v)
        layer = slots_of.write(layer, slots, k, v)
        keys, values = slots_of.read(layer, slots, k, v)
        keys = keys if read_cos is None else rope.rotate(keys, read_cos, read_sin)
        y = attend_filled(q, keys, values, count, self.attention)
        return heads_to_frames(y, frames=1, heads=3), layer


class CrossAttention(nnx.Module):
    """Each frame reads one row of the text; padded text rows are read too, as the checkpoints were trained (spec/names.md §7)."""

    def __init__(self, config, *, rngs, attention=None):
        d = config.dim
        self.q, self.k, self.v, self.o = (Linear(d, d, rngs=rngs) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(d, config.eps), RMSNorm(d, config.eps)
        self.heads, self.attention = config.heads, attention

    def read(self, text: Float[Array, "B P M D"]):
        """Keys and values ``[B,P,M,N,Dh]`` of embedded text."""
        split = lambda y: y.reshape(*y.shape[:-1], self.heads, -1)
        return split(self.norm_k(self.k(text))), split(self.v(text))

    def __call__(self, x: Float[Array, "B F T D"] | Rows, text, call):
        q = self.norm_q(self.q(x))
        q = q.reshape(*q.shape[:-1], self.heads, -1)
        rows = BATCH if call.reads is None else ("batch", "frames")
        y = local(self.look_up, (FRAMES, BATCH, BATCH, rows), FRAMES)(q, *text, call.reads)
        return self.o(y.reshape(*y.shape[:-2], -1))

    def look_up(self, q, k, v, reads):
        name = pick(self.attention, q.dtype)
        name = "xla" if name == "reference" else name
        if reads is None:  # one text row for all frames: one call per sample
            return dense(flat(q), k[:, 0], v[:, 0], name).reshape(q.shape)
        own = (
            lambda y: jnp.einsum(  # the row of each frame; a product, because the gradient of a gather is a slow scatter
                "bfp,bpmnd->bfmnd", reads.astype(y.dtype), y, precision=jax.lax.Precision.HIGHEST
            ).reshape(-1, *y.shape[2:])
        )
        y = dense(q.reshape(-1, *q.shape[2:]), own(k), own(v), name)
        return y.reshape(q.shape)


class Block(nnx.Module):
    """Self-attention, cross-attention and MLP; shift, scale and gate per frame (spec/model.md §1.3)."""

    def __init__(self, config, *, rngs, attention=None):
        d = config.dim
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (6, d)) * d**-0.5)
        self.self_attn = SelfAttention(config, rngs=rngs, attention=attention)
        self.norm3 = Affine(d)
        self.cross_attn = CrossAttention(config, rngs=rngs, attention=attention)
        self.ffn = MLP(d, config.ffn_dim, d, rngs=rngs)
        self.eps = config.eps

    def __call__(self, x: Float[Array, "B F T D"], text, layer, call, visible):
        m = self.modulation[...].astype(x.dtype) + call.modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = (m[:, :, None, i] for i in range(6))
        attn, cross = self.self_attn, self.cross_attn
        with jax.named_scope("self_attn"):
            x, h = self.before((attn.q, attn.k, attn.v), x, 1 + scale1, shift1)
            y, layer = attn(h, call, visible, layer)
        with jax.named_scope("cross_attn"):
            x, h = self.before((cross.q,), x, *self.norm3(x.dtype), y, gate1)
            y = cross(h, text, call)
        with jax.named_scope("ffn"):
            x, h = self.before((self.ffn.up,), x, 1 + scale2, shift2, y)
            x = constrain(x + self.ffn(h) * gate2, *RESIDUAL)
        return x, layer

    def before(self, linears, x, multiplier, addend, y=None, gate=None):
        """``x + y * gate``, and what ``linears`` read of it (``ops.norm.normed``)."""
        return normed([a.weight.get_value() for a in linears], x, multiplier, addend, self.eps, y, gate)


class Head(nnx.Module):
    """Final modulation and projection to patches."""

    def __init__(self, config, outputs, *, rngs):
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (2, config.dim)) * config.dim**-0.5)
        self.head = Linear(config.dim, outputs, rngs=rngs, std=0.0)
        self.eps = config.eps

    def __call__(self, x: Float[Array, "B F T D"], e: Float[Array, "B F D"]):
        m = self.modulation[...].astype(x.dtype) + e[:, :, None]
        return self.head(layer_norm(x, self.eps) * (1 + m[:, :, None, 1]) + m[:, :, None, 0])


class VideoTransformer(nnx.Module):
    """Velocity field of the latent frames of a call.

    ``attention`` names the implementation of ``ops.attention`` (None: automatic).
    """

    def __init__(self, config, *, rngs, attention=None):
        d, (p, q) = config.dim, config.patch
        self.patch_embedding = Linear(config.channels * p * q, d, rngs=rngs)
        self.text_embedding = MLP(config.text_dim, d, d, rngs=rngs)
        self.time_embedding = MLP(config.freq_dim, d, d, "silu", rngs=rngs)
        self.time_projection = Linear(d, 6 * d, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs, attention=attention) for _ in range(config.layers)])
        self.head = Head(config, config.channels * p * q, rngs=rngs)
        self.config = config

    def read(self, text: Float[Array, "B P M E"]):
        """Keys and values of every layer for text embeddings, padded with zeros to ``text_len`` rows; made once per prompt."""
        require(
            text.shape[2] == self.config.text_len,
            f"text has {text.shape[2]} rows and the model reads transformer.text_len={self.config.text_len}; pad with zero rows",
        )
        rows = self.text_embedding(text.astype(self.patch_embedding.bias[...].dtype))
        if isinstance(self.blocks, Block):
            return jax.lax.map(lambda block: block.cross_attn.read(rows), self.blocks)
        return tuple(block.cross_attn.read(rows) for block in self.blocks)

    def __call__(
        self,
        z: Float[Array, "B F h w C"],
        t: Float[Array, "B F"],
        text,
        frames,
        visible=None,
        *,
        memory=None,
        slots=None,
        remat=False,
    ):
        """Velocity ``[B,F,h,w,C]`` of latents ``z`` at times ``t`` (0..1000), and the memory.

        ``text``: from ``read``. ``visible``: Bool[F,F] from a rule, without a memory. With a memory, own keys and values are written into
        ``slots [B,F]`` and every query sees all filled slots. ``remat``: recompute each block in the backward pass.
        """
        require(
            (memory is None) != (visible is None),
            "give either visible (frames of this call see each other) or memory and slots",
        )
        dtype = self.patch_embedding.bias[...].dtype
        grid = z.shape[2] // self.config.patch[0], z.shape[3] // self.config.patch[1]
        x = constrain(self.patch_embedding(patchify(z.astype(dtype), self.config.patch)), *RESIDUAL)
        e = self.time_embedding(rope.sinusoid(t.astype(jnp.float32), self.config.freq_dim).astype(dtype))
        modulation = self.time_projection(jax.nn.silu(e)).reshape(*e.shape[:2], 6, -1)
        call = self.prepare(modulation, text, frames, grid, memory, slots)
        layers = [None] * self.config.layers if memory is None else memory.layers
        x, layers = through(self.blocks, x, text, layers, call, visible, remat)
        out = unpatchify(self.head(x, e), grid, self.config.patch)
        return out, None if memory is None else replace(memory, layers=tuple(layers))

    def prepare(self, modulation, text, frames, grid, memory, slots):
        """The ``Call`` of this forward."""
        head_dim, relative = self.config.head_dim, memory is not None and memory.relative
        time, read_cos, read_sin = frames.time, None, None
        if relative:
            rank = slots_of.rank(memory)
            time = jnp.take_along_axis(rank, slots, 1)
            read_cos, read_sin = rope.rotation(rank, grid, head_dim)
        cos, sin = rope.rotation(time, grid, head_dim)
        prompts = jax.tree.leaves(text)[0].shape[-4]
        reads = None if prompts == 1 else jax.nn.one_hot(frames.prompt, prompts)
        count = None if memory is None else memory.count
        return Call(
            modulation=modulation,
            cos=cos,
            sin=sin,
            reads=reads,
            slots=slots,
            count=count,
            read_cos=read_cos,
            read_sin=read_sin,
        )


def through(blocks, x, text, layers, call, visible, remat):
    """All blocks in order. A list is unrolled (streaming: one buffer a layer, updated in place); a stacked block is scanned (training).

    Scanning copies every layer's memory, so it is for small models, whose programs then compile in a fraction of the time.
    """
    step = jax.jit(lambda block, x, text, layer, call: block(x, text, layer, call, visible), inline=True)  # traced once for all blocks
    if remat:
        step = jax.checkpoint(step, policy=jax.checkpoint_policies.nothing_saveable)
    if isinstance(blocks, Block):
        stacked = stack(layers)
        x, stacked = jax.lax.scan(lambda x, rows: step(rows[0], x, *rows[1:], call), x, (blocks, text, stacked))
        return x, [jax.tree.map(lambda y, i=i: y[i], stacked) for i in range(len(layers))]
    out = []
    for i, (block, layer) in enumerate(zip(blocks, layers, strict=True)):
        with jax.named_scope(f"block_{i}"):
            x, layer = step(block, x, text[i], layer, call)
        out.append(layer)
    return x, out


def stack_blocks(model):
    """The same model with its blocks stacked on a leading axis, so that ``through`` scans them: small programs for deep models."""
    stacked = nnx.clone(model)
    stacked.blocks = stack(model.blocks)
    return stacked


def stack(trees):
    """Trees that are alike as one, on a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def patchify(z: Float[Array, "B F h w C"], patch) -> Float[Array, "B F T P"]:
    """Patches as vectors, channel-major (c, row, column), as the patch convolution's weights are."""
    b, f, h, w, c = z.shape
    p, q = patch
    return z.reshape(b, f, h // p, p, w // q, q, c).transpose(0, 1, 2, 4, 6, 3, 5).reshape(b, f, (h // p) * (w // q), c * p * q)


def unpatchify(x: Float[Array, "B F T P"], grid, patch) -> Float[Array, "B F h w C"]:
    """Inverse for the head's vectors, which are channel-minor (row, column, c)."""
    b, f = x.shape[:2]
    (h, w), (p, q) = grid, patch
    return x.reshape(b, f, h, w, p, q, -1).transpose(0, 1, 2, 4, 3, 5, 6).reshape(b, f, h * p, w * q, -1)
