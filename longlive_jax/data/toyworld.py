"""The toy world: endless, seeded, captioned multi-shot clips whose every attribute a program can read off the pixels.

One or two objects move in front of a background. A *shot* is a run of chunks between cuts; inside a shot the motion, speed, colour or
background may change at a chunk border, over ``BLEND`` pixel frames and without a jump. All motions are periodic (``PERIODS``), with
amplitudes fixed by motion and number of objects (``AMPLITUDES``), so that streams go on for ever and the speed asked for is a number.

Sampling is numpy on the host; pixels come from ``render`` (toydraw.py), captions and tokens from toywords.py.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from longlive_jax.config import CUT_PREFIX, require
from longlive_jax.data.toydraw import PALETTE, render, render_batch
from longlive_jax.data.toyplans import CUTS, PULSES, SAID, SAME, STILL, WITHHELD, Plan, index, mistaken, sample_plans, speak, withheld
from longlive_jax.data.toywords import (
    BACKGROUNDS,
    COLOUR_NAMES,
    COLOURS,
    MOTIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    WORDS,
    PromptError,
    Thing,
    chooser,
    tokenize,
)  # fmt: skip

BLEND = 8  # pixel frames an in-shot change takes
PERIODS = (48.0, 24.0)  # pixel frames of one period, slowly and quickly
RADII = ((17.0, 27.0), (14.0, 19.0))  # [objects - 1][size], world units (pixels at 128 x 128)
PULSE = 0.3  # relative amplitude of the radius of a pulsing object
# [objects - 1][motion]: amplitudes of sin and cos in x, then of sin and cos in y
AMPLITUDES = (
    ((0, 0, 0, 0), (26, 0, 0, 0), (0, 0, 24, 0), (0, 22, 22, 0), (20, 0, 20, 0), (0, 0, 0, 0)),
    ((0, 0, 0, 0), (12, 0, 0, 0), (0, 0, 22, 0), (0, 12, 12, 0), (12, 0, 12, 0), (0, 0, 0, 0)),
)
CENTRES = (((64.0, 64.0),), ((32.0, 64.0), (96.0, 64.0)))
JITTER = 11.0  # the largest offset of a path's centre
JUMP = 22.0  # the least distance an object jumps at a cut that keeps its background
MAX_GAP = 4096  # latent frames


# ---- scenes: plans with paths ----------------------------------------------------------------------------------------------------------------


class Path(NamedTuple):
    """Where one object goes: centre and phase; the amplitudes follow from its motion and the number of objects."""

    x: float
    y: float
    phase: float


def position(thing, count, path, clock):
    """x, y, radius of an object at world times ``clock`` (pixel frames): three arrays like ``clock``, or floats."""
    angle = (2 * math.pi / PERIODS[thing.speed]) * clock + path.phase
    sin, cos = (np.sin(angle), np.cos(angle)) if isinstance(clock, np.ndarray) else (math.sin(angle), math.cos(angle))
    xs, xc, ys, yc = AMPLITUDES[count - 1][thing.motion]
    pulse = PULSE if thing.motion == PULSES else 0.0
    return path.x + xs * sin + xc * cos, path.y + ys * sin + yc * cos, RADII[count - 1][thing.size] * (1 + pulse * sin)


def room(thing, count):
    """How far the centre of a path may lie from the middle (of two objects: of their half), so that the object stays inside: x, y."""
    xs, xc, ys, yc = AMPLITUDES[count - 1][thing.motion]
    radius = RADII[count - 1][thing.size] * (1 + (PULSE if thing.motion == PULSES else 0))
    return max(0.0, min(JITTER, (62 if count == 1 else 31) - radius - xs - xc)), max(0.0, min(JITTER, 62 - radius - ys - yc))


def draw_path(r, thing, count, slot):
    """A random centre and phase."""
    (x, y), (jx, jy) = CENTRES[count - 1][slot], room(thing, count)
    return Path(x + r.uniform(-jx, jx), y + r.uniform(-jy, jy), r.uniform(0, 2 * math.pi))


def jump_path(r, thing, count, clock, old):
    """A path that begins at least ``JUMP`` away from the point ``old``, or the farthest of 64."""
    best, far = None, -1.0
    for _ in range(64):
        path = draw_path(r, thing, count, 0)
        x, y, _ = position(thing, count, path, clock)
        distance = math.hypot(x - old[0], y - old[1])
        if distance > far:
            best, far = path, distance
        if far >= JUMP:
            break
    return best


def follow_path(thing, count, slot, path, old, clock):
    """The path of a changed motion: the old centre where it fits, the phase nearest to the old position and velocity amid the blend."""
    if thing.motion == STILL:
        return Path(path.x, path.y, 0.0)
    t = clock + BLEND / 2
    x, y, radius = position(old, count, path, t)
    ahead = position(old, count, path, t + 1)
    (mx, my), (jx, jy) = CENTRES[count - 1][slot], room(thing, count)
    path = path._replace(x=min(max(path.x, mx - jx), mx + jx), y=min(max(path.y, my - jy), my + jy))
    phases = np.arange(64) * (2 * math.pi / 64)
    xs, ys, rs = position(thing, count, path._replace(phase=phases), np.full(64, t))
    xn, yn, rn = position(thing, count, path._replace(phase=phases), np.full(64, t + 1))
    miss = (xs - x) ** 2 + (ys - y) ** 2 + (rs - radius) ** 2
    turn = (xn - xs - ahead[0] + x) ** 2 + (yn - ys - ahead[1] + y) ** 2 + (rn - rs - ahead[2] + radius) ** 2
    return path._replace(phase=float(phases[np.argmin(miss + 4 * turn)]))


@dataclass(frozen=True)
class Scene:
    """One clip: P pixel frames, F latent frames, K chunks, up to two objects (slot 0 alone or left, slot 1 right)."""

    centre: np.ndarray  # [P,2,2] x, y in world units (128 a side)
    radius: np.ndarray  # [P,2]
    shape: np.ndarray  # [P,2] int32
    rgb: np.ndarray  # [P,2,3] in [0,1]
    presence: np.ndarray  # [P,2] 1 where the slot holds an object
    background: np.ndarray  # [P,2] int32: old, new
    blend: np.ndarray  # [P] weight of the new background
    settled: np.ndarray  # [P] bool: no in-shot change under way
    attributes: dict  # shape, colour, size, motion, speed: int32 [K,2], -1 for no object (speed: nor a still one); background, objects: [K]
    said: np.ndarray  # [K,2,3] bool: whether the caption says shape, colour, size (an unsaid one of a new object is a default)
    captions: list  # [K] str, CUT_PREFIX included
    cut: np.ndarray  # [K] bool
    same: np.ndarray  # [K] bool: the first chunk of a shot that keeps the objects of the shot before
    change: list  # [K] str: "", motion, speed, colour or background: what changes at the chunk's start without a cut
    wrong: np.ndarray  # [K] bool: the chunk shows something else than its caption says
    shot: np.ndarray  # [K] int32
    time: np.ndarray  # [F] float32 rotary time before shot offsets, gap included
    frames_per_chunk: int
    time_stride: int

    def span(self, first, last=None):
        """Pixel frames (start, stop) of chunk ``first``, or of ``first``..``last`` inclusive."""
        return frame_span(first, last, self.frames_per_chunk, self.time_stride)


def frame_span(first, last=None, frames_per_chunk=8, time_stride=4):
    """Pixel frames (start, stop) of the chunks ``first``..``last`` inclusive; the first latent frame of a video is one pixel frame."""
    last = first if last is None else last
    start = 0 if first == 0 else time_stride * (first * frames_per_chunk - 1) + 1
    return start, time_stride * ((last + 1) * frames_per_chunk - 1) + 1


def build(plans, r, frames_per_chunk=8, time_stride=4, gap=0):
    """The Scene of captioned plans; chunks after the first lie ``gap`` latent frames later in rotary and world time."""
    chunks = len(plans)
    frames = frame_span(0, chunks - 1, frames_per_chunk, time_stride)[1]
    out = {
        "centre": np.zeros((frames, 2, 2), np.float32),
        "radius": np.ones((frames, 2), np.float32),
        "shape": np.zeros((frames, 2), np.int32),
        "rgb": np.zeros((frames, 2, 3), np.float32),
        "presence": np.zeros((frames, 2), np.float32),
        "background": np.zeros((frames, 2), np.int32),
        "blend": np.ones(frames, np.float32),
        "settled": np.ones(frames, bool),
    }
    paths, last = [], None
    for c, plan in enumerate(plans):
        start, stop = frame_span(c, None, frames_per_chunk, time_stride)
        clock = np.arange(start, stop, dtype=np.float64) + (time_stride * gap if c else 0)
        old_paths, paths = paths, next_paths(r, plan, last, paths, float(clock[0]))
        fade = None
        if (plan.change or (last and plan.wrong != last.wrong)) and not (c == 1 and gap):
            s = (np.arange(1, stop - start + 1) / (min(BLEND, stop - start) + 1)).clip(max=1)
            fade = s * s * (3 - 2 * s)
            out["settled"][start:stop] = fade >= 1
        fill(out, slice(start, stop), clock, plan, paths, last if fade is not None else None, old_paths, fade)
        last = plan
    time = np.arange(chunks * frames_per_chunk, dtype=np.float32)
    time[frames_per_chunk:] += gap
    cut = np.array([p.cut for p in plans])
    return Scene(
        **out,
        attributes=attributes(plans),
        said=np.array([[tuple(p.said[i]) if i < len(p.said) else (False,) * 3 for i in range(2)] for p in plans]),
        captions=[p.caption for p in plans],
        cut=cut,
        same=np.array([p.same for p in plans]),
        change=[p.change for p in plans],
        wrong=np.array([p.wrong for p in plans]),
        shot=np.cumsum(cut).astype(np.int32),
        time=time,
        frames_per_chunk=frames_per_chunk,
        time_stride=time_stride,
    )


def next_paths(r, plan, last, paths, clock):
    """One path an object for the chunk that begins at ``clock``."""
    count = len(plan.things)
    if last is None or plan.cut:
        if last and count == len(last.things) == 1 and plan.background == last.background:
            return [jump_path(r, plan.things[0], count, clock, position(last.things[0], 1, paths[0], clock - 1))]
        return [draw_path(r, thing, count, i) for i, thing in enumerate(plan.things)]
    return [
        path if (new.motion, new.speed) == (old.motion, old.speed) else follow_path(new, count, i, path, old, clock)
        for i, (new, old, path) in enumerate(zip(plan.things, last.things, paths))
    ]


def fill(out, window, clock, plan, paths, old, old_paths, fade):
    """Write one chunk's frames; ``fade`` [frames] is the weight of the plan against ``old``, the plan before it."""
    out["background"][window] = plan.background
    if old:
        out["background"][window, 0] = old.background
        out["blend"][window] = fade
    for i, (thing, path) in enumerate(zip(plan.things, paths)):
        x, y, radius = position(thing, len(plan.things), path, clock)
        rgb = PALETTE[thing.colour]
        if old:
            x0, y0, radius0 = position(old.things[i], len(plan.things), old_paths[i], clock)
            x, y, radius = x0 + fade * (x - x0), y0 + fade * (y - y0), radius0 + fade * (radius - radius0)
            rgb = PALETTE[old.things[i].colour] + fade[:, None] * (rgb - PALETTE[old.things[i].colour])
        out["centre"][window, i, 0], out["centre"][window, i, 1] = x, y
        out["radius"][window, i], out["rgb"][window, i] = radius, rgb
        out["shape"][window, i], out["presence"][window, i] = thing.shape, 1


