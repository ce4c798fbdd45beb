"""The toy world: what it samples, says and draws."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from longlive_jax.config import CUT_PREFIX, TOY, ConfigError
from longlive_jax.data import toywords
from longlive_jax.data import toyworld as tw
from longlive_jax.data.toywords import COLOUR_NAMES, TOKENS, PromptError

RED = dict(shape="star", colour="red", motion="still")


def scenes(n, seed=0, chunks=6, **options):
    rng = np.random.default_rng(seed)
    return [tw.sample_scene(rng, chunks, **options) for _ in range(n)]


def tuples(scene):
    """All (shape, colour, motion, background) the chunks of a scene show."""
    a = scene.attributes
    return [
        (a["shape"][k, i], a["colour"][k, i], a["motion"][k, i], a["background"][k])
        for k in range(len(a["background"]))
        for i in range(a["objects"][k])
    ]


def test_a_tenth_of_the_combinations_is_withheld():
    share = tw.WITHHELD.mean()
    assert 0.08 < share < 0.12
    assert all(0 < tw.WITHHELD[s].mean() < 0.2 for s in range(len(tw.SHAPES)))
    first = tuple(np.argwhere(tw.WITHHELD)[0])
    names = tuple(t[i] for t, i in zip((tw.SHAPES, COLOUR_NAMES, tw.MOTIONS, tw.BACKGROUNDS), first))
    assert tw.withheld(*names) and tw.withheld(*map(int, first))


@pytest.mark.parametrize("held_out", [False, True])
def test_sampling_keeps_to_its_side_of_the_withheld_combinations(held_out):
    seen = [tw.withheld(*map(int, row)) == held_out for scene in scenes(400, held_out=held_out, changes=0.5) for row in tuples(scene)]
    assert all(seen) and len(seen) > 2000


def test_any_combination_can_be_asked_for():
    seen = [tw.withheld(*map(int, row)) for scene in scenes(200, held_out=None) for row in tuples(scene)]
    assert 0.05 < np.mean(seen) < 0.15


def test_a_seed_fixes_a_scene():
    one, two, other = scenes(1, seed=3)[0], scenes(1, seed=3)[0], scenes(1, seed=4)[0]
    assert one.captions == two.captions != other.captions
    for field in dataclasses.fields(one):
        a, b = vars(one)[field.name], vars(two)[field.name]
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_captions_fit_the_vocabulary_and_the_toy_model():
    assert len(tw.WORDS) <= 200 <= TOY.text.vocab
    assert tw.WORDS[:2] == ["<pad>", "<end>"] and len(set(tw.WORDS)) == len(tw.WORDS)
    used = set()
    for scene in scenes(600):
        for caption in scene.captions:
            ids, mask = tw.tokenize(caption, TOY.transformer.text_len)
            words = [tw.WORDS[i] for i in ids[mask]]
            assert words[-1] == "<end>" and not ids[~mask].any()
            assert " ".join(words[:-1]) == caption.lower().replace(",", " ,").replace(".", " .")
            used.update(words)
    assert used == set(tw.WORDS) - {"<pad>"}  # every word is trained


def test_cuts_and_only_cuts_have_the_prefix():
    for scene in scenes(100):
        assert [c.startswith(CUT_PREFIX) for c in scene.captions] == scene.cut.tolist()
        assert not scene.cut[0] and scene.shot.tolist() == np.cumsum(scene.cut).tolist()
    assert scenes(1, cuts=[2, 5])[0].cut.nonzero()[0].tolist() == [2, 5]


def test_captions_say_what_the_scene_shows():
    for scene in scenes(300, leave_out=False):
        a = scene.attributes
        for k, caption in enumerate(scene.captions):
            words = set(caption.lower().replace(",", "").replace(".", "").split())
            quick = words & {"quickly", "fast", "rapidly"}
            assert bool(quick) == bool((a["speed"][k] == 1).any())
            assert bool(words & {"small", "little", "tiny"}) == bool((a["size"][k] == 0).any())
            assert a["objects"][k] == 1 or words & {"left", "right"}
            for i in range(a["objects"][k]):
                assert words & set(tw_words("COLOUR_WORDS", COLOUR_NAMES[a["colour"][k, i]]))
                assert words & set(tw_words("SHAPE_WORDS", tw.SHAPES[a["shape"][k, i]]))


def tw_words(table, name):
    return vars(toywords)[table][name]


def test_later_shots_keep_objects_and_leave_attributes_out():
    kept, silent = 0, 0
    for scene in scenes(200, same=1.0, cuts=[3]):
        if scene.same[3]:
            kept += 1
            a = scene.attributes
            assert (a["colour"][3] == a["colour"][2]).all() and (a["shape"][3] == a["shape"][2]).all()
            assert "he same" in scene.captions[3]
            silent += not scene.said[3, 0, 1]
    assert kept > 150 and silent > 0.4 * kept


def test_what_is_left_out_is_not_said():
    for scene in scenes(200, objects=1):
        for k, caption in enumerate(scene.captions):
            words = set(caption.lower().replace(",", "").replace(".", "").split())
            colour = COLOUR_NAMES[scene.attributes["colour"][k, 0]]
            assert bool(words & set(tw_words("COLOUR_WORDS", colour))) == bool(scene.said[k, 0, 1])


def test_every_clip_stays_inside_the_picture():
    for scene in scenes(300, changes=0.5):
        there = scene.presence > 0
        low, high = scene.centre - scene.radius[..., None], scene.centre + scene.radius[..., None]
        assert low[there].min() >= 0 and high[there].max() <= 128
        two = there.all(-1)
        assert high[two, 0, 0].max(initial=0) <= 64 <= low[two, 1, 0].min(initial=128)


def test_position_is_continuous_inside_a_shot_and_jumps_at_a_cut_that_keeps_the_background():
    jumps = 0
    for scene in scenes(300, changes=0.4):
        step = np.linalg.norm(np.diff(scene.centre, axis=0), axis=-1)
        change = np.abs(np.diff(scene.rgb, axis=0)).max((1, 2))
        for k in range(1, 6):
            start = scene.span(k)[0]
            window = slice(max(start - 2, 0), start + tw.BLEND + 1)
            if not scene.cut[k]:
                assert step[window][np.arange(len(step[window])) != 0].max() < 12  # the quickest motion makes 6.9
                assert change[start - 1 : start + tw.BLEND].max() < 0.3
            elif scene.attributes["background"][k] == scene.attributes["background"][k - 1]:
                one = scene.attributes["objects"][k - 1 : k + 1].tolist() == [1, 1]
                one &= scene.attributes["colour"][k - 1, 0] == scene.attributes["colour"][k, 0]  # else the colour shows the cut
                jumps += one
                assert not one or step[start - 1, 0] >= tw.JUMP - 2
    assert jumps > 20


def test_in_shot_changes_are_announced_and_settle():
    kinds = []
    for scene in scenes(200, cuts=[], changes=0.5):
        for k in range(1, 6):
            a, start, stop = scene.attributes, *scene.span(k)
            differs = {n for n in ("motion", "speed", "colour", "background") if (a[n][k] != a[n][k - 1]).any()}
            assert (scene.change[k] in differs) if scene.change[k] else not differs
            assert scene.settled[start:stop].all() == (not scene.change[k])
            assert scene.settled[start + tw.BLEND : stop].all()
            kinds.append(scene.change[k])
            assert scene.captions[k] != scene.captions[k - 1] or not scene.change[k]
    assert set(kinds) == {"", "motion", "speed", "colour", "background"}


def test_still_is_still_and_periods_are_as_asked():
    still = tw.scene_from([RED | dict(background="night")] * 2)
    assert np.ptp(still.centre[:, 0], axis=0).max() == 0 and np.ptp(still.radius[:, 0]) == 0
    for speed, period in zip(tw.SPEEDS, tw.PERIODS):
        x = tw.scene_from([dict(shape="ring", colour="blue", motion="slides", speed=speed, background="bricks")] * 6).centre[:, 0, 0]
        np.testing.assert_allclose(x[int(period) :], x[: -int(period)], atol=1e-3)
        assert np.abs(x[int(period) // 2 :] - x[: -int(period) // 2]).max() > 40


def test_a_gap_moves_rotary_and_world_time_together():
    scene = tw.scene_from([dict(shape="ring", colour="blue", motion="slides", background="bricks")] * 3, gap=100)
    plain = tw.scene_from([dict(shape="ring", colour="blue", motion="slides", background="bricks")] * 3)
    assert scene.time.tolist() == [*range(8), *range(108, 124)] and scene.time.dtype == np.float32
    later = (4 * 100) % 48
    np.testing.assert_allclose(scene.centre[29:60], plain.centre[29 + later : 60 + later][:31], atol=1e-3)
    gaps = [s.time[8] - 8 for s in scenes(300, gap=True, chunks=2)]
    assert 0.35 < np.mean(np.array(gaps) == 0) < 0.65 and max(gaps) <= tw.MAX_GAP and max(gaps) > 500


def test_chunk_frames_match_the_configuration():
    scene = scenes(1, chunks=6)[0]
    assert [b - a for a, b in map(scene.span, range(6))] == [29] + [32] * 5
    assert len(scene.centre) == scene.span(0, 5)[1] == TOY.pixel_frames(6 * TOY.stream.chunk)
    tiny = scenes(1, chunks=3, frames_per_chunk=2, time_stride=4)[0]
    assert len(tiny.centre) == 21 and len(tiny.time) == 6


def test_rendering_one_clip_equals_a_batch_and_a_window():
    clips = [tw.device_arrays(s) for s in scenes(3, chunks=2, frames_per_chunk=2, changes=1.0)]
    batch = jax.tree.map(lambda *a: np.stack(a), *clips)
    render, render_batch = (functools.partial(f, height=32, width=64) for f in (tw.render, tw.render_batch))
    one = np.stack([np.asarray(jax.jit(render)(c)) for c in clips])
    assert one.shape == (3, 13, 32, 64, 3) and one.min() >= -1 and one.max() <= 1
    np.testing.assert_allclose(jax.jit(jax.vmap(render))(batch), one, atol=1e-5)
    np.testing.assert_allclose(jax.jit(render_batch)(batch), one, atol=1e-5)
    window = jax.tree.map(lambda a: a[4:9], clips[1])
    np.testing.assert_allclose(jax.jit(render)(window), one[1, 4:9], atol=1e-5)


def test_the_picture_shows_the_scene():
    things = [dict(shape="square", colour="red", size="small", motion="still"), dict(shape="square", colour="cyan", motion="still")]
    scene = tw.scene_from([dict(objects=things, background="studio")], frames_per_chunk=1)
    image = (np.asarray(tw.render(tw.device_arrays(scene)))[0] + 1) / 2
    for i, colour in enumerate(("red", "cyan")):
        x, y = scene.centre[0, i].astype(int)
        np.testing.assert_allclose(image[y, x], tw.COLOURS[colour], atol=0.06)
    assert image[:8].min() > 0.8


def test_scene_from_inherits_and_marks_changes():
    scene = tw.scene_from(
        [
            dict(shape="star", colour="red", motion="slides", background="night"),
            {},
            dict(motion="bounces", speed="quickly"),
            dict(cut=True, same=True, background="meadow"),
            dict(cut=True, objects=[dict(shape="ring", colour="blue", motion="still"), dict(shape="star", colour="pink", motion="pulses")]),
            dict(caption="Hello"),
        ]
    )
    assert scene.change == ["", "", "motion", "", "", ""] and scene.shot.tolist() == [0, 0, 0, 1, 2, 2]
    assert scene.attributes["objects"].tolist() == [1, 1, 1, 1, 2, 2] and scene.captions[5] == "Hello"
    assert scene.attributes["speed"][:, 0].tolist() == [0, 0, 1, 1, -1, -1]
    assert "The same" in scene.captions[3] or "the same" in scene.captions[3]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([dict(shape="sta", colour="red", motion="slides", background="night")], "did you mean 'star'"),
        ([dict(shape="star", colour="red", background="night")], "a new object needs its motion"),
        ([dict(shape="star", colour="red", motion="still")], "names no background"),
        ([RED | dict(background="night"), dict(shape="ring")], "add cut=True"),
        ([dict(shape="star", colour="red", motion="still", background="night", cut=True)], "first chunk cannot be a cut"),
        ([dict(shap="star")], "did you mean 'shape'"),
        ([dict(objects=[{}] * 3, background="night")], "3 objects"),
        ([RED | dict(background="night"), dict(objects=[RED] * 2)], "number of objects changes"),
    ],
)  # fmt: skip
def test_a_bad_specification_is_refused(specs, message):
    with pytest.raises(ConfigError, match=message):
        tw.scene_from(specs)


def test_a_bad_request_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ConfigError, match=r"cuts=\[0\] must lie in 1..3"):
        tw.sample_scene(rng, 4, cuts=[0])
    with pytest.raises(ConfigError, match="objects=3"):
        tw.sample_scene(rng, 4, objects=3)


def test_an_unknown_word_names_the_nearest_and_the_vocabulary():
    with pytest.raises(PromptError, match=r"unknown word 'sta'.*'star'.*WORDS"):
        tw.tokenize("A red sta.")
    with pytest.raises(PromptError, match="unknown word '<pad>'"):
        tw.tokenize("<pad>")
    with pytest.raises(PromptError, match="at most 7 fit"):
        tw.tokenize("red " * 8, length=8)
    ids, mask = tw.tokenize("red " * 7, length=8)
    assert mask.all() and ids[-1] == 1


def test_the_empty_prompt_is_one_end_token():
    ids, mask = tw.tokenize("")
    assert ids[0] == 1 and not ids[1:].any() and mask.tolist() == [True] + [False] * 47 and ids.dtype == np.int32


def test_free_text_is_understood():
    ids, _ = tw.tokenize(CUT_PREFIX + "There is an orange plus, moving quickly up and down, on a checkerboard")
    assert [tw.WORDS[i] for i in ids[:4]] == ["the", "scene", "transitions", "."] and TOKENS["plus"] in ids
