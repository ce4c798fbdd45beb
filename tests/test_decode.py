"""The decode pipeline: order, back-pressure, bounded memory, failures on either side, interruption."""

import threading
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import ConfigError
from longlive_jax.streaming.decode import DecodePipeline


@jax.jit
def running_sum(carry, z):
    """A causal fake decoder: pixel frame k of a chunk is the sum of all latents so far; [B,f,h,w,C] -> [B,4f,h,w,3] in [-1,1]."""
    total = carry + jnp.cumsum(z[..., :3], axis=1)
    return total[:, -1:], jnp.repeat(total, 4, axis=1) / 127.5 - 1.0


def start():
    return jnp.zeros((1, 1, 2, 2, 3))


def ones():
    return jnp.ones((1, 2, 2, 2, 4))


def test_order_carry_and_dropped_frames():
    seen = []
    with DecodePipeline(running_sum, start(), seen.append, drop=3) as pipeline:
        for _ in range(5):
            pipeline.submit(ones())
    assert [frames.shape for frames in seen] == [(1, 5, 2, 2, 3)] + [(1, 8, 2, 2, 3)] * 4
    assert all(frames.dtype == np.uint8 for frames in seen)
    video = np.concatenate(seen, axis=1)[0, :, 0, 0, 0]
    assert video.tolist() == [1] + [n for n in range(2, 11) for _ in range(4)]
    assert (pipeline.submitted, pipeline.delivered, pipeline.frames) == (5, 5, 37)
    assert float(pipeline.carry[0, 0, 0, 0, 0]) == 10


def test_two_pipelines_share_one_step():
    first, second = [], []
    with DecodePipeline(running_sum, start(), first.append) as a, DecodePipeline(running_sum, start(), second.append) as b:
        for _ in range(3):
            a.submit(ones())
            b.submit(2 * ones())
    assert [int(f[0, -1, 0, 0, 0]) for f in first] == [2, 4, 6]
    assert [int(f[0, -1, 0, 0, 0]) for f in second] == [4, 8, 12]


def test_decodes_on_its_own_device():
    device = jax.devices()[3]
    with DecodePipeline(running_sum, start(), lambda frames: None, device=device) as pipeline:
        pipeline.submit(ones())
    assert pipeline.carry.devices() == {device}


def test_uint8_passes_unchanged():
    seen = []
    with DecodePipeline(lambda carry, z: (carry, z), None, seen.append) as pipeline:
        pipeline.submit(np.full((1, 2, 2, 2, 3), 7, np.uint8))
    assert (seen[0] == 7).all()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_slow_sink_holds_the_producer_back_and_memory_stays_flat(depth):
    alive, most, gate = weakref.WeakSet(), [], threading.Semaphore(0)

    class Pixels(np.ndarray):
        """Weakly referenced and hashable, so that living chunks can be counted."""

        __hash__ = object.__hash__

    def step(carry, z):
        pixels = np.zeros((1, 4, 2, 2, 3), np.uint8).view(Pixels)
        alive.add(pixels)
        most.append(len(alive))
        return carry, pixels

    def sink(frames):
        gate.acquire()

    pipeline = DecodePipeline(step, None, sink, depth=depth)
    for _ in range(depth):
        pipeline.submit(None)  # does not wait
    blocked = threading.Thread(target=lambda: [pipeline.submit(None) for _ in range(10)])
    blocked.start()
    time.sleep(0.1)
    assert pipeline.submitted == depth and blocked.is_alive()
    for n in range(1, 4):
        gate.release()
        deadline = time.monotonic() + 5
        while pipeline.submitted < depth + n and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.02)
        assert pipeline.submitted == depth + n
    gate.release(100)
    blocked.join(5)
    pipeline.close()
    assert pipeline.delivered == depth + 10
    assert max(most) <= depth + 2  # the one just made, and one that the worker has not let go of yet


def test_decoding_overlaps_with_the_producer():
    """Ten chunks of 30 ms production and 30 ms sink take much less than the 600 ms of doing one after the other."""
    begin = time.perf_counter()
    with DecodePipeline(running_sum, start(), lambda frames: time.sleep(0.03)) as pipeline:
        for _ in range(10):
            time.sleep(0.03)
            pipeline.submit(ones())
    assert time.perf_counter() - begin < 0.55 and pipeline.sink_seconds >= 0.3