def attributes(plans):
    """Indices to score by, per chunk and object."""
    pad = (-1,) * len(Thing._fields)
    table = [[tuple(p.things[i]) if i < len(p.things) else pad for i in range(2)] for p in plans]
    out = dict(zip(Thing._fields, np.moveaxis(np.array(table, np.int32), -1, 0)))
    out["speed"] = np.where(out["motion"] == STILL, -1, out["speed"]).astype(np.int32)
    out["background"] = np.array([p.background for p in plans], np.int32)
    out["objects"] = np.array([len(p.things) for p in plans], np.int32)
    return out


# ---- the public ways to make a scene ----------------------------------------------------------------------------------------------------


def sample_scene(
    rng,
    chunks,
    *,
    frames_per_chunk=8,
    time_stride=4,
    cuts=None,
    objects=None,
    changes=True,
    gap=False,
    held_out=False,
    leave_out=True,
    same=SAME,
    said=SAID,
    mistakes=0.0,
):
    """A random Scene of ``chunks`` chunks from a numpy ``Generator``.

    cuts: chunk indices where shots begin, or None for 0 to 4 at random (``CUTS``). objects: 1, 2 or None (two in ``TWO_OBJECTS`` of the
    shots). changes: whether motion, speed, colour or background may change inside a shot (20 % of the chunk borders; a float sets that
    share). gap: in half of the clips chunks after the first lie g latent frames later, g log-uniform in 1..4096. held_out: False never
    shows a withheld combination, True only such, None any. leave_out: whether captions of later shots ("the same object") and chunks
    ("it") leave attributes out. same: share of the later shots that keep their objects. said: how often
    these captions say shape, colour and size. mistakes: share of the clips in which a chunk or two show something else than they say
    (``mistaken``). Raises ``ConfigError`` for a cut outside 1..chunks-1 and for another number of objects.
    """
    require(objects in (None, 1, 2), f"objects={objects} must be 1, 2 or None for a random number")
    r = chooser(rng)
    if cuts is None:
        cuts = r.sample(range(1, chunks), min(chunks - 1, r.choices(range(len(CUTS)), CUTS)[0]))
    require(all(0 < c < chunks for c in cuts), f"cuts={list(cuts)} must lie in 1..{chunks - 1}: a cut begins a chunk after the first")
    share = 0.2 if changes is True else float(changes)
    plans = sample_plans(r, chunks, set(cuts), objects, share, held_out, leave_out, same, said)
    if mistakes and r.random() < mistakes:
        plans = mistaken(r, plans, held_out)
    latents = int(math.exp(r.uniform(0, math.log(MAX_GAP)))) if gap and r.random() < 0.5 else 0
    return build(plans, r, frames_per_chunk, time_stride, latents)


