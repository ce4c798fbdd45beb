"""The evaluation of the toy model: rendered truth is all right, wrong videos are not, and the model's frames take the same path."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import evaluate as script
from longlive_jax.config import CUT_PREFIX, TOY, ConfigError, SamplerConfig, StreamConfig, TextConfig, TransformerConfig, VAEConfig, replace
from longlive_jax.data import toyeval as te
from longlive_jax.data.toyfigures import loss_bound, quantity, rate, wilson
from longlive_jax.data.toyplay import Player, model_player, painted, told, truth_player
from longlive_jax.data.toyreader import Reading
from longlive_jax.data.toywords import COLOUR_WORDS, MOTIONS, SHAPE_WORDS
from longlive_jax.data.toyworld import PERIODS, sample_scene
from longlive_jax.model.text import TextEncoder
from longlive_jax.model.transformer import VideoTransformer
from longlive_jax.model.vae import VAE
from longlive_jax.tree import abstract, flat_params, with_params

pytestmark = pytest.mark.usefixtures("optimized")
rng = np.random.default_rng


# ---- figures -----------------------------------------------------------------------------------------------------------------------------


def test_wilson_is_the_published_interval():
    np.testing.assert_allclose(wilson(0.95, 100), (0.888, 0.978), atol=1e-3)
    assert wilson(1.0, 10)[1] == 1 and 0.7 < wilson(1.0, 10)[0] < 0.75


def test_rate_counts_readings_and_widens_the_interval_where_streams_repeat_themselves():
    alone = rate("", "x", [[True]] * 90 + [[False]] * 10)
    repeated = rate("", "x", [[True] * 8] * 90 + [[False] * 8] * 10)
    spread = rate("", "x", [[True] * 9 + [False]] * 80)
    assert alone.value == repeated.value == spread.value == 90
    assert (repeated.n, repeated.readings) == (100, 800)
    width = lambda row: row.high - row.low
    assert width(repeated) == pytest.approx(width(alone), rel=0.03)
    assert width(spread) < 0.5 * width(alone)
    assert rate("", "x", [[True] * 8] * 100).low == pytest.approx(100 * wilson(1.0, 100)[0])  # all right: only streams count


def test_a_rate_without_readings_says_so():
    row = rate("", "x", [[], []], target=95.0)
    assert np.isnan(row.value) and row.n == 0 and not row.met


def test_targets():
    assert rate("", "x", [[True]], 95.0).met and not rate("", "x", [[False]], 95.0).met and rate("", "x", [[True]]).met is None
    low, high = (quantity("", "x", [value], "px", target=2)[1] for value in (1, 3))
    assert low.met and not high.met


def test_the_bound_of_a_loss():
    before = rng(0).normal(95, 3, 400)
    mean, upper = loss_bound(before, before - rng(1).normal(1, 2, 400))
    assert mean == pytest.approx(1, abs=0.3) and mean + 0.12 < upper < mean + 0.25
    assert loss_bound([100.0] * 64, [100.0] * 64, 7) == (0.0, pytest.approx(300 / 448))  # never simply zero
    assert loss_bound([100.0, 50.0], [50.0, 100.0])[1] > 20


# ---- the scenes that are asked for -------------------------------------------------------------------------------------------------------


def test_prompts_hold_withheld_combinations_and_two_objects_in_fixed_shares():
    scenes = te.prompts(rng(0), 32)
    assert [te.is_withheld(s) for s in scenes] == [True, False] * 16
    assert sum(s.attributes["objects"][0] == 2 for s in scenes) == 8
    assert all(len(set(s.captions)) == 1 and not s.cut.any() for s in scenes)


def test_recall_says_an_attribute_once():
    for i, scene in enumerate(te.recall_scenes(rng(0), 20)):
        kind = ("colour", "shape")[i % 2]
        words = {word for options in (COLOUR_WORDS if kind == "colour" else SHAPE_WORDS).values() for word in options}
        said = lambda text, words=words: words & set(text.lower().replace(".", " ").replace(",", " ").split())
        assert said(scene.captions[0]) and not any(said(text) for text in scene.captions[1:])
        assert np.flatnonzero(scene.cut).tolist() == [2, 8, 32]
        assert all(("the same " in text.lower()) == cut for text, cut in zip(scene.captions[1:3], scene.cut[1:3]))
        assert all(len(set(scene.attributes[key][:, 0])) == 1 for key in ("colour", "shape", "size"))


def test_change_changes_one_thing_without_a_cut():
    for i, scene in enumerate(te.change_scenes(rng(0), 24)):
        kind = te.KINDS[i % len(te.KINDS)]
        before, after = ({k: v[j] for k, v in scene.attributes.items()} for j in (te.CHANGE_AT - 1, te.CHANGE_AT))
        differ = {k for k in before if not np.array_equal(before[k], after[k])}
        assert kind in differ <= ({kind, "speed"} if kind == "motion" else {kind})
        assert not scene.cut.any() and not any(text.startswith(CUT_PREFIX) for text in scene.captions)
        assert scene.captions[te.CHANGE_AT - 1] != scene.captions[te.CHANGE_AT] == scene.captions[-1]


def test_windows_of_seconds_are_whole_chunks():
    scene = sample_scene(rng(0), 46, cuts=[], changes=False)
    assert te.chunks_within(scene, (5, 15)) == list(range(4, 11))
    assert te.chunks_within(scene, (50, 60)) == list(range(38, 45))


# ---- scoring, from readings without pixels -----------------------------------------------------------------------------------------------


def ideal(scene, k, late=False):
    """What a perfect reader would say of a perfect video."""
    a = {key: value[k] for key, value in scene.attributes.items()}
    start, stop = scene.span(k)
    period = np.where(a["speed"] >= 0, np.take(PERIODS, a["speed"]), 0)
    rest = {key: np.zeros(2) for key in ("pace", "radius", "shape_score", "colour_share", "fit")}
    rest |= {key: np.float32(0) for key in ("background_error", "background_detail", "background_bad")}
    read = {key: a[key] for key in ("objects", "colour", "shape", "size", "motion", "speed", "background")}
    return Reading(**read, **rest, period=period, centre=scene.centre[start + 8 * late : stop + 8 * late])


def ideal_seen(scenes, chunks, late=(), cuts=None):
    batch = lambda k, late=False: jax.tree.map(lambda *rows: np.stack(rows), *[ideal(s, k, late) for s in scenes])
    found = [[s.span(k)[0] for k in np.flatnonzero(s.cut)] for s in scenes] if cuts is None else cuts
    return te.Seen(scenes, {k: batch(k) for k in chunks}, {k: batch(k, True) for k in late}, found, [])


def value(rows, measure, group=None):
    """The figure of the one row called so."""
    (row,) = [r for r in rows if r.measure.startswith(measure) and group in (None, r.group)]
    return row.value


def altered(seen, k, **fields):
    return seen._replace(readings=seen.readings | {k: seen.readings[k]._replace(**fields)})


def all_met(rows):
    assert [r for r in rows if r.unit == "%" and "over the width" not in r.measure and not r.value == 100] == []
    assert all(r.met is not False for r in rows)


def test_a_perfect_reading_of_one_prompt_is_all_right():
    seen = ideal_seen(te.prompts(rng(0), 24), range(5))
    for part in (te.adherence, te.motion, te.seams):
        all_met(part(seen)[0])


def test_adherence_falls_for_what_is_wrong_alone():
    seen = ideal_seen(te.prompts(rng(0), 24), range(5))
    wrong = (seen.readings[2].colour + 1) % 8
    rows, details = te.adherence(altered(seen, 2, colour=np.where(np.arange(24)[:, None] < 12, wrong, seen.readings[2].colour)))
    assert value(rows, "colour", "all prompts") == value(rows, "four", "all prompts") == 100 - 100 * 12 / 96
    assert value(rows, "shape", "all prompts") == 100 == value(rows, "colour", "first chunk")
    assert sum(" as " in name for name in details["confusion"]["colour"]) > 0 and not any(
        " as " in name for name in details["confusion"]["shape"]
    )
    rows = te.adherence(altered(seen, 0, background=seen.readings[0].background * 0 - 1))[0]
    assert value(rows, "four", "first chunk") == 0 and value(rows, "four", "all prompts") == 100
    rows = te.adherence(altered(seen, 1, objects=3 - seen.readings[1].objects))[0]
    assert (
        value(rows, "objects", "all prompts") == value(rows, "shape", "all prompts") == 75 and value(rows, "background", "all prompts") == 100
    )


def test_motion_measures_stillness_and_speed():
    seen = ideal_seen(te.prompts(rng(0), 24), range(5))
    reading = seen.readings[3]
    drifted = altered(seen, 3, centre=reading.centre + np.linspace(0, 2.5, 32)[:, None, None])
    assert value(te.motion(drifted)[0], "displacement, maximum") == pytest.approx(2.5 * 2**0.5, rel=0.01)
    assert value(te.motion(drifted)[0], "displacement over the width, maximum") == pytest.approx(100 * 2.5 * 2**0.5 / 128, rel=0.01)
    assert value(te.motion(altered(seen, 3, period=reading.period * 1.1))[0], "speed measured in one chunk") == 100
    assert value(te.motion(altered(seen, 3, period=reading.period * 1.3))[0], "speed measured in one chunk") == 75
    assert (
        value(te.motion(altered(seen, 3, period=reading.period * 1.3))[0], "speed measured over a stream") == 100
    )  # one chunk of four does not decide
    assert value(te.motion(altered(seen, 3, motion=reading.motion * 0 + MOTIONS.index("slides")))[0], "reads as still") == 75


def test_seams_see_a_jump_between_chunks_and_not_inside():
    seen = ideal_seen(te.prompts(rng(0), 24), range(5))
    jumped = altered(seen, 2, centre=seen.readings[2].centre + 9.0)  # at two of four seams
    rows = te.seams(jumped)[0]
    assert value(rows, "jump over the median step inside, mean") > 1.5 > value(rows, "step over the median step, mean")
    assert value(rows, "clips whose mean is at most 1.5") < 20
    assert value(rows, "jump of objects that stay in place, maximum") == pytest.approx(9 * 2**0.5, rel=0.01)


def test_cuts_count_misses_and_false_ones():
    scenes = te.storyboards(rng(0), 9)
    asked = [[s.span(k)[0] for k in np.flatnonzero(s.cut)] for s in scenes]
    assert {len(starts) for starts in asked} == {2, 3, 4}
    all_met(te.cuts(ideal_seen(scenes, range(8)))[0])

    def figures(found):
        rows, details = te.cuts(ideal_seen(scenes, range(8), cuts=found))
        names = ("asked cuts that are there", "chunks without a cut elsewhere", "videos with exactly")
        return [value(rows, name) for name in names], details

    (hit, stay, exact), details = figures([starts[1:] for starts in asked])
    assert (hit, stay, exact) == (pytest.approx(100 * (1 - 9 / 27)), 100, 0) and details == {"missed": 9, "false": 0}
    (hit, stay, exact), details = figures([[*starts, starts[0] + 12] for starts in asked])
    assert (hit, stay, exact) == (100, pytest.approx(100 * (1 - 9 / 72)), 0) and details == {"missed": 0, "false": 9}
    (hit, stay, exact), _ = figures([[f + 32 for f in starts] for starts in asked])
    assert hit < 60 and stay < 100 and exact == 0
    assert figures([[f + 2 for f in starts] for starts in asked])[0] == [100, 100, 100]


def test_drift_pairs_the_windows_of_a_stream():
    scenes = te.long_prompts(rng(0), 8, 10)
    seen = ideal_seen(scenes, range(1, 9))
    all_met(te.drift(seen, [1, 2], [7, 8])[0][:18])
    wrong = np.where(np.arange(8)[:, None] < 2, -1, seen.readings[8].shape)
    rows, details = te.drift(altered(seen, 8, shape=wrong), [1, 2], [7, 8])
    assert value(rows, "shape", "loss") == value(rows, "four", "loss") == 100 * 2 / 16
    assert value(rows, "colour", "loss") == 0 and details["streams that differ"] == 2
    (row,) = [r for r in rows if (r.group, r.measure) == ("loss, upper 95 % bound", "four")]
    assert row.value > 12.5 and row.met is False
    assert details["slips"] == {i: {"prompt": scenes[i].captions[0], "shape": [8]} for i in range(2)}


@pytest.mark.exhaustive
def test_stills_are_of_the_chunks_that_are_read(tmp_path):
    scenes = te.prompts(rng(0), 3, 4)
    seen = te.observe(truth_player(2), scenes, (1, 3), stills=16)
    assert len(seen.clips) == 3 and all(clip.shape == (4, 128, 128, 3) for clip in seen.clips)
    np.testing.assert_array_equal(seen.clips[2], np.asarray(painted(scenes[2:], 29, 125))[0, [0, 16, 64, 80]])
    seen = altered(seen, 3, shape=np.where(np.arange(3)[:, None] == 1, -1, seen.readings[3].shape))
    (first, text), *rest = script.stream_rows(seen)
    assert first is seen.clips[1] and text == f"2. {scenes[1].captions[0]} [wrong: shape in chunk 3]" and len(rest) == 2
    assert [row[0] is seen.clips[i] for row, i in zip(rest, (0, 2))] == [True, True] and len(list(script.stream_rows(seen, 1))) == 1
    script.write_sheet(te.Part("endless", [], {}, seen), tmp_path)
    assert (tmp_path / "endless.png").stat().st_size > 1000


def test_recall_reads_the_attribute_that_was_left_out():
    scenes = te.recall_scenes(rng(0), 8, (1, 3))
    seen = ideal_seen(scenes, (1, 3))
    all_met(te.recall(seen, True, (1, 3))[0])
    rows = te.recall(altered(seen, 3, colour=seen.readings[3].colour * 0 - 1), True, (1, 3))[0]
    assert value(rows, "attribute left out, 1") == 100 and value(rows, "attribute left out, 3") == 50
    assert value(rows, "colour left out, 3") == 0 and value(rows, "shape left out, 3") == 100
    assert all(row.target is None for row in te.recall(seen, False, (1, 3))[0])


def test_a_change_that_comes_late_or_never():
    scenes = te.change_scenes(rng(0), 12)
    seen = ideal_seen(scenes, (1, 3), late=(2,))
    all_met(te.change(seen)[0])
    stays = ideal_seen([dataclasses.replace(s, attributes={k: v[[0] * 4] for k, v in s.attributes.items()}) for s in scenes], (1, 3), late=(2,))
    for kind in set(te.KINDS):
        late = te.change(seen._replace(late=stays.late))[0]
        never = te.change(stays._replace(scenes=scenes))[0]
        assert value(late, "obeyed by the next chunk", kind) == 0 and value(late, "obeyed a chunk later", kind) == 100
        assert value(never, "obeyed by the next chunk", kind) == value(never, "obeyed a chunk later", kind) == 0
        assert value(te.change(seen._replace(cuts=[[61]] * 12))[0], "without a cut", kind) == 0


# ---- pixels ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rendered_truth_is_all_right_in_every_part():
    parts = list(te.evaluate(truth_player(2), n=8, long=2, seconds=((1.2, 2.6), (3.8, 5.3)), distances=(1, 2)))
    assert [part.name for part in parts] == list(te.PARTS)
    for part in parts:
        all_met([r for r in part.rows if r.readings and r.group != "loss, upper 95 % bound"])


@pytest.mark.slow
def test_wrong_videos_score_low():
    scenes = te.prompts(rng(3), 4, 3)
    other = {id(s): o for s, o in zip(scenes, [*scenes[1:], scenes[0]])}
    rows = te.adherence(te.observe(truth_player(2, lambda s: other[id(s)]), scenes, range(3)))[0]
    assert value(rows, "four", "all prompts") <= 25 and value(rows, "shape", "all prompts") < 70

    still = lambda s: dataclasses.replace(s, centre=s.centre[:1].repeat(len(s.centre), 0), radius=s.radius[:1].repeat(len(s.radius), 0))
    moving = [s for s in te.prompts(rng(4), 12, 3) if (s.attributes["motion"][0, : s.attributes["objects"][0]] > 0).all()][:2]
    rows = te.adherence(seen := te.observe(truth_player(2, still), moving, range(3)))[0]
    assert value(rows, "motion", "all prompts") == 0 and value(rows, "colour", "all prompts") == 100
    assert value(te.motion(seen)[0], "speed measured in one chunk") == 0 == value(te.motion(seen)[0], "speed measured over a stream")

    odd = lambda s: np.array([k % 2 for k in range(3) for _ in range(*s.span(k))])[:, None, None]
    jump = lambda s: dataclasses.replace(s, centre=s.centre + np.float32(9) * odd(s))
    rows = te.seams(te.observe(truth_player(2, jump), moving, range(3)))[0]
    assert value(rows, "jump over the median step inside, mean") > 1.5 > value(rows, "step over the median step, mean")


@pytest.mark.slow
def test_cuts_a_chunk_late_are_misses_and_false_ones():
    early, late = (sample_scene(rng(5), 4, cuts=cuts, changes=False, objects=1, same=0.0) for cuts in ([1], [2]))
    seen = te.observe(truth_player(2, lambda s: late), [early], range(4), cuts=True)
    assert te.cuts(seen)[1] == {"missed": 1, "false": 1}
    assert te.cuts(te.observe(truth_player(2), [early], range(4), cuts=True))[1] == {"missed": 0, "false": 0}


# ---- the model ---------------------------------------------------------------------------------------------------------------------------

SMALL = replace(
    TOY,
    transformer=TransformerConfig(
        dim=32, ffn_dim=32, heads=2, layers=1, channels=4, text_dim=16, text_len=48, freq_dim=16, patch=(1, 1)
    ),
    vae=VAEConfig(dim=4, decoder_dim=4, channels=4, multipliers=(1, 1, 1, 1), res_blocks=1),
    text=TextConfig(vocab=256, dim=16, attention_dim=16, ffn_dim=16, heads=2, layers=1, tokenizer="words"),
    sampler=SamplerConfig(steps=2, shift=3.0, guidance=2.0, negative_prompt=""),
)  # fmt: skip


def filled(empty, seed):
    """A module with random weights; norms keep gains near one."""
    draw, params = rng(seed).standard_normal, {}
    for name, p in flat_params(empty).items():
        fan_in = p.shape[-1] if p.ndim == 2 else np.prod(p.shape[:-1])
        params[name] = jnp.asarray(draw(p.shape) * (0.1 if p.ndim == 1 else fan_in**-0.5) + ("norm" in name or "gamma" in name), p.dtype)
    return with_params(empty, params)


def small_model(experiment=SMALL):
    kinds = ((VideoTransformer, experiment.transformer), (VAE, experiment.vae), (TextEncoder, experiment.text))
    return tuple(filled(abstract(lambda kind=kind, config=config: kind(config, rngs=nnx.Rngs(0))), i) for i, (kind, config) in enumerate(kinds))


def test_a_player_says_how_far_it_is(capsys):
    player = Player(2, lambda scenes, first, sink: iter([jnp.zeros((2, 29)), jnp.ones((2, 32))]))
    heard = told(player, "fp8", 2)
    assert heard.batch == 2 and [x.shape for x in heard.play(None, 0, True)] == [(2, 29), (2, 32)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "fp8: 2 chunks of 2 streams; the first may wait for its programs"
    assert lines[1].startswith("fp8: 1/2, 0:0") and " left" in lines[1]
    assert lines[-1].startswith("fp8: 2/2")


def frames(experiment, scenes, modules, first=0, sink=True):
    player = model_player(experiment, *modules, batch=len(scenes))
    return [np.asarray(x) for x in player.play(scenes, first, sink)]


@pytest.mark.exhaustive
def test_the_model_plays_chunks_that_do_not_depend_on_the_batch():
    modules = small_model()
    scenes = [sample_scene(rng(i), 3, cuts=cuts) for i, cuts in enumerate(([1], [2]))]
    both = frames(SMALL, scenes, modules=modules)
    assert [x.shape for x in both] == [(2, 29, 128, 128, 3), (2, 32, 128, 128, 3), (2, 32, 128, 128, 3)] and both[0].dtype == np.uint8
    turned = frames(SMALL, scenes[::-1], first=1, modules=modules)  # streams 1 and 2
    assert all(np.abs(a[1].astype(int) - b[0]).max() <= 1 for a, b in zip(both, turned))
    assert np.abs(both[0][0].astype(int) - turned[0][1]).mean() > 1  # the same prompt with other noise
    recaptioned = dataclasses.replace(scenes[0], captions=[scenes[0].captions[0], *scenes[1].captions[1:]])
    a, b = both, frames(SMALL, [recaptioned, scenes[1]], modules=modules)
    assert np.array_equal(a[0], b[0]) and not np.array_equal(a[1][0], b[1][0]) and np.array_equal(a[1][1], b[1][1])


@pytest.mark.exhaustive
def test_without_a_sink_the_stream_is_that_of_a_memory_without_one():
    modules = small_model()
    stream = StreamConfig(chunk=1, window=4, sink=1)
    scenes = [sample_scene(rng(i), 7, cuts=cuts) for i, cuts in enumerate(([2], [3]))]
    played = frames(replace(SMALL, stream=stream), scenes, sink=False, modules=modules)
    plain = frames(replace(SMALL, stream=replace(stream, sink=0, shot_sink=False)), scenes, modules=modules)
    kept = frames(replace(SMALL, stream=stream), scenes, modules=modules)
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(played, plain)) <= 1
    assert np.abs(played[-1].astype(int) - kept[-1]).max() > 1


@pytest.mark.slow
def test_the_program_writes_figures_and_sheets_for_a_model(tmp_path):
    words = ["--n=2", "--batch=2", f"--out={tmp_path}", "--bundle=runs/small"]
    parts = script.main([*words, "--only=adherence,seams", "--steps=1", "--guidance=1"], bundle=(SMALL, *small_model()))
    assert [p.name for p in parts] == ["adherence", "seams"]
    assert value(parts[0].rows, "four", "all prompts") == 0  # noise
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["settings"]["steps"] == "1" and record["settings"]["model"] == "small" and record["parts"]["adherence"]["rows"][0]["n"] == 2
    assert (tmp_path / "prompts.png").stat().st_size > 10_000 and "| adherence | all prompts | four |" in (tmp_path / "results.md").read_text()
    (part,) = script.main([*words, "--compare_n=2", "--steps=1", "--guidance=1,3"], bundle=(SMALL, *small_model()))
    groups = {row.group for row in part.rows}
    assert groups >= {"steps 1, guidance 1.0", "steps 1, guidance 3.0, first chunk"} and len(part.rows) == 4 * len(te.KEYS)


@pytest.mark.slow
def test_the_program_shows_rendered_truth(tmp_path):
    parts = script.main(["--truth", "--n=4", "--batch=2", "--only=cuts,change", f"--out={tmp_path}"])
    for part in parts:
        all_met([r for r in part.rows if r.readings])
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "results.md", "shots.png", "changes.png"}


# ---- errors ------------------------------------------------------------------------------------------------------------------------------


def test_unknown_parts_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="unknown part 'adherance': did you mean 'adherence'"):
        script.main(["--only=cuts,adherance"])
    assert te.check_parts(["cuts", "adherence"]) == ("adherence", "cuts")


def test_a_missing_bundle_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.*is missing"):
        script.main([f"--bundle={tmp_path / 'nowhere'}", f"--out={tmp_path}"])


@pytest.mark.parametrize("word", ["--n=0", "--batch=-1", "--long=0", "--compare_n=0"])
def test_counts_are_positive(word):
    with pytest.raises(ConfigError, match=f"{word} must be at least 1"):
        script.main([word])


def test_evaluate_refuses_bad_counts():
    with pytest.raises(ConfigError, match="n=0 and long=64 must be at least 1"):
        next(te.evaluate(truth_player(1), n=0))
    with pytest.raises(ConfigError, match="hold no whole chunk"):
        next(te.evaluate(truth_player(1), ["drift"], long=1, seconds=((1.3, 2.5), (3, 6))))


def test_settings_have_their_types(capsys):
    with pytest.raises(SystemExit):
        script.main(["--steps=4,many"])
    assert "--steps" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="'unipc' or 'euler'"):
        script.main(["--solver=heun"], bundle=(SMALL, None, None, None))


def test_a_player_refuses_other_sizes_and_other_numbers_of_scenes():
    modules = [jnp.zeros(1)] * 3
    with pytest.raises(ConfigError, match="video 64x128 cannot be read"):
        model_player(replace(SMALL, video=replace(SMALL.video, height=64)), *modules, batch=1)
    with pytest.raises(ConfigError, match="1 scenes given to a player of batch=2"):
        next(model_player(SMALL, *modules, batch=2).play(te.prompts(rng(0), 1)))
