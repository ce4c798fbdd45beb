"""What the chunks of a toy clip show and say: withheld combinations, random plans of shots, in-shot changes, captions."""

import difflib
import math
from typing import NamedTuple

import numpy as np

from longlive_jax.config import CUT_PREFIX, require
from longlive_jax.data.toywords import BACKGROUNDS, COLOUR_NAMES, COLOURS, EVERYTHING, MOTIONS, SHAPES, Said, Thing, caption

TWO_OBJECTS = 0.4  # share of the new shots
SAME = 0.55  # share of the later shots that keep their objects
SAID = (0.3, 0.35, 0.25)  # how often "the same" and "the" go with the object's shape, colour and size
CUTS = (0.22, 0.3, 0.24, 0.15, 0.09)  # how often a clip has 0, 1, .. cuts
STILL, PULSES = MOTIONS.index("still"), MOTIONS.index("pulses")


# ---- withheld combinations -----------------------------------------------------------------------------------------------------------------


def mixed(n):
    """A stable 64-bit hash of a small integer (splitmix64)."""
    mask = (1 << 64) - 1
    n = (n + 1) * 0x9E3779B97F4A7C15 & mask
    n = (n ^ n >> 30) * 0xBF58476D1CE4E5B9 & mask
    n = (n ^ n >> 27) * 0x94D049BB133111EB & mask
    return n ^ n >> 31


DIMS = (len(SHAPES), len(COLOURS), len(MOTIONS), len(BACKGROUNDS))
WITHHELD = np.array([mixed(i) % 10 == 0 for i in range(math.prod(DIMS))]).reshape(DIMS)
HELD = WITHHELD.tolist()  # the same, fast for scalars


def withheld(shape, colour, motion, background):
    """Whether training never shows this combination (names or indices)."""
    tables = (SHAPES, COLOUR_NAMES, MOTIONS, BACKGROUNDS)
    return bool(WITHHELD[tuple(index(t, v) if isinstance(v, str) else v for t, v in zip(tables, (shape, colour, motion, background)))])


