"""Training clips: a function of (seed, index), resumable at any batch, with the rotary time that streaming has."""

import itertools

import numpy as np
import pytest
from absl import flags

from longlive_jax.config import TINY, TOY, ConfigError, replace
from longlive_jax.config_train import (
    ARRun,
    ClipConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RingConfig,
    TrainConfig,
    VAERun,
    flat_config,
)
from longlive_jax.data import toyworld
from longlive_jax.data.pipeline import LABELS, batches, first_held, made, rotary_time, short_clips, shot_gap_unit, training_clips
from longlive_jax.data.toywords import Thing

SMALL = replace(TINY, transformer=replace(TINY.transformer, text_len=48))
DATA = ClipConfig(chunks=4, frames=9)


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_a_clip_is_a_function_of_seed_and_index():
    one, two = training_clips(SMALL, DATA), training_clips(SMALL, DATA)
    equal(one[17], two[17])
    assert not np.array_equal(one[17]["centre"], one[18]["centre"])
    assert not np.array_equal(one[17]["centre"], training_clips(SMALL, replace(DATA, seed=1))[17]["centre"])


def test_what_a_batch_holds():
    batch = next(batches(training_clips(SMALL, DATA), 3))
    frames, pixels = 4 * SMALL.stream.chunk, SMALL.pixel_frames(4 * SMALL.stream.chunk)
    shapes = {name: x.shape for name, x in batch.items()}
    assert shapes["ids"] == shapes["mask"] == (3, 4, 48) and shapes["cut"] == (3, 4) and shapes["time"] == (3, frames)
    assert shapes["change"] == shapes["wrong"] == (3, 4) and not batch["wrong"].any()
    drawn = {name: shape for name, shape in shapes.items() if name not in LABELS}
    assert set(drawn) == {"centre", "radius", "shape", "rgb", "presence", "background", "blend"}
    assert all(shape[:2] == (3, pixels) for shape in drawn.values())
    assert batch["mask"].any(-1).all() and ((batch["ids"] > 0) == batch["mask"]).all()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_batches_resume_anywhere(workers):
    flags.FLAGS.mark_as_parsed()
    clips = training_clips(SMALL, DATA)
    whole = list(itertools.islice(batches(clips, 2), 7))
    part = list(itertools.islice(batches(clips, 2, start=3, workers=workers), 4))
    for a, b in zip(whole[3:], part, strict=True):
        equal(a, b)
    equal(whole[3], {name: np.stack([clips[6][name], clips[7][name]]) for name in whole[3]})


def test_recall_clips_follow_one_object_and_say_little():
    batch = next(batches(training_clips(SMALL, replace(DATA, chunks=6, recall=1.0)), 40))
    plain = next(batches(training_clips(SMALL, replace(DATA, chunks=6)), 40))
    assert (batch["presence"][..., 1] == 0).all()
    assert (np.diff(batch["shape"][..., 0], axis=1) == 0).all(1).mean() > 0.6  # where a combination is withheld, another object comes
    assert batch["cut"].mean() > 1.3 * plain["cut"].mean()
    named = np.isin(batch["ids"], [toyworld.WORDS.index(w) for w in ("star", "circle", "square", "triangle", "ring")]).any(-1)
    assert named[:, 0].mean() > 0.4 and named[:, 1:].mean() < 0.15


def test_a_change_is_marked_where_its_prompt_begins():
    batch = next(batches(training_clips(SMALL, replace(DATA, chunks=6)), 40))
    assert not (batch["change"] & batch["cut"]).any() and not batch["change"][:, 0].any() and batch["change"].mean() > 0.05
    reworded = (batch["ids"][:, 1:] != batch["ids"][:, :-1]).any(-1)
    assert reworded[batch["change"][:, 1:]].all()


def test_mistakes_are_mended_by_the_next_chunk():
    """A clip with a mistake is the clip without it but for the chunks that are wrong, which say what the plan asks for."""
    rng, shown, lengths = np.random.default_rng, {}, set()
    for seed in range(150):
        scene = toyworld.sample_scene(rng(seed), 6, frames_per_chunk=2, mistakes=1.0)
        plain = toyworld.sample_scene(rng(seed), 6, frames_per_chunk=2)
        wrong = np.flatnonzero(scene.wrong)
        assert scene.captions == plain.captions and scene.change == plain.change and not plain.wrong.any()
        if not len(wrong):
            continue
        start, stop = wrong[0], wrong[-1] + 1
        lengths.add(stop - start)
        assert 1 <= start and stop < 6 and stop - start == len(wrong) and not scene.cut[start : stop + 1].any()
        differs = {}
        for key, theirs in plain.attributes.items():
            ours = scene.attributes[key]
            differs[key] = (ours != theirs).reshape(6, -1).any(1)
            assert not differs[key][~scene.wrong].any()
        kinds = {key for key, at in differs.items() if at.any()} - {"speed"} or {"speed"}
        assert len(kinds) == 1 and all(differs[key][scene.wrong].all() for key in kinds)
        shown[kinds.pop()] = shown.get(next(iter(kinds), None), 0) + 1
        for k, j in itertools.product(wrong, range(2)):
            row = [int(scene.attributes[key][k, j]) for key in ("shape", "colour", "motion")]
            assert row[0] < 0 or not toyworld.withheld(*row, int(scene.attributes["background"][k]))
        at = plain.span(stop)[0]  # the object moves on from where the mistake left it
        leap = np.abs(scene.centre[at] - scene.centre[at - 1]).max()
        assert leap < 8 or scene.time[2] > 2
    assert set(shown) == {"shape", "motion", "speed", "colour", "size"} and lengths == {1, 2}