TABLES = {"shape": SHAPES, "colour": COLOUR_NAMES, "size": SIZES, "motion": MOTIONS, "speed": SPEEDS}
DEFAULTS = {"size": "big", "speed": "slowly"}


def scene_from(specs, rng=None, *, frames_per_chunk=8, time_stride=4, leave_out=False, gap=0):
    """A Scene from explicit choices, one dict a chunk.

    Keys: shape, colour, size, motion, speed (names) for one object or ``objects``, a list of two such dicts, left first; background; cut and
    same (bool); caption (a text instead of a made one). A chunk takes what it does not name from the chunk before; at first the size is big
    and the speed slow. What differs from the chunk before, without a cut, is an in-shot change. Raises ``ConfigError`` for unknown names.
    """
    r = chooser(rng or np.random.default_rng(0))
    plans = []
    for spec in specs:
        last = plans[-1] if plans else None
        known = {*TABLES, "objects", "background", "cut", "same", "caption"}
        for key in spec:
            index(sorted(known), key)
        plan = spec_plan(spec, last)
        plan = speak(r, plan, last, leave_out)
        if "caption" in spec:
            plan = plan._replace(caption=(CUT_PREFIX if plan.cut else "") + spec["caption"])
        plans.append(plan)
    return build(plans, r, frames_per_chunk, time_stride, gap)


