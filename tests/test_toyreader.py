"""The toy reader: what it reads off rendered truth, degraded truth and wrong pictures."""

import jax
import numpy as np
import pytest

from longlive_jax.config import ConfigError
from longlive_jax.data import toyreader as tr
from longlive_jax.data import toyworld as tw
from longlive_jax.data.toydraw import backgrounds
from longlive_jax.data.toyeval import read_chunk

pytestmark = pytest.mark.usefixtures("optimized")

STAR = dict(shape="star", colour="red", motion="slides", background="night")
PAIR = [
    dict(shape="ring", colour="blue", size="small", motion="bounces", speed="quickly"),
    dict(shape="square", colour="yellow", motion="still"),
]


render = jax.jit(tw.render)


def drawn(arrays):
    return np.asarray((render(arrays) + 1) * 127.5).round().astype(np.uint8)


def pixels(scene):
    return drawn(tw.device_arrays(scene))


def film(*specs, **options):
    scene = tw.scene_from(specs, **options)
    return scene, pixels(scene)


@pytest.mark.exhaustive
def test_one_object_is_read_whole():
    scene, frames = film(STAR)
    reading = tr.read(frames)
    assert all(tr.score(reading, scene, 0).values())
    assert reading.objects == 1 and reading.colour.tolist() == [0, -1] and reading.shape.tolist() == [tw.SHAPES.index("star"), -1]
    assert abs(reading.period[0] / tw.PERIODS[0] - 1) < 0.06 and abs(reading.radius[0] / 27 - 1) < 0.06
    there = np.abs(np.diff(scene.centre[:, 0, 0])).mean()
    assert abs(reading.pace[0] / there - 1) < 0.05
    assert np.abs(reading.centre[:, 0, 0] - scene.centre[:, 0, 0]).max() < 1
    assert reading.background_error < 0.004 and reading.background_detail > 0.98 and reading.background_bad == 0


def test_float_frames_in_a_batch_read_like_bytes_alone():
    films = [film(dict(objects=PAIR, background="meadow"))[1], film(STAR)[1]]
    batch = read_chunk(np.stack(films).astype(np.float32) / 127.5 - 1)
    for i, frames in enumerate(films):
        for key, value in tr.read(frames)._asdict().items():
            np.testing.assert_allclose(batch._asdict()[key][i], value, atol=1e-3, err_msg=key)


def test_two_objects_are_read_left_and_right():
    scene, frames = film(dict(objects=PAIR, background="meadow"))
    reading = tr.read(frames)
    assert all(tr.score(reading, scene, 0).values()) and reading.objects == 2
    assert reading.motion.tolist() == [tw.MOTIONS.index("bounces"), tw.MOTIONS.index("still")]
    assert reading.speed.tolist() == [tw.SPEEDS.index("quickly"), -1] and reading.period[1] == 0
    swapped, _ = film(dict(objects=PAIR[::-1], background="meadow"))
    verdict = tr.score(reading, swapped, 0)
    assert verdict["objects"] and verdict["background"] and not verdict["colour"] and not verdict["all"]


def test_every_wrong_attribute_is_noticed():
    _, frames = film(STAR)
    reading = tr.read(frames)
    wrong = dict(shape="cross", colour="pink", size="small", motion="bounces", speed="quickly", background="sunset")
    for key, value in wrong.items():
        verdict = tr.score(reading, tw.scene_from([STAR | {key: value}]), 0)
        assert [k for k, ok in verdict.items() if not ok] == [key, "all"], key


def test_a_night_without_stars_is_no_night():
    scene, frames = film(STAR | dict(motion="still"))
    sky = np.array([18, 20, 50], np.uint8)
    dark = frames.copy()
    far = np.abs(np.arange(128) - scene.centre[0, 0, 0]) > 34
    dark[:, :, far] = sky
    dark[:, np.abs(np.arange(128) - scene.centre[0, 0, 1]) > 34] = sky
    reading = tr.read(dark)
    assert reading.background == -1 and reading.background_detail < 0.3
    assert tr.read(frames).background == tw.BACKGROUNDS.index("night")
    assert reading.colour[0] == 0 and reading.shape[0] == tw.SHAPES.index("star")  # the object is still read


def test_half_a_background_is_no_background():
    _, frames = film(STAR | dict(background="checker", motion="still"))
    frames = frames.copy()
    frames[:, :, :40] = 150
    assert tr.read(frames).background == -1


def test_an_empty_picture_has_no_object():
    for i in (0, 1, 4):
        frames = np.repeat((backgrounds()[None, i] * 255).round().astype(np.uint8), 29, 0)
        reading = tr.read(frames)
        assert reading.objects == 0 and (reading.colour == -1).all() and reading.background == i


