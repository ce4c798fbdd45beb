"""Judges the other ways to a toy video: from an image, from a video that goes on, through a change of the prompt with recache, without end, and
from a video that slips.

``evaluate`` gives one ``Part`` after another, as toyeval.py does for the seven parts that need captions alone; scenes, verdicts and intervals
are the same. What is given to a model to begin with is rendered truth.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.config import require
from longlive_jax.data.toyeval import (
    BLEND,
    CHANGE_AT,
    FOUR,
    KEYS,
    KINDS,
    Part,
    change_scenes,
    check_parts,
    columns,
    drift,
    long_prompts,
    observe,
    prompts,
    repeated,
    seams,
    stack,
    verdicts,
)
from longlive_jax.data.toyfigures import Row, loss_bound, quantity, rate
from longlive_jax.data.toyplay import Player, painted
from longlive_jax.data.toywords import Said, Thing, caption, chooser
from longlive_jax.data.toyworld import sample_scene

CHUNKS = 8  # of the videos that begin with something given
PREFIX = 3  # chunks that an extended video begins with
KEPT = ("colour", "shape", "background")
TARGETS = dict.fromkeys(KEPT, 95.0)
CLEAR = 30.0  # dB


# ---- videos that begin with something given ----------------------------------------------------------------------------------------------


class Film(NamedTuple):
    """N videos frame by frame; the first G of their P frames were given."""

    steps: np.ndarray  # [N,P-1] mean difference of a frame to the one before it, levels of 255
    psnr: np.ndarray  # [N,G] of the given frames as the video shows them, dB
    seam: np.ndarray  # [N] difference of the first frame that was not given to the last given one, as it was given


@jax.jit
def differences(film):
    """Mean difference of each frame of uint8 [B,P,H,W,3] to the one before it, levels of 255: [B,P-1]."""
    return jnp.abs(jnp.diff(film.astype(jnp.float32), axis=1)).mean((2, 3, 4))


@jax.jit
def psnr(a, b):
    """Peak signal to noise of uint8 [B,P,H,W,3], dB, at most 99: [B,P]."""
    error = jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)).mean((2, 3, 4))
    return jnp.minimum(10 * jnp.log10(255**2 / jnp.maximum(error, 1e-9)), 99.0)


def beginning(player, known, films):
    """``player`` with videos that begin with the first ``known`` pixel frames of their scenes; each play adds its ``Film`` to ``films``."""

    def play(scenes, first=0, sink=True):
        given, at, last = painted(scenes, 0, known), 0, None
        steps, clear, seam = [], [], None
        for frames in player.play(scenes, first, sink, given):
            same = given[:, at : at + frames.shape[1]]
            clear.append(psnr(same, frames[:, : same.shape[1]]))
            if at <= known < at + frames.shape[1]:
                seam = differences(jnp.stack([given[:, -1], frames[:, known - at]], 1))[:, 0]
            steps.append(differences(frames if last is None else jnp.concatenate([last, frames], 1)))
            at, last = at + frames.shape[1], frames[:, -1:]
            yield frames
        films.append(Film(jnp.concatenate(steps, 1), jnp.concatenate(clear, 1), seam))

    return Player(player.batch, play)


def observe_beginning(player, scenes, known, **options):
    """``Seen`` and ``Film`` of scenes whose first ``known`` pixel frames are given."""
    films = []
    seen = observe(beginning(player, known, films), scenes, range(len(scenes[0].captions)), **options)
    return seen, jax.tree.map(lambda *rows: np.concatenate(rows)[: len(scenes)], *films)


def left_out(rng, scene, chunk):
    """The scene whose captions from ``chunk`` on say motion and background and no more of its objects than "the object"."""
    said, r = Said(shape=False, colour=False, size=False), chooser(rng)
    rows = [[int(scene.attributes[field][0, i]) for field in Thing._fields] for i in range(int(scene.attributes["objects"][0]))]
    things = tuple(Thing(*row)._replace(speed=max(0, row[-1])) for row in rows)
    text = caption(r, things, int(scene.attributes["background"][0]), determiner="the", said=(said,) * len(things))
    told = scene.said.copy()
    told[chunk:] = False
    return dataclasses.replace(scene, captions=scene.captions[:chunk] + [text] * (len(scene.captions) - chunk), said=told)


def given_scenes(rng, n, chunk):
    """``n`` scenes of one prompt as in ``prompts``; eight in turn say everything in every chunk and leave it out from ``chunk`` on."""
    return [left_out(rng, scene, chunk) if i // 8 % 2 else scene for i, scene in enumerate(prompts(rng, n, CHUNKS))]


def kept(seen, chunks):
    """Rows of adherence in ``chunks``: by what the captions say, by the number of objects, and in the first and the last of them."""
    right = [verdicts(seen.readings[k], seen.scenes, k) for k in chunks]
    told = np.array([scene.said[-1, 0].any() for scene in seen.scenes])
    two = columns(seen.scenes, "objects") == 2
    groups = {"said in every chunk": told, "left out later": ~told, "one object": ~two, "two objects": two}
    rows = [rate("said in every chunk", key, stack(right, key)[told], TARGETS.get(key)) for key in KEYS]
    rows += [rate(name, key, stack(right, key)[mask]) for name, mask in list(groups.items())[1:] for key in KEYS]
    rows += [rate(f"chunk {k}", key, right[at][key][:, None]) for at, k in ((0, chunks[0]), (-1, chunks[-1])) for key in KEYS]
    return rows, {"by chunk": {key: {k: 100 * float(np.mean(v[key])) for k, v in zip(chunks, right)} for key in FOUR}}


def image(seen, film):
    """Whether a video made from an image shows it first, and keeps what it shows."""
    first = film.psnr[:, 0]
    rows = [
        rate("first frame", f"PSNR at least {CLEAR:g} dB", (first >= CLEAR)[:, None], 95.0),
        Row("first frame", "PSNR, median", float(np.median(first)), "dB", n=len(first), readings=len(first), target=CLEAR),
        Row("first frame", "PSNR, lowest", float(first.min()), "dB", n=len(first), readings=len(first)),
    ]
    more, details = kept(seen, range(CHUNKS))
    return rows + more, details


def extension(seen, film):
    """Whether a video that goes on keeps what it shows, and whether its seam is like the rest of it."""
    before = [verdicts(seen.readings[k], seen.scenes, k) for k in range(PREFIX)]
    rows = [rate("given part, decoded", key, stack(before, key)) for key in KEYS]
    rows.append(Row("given part", "PSNR once decoded, median", float(np.median(film.psnr)), "dB", n=len(film.psnr), readings=film.psnr.size))
    more, details = kept(seen, range(PREFIX, CHUNKS))
    borders = [seen.scenes[0].span(k)[0] - 1 for k in range(1, CHUNKS)]
    inside = np.delete(film.steps, borders, 1)
    limit, usual = np.quantile(inside, 0.99, axis=1), np.median(inside, 1)
    within = lambda step: step <= limit + 1e-3
    after = [within(film.steps[:, at]) for at in borders[PREFIX:]]
    measure = "difference within the film's 99th percentile"
    decoded = film.steps[:, borders[PREFIX - 1]]
    rows += [
        *more,
        rate("seam", measure, within(decoded)[:, None], 95.0),
        rate("seam, given frames kept", measure, within(film.seam)[:, None]),
        rate("later borders of chunks", measure, np.stack(after, 1)),
        *quantity("seam", "difference of frames", decoded, "of 255"),
        *quantity("seam, given frames kept", "difference of frames", film.seam, "of 255"),
        *quantity("inside the chunks", "difference of frames", usual, "of 255"),
    ]
    pair = seen._replace(readings={k: seen.readings[k] for k in (PREFIX - 1, PREFIX)})
    rows += [row._replace(group={"seams": "seam"}.get(row.group, row.group), target=None) for row in seams(pair)[0]]
    return rows, details


# ---- a change of the prompt, with recache ------------------------------------------------------------------------------------------------


def recaching(player):
    """``player`` that rebuilds the memory under a prompt that changes."""
    return Player(player.batch, lambda scenes, first=0, sink=True: player.play(scenes, first, sink, rebuild=True))


def obeyed(seen):
    """Per scene of ``change_scenes``: whether the change is there from ``BLEND`` on, a chunk later, and what did not change as before."""
    kinds = [scene.change[CHANGE_AT] for scene in seen.scenes]
    late = verdicts(seen.late[CHANGE_AT], seen.scenes, CHANGE_AT)
    later = verdicts(seen.readings[CHANGE_AT + 1], seen.scenes, CHANGE_AT + 1)
    pick = lambda right: np.array([right[kind][i] for i, kind in enumerate(kinds)])
    rest = np.array([all(later[key][i] for key in FOUR if key != kind) for i, kind in enumerate(kinds)])
    return pick(late), pick(later), rest, np.array(kinds)


def recache(plain, rebuilt):
    """A change of the prompt without and with a memory that is rebuilt, by two ``Seen`` of the same scenes."""
    rows, right = [], {}
    for name, seen in {"without recache": plain, "with recache": rebuilt}.items():
        at_once, later, rest, kinds = obeyed(seen)
        right[name] = at_once
        rows.append(rate(name, f"obeyed by the next chunk (from frame {BLEND})", at_once[:, None], 90.0))
        rows += [rate(name, f"{kind} obeyed by the next chunk", at_once[kinds == kind][:, None]) for kind in dict.fromkeys(KINDS)]
        rows.append(rate(name, "obeyed a chunk later", later[:, None]))
        rows.append(rate(name, "what did not change is kept, a chunk later", rest[:, None]))
        rows.append(rate(name, "without a cut", [[not found] for found in seen.cuts]))
    mean, upper = loss_bound(*(100 * right[name] for name in right))
    rows.append(Row("lost by recache", "obeyed by the next chunk", mean, "points", high=upper, n=len(plain.scenes), readings=len(plain.scenes)))
    return rows, {}


# ---- a video that slips ------------------------------------------------------------------------------------------------------------------

SLIPS = ("shape", "size", "colour", "motion", "speed")


def mending_scenes(rng, n):
    """``n`` scenes of one prompt; in the chunks 1 and 2 they show something else than it says, of ``SLIPS`` one (toyplans.mistaken)."""
    scenes = []
    while len(scenes) < n:
        scene = sample_scene(rng, PREFIX + 3, cuts=[], changes=False, held_out=None, leave_out=False, mistakes=1.0)
        if np.flatnonzero(scene.wrong).tolist() == list(range(1, PREFIX)):
            scenes.append(repeated(scene))
    return scenes


def mending(seen):
    """Whether what is wrong at the end of the given chunks is right again in those that follow, from ``BLEND`` frames on in the first."""
    kinds = np.array([next(key for key in SLIPS if (s.attributes[key][1] != s.attributes[key][0]).any()) for s in seen.scenes])
    after = {"by the next chunk": seen.late[PREFIX], "a chunk later": seen.readings[PREFIX + 1], "two chunks later": seen.readings[PREFIX + 2]}
    rows = []
    for when, reading in after.items():
        right = verdicts(reading, seen.scenes, PREFIX)
        mended = np.array([right[kind][i] for i, kind in enumerate(kinds)])
        rows.append(rate(when, "mended", mended[:, None]))
        rows += [rate(when, f"{kind} mended", mended[kinds == kind][:, None]) for kind in SLIPS]
    return rows, {}


# ---- the whole ---------------------------------------------------------------------------------------------------------------------------

MODES = ("image", "extension", "recache", "endless", "mending")


def ends(latents, window, chunk=8):
    """Numbers of the chunks that lie wholly in the first and in the last ``window`` latents of a video of at least ``latents``."""
    chunks = math.ceil(latents / chunk)
    count = window // chunk
    require(count >= 1 and chunks >= 2 * count, f"latents={latents} do not hold two windows of {window} latents, of whole chunks of {chunk}")
    return list(range(count)), list(range(chunks - count, chunks))


def evaluate(player, parts=MODES, *, n=256, long=64, seed=0, latents=1100, window=50):
    """Yields one ``Part`` after another.

    n: videos from an image, and extended ones; half as many changes and slips. long: streams of the endless part, ``latents`` latent frames
    each, read in the first and in the last ``window``. Raises ``ConfigError`` for unknown parts, for numbers below 1 and for windows without
    a chunk.
    """
    parts = check_parts(parts, MODES)
    require(n >= 1 and long >= 1, f"n={n} and long={long} must be at least 1")
    for name in parts:
        rng = np.random.default_rng([seed, 7919, 100 + MODES.index(name)])  # apart from those of training and of the other parts
        if name == "image":
            seen, film = observe_beginning(player, given_scenes(rng, n, 1), 1, keep=8)
            rows, details = image(seen, film)
        elif name == "extension":
            scenes = given_scenes(rng, n, PREFIX)
            seen, film = observe_beginning(player, scenes, scenes[0].span(0, PREFIX - 1)[1], keep=8)
            rows, details = extension(seen, film)
        elif name == "recache":
            scenes = change_scenes(rng, max(len(KINDS), n // 2))
            look = lambda p, scenes=scenes: observe(p, scenes, (CHANGE_AT + 1,), late=(CHANGE_AT,), cuts=True, keep=6)
            plain, seen = look(player), look(recaching(player))
            rows, details = recache(plain, seen)
        elif name == "mending":
            scenes = mending_scenes(rng, max(1, n // 2))
            seen, _ = observe_beginning(player, scenes, scenes[0].span(0, PREFIX - 1)[1], late=(PREFIX,), keep=8)
            rows, details = mending(seen)
        else:
            early, late = ends(latents, window)
            seen = observe(player, long_prompts(rng, long, late[-1] + 1), (*early, *late), stills=8)
            rows, details = drift(seen, early, late)
        yield Part(name, rows, details, seen)


__all__ = [
    "CHUNKS", "MODES", "PREFIX", "SLIPS", "Film", "beginning", "ends", "evaluate", "extension", "given_scenes", "image", "mending",
    "mending_scenes", "recache", "recaching",
]  # fmt: skip
