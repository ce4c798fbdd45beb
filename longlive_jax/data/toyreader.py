"""Reads the toy world back from pixels: objects, colours, shapes, sizes, motions, speeds, background and cuts.

The reader knows the world's pictures, palette and shapes, never the scene. Steps for one segment without a cut: the temporal median against
blurred templates gives the background; pixels away from it vote for a palette colour; coverage is the position of a pixel on the line from
background to that colour (matting); shape is the correlation of the coverage, normalised by centroid and area, with templates; motion and
period are the best fit of one sinusoid to centroid and radius. What matches nothing reads -1.
"""

import io
from typing import NamedTuple

import av
import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.config import require
from longlive_jax.data.toydraw import CANVAS, PALETTE, render_batch
from longlive_jax.data.toypixels import (
    BLURS,
    RIDGE,
    TRIAL_PERIODS,
    background_templates,
    box,
    fits,
    gaussian,
    moments,
    normalise,
    shape_templates,
    smooth,
    unit,
    unit_frames,
)  # fmt: skip
from longlive_jax.data.toyworld import MOTIONS, PERIODS, RADII, device_arrays, sample_scene

CONTRAST = 0.13  # least difference to the background of an object's inside
SPEED_TOLERANCE = 0.15


class Reading(NamedTuple):
    """What a segment of T pixel frames shows; indices as in toyworld, -1 for what matches nothing. Slot 0: the only or the left object."""

    objects: jax.Array  # number of objects
    colour: jax.Array  # [2]
    shape: jax.Array  # [2]
    size: jax.Array  # [2]
    motion: jax.Array  # [2]
    speed: jax.Array  # [2] nearest of PERIODS within 15 %; -1 also for a still object
    period: jax.Array  # [2] pixel frames; 0 for a still object
    pace: jax.Array  # [2] mean px a frame along the fitted path
    radius: jax.Array  # [2] mean, px
    centre: jax.Array  # [T,2,2] centroid x, y in px
    shape_score: jax.Array  # [2] correlation with the best shape's template
    colour_share: jax.Array  # [2] part of the frames that show the colour read
    fit: jax.Array  # [2] part of the movement that the fitted sinusoid explains
    background: jax.Array  # index, or -1
    background_error: jax.Array  # root mean square difference to the template outside the objects, of 1
    background_detail: jax.Array  # how much of the template's fine structure is there: 1 all, 0 none
    background_bad: jax.Array  # part of the 16x16 cells of another colour or without the template's fine structure


# ---- one segment ------------------------------------------------------------------------------------------------