def test_a_still_object_is_still_and_a_creeping_one_is_not():
    scene, frames = film(STAR | dict(motion="still"))
    reading = tr.read(frames)
    assert reading.motion[0] == 0 and reading.period[0] == 0 and tr.score(reading, scene, 0)["motion"]
    arrays = tw.device_arrays(scene)
    arrays["centre"] = arrays["centre"] + np.linspace(0, 6, 29, dtype=np.float32)[:, None, None]
    assert tr.read(drawn(arrays)).motion[0] != 0


def test_a_jumping_object_has_no_motion():
    scene, _ = film(STAR)
    arrays = tw.device_arrays(scene)
    rng = np.random.default_rng(0)
    arrays["centre"] = rng.uniform(40, 88, arrays["centre"].shape).astype(np.float32)
    assert tr.read(drawn(arrays)).motion[0] == -1


def test_a_colour_that_changes_is_no_colour():
    scene, _ = film(STAR)
    arrays = tw.device_arrays(scene)
    arrays["rgb"][:14, 0] = tw.COLOURS["pink"]
    reading = tr.read(drawn(arrays))
    assert reading.colour[0] == -1 and 0.4 < reading.colour_share[0] < 0.6


def test_a_cut_that_keeps_its_background_is_found():
    scene, frames = film(STAR, STAR | dict(cut=True, same=True))
    assert tr.find_cuts(frames) == [29] and tr.score_cuts([29], scene)
    scene, frames = film(STAR | dict(motion="still"), dict(shape="ring", colour="blue", cut=True))
    assert tr.find_cuts(frames) == [29]


def test_changes_inside_a_shot_are_no_cuts():
    night = STAR | dict(background="studio", speed="quickly")
    scene, frames = film(night, dict(background="night"), dict(motion="circles"), dict(colour="cyan"), dict(speed="slowly"))
    assert tr.find_cuts(frames) == [] and tr.score_cuts([], scene) and not tr.score_cuts([29], scene)
    a, b = scene.span(2)
    reading = tr.read(frames[a:b][scene.settled[a:b]])
    assert tr.score(reading, scene, 2)["motion"] and tr.score(reading, scene, 2)["background"]


def test_a_cut_smeared_over_two_frames_is_found():
    _, frames = film(STAR, STAR | dict(cut=True, background="studio", colour="blue"))
    frames = frames.copy()
    frames[29] = frames[28] // 2 + frames[30] // 2
    (found,) = tr.find_cuts(frames)
    assert abs(found - 29) <= 1


@pytest.mark.slow
def test_rendered_truth_is_read_right():
    table = tr.evaluate_reader(16, seed=11, chunks=2)
    assert table.pop("segments") >= 28
    assert min(table.values()) == 1.0, table


@pytest.mark.slow
@pytest.mark.parametrize("degradation", tr.DEGRADATIONS[1:])
def test_degraded_truth_is_read_right(degradation):
    """Ten random chunks and a cut in one video of two."""
    rng = np.random.default_rng(11)
    scenes = [tw.sample_scene(rng, 1, held_out=None) for _ in range(10)]
    verdicts = [tr.score(tr.read(tr.degrade(pixels(scene), degradation, rng)), scene, 0) for scene in scenes]
    assert [v for v in verdicts if not v["all"]] == []
    for specs, cuts in (((STAR, STAR | dict(cut=True, same=True)), [29]), ((STAR, dict(motion="circles")), [])):
        assert tr.find_cuts(tr.degrade(film(*specs)[1], degradation, rng)) == cuts


def test_a_degradation_changes_the_picture_as_named():
    _, frames = film(STAR)
    rng = np.random.default_rng(0)
    assert tr.degrade(frames, "none", rng) is frames
    assert 9 < (tr.degrade(np.full_like(frames, 128), "noise", rng).astype(float) - 128).std() < 11
    for kind in ("blur", "h264"):
        out = tr.degrade(frames, kind, rng)
        error = np.abs(out.astype(float) - frames).mean()
        assert out.shape == frames.shape and out.dtype == np.uint8 and 0.3 < error < 12
    with pytest.raises(ConfigError, match="unknown degradation 'rain'"):
        tr.degrade(frames, "rain", rng)


def test_what_cannot_be_read_or_scored_is_refused():
    scene, frames = film(STAR, dict(motion="bounces"))
    with pytest.raises(ConfigError, match=r"wants \[...,128,128,3\]"):
        tr.read(frames[:, :64])
    with pytest.raises(ConfigError, match="4 frames is too short"):
        tr.read(frames[:4])
    with pytest.raises(ConfigError, match="more than one motion"):
        tr.score(tr.read(frames[:29]), scene, [0, 1])
