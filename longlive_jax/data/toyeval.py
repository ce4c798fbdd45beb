"""Judges generated toy videos by their pixels: adherence, cuts, motion, seams, drift, recall and changes of the prompt.

``evaluate`` asks a player (toyplay.py) for the videos of scenes that it draws, reads them (toyreader.py) and gives one ``Part`` after another.
Every figure is a ``Row``: a percentage with its 95 % interval, or a measured quantity. Readings of one stream are not independent, so
intervals count streams (``rate``). The same path fed with rendered truth must give 100 %.
"""

import dataclasses
import difflib
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.config import CUT_PREFIX, require
from longlive_jax.data.toydraw import CANVAS
from longlive_jax.data.toyfigures import Row, loss_bound, quantity, rate
from longlive_jax.data.toypixels import unit_frames
from longlive_jax.data.toyplans import PULSES, STILL, Plan, draw_things, with_motion, withheld
from longlive_jax.data.toyreader import SPEED_TOLERANCE, find_cuts, read_segment, score
from longlive_jax.data.toywords import BACKGROUNDS, COLOUR_NAMES, EVERYTHING, MOTIONS, SHAPES, SIZES, SPEEDS, Said, caption, chooser
from longlive_jax.data.toyworld import BLEND, PERIODS, build, sample_scene

FOUR = ("colour", "shape", "motion", "background")
KEYS = (*FOUR, "four", "size", "objects", "speed", "all")
NAMES = {"colour": COLOUR_NAMES, "shape": SHAPES, "motion": MOTIONS, "background": BACKGROUNDS, "size": SIZES, "speed": SPEEDS}
DISTANCES = (2, 8, 32)  # chunks from the one that names an attribute to the one read for it
CHANGE_AT = 2  # the chunk with the new prompt
KINDS = ("motion", "speed", "motion", "colour", "motion", "background")  # what changes, in turn
NEAR = 2  # pixel frames between a cut and the start of its chunk


# ---- reading -----------------------------------------------------------------------------------------------------------------------------


@jax.jit
def read_chunk(frames):
    """Readings of uint8 [B,T,H,W,3], on the device."""
    return jax.lax.map(lambda f: read_segment(unit_frames(f)), frames, batch_size=16)


class Seen(NamedTuple):
    """What was read of the videos of ``scenes``: Readings of numpy arrays with a leading axis of scenes."""

    scenes: list
    readings: dict  # chunk -> its Reading
    late: dict  # chunk -> the Reading of as many frames from BLEND frames after its start on
    cuts: list  # per scene the frames where a cut was found, where asked for
    clips: list  # uint8 [P,H,W,3] of the first ``keep`` scenes, or of all scenes every ``stills``-th frame of the chunks that were read


class Part(NamedTuple):
    """What one part of the evaluation found."""

    name: str
    rows: list
    details: dict
    seen: Seen


def observe(player, scenes, read, *, late=(), cuts=False, sink=True, keep=0, stills=0):
    """Play ``scenes`` (of equal length) and read the chunks ``read`` and the shifted windows ``late``. Returns ``Seen``."""
    parts, found, clips = [], [], []
    for start in range(0, len(scenes), player.batch):
        group = list(scenes[start : start + player.batch])
        count = len(group)
        seen, shifted, clip, last = {}, {}, [], None
        hold = cuts or len(clips) < keep
        for k, frames in enumerate(player.play(group + group[:1] * (player.batch - count), start, sink)):
            if k in read:
                seen[k] = read_chunk(frames)
                if stills:
                    clip.append(np.asarray(frames[:count, ::stills]))
            if k - 1 in late:
                shifted[k - 1] = read_chunk(jnp.concatenate([last[:, BLEND:], frames[:, :BLEND]], 1))
            if hold:
                clip.append(frames)
            last = frames
        parts.append(jax.tree.map(lambda a, n=count: np.asarray(a)[:n], (seen, shifted)))
        if hold:
            clip = jnp.concatenate(clip, 1)
            clips += list(np.asarray(clip[: min(count, keep - len(clips))])) if len(clips) < keep else []
            found += [find_cuts(clip[i]) for i in range(count)] if cuts else []
        elif stills:
            clips += list(np.concatenate(clip, 1))
    readings, shifted = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
    return Seen(list(scenes), readings, shifted, found, clips)