def test_only_some_clips_hold_mistakes_and_their_chunks_are_marked():
    some = next(batches(training_clips(SMALL, replace(DATA, chunks=6, mistakes=0.5)), 60))
    assert 0.15 < some["wrong"].any(1).mean() < 0.55 and not some["wrong"][:, 0].any()


def test_no_withheld_combination_is_trained():
    a = toyworld.sample_scene(np.random.default_rng((DATA.seed, 5)), 4, frames_per_chunk=2, gap=True)
    clip = training_clips(SMALL, DATA)[5]
    np.testing.assert_array_equal(clip["centre"], a.centre)
    rows = [(a.attributes[k][c, 0] for k in ("shape", "colour", "motion")) for c in range(4)]
    assert not any(toyworld.withheld(*map(int, row), int(a.attributes["background"][c])) for c, row in enumerate(rows))


def test_cuts_add_the_shot_offset():
    scene = toyworld.sample_scene(np.random.default_rng(0), 5, frames_per_chunk=2, cuts=[1, 3])
    time = rotary_time(scene, np.random.default_rng(1), replace(SMALL.stream, shot_offset=100.0), 0.0, 12)
    np.testing.assert_array_equal(time, np.arange(10) + np.repeat([0, 100, 100, 200, 200], 2))


def test_a_shot_gap_follows_the_first_chunk_of_a_shot():
    seen = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        scene = toyworld.sample_scene(rng, 5, frames_per_chunk=2, cuts=[1, 3])
        gaps = np.diff(rotary_time(scene, rng, replace(SMALL.stream, shot_offset=0.0), 1.0, 12)) - 1
        assert np.count_nonzero(gaps) == 1
        at = int(np.flatnonzero(gaps)[0])
        assert at in (3, 7) and gaps[at] % 12 == 0 and 12 <= gaps[at] <= toyworld.MAX_GAP
        seen.add((at, gaps[at]))
    assert len(seen) > 20 and {at for at, _ in seen} == {3, 7}


def test_a_cut_at_the_last_chunk_has_no_gap():
    scene = toyworld.sample_scene(np.random.default_rng(0), 3, frames_per_chunk=2, cuts=[2])
    np.testing.assert_array_equal(rotary_time(scene, np.random.default_rng(1), SMALL.stream, 1.0, 12), np.arange(6) + np.repeat([0, 0, 2], 2))


@pytest.mark.parametrize("speed", [0, 1])
@pytest.mark.parametrize("motion", range(len(toyworld.MOTIONS)))
def test_the_world_repeats_after_the_unit_of_the_shot_gap(motion, speed):
    thing, path, clock = Thing(0, 0, 1, motion, speed), toyworld.Path(64.0, 60.0, 0.7), np.arange(50.0)
    ahead = clock + TOY.vae.time_stride * shot_gap_unit(TOY.vae.time_stride)
    for now, then in zip(toyworld.position(thing, 1, path, clock), toyworld.position(thing, 1, path, ahead)):
        np.testing.assert_allclose(now, then, atol=1e-9)


def test_half_of_the_short_clips_hold_a_cut_between_two_latents():
    clips = [short_clips(SMALL, DATA)[i] for i in range(120)]
    assert all(x.shape[0] == 9 for clip in clips for x in clip.values())
    steps = np.stack([np.abs(np.diff(clip["rgb"][:, 0], axis=0)).max(-1) > 0.5 for clip in clips])  # a cut to another colour
    assert 10 < steps.any(1).sum() < 60
    assert set(np.flatnonzero(steps.any(0))) == {0, 4}  # the first latent is one frame, the others four
    equal(clips[3], short_clips(SMALL, DATA)[3])


def test_the_ring_is_a_function_of_the_step():
    ring = RingConfig(size=8, group=2, every=3, part=1)
    held, groups = [None] * 4, itertools.count()
    for g in range(4):
        held[g] = next(groups)
    for step in range(40):
        if step and step % 3 == 0:
            g = next(groups)
            held[g % 4] = g
        again = [None] * 4
        for g in range(first_held(step, ring), made(step, ring)):
            again[g % 4] = g
        assert again == held


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: TrainConfig(), "exactly one"),
        (lambda: TrainConfig(steps=5, minutes=1.0), "exactly one"),
        (lambda: TrainConfig(steps=5, dtype="float16"), "'float32' or 'bfloat16'"),
        (lambda: TrainConfig(steps=5, batch=0), "must be positive"),
        (lambda: OptimizerConfig(kind="sgd"), "'adamw' or 'muon'"),
        (lambda: OptimizerConfig(warmup=0.7, decay=0.7), "overlap"),
        (lambda: OptimizerConfig(ema=1.5), "in 0..1"),
        (lambda: ClipConfig(frames=16), "e.g. 17"),
        (lambda: RingConfig(size=10, group=4, part=4), "multiple of ring.group=4"),
        (lambda: RingConfig(size=8, group=4, part=3), "multiple of ring.part=3"),
        (lambda: ObjectiveConfig(drop_text=2.0), "in 0..1"),
        (lambda: ObjectiveConfig(recache=-0.5), "in 0..1"),
        (lambda: ClipConfig(mistakes=1.5), "in 0..1"),
        (lambda: VAERun(optimizer=OptimizerConfig(kind="muon")), "'adamw'"),
        (lambda: VAERun(experiment=mesh(seq=2)), "mesh.seq=1"),
        (lambda: ARRun(experiment=mesh(data=3)), "use train.batch=3"),
    ],
)
def test_the_schema_refuses(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def mesh(**sizes):
    return replace(SMALL, mesh=replace(SMALL.mesh, **sizes))


def test_a_flat_config_is_plain():
    flat = flat_config(ARRun(experiment=SMALL))
    assert flat["experiment.transformer.dim"] == 64 and flat["experiment.transformer.patch"] == [1, 1] and flat["vae"] == ""