def median_of(arrays):
    """Elementwise median of an odd number of arrays (an insertion network: far quicker than a sort along a short axis)."""
    ranked = []
    for a in arrays:
        for i, b in enumerate(ranked):
            ranked[i], a = jnp.minimum(a, b), jnp.maximum(a, b)
        ranked.append(a)
    return ranked[len(ranked) // 2]


def read_background(x):
    """Nearest template of smoothed planes [3,T,H,W]: its index and the picture to matte against [3,H,W]."""
    _, templates, _ = background_templates()
    some = np.linspace(0, x.shape[1] - 1, 9).round().astype(int)
    median = median_of([x[:, i] for i in some])
    error = jnp.minimum(jnp.abs(median - templates).mean(-3), 0.2).mean((-2, -1))  # [backgrounds, blurs]
    best = jnp.argmin(error)
    picture = jnp.asarray(templates).reshape(-1, 3, CANVAS, CANVAS)[best]
    near = jnp.abs(median - picture).max(0) < 0.08
    return best // len(BLURS), jnp.where(near, median, picture)


def read_objects(x, picture):
    """How many objects there are, the windows [2,W] of the two slots, and votes: a colour's index inside objects, else -1 [T,H,W]."""
    apart = jnp.abs(x - picture[:, None]).max(0) > CONTRAST
    inside = box(apart.astype(jnp.float32)) > 0.85
    votes, least = jnp.full(inside.shape, -1), jnp.full(inside.shape, 0.42**2)
    for i, rgb in enumerate(PALETTE):
        distance = ((x - rgb[:, None, None, None]) ** 2).sum(0)
        votes, least = jnp.where(inside & (distance < least), i, votes), jnp.minimum(distance, least)
    columns = (votes >= 0).sum(1)  # [T,W]
    middle = slice(57, 71)
    valley = 57 + jnp.argmin(columns[:, middle], 1)
    at = jnp.arange(CANVAS)
    left = (columns * (at < valley[:, None])).sum(1)
    right = (columns * (at > valley[:, None])).sum(1)
    two = (jnp.minimum(left, right) > 40) & (columns[:, middle].min(1) < 3)
    seen = (columns.sum(1) > 40).mean() > 0.5
    count = jnp.where(seen, jnp.where(two.mean() > 0.5, 2, 1), 0)
    windows = jnp.where(count == 2, jnp.stack([at < 64, at >= 64]), jnp.stack([at >= 0, at < 0]))
    return count, windows.astype(jnp.float32), votes


def matte(x, picture, votes, window):
    """Coverage [T,H,W] of one slot's object; also its colour index and the part of the frames that show it."""
    votes = jnp.where(window > 0, votes, -1)
    frames = jnp.stack([(votes == i).sum((1, 2)) for i in range(len(PALETTE))], -1)  # [T,8]
    colour = jnp.argmax(frames.sum(0))
    share = (jnp.argmax(frames, -1) == colour).mean()
    mine = votes == colour
    rgb = (x * mine).sum((1, 2, 3)) / (mine.sum() + 1e-6)
    away, line = x - picture[:, None], (rgb[:, None, None] - picture)[:, None]  # [3,T,H,W], [3,1,H,W]
    cover = jnp.clip((away * line).sum(0) / ((line**2).sum(0) + 1e-4), 0, 1)
    residual = jnp.abs(away - cover * line).max(0)
    cover = jnp.where((cover > 0.12) & (residual < 0.25), cover, 0) * window
    cover = jnp.where(box(cover) > 0.12, cover, 0)
    return cover, colour, share


def gather(cover):
    """Coverage without what lies far from the object, and its area, x, y [T]."""
    at = jnp.arange(CANVAS) + 0.5
    focus = cover * box(cover) ** 2
    for _ in range(2):
        _, x, y = jax.vmap(moments)(focus)
        reach = 1.5 * jnp.sqrt(jnp.median(cover.sum((1, 2))) / 1.77) + 5
        far = jnp.hypot(at - x[:, None, None], at[:, None] - y[:, None, None]) > reach
        focus = jnp.where(far, 0, cover)
    return focus, *jax.vmap(moments)(focus)


def read_shape(mask, area, x, y):
    """Shape index, its score, and the radius in each frame [T]."""
    templates, areas = shape_templates()
    seen = unit(jax.vmap(normalise)(mask, area, x, y))
    scores = jnp.einsum("tij,skij->tsk", seen, templates).mean(0).max(-1)
    shape = jnp.argmax(scores)
    return shape, scores[shape], jnp.sqrt(area / jnp.asarray(areas)[shape])


def read_motion(x, y, radius):
    """Motion, period, pace, mean radius and fit from centroid and radius [T]."""
    design, solver = map(jnp.asarray, fits(len(x)))
    signals = jnp.stack([x, y, radius])
    middle = signals.mean(1, keepdims=True)
    weights = jnp.einsum("gkt,st->gsk", solver, signals - middle)
    rest = (signals - middle - jnp.einsum("gtk,gsk->gst", design, weights)) ** 2
    cost = rest.sum((1, 2)) + RIDGE * len(x) * (weights[..., 1:] ** 2).sum((1, 2))
    best = jnp.argmin(cost)
    weights = weights[best]
    period = jnp.asarray(TRIAL_PERIODS)[best]
    ax, ay, ar = jnp.sqrt((weights[:, 1:] ** 2).sum(1))
    alike = jnp.abs((weights[0, 1:] * weights[1, 1:]).sum()) / (ax * ay + 1e-6)  # cosine of the phase between x and y
    size = middle[2, 0] + weights[2, 0]
    pulse, span = ar / (size + 1e-6), jnp.hypot(ax, ay)
    wander = jnp.hypot(x.std(), y.std())
    moves = span > 5
    way = jnp.where(ay < 0.35 * ax, 1, jnp.where(ax < 0.35 * ay, 2, jnp.where(alike > 0.7, 4, 3)))
    fit = 1 - jnp.where(moves, rest[best, :2].sum(), rest[best, 2].sum()) / (
        jnp.where(moves, (x.var() + y.var()), radius.var()) * len(x) + 1e-6
    )
    quarter = len(x) // 4
    drift = jnp.hypot(*(jnp.stack([x, y])[:, -quarter:].mean(1) - jnp.stack([x, y])[:, :quarter].mean(1)))
    rests = (wander < 2) & (drift < 2) & (radius.std() < 0.06 * size)
    motion = jnp.where(
        moves, jnp.where((fit > 0.7) & (pulse < 0.2), way, -1), jnp.where(rests, 0, jnp.where((pulse > 0.12) & (fit > 0.7), 5, -1))
    )
    pace = jnp.hypot(*jnp.diff(weights[:2] @ design[best].T)).mean()
    return motion, jnp.where(motion == 0, 0.0, period), jnp.where(motion == 0, 0.0, pace), size, fit


def read_slot(x, picture, votes, window, count):
    """Everything about one object."""
    cover, colour, share = matte(x, picture, votes, window)
    mask, area, cx, cy = gather(cover)
    shape, score, radius = read_shape(mask, area, cx, cy)
    motion, period, pace, mean, fit = read_motion(cx, cy, radius)
    small, big = jnp.asarray(RADII)[jnp.maximum(count, 1) - 1]
    size = jnp.where((mean < 0.75 * small) | (mean > 1.25 * big), -1, (mean > jnp.sqrt(small * big)).astype(jnp.int32))
    off = jnp.abs(jnp.log(jnp.maximum(period, 1.0) / jnp.asarray(PERIODS)))
    speed = jnp.where(off.min() <= np.log(1 + SPEED_TOLERANCE), jnp.argmin(off), -1)
    seen = (area > 40).mean() > 0.8
    return {
        "colour": jnp.where(seen & (share > 0.6), colour, -1),
        "shape": jnp.where(seen & (score > 0.7), shape, -1),
        "size": jnp.where(seen, size, -1),
        "motion": jnp.where(seen, motion, -1),
        "speed": jnp.where(seen & (motion > 0), speed, -1),
        "period": period,
        "pace": pace,
        "radius": mean,
        "centre": jnp.stack([cx, cy], -1),
        "shape_score": score,
        "colour_share": share,
        "fit": fit,
    }


def blocks(m, n):
    """Sums over an n x n division of [H,W]."""
    return m.reshape(n, CANVAS // n, n, CANVAS // n).sum((1, 3))


def judge_background(frames, x, which, slots, present):
    """Verdict, error, detail and bad cells from everything outside a disc around each object.

    frames, x: planes [3,T,H,W] as given and smoothed; slots: what ``read_slot`` gave for both; present: [2] bool.
    """
    plain, templates, coarse = (jnp.asarray(t)[which] for t in background_templates())
    at = jnp.arange(CANVAS) + 0.5
    reach = 1.35 * slots["radius"] * jnp.where(slots["motion"] == MOTIONS.index("pulses"), 1.3, 1.0) + 4
    c = slots["centre"][:, :, None, None, :]  # [2,T,1,1,2]
    near = jnp.hypot(at - c[..., 0], at[:, None] - c[..., 1]) < reach[:, None, None, None]
    open_ = (~(near & present[:, None, None, None]).any(0)).astype(jnp.float32)  # [T,H,W]
    error = jnp.sqrt((((frames - plain[:, None]) ** 2).mean(0) * open_).sum() / (open_.sum() + 1e-6))
    often = open_.sum(0)
    valid = (often >= 2).astype(jnp.float32)
    mean = (x * open_).sum(1) / (often + 1e-6)
    fine = (templates[0] - coarse) * valid
    found, whole = ((mean - coarse) * fine).sum(0), (fine**2).sum(0)
    detail = found.sum() / (whole.sum() + 1e-6)
    rough = (blocks(found, 4) < 0.4 * blocks(whole, 4)) & (blocks(whole, 4) > 4)  # 32x32 pixels: fine structure is missing here
    off = jnp.abs(mean - templates[1]).mean(0) * valid
    wrong = (blocks(off, 8) > 0.12 * blocks(valid, 8)) & (blocks(valid, 8) > 20)  # 16x16 pixels: another colour here
    bad = (wrong | jnp.repeat(jnp.repeat(rough, 2, 0), 2, 1)).mean()
    return jnp.where((detail > 0.5) & (bad <= 0.15), which, -1), error, detail, bad


def read_segment(frames):
    """The Reading of [T,H,W,3] in [0,1]."""
    frames = jnp.moveaxis(frames, -1, 0)  # planes: colour sums then run along whole pictures
    x = smooth(frames)
    which, picture = read_background(x)
    count, windows, votes = read_objects(x, picture)
    slot = jax.jit(lambda window: read_slot(x, picture, votes, window, count))  # traced once
    blank = lambda window: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(slot, window))
    used = jnp.stack([True, count == 2])
    slots = jax.lax.map(lambda row: jax.lax.cond(row[0], slot, blank, row[1]), (used, windows))  # and compiled once
    present = jnp.arange(2) < count
    background, error, detail, bad = judge_background(frames, x, which, slots, present)
    kept = {k: jnp.where(present, slots[k], -1) for k in ("colour", "shape", "size", "motion", "speed")}
    rest = {k: jnp.where(present, slots[k], 0) for k in ("period", "pace", "radius", "shape_score", "colour_share", "fit")}
    return Reading(
        objects=count,
        centre=slots["centre"].swapaxes(0, 1),
        background=background,
        background_error=error,
        background_detail=detail,
        background_bad=bad,
        **kept,
        **rest,
    )


_read = jax.jit(read_segment)


def read(frames):
    """The Reading of one segment without a cut [T,128,128,3], uint8 or float in [-1,1]: numpy arrays."""
    unit = unit_frames(jnp.asarray(frames))
    require(len(frames) >= 8, f"a segment of {len(frames)} frames is too short to read; give at least 8 (29 for speeds)")
    return jax.tree.map(np.asarray, _read(unit))


# ---- cuts ------------------------------------------------------------------------------------------------


@jax.jit
def leaps(frames):
    """How much of the picture changes abruptly between frames t and t+1: [T-1]."""

    def one(pair):
        a, b = smooth(jnp.moveaxis(unit_frames(pair), -1, 1))
        return jnp.maximum(jnp.abs(a - b).max(0) - 0.1, 0).mean()

    return jax.lax.map(one, jnp.stack([frames[:-1], frames[1:]], 1), batch_size=8)


def find_cuts(frames):
    """Frames at which a new shot begins, in a video [T,128,128,3].

    A cut is a change that stands out from the frames just before and after it; it may be spread over two frames. Motion and in-shot changes
    go on for longer.
    """
    leap = np.pad(np.asarray(leaps(jnp.asarray(frames))), 2, mode="edge")
    excess = np.zeros(len(leap))
    for width in (1, 2):
        for t in range(2, len(leap) - 2):
            inside = leap[t : t + width].mean()
            beside = max(leap[t - 1], leap[t + width])
            at = t + int(np.argmax(leap[t : t + width]))
            excess[at] = max(excess[at], inside - 1.35 * beside - 0.006)
    found = np.flatnonzero(excess > 0)
    return [int(t) - 1 for t in found if excess[t] == excess[max(t - 3, 0) : t + 4].max()]


# ---- scoring ------------------------------------------------------------------------------------------------

READ = ("colour", "shape", "size", "motion", "speed")


def score(reading, scene, chunks):
    """Whether the Reading of one segment shows what ``scene`` asks in ``chunks`` (an index or several): a dict of bool.

    Keys: objects, colour, shape, size, motion, speed, background, each right for every object, and all. A speed is right when the measured
    period is within 15 % of the asked one (for a still object: when it is still). Raises ``ConfigError`` when the chunks ask for
    different things.
    """
    chunks = np.atleast_1d(chunks)
    asked = {k: v[chunks] for k, v in scene.attributes.items()}
    for key, value in asked.items():
        require((value == value[0]).all(), f"chunks {chunks.tolist()} ask for more than one {key}; score them one by one")
    asked = {k: v[0] for k, v in asked.items()}
    count = int(asked["objects"])
    same = int(reading.objects) == count
    out = {"objects": same}
    for key in READ:
        out[key] = bool(same and (reading._asdict()[key][:count] == asked[key][:count]).all())
    out["background"] = bool(reading.background == asked["background"])
    return out | {"all": all(out.values())}


def score_cuts(found, scene, tolerance=2):
    """Whether exactly the cuts asked for were found, each within ``tolerance`` pixel frames of its chunk's start."""
    asked = [scene.span(k)[0] for k in np.flatnonzero(scene.cut)]
    return len(found) == len(asked) and all(abs(a - b) <= tolerance for a, b in zip(sorted(found), asked))


# ---- how well the reader reads ------------------------------------------------------------------------------------------------


def recompressed(frames, crf):
    """uint8 [T,H,W,3] after H.264 (yuv420p) at a constant rate factor."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=24, options={"crf": str(crf), "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    file.seek(0)
    with av.open(file) as source:
        return np.stack([f.to_ndarray(format="rgb24") for f in source.decode(video=0)])


DEGRADATIONS = ("none", "blur", "noise", "h264")


def degrade(frames, kind, rng):
    """uint8 frames [T,H,W,3] blurred (sigma 1.5 px), noisy (sigma 10 of 255), or after H.264 at CRF 28."""
    require(kind in DEGRADATIONS, f"unknown degradation {kind!r}; known: {', '.join(DEGRADATIONS)}")
    if kind == "blur":
        return gaussian(frames.astype(np.float32), 1.5, (1, 2)).round().astype(np.uint8)
    if kind == "noise":
        return (frames + 10 * rng.standard_normal(frames.shape, np.float32)).round().clip(0, 255).astype(np.uint8)
    return recompressed(frames, 28) if kind == "h264" else frames


def evaluate_reader(n, degradation="none", seed=0, chunks=4):
    """How often the reader reads rendered truth right: per attribute the share of right segments, and of clips with all cuts right.

    From each of ``n`` random clips (any combination, cuts and in-shot changes included) it reads the first chunk (29 frames), one later chunk
    (32) and, where they ask for the same, the first two (61). Returns a dict: objects, colour, ..., background, all, cuts, and the number
    of segments.
    """
    rng = np.random.default_rng(seed)
    right = {"cuts": []}
    draw = jax.jit(render_batch)
    for start in range(0, n, 16):
        scenes = [sample_scene(rng, chunks, held_out=None) for _ in range(min(16, n - start))]
        pixels = draw(jax.tree.map(lambda *a: np.stack(a), *map(device_arrays, scenes)))
        clips = np.asarray(((pixels + 1) * 127.5).round().astype(jnp.uint8))
        for scene, clip in zip(scenes, clips):
            clip = degrade(clip, degradation, rng)
            right["cuts"].append(score_cuts(find_cuts(clip), scene))
            later = [k for k in range(1, chunks) if scene.change[k] == ""]
            rows = [(0, 0)] + ([(k := int(rng.choice(later)), k)] if later else [])
            rows += [(0, 1)] if not scene.cut[1] and scene.change[1] == "" else []
            for first, last in rows:
                a, b = scene.span(first, last)
                for key, ok in score(read(clip[a:b]), scene, first).items():
                    right.setdefault(key, []).append(ok)
    return {key: float(np.mean(values)) for key, values in right.items()} | {"segments": len(right["all"])}
