"""Streaming once more, slowly: float64 numpy and Python lists, from the specification alone, for one sample.

The history is a list of records, one per remembered frame, in time order. Windows, sinks and cuts are list operations, every forward is written
out here, and nothing of the package is called. Keys lie unrotated with the frame that they belong to and are rotated whenever they are read.
"""

import functools
from dataclasses import dataclass, replace

import numpy as np


@dataclass
class Record:
    """One remembered frame."""

    frame: int  # absolute number
    time: float  # rotary time, the shift of its shot added
    shot: int
    latent: np.ndarray  # [h,w,C], clean
    text: np.ndarray  # [M,E] that it was remembered under
    kv: list  # a pair of keys and values [T,N,Dh] for every layer
    unguided: list | None  # the same under the negative text


# ---- the network (spec/model.md §1) --------------------------------------------------------------------------------------------------------


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x * x * x)))


def layer_norm(x, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def rms_norm(p, name, x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p[f"{name}.weight"]


def angles(position, n):
    """Position times the n frequencies of a rotary axis or of a sinusoid."""
    return position * 10000.0 ** (-np.arange(n) / n)


@functools.cache
def turns(time, grid, head_dim):
    """Unit complex numbers ``[T,1,Dh/2]`` by which the tokens of a frame turn: time first, then row, then column (§1.5)."""
    side = head_dim // 6
    axes = [angles(time, head_dim // 2 - 2 * side), [angles(i, side) for i in range(grid[0])], [angles(j, side) for j in range(grid[1])]]
    return np.exp(1j * np.array([[np.concatenate([axes[0], row, column])] for row in axes[1] for column in axes[2]]))


def rotate(x, time, grid):
    """``x [T,N,Dh]`` of a frame at rotary ``time``; adjacent pairs are complex numbers."""
    z = x.view(complex) * turns(time, grid, x.shape[-1])
    return z.view(float)


def softmax_attention(q, k, v):
    """``q [n,N,Dh]`` over keys and values ``[m,N,Dh]``."""
    q, k, v = (x.swapaxes(0, 1) for x in (q, k, v))
    scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights @ v / weights.sum(-1, keepdims=True)).swapaxes(0, 1)


class Network:
    """The transformer as a function of lists of frames; ``params``: dotted names to arrays; ``sizes``: heads, layers, freq_dim, patch, eps."""

    def __init__(self, params, sizes):
        self.p = {name: np.asarray(x, np.float64) for name, x in params.items()}
        self.sizes = sizes

    def qkv(self, name, x, source):
        """Queries of ``x``, keys and values of ``source``, ``[n,N,Dh]``; norms before the heads are split."""
        p, eps = self.p, self.sizes.eps
        split = lambda y: y.reshape(len(y), self.sizes.heads, -1)
        q = rms_norm(p, f"{name}.norm_q", linear(p, f"{name}.q", x), eps)
        k = rms_norm(p, f"{name}.norm_k", linear(p, f"{name}.k", source), eps)
        return split(q), split(k), split(linear(p, f"{name}.v", source))

    def __call__(self, frames, times, past, t, text):
        """Velocities and keys and values of ``frames``, a list of latents ``[h,w,C]``.

        ``times``: rotary times of the past and of the frames, in one list; ``past``: for every past frame its pairs of keys and values;
        ``t``: a time in 0..1000 for every frame; ``text [M,E]``. Every frame sees the past and all of ``frames``.
        """
        p, s = self.p, self.sizes
        grid = frames[0].shape[0] // s.patch[0], frames[0].shape[1] // s.patch[1]
        eps, each = s.eps, lambda y: np.split(y, len(frames))  # rows of all frames, frame by frame
        xs = [linear(p, "patch_embedding", patches(f, s.patch)) for f in frames]
        waves = [angles(ti, s.freq_dim // 2) for ti in t]
        es = [linear(p, "time_embedding.down", silu(linear(p, "time_embedding.up", np.concatenate([np.cos(a), np.sin(a)])))) for a in waves]
        shared = [linear(p, "time_projection", silu(e)).reshape(6, -1) for e in es]
        rows = linear(p, "text_embedding.down", gelu(linear(p, "text_embedding.up", text)))
        own = [[] for _ in frames]
        for i in range(s.layers):
            b = f"blocks.{i}"
            ms = [p[f"{b}.modulation"] + m for m in shared]
            inputs = [layer_norm(x, eps) * (1 + m[1]) + m[0] for x, m in zip(xs, ms)]
            qs = []
            for kv, x in zip(own, inputs):
                q, k, v = self.qkv(f"{b}.self_attn", x, x)
                qs.append(q)
                kv.append((k, v))
            seen = [kv[i] for kv in [*past, *own]]
            keys = np.concatenate([rotate(k, time, grid) for (k, _), time in zip(seen, times)])
            values = np.concatenate([v for _, v in seen])
            q = np.concatenate([rotate(q, time, grid) for q, time in zip(qs, times[len(past) :])])
            ys = each(linear(p, f"{b}.self_attn.o", softmax_attention(q, keys, values).reshape(len(q), -1)))
            xs = [x + y * m[2] for x, y, m in zip(xs, ys, ms)]
            normed = layer_norm(np.concatenate(xs), eps) * p[f"{b}.norm3.weight"] + p[f"{b}.norm3.bias"]
            ys = each(linear(p, f"{b}.cross_attn.o", softmax_attention(*self.qkv(f"{b}.cross_attn", normed, rows)).reshape(normed.shape)))
            xs = [x + y for x, y in zip(xs, ys)]
            inputs = np.concatenate([layer_norm(x, eps) * (1 + m[4]) + m[3] for x, m in zip(xs, ms)])
            ys = each(linear(p, f"{b}.ffn.down", gelu(linear(p, f"{b}.ffn.up", inputs))))
            xs = [x + y * m[5] for x, y, m in zip(xs, ys, ms)]
        heads = [p["head.modulation"] + e for e in es]
        out = [linear(p, "head.head", layer_norm(x, eps) * (1 + m[1]) + m[0]) for x, m in zip(xs, heads)]
        return [pixels(y, grid, s.patch) for y in out], own


def patches(z, patch):
    """``[h,w,C]`` to ``[T, C p q]``: channel, row, column."""
    (h, w, _), (p, q) = z.shape, patch
    return np.array([z[i : i + p, j : j + q].transpose(2, 0, 1).ravel() for i in range(0, h, p) for j in range(0, w, q)])


def pixels(y, grid, patch):
    """``[T, p q C]`` (row, column, channel) to ``[h,w,C]``."""
    rows = [[y[i * grid[1] + j].reshape(*patch, -1) for j in range(grid[1])] for i in range(grid[0])]
    return np.concatenate([np.concatenate(row, 1) for row in rows], 0)


# ---- the solvers (spec/inference.md §1.3) --------------------------------------------------------------------------------------------------


def schedule(steps, shift):
    """Sigmas, ending in 0, and the whole times that the network sees."""
    u = np.linspace(0.999, 0, steps + 1)
    sigmas = shift * u / (1 + (shift - 1) * u)
    return sigmas, np.trunc(1000 * sigmas[:-1])


def euler(velocity, x, steps, shift, hold):
    sigmas, times = schedule(steps, shift)
    for i, t in enumerate(times):
        x = hold(x + (sigmas[i + 1] - sigmas[i]) * velocity(x, t))
    return x


def unipc(velocity, x, steps, shift, hold):
    """Order 2, B(h) = bh2; ``hold`` puts given frames back after every step."""
    sigmas, times = schedule(steps, shift)
    lam = np.append(np.log(1 - sigmas[:-1]) - np.log(sigmas[:-1]), np.inf)
    clean, corrected, order_before = [], x, None
    for i, t in enumerate(times):
        clean.append(x - sigmas[i] * velocity(x, t))
        if i == steps - 1:
            return hold(clean[-1])
        if i > 0:
            h = lam[i] - lam[i - 1]
            scale = (1 - sigmas[i]) * (1 - np.exp(-h))
            if order_before == 1:
                change = 0.5 * (clean[i] - clean[i - 1])
            else:
                r1, z = (lam[i - 2] - lam[i - 1]) / h, -h
                e = np.expm1(z)
                p1 = e / z - 1
                rho = np.linalg.solve([[1, 1], [r1, 1]], [p1 / e, 2 * (p1 / z - 0.5) / e])
                change = rho[0] * (clean[i - 2] - clean[i - 1]) / r1 + rho[1] * (clean[i] - clean[i - 1])
            corrected = sigmas[i] / sigmas[i - 1] * corrected + scale * (clean[i - 1] + change)
        else:
            corrected = x
        order_before = min(2, steps - i, i + 1)
        h = lam[i + 1] - lam[i]
        scale = (1 - sigmas[i + 1]) * (1 - np.exp(-h))
        change = 0.5 * (clean[i - 1] - clean[i]) / ((lam[i - 1] - lam[i]) / h) if order_before == 2 else 0
        x = hold(sigmas[i + 1] / sigmas[i] * corrected + scale * (clean[i] + change))


# ---- streaming (spec/inference.md §1.2, §1.4, §2) ------------------------------------------------------------------------------------------


class Stream:
    """One sample's video. ``stream``, ``sampler``: the numbers of a ``StreamConfig`` and a ``SamplerConfig``; ``negative [M,E]``."""

    def __init__(self, network, stream, sampler, negative=None):
        self.network, self.stream, self.sampler = network, stream, sampler
        self.negative = None if sampler.guidance == 1.0 else np.asarray(negative, np.float64)
        self.history, self.chunk, self.shot, self.pinned = [], 0, 0, []

    def step(self, noise, text, cut=False, given=None):
        """Latents ``[F,h,w,C]`` of the next chunk. ``given``: known latents by the frame's place in the chunk."""
        given = {i: np.asarray(z, np.float64) for i, z in (given or {}).items()}
        own, text = self.enter(cut), np.asarray(text, np.float64)
        self.make_room(len(own))

        def velocity(x, t):
            ts = [0.0 if i in given else t for i in range(len(x))]
            v, _ = self.forward(x, ts, own, text, "kv")
            if self.negative is None:
                return v
            base, _ = self.forward(x, ts, own, self.negative, "unguided")
            return base + self.sampler.guidance * (v - base)

        hold = lambda x: np.array([given.get(i, z) for i, z in enumerate(x)])
        solve = {"unipc": unipc, "euler": euler}[self.sampler.solver]
        z = solve(velocity, hold(np.asarray(noise, np.float64)), self.sampler.steps, self.sampler.shift, hold)
        self.leave(own, z, text, cut)
        return z

    def remember(self, latents, text, cut=False):
        """Take known latents ``[F,h,w,C]`` in as the next chunk."""
        own = self.enter(cut)
        self.make_room(len(own))
        self.leave(own, np.asarray(latents, np.float64), np.asarray(text, np.float64), cut)

    def recache(self, text):
        """What is held of the current shot once more, chunk by chunk in time order, under another text."""
        text, n = np.asarray(text, np.float64), self.stream.chunk
        for first in range(0, len(self.history), n):
            part = self.history[first : first + n]
            if part[0].shot == self.shot:
                _, kv = self.forward([r.latent for r in part], [0.0] * n, part, text, "kv", self.history[:first])
                self.history[first : first + n] = [replace(r, text=text, kv=x) for r, x in zip(part, kv)]

    @property
    def held(self):
        return [r.frame for r in self.history]

    def enter(self, cut):
        """Records of the next chunk's frames; a cut begins a shot, whose rotary time is shifted."""
        if cut and self.chunk > 0:
            self.shot += 1
        n = self.stream.chunk
        frames = range(self.chunk * n, (self.chunk + 1) * n)
        return [Record(f, f + self.shot * self.stream.shot_offset, self.shot, None, None, None, None) for f in frames]

    def make_room(self, n):
        """The oldest frames go that are neither in the global sink nor in the shot sink."""
        while len(self.history) + n > self.stream.window:
            self.history.remove(next(r for r in self.history if r.frame >= self.stream.sink and r.frame not in self.pinned))

    def leave(self, own, z, text, cut):
        """The pass at t = 0, and what a cut keeps."""
        pins = cut and self.chunk > 0 and self.stream.shot_sink and self.stream.sink > 0
        if pins and self.stream.clean_recache:
            self.history = [r for r in self.history if r.frame < self.stream.sink]
        still = [0.0] * len(own)
        _, kv = self.forward(z, still, own, text, "kv")
        other = [None] * len(own) if self.negative is None else self.forward(z, still, own, self.negative, "unguided")[1]
        self.history += [replace(r, latent=x, text=text, kv=a, unguided=b) for r, x, a, b in zip(own, z, kv, other)]
        self.pinned = [r.frame for r in own] if pins else self.pinned
        self.chunk += 1

    def forward(self, x, t, own, text, branch, history=None):
        """Velocities ``[F,h,w,C]`` of the frames ``own``, and their keys and values, for one branch of guidance."""
        history = self.history if history is None else history
        times = list(range(len(history) + len(own))) if self.stream.relative else [r.time for r in [*history, *own]]
        past = [{"kv": r.kv, "unguided": r.unguided}[branch] for r in history]
        v, kv = self.network(list(x), times, past, t, text)
        return np.array(v), kv