def spec_plan(spec, last):
    """The plan of one dict of ``scene_from``."""
    rows = spec.get("objects") or [{k: v for k, v in spec.items() if k in TABLES}]
    if last and rows == [{}]:  # nothing named: the objects go on
        rows = [{}] * len(last.things)
    require(len(rows) in (1, 2), f"a chunk has {len(rows)} objects; one or two are possible")
    old = last.things if last and len(last.things) == len(rows) else (None,) * len(rows)
    things = tuple(spec_thing(row, thing) for row, thing in zip(rows, old))
    require(last is not None or "background" in spec, "the first chunk names no background; add background=...")
    background = index(BACKGROUNDS, spec["background"]) if "background" in spec else last.background
    cut = bool(spec.get("cut", False))
    require(not (cut and last is None), "the first chunk cannot be a cut: no shot goes before it")
    change = ""
    if last and not cut:
        require(len(things) == len(last.things), "the number of objects changes inside a shot; add cut=True")
        kinds = {k for a, b in zip(things, last.things) for k in Thing._fields if field_of(a, k) != field_of(b, k)}
        require(not kinds & {"shape", "size"}, f"{', '.join(sorted(kinds & {'shape', 'size'}))} cannot change inside a shot; add cut=True")
        change = "background" if background != last.background else next(iter(sorted(kinds)), "")
    return Plan(things, background, cut=cut, same=cut and bool(spec.get("same", False)), change=change)


def field_of(thing, key):
    return thing[Thing._fields.index(key)]


def spec_thing(row, old):
    values = {}
    for key, table in TABLES.items():
        name = row.get(key, table[field_of(old, key)] if old else DEFAULTS.get(key))
        require(name is not None, f"a new object needs its {key}: one of {', '.join(table)}")
        values[key] = index(table, name)
    if values["motion"] == STILL:
        values["speed"] = 0
    return Thing(**values)


def device_arrays(scene):
    """The arrays ``render`` reads, each with a leading frame axis [P,...]; slice them to render a window."""
    return {
        "centre": scene.centre,
        "radius": scene.radius,
        "shape": scene.shape,
        "rgb": scene.rgb,
        "presence": scene.presence,
        "background": scene.background,
        "blend": scene.blend,
    }


__all__ = [
    "BACKGROUNDS", "BLEND", "COLOURS", "MOTIONS", "PERIODS", "RADII", "SHAPES", "SIZES", "SPEEDS", "WITHHELD", "WORDS", "PromptError", "Scene",
    "device_arrays", "frame_span", "render", "render_batch", "sample_scene", "scene_from", "tokenize", "withheld",
]  # fmt: skip