class Broken(RuntimeError):
    pass


def failing_at(n, seen):
    def sink(frames):
        if len(seen) == n:
            raise Broken("disk full")
        seen.append(frames)

    return sink


def test_sink_failure_reaches_the_next_submit_and_nothing_is_sunk_after_it():
    seen = []
    pipeline = DecodePipeline(running_sum, start(), failing_at(1, seen), depth=2)
    with pytest.raises(Broken, match="disk full"):
        for _ in range(20):
            pipeline.submit(ones())
            time.sleep(0.01)
    assert len(seen) == 1 and pipeline.submitted < 6
    with pytest.raises(ConfigError, match=r"the pipeline is closed after . chunks; make a new one"):
        pipeline.submit(ones())
    pipeline.close()


def test_sink_failure_in_the_last_chunks_reaches_close():
    calls, gate = [], threading.Event()

    def sink(frames):
        calls.append(frames)
        gate.wait(5)
        raise Broken("disk full")

    pipeline = DecodePipeline(running_sum, start(), sink, depth=3)
    for _ in range(3):
        pipeline.submit(ones())
    gate.set()
    with pytest.raises(Broken):
        pipeline.close()
    assert len(calls) == 1 and pipeline.delivered == 0  # the chunks after the failure never reached the sink
    with pytest.raises(Broken), DecodePipeline(running_sum, start(), sink) as other:
        other.submit(ones())


def test_sink_failure_is_raised_once_through_the_context_manager():
    with pytest.raises(Broken) as caught, DecodePipeline(running_sum, start(), failing_at(0, [])) as pipeline:
        for _ in range(20):
            pipeline.submit(ones())
    assert caught.value.__context__ is None and not hasattr(caught.value, "__notes__")


def test_device_failure_reaches_the_caller():
    class Lost:
        dtype = np.dtype(np.uint8)

        def __array__(self, dtype=None, copy=None):
            raise Broken("device lost")

    pipeline = DecodePipeline(lambda carry, z: (carry, Lost()), None, lambda frames: None)
    pipeline.submit(None)
    with pytest.raises(Broken, match="device lost"):
        pipeline.close()


def test_step_failure_is_raised_where_it_happens_and_keeps_the_chunks_before():
    seen = []

    def step(carry, z):
        if carry == 2:
            raise Broken("bad shape")
        return carry + 1, np.zeros((1, 1, 2, 2, 3), np.uint8)

    with pytest.raises(Broken, match="bad shape"), DecodePipeline(step, 0, seen.append) as pipeline:
        for _ in range(5):
            pipeline.submit(None)
    assert len(seen) == 2


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
def test_producer_failure_drains_what_was_submitted(error):
    seen = []

    def sink(frames):
        time.sleep(0.02)
        seen.append(frames)

    with pytest.raises(error), DecodePipeline(running_sum, start(), sink, depth=3) as pipeline:
        for _ in range(3):
            pipeline.submit(ones())
        raise error("stop")
    assert len(seen) == 3


def test_failure_while_draining_is_noted_on_the_producers_error():
    with pytest.raises(KeyboardInterrupt) as caught, DecodePipeline(running_sum, start(), failing_at(0, [])) as pipeline:
        pipeline.submit(ones())
        raise KeyboardInterrupt
    assert caught.value.__notes__ == ["decoding failed as well: Broken('disk full')"]


def test_abort_drops_what_is_queued_and_returns():
    seen, started, gate = [], threading.Event(), threading.Event()

    def sink(frames):
        started.set()
        gate.wait(5)
        seen.append(frames)

    pipeline = DecodePipeline(running_sum, start(), sink, depth=4)
    for _ in range(4):
        pipeline.submit(ones())
    started.wait(5)
    threading.Timer(0.05, gate.set).start()
    pipeline.abort()
    assert len(seen) == 1 and pipeline.submitted == 4
    pipeline.close()


def test_settings_refused():
    with pytest.raises(ConfigError, match="depth=0 must be at least 1"):
        DecodePipeline(running_sum, start(), print, depth=0)
    with pytest.raises(ConfigError, match="drop=-1"):
        DecodePipeline(running_sum, start(), print, drop=-1)
