"""Batches of toy-world clips through grain: element i is a function of (seed, i), so a resumed run continues at any batch.

A batch holds numpy arrays with a leading clip axis: the arrays that ``toyworld.render`` reads ``[n,P,...]``, prompt tokens ``ids`` and ``mask``
``[n,chunks,M]``, rotary ``time [n,F]`` with the shot offsets added, and of every chunk ``[n,chunks]`` whether it begins a later shot
(``cut``), shows for the first time what its prompt changes inside a shot (``change``), or shows what no prompt asks for (``wrong``).
"""

import functools
import math

import grain
import numpy as np

from longlive_jax.data import toyworld

ENDLESS = 1 << 40
THREADS = 8
LABELS = ("ids", "mask", "cut", "change", "wrong", "time")  # of a batch for the transformer; the rest is what ``toyworld.render`` reads


def shot_gap_unit(time_stride):
    """Latent frames after which every motion of the world is back where it was: a gap of that many leaves the pixels as they are."""
    return math.lcm(*(int(period) for period in toyworld.PERIODS)) // time_stride


def rotary_time(scene, rng, stream, share, unit):
    """Rotary time ``[F]`` of a scene: ``shot_offset`` more at every cut; in a ``share`` of the clips, a gap after one shot's first chunk.

    The gap is a multiple of the common period of all motions, so what is seen fits; it makes the first chunk of a shot a far memory, as a
    pinned shot sink is when streaming.
    """
    chunk = np.arange(len(scene.time)) // stream.chunk
    time = scene.time + stream.shot_offset * scene.shot[chunk]
    starts = np.flatnonzero(scene.cut[:-1])
    if len(starts) and rng.random() < share:
        start = starts[rng.integers(len(starts))]
        periods = int(math.exp(rng.uniform(0, math.log(toyworld.MAX_GAP / unit))))
        time = time + np.where(chunk > start, unit * periods, 0)
    return time.astype(np.float32)


def training_clip(index, *, data, stream, time_stride, text_len):
    """Clip ``index`` for the transformer: ``data.chunks`` chunks, no withheld combination.

    A ``data.recall`` share of the clips follows one object through many shots whose captions seldom say what it is: only there has a new
    shot to find the shape in the memory.
    """
    rng = np.random.default_rng((data.seed, int(index)))
    kind = {}
    if data.recall and rng.random() < data.recall:
        kind = dict(cuts=[k for k in range(1, data.chunks) if rng.random() < 0.7], objects=1, changes=False, same=1.0, said=(0.1, 0.5, 0.2))
    options = dict(frames_per_chunk=stream.chunk, time_stride=time_stride, gap=data.gap, mistakes=data.mistakes)
    scene = toyworld.sample_scene(rng, data.chunks, **options, **kind)
    ids, mask = zip(*(toyworld.tokenize(caption, text_len) for caption in scene.captions))
    time = rotary_time(scene, rng, stream, data.shot_gap, shot_gap_unit(time_stride))
    told = {"cut": scene.cut, "change": np.array(scene.change) != "", "wrong": scene.wrong}
    return toyworld.device_arrays(scene) | {"ids": np.stack(ids), "mask": np.stack(mask), "time": time} | told


def short_clip(index, *, data, time_stride):
    """Clip ``index`` for the VAE: ``data.frames`` pixel frames of a scene of two chunks.

    Half of the clips hold a cut, between two latents as in a stream: what follows it is the hardest to encode. The others lie anywhere.
    """
    rng = np.random.default_rng((data.seed, int(index)))
    latents = (data.frames - 1) // time_stride + 1
    cut = latents > 1 and rng.random() < 0.5
    cuts = [1] if cut else []
    scene = toyworld.sample_scene(rng, 2, frames_per_chunk=latents, time_stride=time_stride, cuts=cuts, changes=0.5, held_out=None)
    start = time_stride * rng.integers(1, latents) if cut else rng.integers(len(scene.centre) - data.frames + 1)
    return {name: x[start : start + data.frames] for name, x in toyworld.device_arrays(scene).items()}


def training_clips(experiment, data):
    """Endless ``grain.MapDataset`` of clips for the transformer."""
    make = functools.partial(
        training_clip,
        data=data,
        stream=experiment.stream,
        time_stride=experiment.vae.time_stride,
        text_len=experiment.transformer.text_len,
    )
    return grain.MapDataset.range(ENDLESS).map(make)


def short_clips(experiment, data):
    """Endless ``grain.MapDataset`` of clips for the VAE."""
    return grain.MapDataset.range(ENDLESS).map(functools.partial(short_clip, data=data, time_stride=experiment.vae.time_stride))


def batches(dataset, size, start=0, workers=0, ahead=8):
    """Iterator over the batches ``start, start + 1, ...`` of ``size`` clips, sampled ahead by threads or by ``workers`` processes.

    Processes need absl's flags to be parsed, as ``app.run`` does.
    """
    dataset = dataset.batch(size).slice(slice(start, None))
    options = grain.ReadOptions(num_threads=1 if workers else THREADS, prefetch_buffer_size=ahead)
    out = dataset.to_iter_dataset(options)
    if workers:
        out = out.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
    return iter(out)


# ---- the ring of encoded clips -------------------------------------------------------------------------------------------------------------


def made(step, ring):
    """Groups of clips that exist when step number ``step`` (from 0) runs: a full ring at first, one more every ``ring.every`` steps."""
    return ring.size // ring.group + step // ring.every


def first_held(step, ring):
    """The oldest group still in the ring at ``step``; group g lies in slot ``g % (size / group)``."""
    return made(step, ring) - ring.size // ring.group