def take(reading, i):
    """The Reading of scene ``i``, or of several (a list, a mask)."""
    return jax.tree.map(lambda a: a[i], reading)


def verdicts(reading, scenes, chunk):
    """Per key of ``KEYS`` which scenes show in ``reading`` what they ask for in ``chunk``: bool [N]."""
    rows = [score(take(reading, i), scene, chunk) for i, scene in enumerate(scenes)]
    out = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    return out | {"four": np.logical_and.reduce([out[key] for key in FOUR])}


def stack(verdict_list, key):
    """[N, chunks] of one key."""
    return np.stack([v[key] for v in verdict_list], 1)


def columns(scenes, key):
    """An attribute of the first chunk for each scene: [N] or [N,2]."""
    return np.stack([scene.attributes[key][0] for scene in scenes])


# ---- adherence, motion, seams: one prompt ------------------------------------------------------------------------------------------------


def repeated(scene):
    """The scene with the caption of its first chunk in every chunk."""
    return dataclasses.replace(scene, captions=[scene.captions[0]] * len(scene.captions))


def prompts(rng, n, chunks=5):
    """``n`` scenes of one prompt each: every second shows a combination withheld from training, every fourth two objects."""
    options = dict(cuts=[], changes=False, leave_out=False)
    kinds = [(bool(i % 2 == 0), 2 if i // 2 % 4 == 3 else 1) for i in range(n)]
    return [repeated(sample_scene(rng, chunks, held_out=held_out, objects=objects, **options)) for held_out, objects in kinds]


def is_withheld(scene):
    """Whether training never shows one of the objects of the first chunk like this."""
    a = scene.attributes
    rows = [[int(a[key][0, i]) for key in ("shape", "colour", "motion")] for i in range(a["objects"][0])]
    return any(withheld(*row, int(a["background"][0])) for row in rows)


TARGETS = dict.fromkeys(FOUR, 95.0) | {"four": 92.0}


def adherence(seen):
    """Rows per attribute for all prompts, the first chunk by itself, and groups of prompts; details: who is taken for whom."""
    first, *later = [verdicts(seen.readings[k], seen.scenes, k) for k in sorted(seen.readings)]
    held, two = np.array([is_withheld(s) for s in seen.scenes]), columns(seen.scenes, "objects") == 2
    rows = [rate("all prompts", key, stack(later, key), TARGETS.get(key)) for key in KEYS]
    rows += [rate("first chunk", key, first[key][:, None], TARGETS.get(key)) for key in KEYS]
    groups = {"withheld from training": held, "not withheld": ~held, "one object": ~two, "two objects": two}
    rows += [rate(name, key, stack(later, key)[mask]) for name, mask in groups.items() for key in KEYS]
    return rows, {"confusion": confusion(seen, sorted(seen.readings)[1:])}


def confusion(seen, chunks):
    """Per attribute: "asked as read" -> count, right ones as "asked". Objects whose number was read right; backgrounds of all."""
    out = {key: {} for key in NAMES}
    for k in chunks:
        for i, scene in enumerate(seen.scenes):
            reading = take(seen.readings[k], i)
            count = int(scene.attributes["objects"][k])
            slots = range(count) if int(reading.objects) == count else ()
            pairs = [(key, scene.attributes[key][k, j], reading._asdict()[key][j]) for key in NAMES if key != "background" for j in slots]
            for key, asked, read in [*pairs, ("background", scene.attributes["background"][k], reading.background)]:
                if asked >= 0:
                    name = NAMES[key][asked] + ("" if asked == read else f" as {NAMES[key][read] if read >= 0 else 'nothing known'}")
                    out[key][name] = out[key].get(name, 0) + 1
    return {key: dict(sorted(counts.items(), key=lambda item: -item[1])) for key, counts in out.items()}


def objects_of(seen, chunks):
    """Per scene and object whose number is right in all ``chunks``: (stream, motion asked, speed asked, readings, slot)."""
    for i, scene in enumerate(seen.scenes):
        readings = [take(seen.readings[k], i) for k in chunks]
        count = int(scene.attributes["objects"][0])
        if all(int(r.objects) == count for r in readings):
            for j in range(count):
                yield i, int(scene.attributes["motion"][0, j]), int(scene.attributes["speed"][0, j]), readings, j


def motion(seen):
    """How still still objects are, and how fast the others, after the first chunk."""
    moves, right, ratios, moving = [], [], [], 0
    speeds, whole = ({i: [] for i in range(len(seen.scenes))} for _ in range(2))
    for i, asked, speed, readings, j in objects_of(seen, sorted(seen.readings)[1:]):
        if asked == STILL:
            at = np.concatenate([r.centre[:, j] for r in readings])
            moves.append(np.hypot(*(at - np.median(at, 0)).T).max())
            right.append([r.motion[j] == STILL for r in readings])
        else:
            found = [PERIODS[speed] / r.period[j] if r.period[j] > 0 else 0.0 for r in readings]
            ratios, moving = ratios + found, moving + 1
            speeds[i] += [abs(f - 1) <= SPEED_TOLERANCE for f in found]
            whole[i].append(abs(np.median(found) - 1) <= SPEED_TOLERANCE)
    width = 100 / CANVAS
    rows = [rate("still", "reads as still", right), *quantity("still", "displacement", moves, "px")]
    rows += quantity("still", "displacement over the width", np.asarray(moves) * width, "%")
    within = f"within {100 * SPEED_TOLERANCE:.0f} % of the asked"
    rows.append(rate("moving", f"speed measured over a stream (median of its chunks) {within}", whole.values(), 95.0))
    rows.append(rate("moving", f"speed measured in one chunk {within}", speeds.values()))
    middle = [float(np.quantile(ratios, q)) for q in (0.5, 0.05, 0.95)] if ratios else [math.nan] * 3
    rows.append(Row("moving", "measured over asked speed, median (5th to 95th percentile)", middle[0], "x", *middle[1:], n=len(ratios)))
    objects = int(sum(scene.attributes["objects"][0] for scene in seen.scenes))
    return rows, {"objects": objects, "objects left out, for their number was read wrong": objects - len(moves) - moving}


def seams(seen):
    """Steps between chunks against steps inside them; for comparison the same of the step in the middle of each chunk."""
    chunks = sorted(seen.readings)
    ratios, middles, jumps = [], [], []
    for _, asked, _, readings, j in objects_of(seen, chunks):
        at = [r.centre[:, j] for r in readings]
        inside = [np.hypot(*np.diff(a, axis=0).T) for a in at]
        across = np.array([np.hypot(*(b[0] - a[-1])) for a, b in itertools.pairwise(at)])
        if asked in (STILL, PULSES):
            jumps += list(across)
            continue
        usual = np.array([np.median(np.concatenate(pair)) for pair in itertools.pairwise(inside)])
        ratios.append(across / np.maximum(usual, 1e-6))
        middles.append(np.array([step[len(step) // 2] for step in inside[1:]]) / np.maximum(usual, 1e-6))
    per_clip = [float(np.mean(r)) for r in ratios]
    flat, control = (np.concatenate(rows) if rows else np.zeros(0) for rows in (ratios, middles))
    mean = lambda values: float(np.mean(values)) if len(values) else math.nan
    rows = [
        Row("seams", "jump over the median step inside, mean", mean(flat), "x", n=len(ratios), readings=len(flat), target=1.5, at_most=True),
        rate("seams", "clips whose mean is at most 1.5", [[r <= 1.5] for r in per_clip], 95.0),
        *quantity("seams", "jump over the median step inside", flat, "x"),
        Row("middle of a chunk", "step over the median step, mean", mean(control), "x", n=len(middles), readings=len(control)),
        *quantity("middle of a chunk", "step over the median step", control, "x"),
        *quantity("seams", "jump of objects that stay in place", jumps, "px"),
    ]
    return rows, {"ratio per clip": per_clip}


# ---- cuts: storyboards -------------------------------------------------------------------------------------------------------------------


def storyboards(rng, n, chunks=8):
    """``n`` scenes of 3 to 5 shots; half of the later shots keep their objects ("the same star")."""
    picks = [sorted(rng.choice(np.arange(1, chunks), 2 + i % 3, replace=False).tolist()) for i in range(n)]
    return [sample_scene(rng, chunks, cuts=cuts, changes=False, held_out=None) for cuts in picks]


def cuts(seen):
    """Whether the cuts are where they were asked for and nowhere else, and what the shots show."""
    hits, stays, exact = [], [], []
    for scene, found in zip(seen.scenes, seen.cuts):
        starts = np.array([scene.span(k)[0] for k in range(len(scene.cut))])
        asked = starts[scene.cut]
        extra = [f for f in found if not (abs(asked - f) <= NEAR).any()]
        bad = np.searchsorted(starts, [f + NEAR for f in extra], side="right") - 1
        hits.append([any(abs(f - start) <= NEAR for f in found) for start in asked])
        stays.append([k not in bad for k in range(len(starts))])
        exact.append([all(hits[-1]) and not extra])
    by_chunk = {k: verdicts(seen.readings[k], seen.scenes, k) for k in seen.readings}
    rows = [
        rate("cuts", "asked cuts that are there, on their chunk", hits, 99.0),
        rate("cuts", "chunks without a cut elsewhere", stays, 99.0),
        rate("cuts", "videos with exactly the cuts asked for", exact),
    ]
    shots = np.stack([scene.shot for scene in seen.scenes])
    same = np.stack([scene.same for scene in seen.scenes])
    new = np.stack([scene.cut for scene in seen.scenes]) & ~same
    for name, mask in [*((f"shot {s + 1}", shots == s) for s in range(shots.max() + 1)), ("cut to the same", same), ("cut to another", new)]:
        rows += [rate(name, key, [[by_chunk[k][key][i] for k in by_chunk if mask[i, k]] for i in range(len(mask))]) for key in KEYS]
    missed = sum(len(row) - sum(row) for row in hits)
    return rows, {"missed": int(missed), "false": int(sum(len(row) - sum(row) for row in stays))}


# ---- drift: one prompt for a minute ------------------------------------------------------------------------------------------------------


def chunks_within(scene, seconds, fps=24):
    """The chunks that lie wholly inside ``seconds`` (from, to)."""
    first, last = (round(s * fps) for s in seconds)
    return [k for k in range(len(scene.captions)) if first <= scene.span(k)[0] and scene.span(k)[1] <= last]


def long_prompts(rng, n, chunks=46):
    """``n`` scenes of one prompt that goes on for a minute."""
    return [repeated(sample_scene(rng, chunks, cuts=[], changes=False, held_out=None, leave_out=False)) for _ in range(n)]


def slips(seen, right):
    """Number of a stream -> its prompt and, by attribute, the chunks that show it wrong; ``right``: chunk -> verdicts."""
    chunks = lambda i, key: [k for k, verdict in right.items() if not verdict[key][i]]
    rows = [{key: chunks(i, key) for key in KEYS if key not in ("four", "all") and chunks(i, key)} for i in range(len(seen.scenes))]
    return {i: {"prompt": seen.scenes[i].captions[0], **row} for i, row in enumerate(rows) if row}


def drift(seen, early, late):
    """Adherence in two windows (lists of chunks) and the loss between, paired by stream."""
    windows = {name: [verdicts(seen.readings[k], seen.scenes, k) for k in at] for name, at in (("early", early), ("late", late))}
    rows = [rate(name, key, stack(read, key)) for name, read in windows.items() for key in KEYS]
    right = dict(zip((*early, *late), [*windows["early"], *windows["late"]]))
    details = {"chunks": {"early": list(early), "late": list(late)}, "slips": slips(seen, right)}
    for key in KEYS:
        before, after = (100 * stack(read, key).mean(1) for read in windows.values())
        mean, upper = loss_bound(before, after, len(late))
        n = len(before)
        rows.append(Row("loss", key, mean, "points", n=n, readings=n * len(late)))
        rows.append(Row("loss, upper 95 % bound", key, upper, "points", n=n, target=2.0 if key in TARGETS else None, at_most=True))
    details["streams that differ"] = int((stack(windows["early"], "four").mean(1) != stack(windows["late"], "four").mean(1)).sum())
    return rows, details


# ---- recall: what only the first chunk says ----------------------------------------------------------------------------------------------


def recall_scene(rng, kind, distances=DISTANCES):
    """One object through ``len(distances) + 1`` shots; its ``kind`` (colour or shape) is said in chunk 0 and never again.

    The shots begin at the chunks ``distances``, each with "the same ..." on another background with any motion; inside the first shot,
    "the ...". So at its first chunk a shot has to take the attribute from chunk 0, or from later chunks that took it over.
    """
    r = chooser(rng)
    background = r.randrange(len(BACKGROUNDS))
    (thing,) = draw_things(r, 1, None, background)
    text = caption(r, (thing,), background)
    plans = [Plan((thing,), background, caption=text)]
    for k in range(1, max(distances) + 1):
        cut = k in distances
        if cut:
            background = r.choice([b for b in range(len(BACKGROUNDS)) if b != background])
            thing = with_motion(r, thing, None, background)
        if cut or k == 1:
            said = (Said(shape=kind != "shape", colour=kind != "colour"),)
            text = caption(r, (thing,), background, determiner="the same" if cut else "the", said=said)
        plans.append(Plan((thing,), background, cut=cut, same=cut, said=said, caption=(CUT_PREFIX if cut else "") + text))
    return build(plans, r)


RECALLED = ("colour", "shape")


def recall_scenes(rng, n, distances=DISTANCES):
    return [recall_scene(rng, RECALLED[i % 2], distances) for i in range(n)]


def recall(seen, sink, distances=DISTANCES):
    """Whether the attribute left out is still right; scenes as ``recall_scenes`` made them."""
    name, rows = "with sink" if sink else "without sink", []
    for d in distances:
        right = verdicts(seen.readings[d], seen.scenes, d)
        both = np.where(np.arange(len(seen.scenes)) % 2 == 0, right[RECALLED[0]], right[RECALLED[1]])
        rows.append(rate(name, f"attribute left out, {d} chunks", both[:, None], 80.0 if sink else None))
        rows += [rate(name, f"{kind} left out, {d} chunks", both[i::2, None]) for i, kind in enumerate(RECALLED)]
        rows.append(rate(name, f"motion and background said, {d} chunks", (right["motion"] & right["background"])[:, None]))
    return rows, {}


# ---- change: another prompt inside a shot ------------------------------------------------------------------------------------------------


def change_scene(rng, kind, chunks=4):
    """One object; at chunk ``CHANGE_AT`` its ``kind`` (of ``KINDS``) changes without a cut."""
    r = chooser(rng)
    background = r.randrange(len(BACKGROUNDS))
    (thing,) = draw_things(r, 1, None, background)
    while kind == "speed" and thing.motion == STILL:
        (thing,) = draw_things(r, 1, None, background)
    new, where = thing, background
    if kind == "motion":
        new = with_motion(r, thing, None, background, other_than=thing.motion)
    elif kind == "speed":
        new = thing._replace(speed=1 - thing.speed)
    elif kind == "colour":
        new = thing._replace(colour=r.choice([c for c in range(len(COLOUR_NAMES)) if c != thing.colour]))
    else:
        where = r.choice([b for b in range(len(BACKGROUNDS)) if b != background])
    before, after = caption(r, (thing,), background), caption(r, (new,), where)
    plans = [Plan((thing,), background, said=(EVERYTHING,), caption=before)] * CHANGE_AT
    plans.append(Plan((new,), where, change=kind, said=(EVERYTHING,), caption=after))
    plans += [Plan((new,), where, said=(EVERYTHING,), caption=after)] * (chunks - len(plans))
    return build(plans, r)


def change_scenes(rng, n):
    return [change_scene(rng, KINDS[i % len(KINDS)]) for i in range(n)]


def change(seen):
    """Whether what changed is right in the frames from ``BLEND`` after the change on, and a chunk later."""
    kinds = np.array([scene.change[CHANGE_AT] for scene in seen.scenes])
    at_once = verdicts(seen.late[CHANGE_AT], seen.scenes, CHANGE_AT)
    later = verdicts(seen.readings[CHANGE_AT + 1], seen.scenes, CHANGE_AT + 1)
    before = verdicts(seen.readings[CHANGE_AT - 1], seen.scenes, CHANGE_AT - 1)
    rows = []
    for kind in dict.fromkeys(KINDS):
        mask = kinds == kind
        rows.append(rate(kind, f"obeyed by the next chunk (from frame {BLEND})", at_once[kind][mask][:, None], 85.0))
        rows.append(rate(kind, "obeyed a chunk later", later[kind][mask][:, None]))
        rows.append(rate(kind, "all four, a chunk later", later["four"][mask][:, None]))
        rows.append(rate(kind, "all four, the chunk before", before["four"][mask][:, None]))
        rows.append(rate(kind, "without a cut", [[not found] for found, of in zip(seen.cuts, mask) if of]))
    return rows, {}


# ---- the whole ---------------------------------------------------------------------------------------------------------------------------

PARTS = ("adherence", "motion", "seams", "cuts", "change", "recall", "drift")


def check_parts(names, known=PARTS):
    """The parts called ``names`` in the order of ``known``; refuses unknown names."""
    for name in names:
        near = difflib.get_close_matches(name, known, n=1)
        require(name in known, f"unknown part {name!r}: " + (f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(known)}")
    return tuple(name for name in known if name in names)


def evaluate(player, parts=PARTS, *, n=512, long=64, seed=0, seconds=((5, 15), (50, 60)), distances=DISTANCES):
    """Yields one ``Part`` after another.

    n: prompts of adherence, motion and seams; half as many changes, a quarter as many storyboards. long: streams of drift and recall.
    seconds: the windows of drift, early and late. Raises ``ConfigError`` for unknown parts, for numbers below 1 and for windows
    without a chunk.
    """
    parts = check_parts(parts)
    require(n >= 1 and long >= 1, f"n={n} and long={long} must be at least 1")
    rng = lambda name: np.random.default_rng([seed, 7919, PARTS.index(name)])  # apart from any seed of training
    prompted = functools.cache(lambda: observe(player, prompts(rng("adherence"), n), range(5), keep=16))
    for name in parts:
        if name in ("adherence", "motion", "seams"):
            seen = prompted()
            rows, details = {"adherence": adherence, "motion": motion, "seams": seams}[name](seen)
        elif name == "cuts":
            seen = observe(player, storyboards(rng(name), max(1, n // 4)), range(8), cuts=True, keep=6)
            rows, details = cuts(seen)
        elif name == "change":
            scenes = change_scenes(rng(name), max(len(KINDS), n // 2))
            seen = observe(player, scenes, (CHANGE_AT - 1, CHANGE_AT + 1), late=(CHANGE_AT,), cuts=True, keep=6)
            rows, details = change(seen)
        elif name == "recall":
            scenes, rows, details = recall_scenes(rng(name), max(2, long), distances), [], {}
            for sink in (True, False):
                seen = observe(player, scenes, distances, sink=sink)
                rows += recall(seen, sink, distances)[0]
        else:
            scenes = long_prompts(rng(name), long, math.ceil((24 * seconds[1][1] + 3) / 32))
            early, late = (chunks_within(scenes[0], window) for window in seconds)
            require(early and late, f"seconds={seconds} hold no whole chunk (32 pixel frames, 1.33 s); widen the windows")
            seen = observe(player, scenes, (*early, *late))
            rows, details = drift(seen, early, late)
        yield Part(name, rows, details, seen)


__all__ = [
    "CHANGE_AT", "DISTANCES", "FOUR", "KEYS", "KINDS", "NEAR", "PARTS", "Part", "Seen", "adherence", "change", "change_scenes", "check_parts",
    "chunks_within", "cuts", "drift", "evaluate", "is_withheld", "long_prompts", "motion", "observe", "prompts", "recall", "recall_scenes",
    "repeated", "seams", "stack", "storyboards", "take", "verdicts",
]  # fmt: skip