def index(table, name):
    """Where ``name`` stands in a table of names; a ``ConfigError`` names the nearest."""
    near = difflib.get_close_matches(str(name), table, n=1)
    require(name in table, f"unknown name {name!r}: " + (f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(table)}")
    return table.index(name)


def fits(held_out, thing, background):
    return held_out is None or HELD[thing.shape][thing.colour][thing.motion][background] == held_out


def candidates(held_out):
    """Per background the (shape, colour, motion) that may be drawn."""
    keep = np.ones(DIMS, bool) if held_out is None else held_out == WITHHELD
    return [[tuple(map(int, row)) for row in np.argwhere(keep[..., b])] for b in range(len(BACKGROUNDS))]


CANDIDATES = {held_out: candidates(held_out) for held_out in (False, True, None)}


# ---- plans -----------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What one chunk shows and says."""

    things: tuple[Thing, ...]
    background: int
    cut: bool = False  # a new shot begins
    same: bool = False  # the objects of the shot before go on in this shot
    change: str = ""  # what changed inside the shot at this chunk's start: motion, speed, colour or background
    wrong: bool = False  # the chunk shows something else than its caption says
    said: tuple[Said, ...] = ()
    caption: str = ""


def draw_things(r, count, held_out, background):
    """New objects; two have different colours."""
    while True:
        rows = [r.choice(CANDIDATES[held_out][background]) for _ in range(count)]
        if count == 1 or rows[0][1] != rows[1][1]:
            return tuple(Thing(s, c, r.randrange(2), m, 0 if m == STILL else r.randrange(2)) for s, c, m in rows)


def with_motion(r, thing, held_out, background, other_than=None):
    """The same object with another motion; None where no motion is allowed."""
    motions = [m for m in range(len(MOTIONS)) if m != other_than and fits(held_out, thing._replace(motion=m), background)]
    if not motions:
        return None
    motion = r.choice(motions)
    return thing._replace(motion=motion, speed=0 if motion == STILL else r.randrange(2))


def new_shot(r, last, held_out, count, same):
    """The plan of a shot after ``last``: the same or other objects, at times with the same background."""
    keep = r.random() < 0.25
    background = last.background if keep else r.choice([b for b in range(len(BACKGROUNDS)) if b != last.background])
    if same:
        things = tuple(with_motion(r, t, held_out, background) for t in last.things)
        if None not in things and (not keep or jumps(last.things, things)):
            return Plan(things, background, cut=True, same=True)
    for _ in range(8):
        things = draw_things(r, count, held_out, background)
        if not keep or jumps(last.things, things):
            return Plan(things, background, cut=True)
    background = (background + 1) % len(BACKGROUNDS)
    return Plan(draw_things(r, count, held_out, background), background, cut=True)


def jumps(old, new):
    """Whether a cut between these objects on one background can be seen: other in number or in all colours, or one that can jump."""
    moving = len(new) == 1 and new[0].motion not in (STILL, PULSES)
    return len(old) != len(new) or moving or all(a.colour != b.colour for a, b in zip(old, new))


def changed(r, last, held_out):
    """The plan of the next chunk with one change and no cut; None where the withheld combinations leave no choice."""
    kind = r.choices(("motion", "speed", "colour", "background"), (0.35, 0.2, 0.27, 0.18))[0]
    things, i = list(last.things), r.randrange(len(last.things))
    background = last.background
    if kind == "speed" and things[i].motion == STILL:
        kind = "motion"
    if kind == "motion":
        things[i] = with_motion(r, things[i], held_out, background, other_than=things[i].motion)
    elif kind == "speed":
        things[i] = things[i]._replace(speed=1 - things[i].speed)
    elif kind == "colour":
        taken = {t.colour for t in things}
        options = [things[i]._replace(colour=c) for c in range(len(COLOURS)) if c not in taken]
        options = [t for t in options if fits(held_out, t, background)]
        things[i] = r.choice(options) if options else None
    else:
        options = [b for b in range(len(BACKGROUNDS)) if b != background and all(fits(held_out, t, b) for t in things)]
        background = r.choice(options) if options else None
    if None in things or background is None:
        return None
    return Plan(tuple(things), background, change=kind)


def speak(r, plan, last, leave_out, shares=SAID):
    """The plan with its caption, cut prefix included. ``last``: the plan of the chunk before, or None."""
    said = tuple(
        Said(r.random() < shares[0], r.random() < shares[1] or plan.change == "colour", r.random() < shares[2]) if leave_out else EVERYTHING
        for _ in plan.things
    )
    now = False
    if plan.same:
        determiner = "the same"
    elif last is None or plan.cut:
        determiner = "a"
    elif not plan.change and r.random() < 0.7:  # repeat; a change is not announced twice
        text = last.caption.removeprefix(CUT_PREFIX).removeprefix("Now ")
        return plan._replace(said=last.said, caption=text[0].upper() + text[1:])
    else:
        now = bool(plan.change) and r.random() < 0.4
        determiner = "the" if leave_out and r.random() < 0.5 else "a"
        if determiner == "the" and len(plan.things) == 1 and plan.change != "colour" and r.random() < 0.25:
            determiner, said = "it", (Said(False, False, False),)
    if determiner == "a":  # new words for everything; defaults may stay unsaid
        said = tuple(Said(size=t.size == 0 or r.random() < 0.6) for t in plan.things)
    text = caption(r, plan.things, plan.background, determiner=determiner, said=said, now=now)
    return plan._replace(said=said, caption=(CUT_PREFIX if plan.cut else "") + text)


def sample_plans(r, chunks, cuts, objects, changes, held_out, leave_out, same, said=SAID):
    """One captioned plan a chunk."""

    def count():
        return objects or (2 if r.random() < TWO_OBJECTS else 1)

    background = r.randrange(len(BACKGROUNDS))
    plan = Plan(draw_things(r, count(), held_out, background), background)
    plans = [speak(r, plan, None, leave_out, said)]
    for c in range(1, chunks):
        last = plans[-1]
        plan = Plan(last.things, last.background)
        if c in cuts:
            plan = new_shot(r, last, held_out, count(), r.random() < same)
        elif r.random() < changes:
            plan = changed(r, last, held_out) or plan
        plans.append(speak(r, plan, last, leave_out, said))
    return plans


# ---- mistakes ------------------------------------------------------------------------------------------------------------------------------

MISTAKES = {"shape": 0.35, "motion": 0.2, "speed": 0.15, "colour": 0.15, "size": 0.15}  # what is wrong, how often


def mistaken(r, plans, held_out):
    """The plans with a mistake in one or two chunks inside a shot: an object that is not as their captions say. The next chunk is right again.

    The chunk before is right too; none of them but that one is a cut or a change. A stream that slips looks so, and nothing else in the
    clips shows that a slip can be undone. Plans that have no room for a mistake stay as they are.
    """
    quiet = [not (plan.cut or plan.change) for plan in plans]
    spans = [(k, k + n) for n in (1, 2) for k in range(1, len(plans) - n) if all(quiet[k : k + n + 1])]
    if not spans:
        return plans
    start, stop = r.choice(spans)
    right = plans[start].things
    at = r.randrange(len(right))
    thing = slipped(r, right[at], held_out, plans[start].background, {t.colour for t in right})
    if thing is None:
        return plans
    wrong = (*right[:at], thing, *right[at + 1 :])
    return [plan._replace(things=wrong, wrong=True) if start <= k < stop else plan for k, plan in enumerate(plans)]


def slipped(r, thing, held_out, background, taken):
    """The object with one attribute of ``MISTAKES`` wrong, and a colour that is not among those ``taken``; None where there is none."""
    kind = r.choices(*zip(*MISTAKES.items()))[0]
    if kind == "motion":
        return with_motion(r, thing, held_out, background, other_than=thing.motion)
    if kind == "speed":
        return None if thing.motion == STILL else thing._replace(speed=1 - thing.speed)
    if kind == "size":
        return thing._replace(size=1 - thing.size)
    others = [c for c in range(len(COLOURS)) if c not in taken] if kind == "colour" else [s for s in range(len(SHAPES)) if s != thing.shape]
    options = [t for t in (thing._replace(**{kind: i}) for i in others) if fits(held_out, t, background)]
    return r.choice(options) if options else None
