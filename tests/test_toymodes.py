"""The figures of videos from an image, of extended ones, of recache and of endless ones: right on truth, wrong where something is wrong."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import evaluate as script
from longlive_jax.config import ConfigError, replace
from longlive_jax.data import toyeval as te
from longlive_jax.data import toymodes as tm
from longlive_jax.data.toydraw import PALETTE
from longlive_jax.data.toyplay import Player, model_player, painted, truth_player
from longlive_jax.data.toywords import ANY_SHAPE, COLOUR_WORDS, SHAPE_WORDS, SIZE_WORDS, tokenize
from tests.test_toyeval import SMALL, all_met, altered, ideal_seen, small_model, value

rng = np.random.default_rng
SEAM = 93  # the first pixel frame after three chunks


def film_of(n, psnr=40.0):
    """A film whose frames differ by 1 to 2 levels, those across the borders of chunks by 1.5."""
    steps = np.tile(1 + (np.arange(252) * 7 % 101) / 100, (n, 1))
    steps[:, [29 + 32 * k - 1 for k in range(7)]] = 1.5
    return tm.Film(steps, np.full((n, SEAM), psnr), np.full(n, 1.5))


def named(rows, group, measure):
    """The one row of a group whose measure starts so."""
    (row,) = [r for r in rows if r.group == group and r.measure.startswith(measure)]
    return row


# ---- scenes ------------------------------------------------------------------------------------------------------------------------------


def test_captions_leave_the_objects_out_once_something_is_given():
    scenes = tm.given_scenes(rng(0), 16, tm.PREFIX)
    words = {word for table in (COLOUR_WORDS, SHAPE_WORDS, SIZE_WORDS) for options in table.values() for word in options} - set(ANY_SHAPE)
    said = lambda text: words & set(text.lower().replace(".", " ").replace(",", " ").split())
    for i, scene in enumerate(scenes):
        assert len(scene.captions) == tm.CHUNKS == len(scene.said) and len(set(scene.captions[: tm.PREFIX])) == 1
        assert [bool(said(text)) for text in scene.captions] == [True] * 3 + [i < 8] * 5
        assert "the " in scene.captions[-1].lower() or i < 8
        tokenize(scene.captions[-1])
    plain = te.prompts(rng(0), 16, tm.CHUNKS)
    assert all(np.array_equal(a.attributes["motion"], b.attributes["motion"]) for a, b in zip(plain[:1], scenes[:1]))


def test_windows_of_latents_are_whole_chunks():
    assert tm.ends(1100, 50) == (list(range(6)), list(range(132, 138)))
    assert tm.ends(40, 16) == ([0, 1], [3, 4])
    with pytest.raises(ConfigError, match="do not hold two windows of 50 latents"):
        tm.ends(80, 50)


# ---- scoring, from readings without pixels -----------------------------------------------------------------------------------------------


def test_an_image_is_shown_first_and_kept():
    seen = ideal_seen(tm.given_scenes(rng(0), 16, 1), range(8))
    all_met(tm.image(seen, film_of(16))[0])
    clear = np.where(np.arange(16)[:, None] < 4, 29.9, 40.0)
    rows, _ = tm.image(seen, film_of(16)._replace(psnr=clear))
    assert named(rows, "first frame", "PSNR at least").value == 75 and not named(rows, "first frame", "PSNR at least").met
    assert named(rows, "first frame", "PSNR, median").met and named(rows, "first frame", "PSNR, lowest").value == 29.9
    other = np.where(np.arange(16)[:, None] < 8, seen.readings[7].colour, -1)  # lost where the caption does not say it
    rows, details = tm.image(altered(seen, 7, colour=other), film_of(16))
    assert named(rows, "said in every chunk", "colour").value == 100 and named(rows, "left out later", "colour").value == 100 - 100 / 8
    assert named(rows, "chunk 7", "colour").value == 50 == details["by chunk"]["colour"][7] and details["by chunk"]["shape"][7] == 100
    assert named(rows, "said in every chunk", "background").target == 95.0


def test_a_seam_lies_among_the_films_own_differences():
    seen = ideal_seen(tm.given_scenes(rng(0), 8, tm.PREFIX), range(8))
    all_met([r for r in tm.extension(seen, film_of(8))[0] if r.readings])
    measure = "difference within"
    loud = film_of(8)
    loud.steps[:2, SEAM - 1] = 2.5
    rows, _ = tm.extension(seen, loud)
    assert named(rows, "seam", measure).value == 75 and not named(rows, "seam", measure).met
    assert named(rows, "later borders of chunks", measure).value == 100 == named(rows, "seam, given frames kept", measure).value
    rows, _ = tm.extension(seen, film_of(8)._replace(seam=np.full(8, 2.5)))
    assert named(rows, "seam", measure).value == 100 and named(rows, "seam, given frames kept", measure).value == 0
    lost = altered(seen, 3, shape=seen.readings[3].shape * 0 - 1)
    rows, _ = tm.extension(lost, film_of(8))
    assert named(rows, "chunk 3", "shape").value == 0 and named(rows, "said in every chunk", "shape").value == 80
    assert named(rows, "given part, decoded", "shape").value == 100
    moved = altered(seen, 3, centre=seen.readings[3].centre + 9)
    assert value(tm.extension(moved, film_of(8))[0], "jump over the median step inside, mean") > 1.5


def test_recache_is_paired_with_a_memory_as_it_was():
    scenes = te.change_scenes(rng(0), 12)
    seen = ideal_seen(scenes, (3,), late=(2,))
    all_met(tm.recache(seen, seen)[0])
    stays = ideal_seen([dataclasses.replace(s, attributes={k: v[[0] * 4] for k, v in s.attributes.items()}) for s in scenes], (3,), late=(2,))
    rows, _ = tm.recache(stays._replace(scenes=scenes), seen)
    assert named(rows, "without recache", "obeyed by the next chunk").value == 0 == named(rows, "without recache", "obeyed a chunk later").value
    assert named(rows, "with recache", "obeyed by the next chunk").met and named(rows, "without recache", "what did not change").value == 100
    assert named(rows, "lost by recache", "obeyed").value == -100
    rows, _ = tm.recache(seen, altered(seen, 3, background=seen.readings[3].background * 0 - 1)._replace(cuts=[[61]] * 12))
    assert named(rows, "with recache", "what did not change").value == pytest.approx(100 / 6)
    assert named(rows, "with recache", "without a cut").value == 0


def test_a_slip_is_mended_where_its_attribute_is_right_again():
    scenes = tm.mending_scenes(rng(0), 40)
    assert all(len(set(s.captions)) == 1 and s.wrong.tolist() == [False, True, True, False, False, False] for s in scenes)
    seen = ideal_seen(scenes, range(6), late=(tm.PREFIX,))
    rows, _ = tm.mending(seen)
    all_met([r for r in rows if r.readings])
    assert [r.n for r in rows[:6]] == [40, *(r.n for r in rows[1:6])] and sum(r.n for r in rows[1:6]) == 40 and min(r.n for r in rows[1:6]) > 0
    rows, _ = tm.mending(altered(seen, 4, shape=seen.readings[2].shape)._replace(late=dict.fromkeys((3,), seen.readings[2])))
    assert [named(rows, when, "mended").value for when in ("by the next chunk", "two chunks later")] == [0, 100]
    assert named(rows, "a chunk later", "shape mended").value == 0 and named(rows, "a chunk later", "colour mended").value == 100


# ---- pixels ------------------------------------------------------------------------------------------------------------------------------


def deaf(player):
    """``player`` that does not look at what it is given."""
    return Player(player.batch, lambda scenes, first=0, sink=True, given=None, rebuild=False: player.play(scenes, first, sink))


def filmed(player, scenes, known):
    films = []
    list(tm.beginning(player, known, films).play(scenes))
    return films[0]


@pytest.mark.exhaustive
def test_truth_begins_with_what_is_given_and_a_deaf_player_does_not():
    scenes = te.prompts(rng(0), 2, 2)
    strange = lambda scene: dataclasses.replace(scene, rgb=1 - scene.rgb)
    for known in (1, 29):
        film = filmed(truth_player(2), scenes, known)
        assert film.steps.shape == (2, 60) and film.psnr.shape == (2, known) and (film.psnr == 99).all()
        np.testing.assert_allclose(film.seam, film.steps[:, known - 1], rtol=1e-5)
        pixels = np.asarray(painted(scenes, known - 1, known + 1)).astype(int)
        np.testing.assert_allclose(film.seam, np.abs(np.diff(pixels, axis=1)).mean((1, 2, 3, 4)), rtol=1e-5)
        moved = filmed(truth_player(2, strange), scenes, known)  # as given, then in other colours
        assert (moved.psnr == 99).all() and (moved.seam > film.seam).all()
        np.testing.assert_allclose(moved.seam, moved.steps[:, known - 1], rtol=1e-5)
        assert (filmed(deaf(truth_player(2, strange)), scenes, known).psnr < 30).all()


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_rendered_truth_is_all_right_in_every_mode():
    parts = list(tm.evaluate(truth_player(2), n=2, long=2, latents=40, window=16))
    assert [part.name for part in parts] == list(tm.MODES)
    for part in parts:
        all_met([r for r in part.rows if r.readings and r.group != "loss, upper 95 % bound"])
    assert sorted(parts[3].seen.readings) == [0, 1, 3, 4] and [len(clip) for clip in parts[3].seen.clips] == [16, 16]


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_another_colour_after_the_seam_is_seen():
    late = lambda s: (np.arange(len(s.rgb)) >= SEAM)[:, None, None]
    other = lambda s: dataclasses.replace(s, rgb=np.where(late(s), PALETTE[(s.attributes["colour"][0] + 1) % 8], s.rgb).astype(np.float32))
    rows = next(tm.evaluate(truth_player(2, other), ["extension"], n=2)).rows
    assert named(rows, "given part, decoded", "four").value == 100 == named(rows, "said in every chunk", "shape").value
    assert named(rows, "said in every chunk", "colour").value == 0
    assert named(rows, "seam", "difference within").value == 50  # the other object is so quick that its motion outweighs the colour


@pytest.mark.slow
def test_the_model_goes_on_from_what_it_is_given():
    layers = replace(SMALL.transformer, layers=2)  # keys of a first layer do not depend on the prompt
    experiment = replace(SMALL, transformer=layers, sampler=replace(SMALL.sampler, steps=1, guidance=1.0))
    player = model_player(experiment, *small_model(experiment), batch=2)
    scenes = [dataclasses.replace(s, captions=[s.captions[0], s.captions[2]]) for s in te.change_scenes(rng(0), 2)]
    play = lambda **more: [np.asarray(x).astype(int) for x in player.play(scenes, 0, True, **more)]
    apart = lambda a, b: [float(np.abs(x - y).mean()) for x, y in zip(a, b)]
    plain, image, extended, rebuilt = play(), play(given=painted(scenes, 0, 1)), play(given=painted(scenes, 0, 29)), play(rebuild=True)
    assert [x.shape for x in extended] == [(2, 29, 128, 128, 3), (2, 32, 128, 128, 3)]
    assert np.abs(image[0][:, 0] - extended[0][:, 0]).max() <= 1 < np.abs(image[0][:, 0] - plain[0][:, 0]).mean()  # the image's alone
    assert min(apart(image, plain) + apart(extended, plain) + apart(image, extended)) > 0.02
    assert np.abs(rebuilt[0] - plain[0]).max() <= 1  # another program, so another rounding here and there
    assert apart(rebuilt, plain)[0] < 1e-3 < 0.02 < apart(rebuilt, plain)[1]


# ---- errors ------------------------------------------------------------------------------------------------------------------------------


def test_all_parts_can_be_asked_for():
    assert script.arguments(["--parts=all"]).parts == (*te.PARTS, *tm.MODES)
    assert script.arguments([]).parts == te.PARTS and script.arguments(["--only=endless,cuts"]).parts == ("cuts", "endless")
    with pytest.raises(ConfigError, match="unknown part 'imagine': did you mean 'image'"):
        script.arguments(["--parts=imagine"])


def test_bad_counts_are_refused():
    with pytest.raises(ConfigError, match="n=0 and long=64 must be at least 1"):
        next(tm.evaluate(truth_player(1), n=0))
    with pytest.raises(ConfigError, match="30 frames are given; give one, or whole chunks: 29 frames"):
        modules = [jax.numpy.zeros(1)] * 3
        scenes = te.prompts(rng(0), 1, 2)
        next(model_player(SMALL, *modules, batch=1).play(scenes, given=painted(scenes, 0, 30)))
