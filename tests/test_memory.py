"""The slot table against lists of frames, over random schedules with a cut of its own in every sample."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import StreamConfig, TransformerConfig, replace
from longlive_jax.model.memory import empty_memory, forget, held_frames, make_room, pin, rank, write

SIZES = TransformerConfig(dim=8, heads=1, layers=2, ffn_dim=8, channels=4, text_dim=4, text_len=4, freq_dim=8)
SETTINGS = [
    StreamConfig(chunk=2, window=8, sink=2, shot_offset=2.0),
    StreamConfig(chunk=3, window=9, sink=3),
    StreamConfig(chunk=2, window=8, sink=2, clean_recache=True),
    StreamConfig(chunk=4, window=16, sink=8, clean_recache=True, relative=True),
    StreamConfig(chunk=2, window=6, sink=0),
    StreamConfig(chunk=1, window=5, sink=2, shot_sink=False),
]


class Plain:
    """One sample's memory as a list of frames, oldest first, and the frames of its shot sink."""

    def __init__(self, stream):
        self.stream, self.held, self.shot = stream, [], []

    def chunk(self, frames, cut):
        """The frames held while the chunk is denoised, and after it is remembered."""
        for frame in frames:
            if len(self.held) == self.stream.window:
                self.held.remove(next(f for f in self.held if f >= self.stream.sink and f not in self.shot and f not in frames))
            self.held.append(frame)
        during = sorted(self.held)
        if cut and self.stream.pins:
            if self.stream.clean_recache:
                self.held = [f for f in self.held if f < self.stream.sink or f in frames]
            self.shot = frames
        return during, sorted(self.held)


def remember(stream):
    """The memory operations of one chunk, as the rollout orders them, jitted: cuts and frames are data."""

    @jax.jit
    def step(memory, index, cut):
        memory, slots = make_room(memory, index)
        during = memory
        layers = tuple(write(layer, slots, *marked(index, layer)) for layer in memory.layers)
        memory = replace(memory, layers=layers)
        if stream.pins and stream.clean_recache:
            memory, slots = forget(memory, slots, index, cut)
            memory = replace(memory, layers=tuple(write(layer, slots, *marked(index, layer)) for layer in memory.layers))
        memory = pin(memory, slots, cut) if stream.pins else memory
        return during, memory, slots, rank(memory)

    return step


def marked(index, layer):
    """Keys that carry their frame number, values its negative: ``[B,n,T,N,Dh]``."""
    x = jnp.broadcast_to(index[:, :, None, None, None].astype(jnp.float32), (*index.shape, *layer[0].shape[2:]))
    return x, -x


@pytest.mark.parametrize("stream", SETTINGS, ids=range(len(SETTINGS)))
def test_random_schedules_match_lists(stream):
    step = remember(stream)
    for seed in range(3):
        follow_schedule(stream, step, random.Random(seed))
    assert step._cache_size() == 1


def follow_schedule(stream, step, rng, batch=5, chunks=24):
    n = stream.chunk
    memory = empty_memory(SIZES, stream, batch, 1, jnp.float32)
    plain, last_shot = [Plain(stream) for _ in range(batch)], [[] for _ in range(batch)]
    for c in range(chunks):
        cuts = [c > 0 and rng.random() < 0.25 for _ in range(batch)]
        frames = list(range(c * n, (c + 1) * n))
        index = np.broadcast_to(np.array(frames, np.int32), (batch, n))
        during, memory, slots, order = step(memory, index, np.array(cuts))
        expected = [model.chunk(frames, cut) for model, cut in zip(plain, cuts)]
        assert held_frames(during) == [e[0] for e in expected], c
        assert held_frames(memory) == [e[1] for e in expected], c
        table = jax.device_get(memory)
        check_slots(table, np.asarray(slots), np.asarray(order), frames)
        for b, model in enumerate(plain):
            last_shot[b] = frames if cuts[b] and stream.pins else last_shot[b]
            assert sorted(table.frame[b][table.pinned[b]].tolist()) == last_shot[b], (c, b)
            assert table.count[b] == len(model.held)


def check_slots(memory, slots, order, frames):
    """Filled slots are a prefix, the chunk's slots hold it, every slot holds the keys of its frame, ranks are the order in time."""
    for b, (row, count) in enumerate(zip(memory.frame, memory.count)):
        filled = row[:count].tolist()
        assert min(filled) >= 0 and (row[count:] == -1).all()
        assert row[slots[b]].tolist() == frames
        assert order[b, :count].tolist() == [sorted(filled).index(f) for f in filled] and not order[b, count:].any()
        for k, v in memory.layers:
            assert k[b, :count, 0, 0, 0].tolist() == filled and (v[b, :count] == -k[b, :count]).all()


def test_empty_memory():
    memory = empty_memory(SIZES, SETTINGS[0], 3, 4, jnp.bfloat16)
    assert memory.slots == 8 and held_frames(memory) == [[], [], []] and not memory.pinned.any() and not memory.count.any()
    assert len(memory.layers) == 2 and memory.layers[0][0].shape == (3, 8, 4, 1, 8) and memory.layers[1][1].dtype == jnp.bfloat16
    assert (memory.sink, memory.relative) == (2, False) and not rank(memory).any()


def test_write_keeps_the_dtype_and_the_other_slots():
    k = jnp.zeros((2, 4, 1, 1, 2), jnp.bfloat16)
    new = jnp.ones((2, 1, 1, 1, 2), jnp.float32)
    a, b = write((k, k), jnp.array([[1], [3]]), new, 2 * new)
    assert a.dtype == jnp.bfloat16
    assert np.asarray(a[:, :, 0, 0, 0], np.float32).tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]
    assert np.asarray(b[:, :, 0, 0, 1], np.float32).tolist() == [[0, 2, 0, 0], [0, 0, 0, 2]]
