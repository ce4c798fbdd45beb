"""The toy world's language: attribute names, caption grammar, vocabulary and tokenizer.

Every caption determines every attribute. What an indefinite caption ("a red star bounces") leaves unsaid has a fixed default: the size is big
and the motion is slow. A definite one ("the star", "the same object", "it") takes what it leaves unsaid from the object already in the video.
Two objects are always told apart by "left" and "right". One word is one token.
"""

import difflib
import random
import re
from typing import NamedTuple

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (0.86, 0.09, 0.11),
    "orange": (1.00, 0.53, 0.03),
    "yellow": (0.99, 0.89, 0.14),
    "green": (0.07, 0.60, 0.20),
    "cyan": (0.08, 0.82, 0.87),
    "blue": (0.12, 0.25, 0.92),
    "purple": (0.52, 0.13, 0.74),
    "pink": (0.98, 0.38, 0.70),
}  # sRGB in [0, 1]
SIZES = ("small", "big")
MOTIONS = ("still", "slides", "bounces", "circles", "diagonal", "pulses")
SPEEDS = ("slowly", "quickly")
BACKGROUNDS = ("studio", "night", "checker", "stripes", "meadow", "sunset", "bricks", "mountains")

SHAPE_WORDS = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle", "pyramid"),
    "star": ("star",),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop", "donut"),
}
ANY_SHAPE = ("object", "shape", "thing")
COLOUR_WORDS = {
    "red": ("red", "crimson"),
    "orange": ("orange",),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "cyan": ("cyan", "turquoise"),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rose"),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "big": ("big", "large", "huge")}
SPEED_WORDS = {"slowly": ("slowly", "gently", "calmly"), "quickly": ("quickly", "fast", "rapidly")}
# (finite verb, participle, rest): "bounces up and down", "is bouncing up and down"
MOTION_WORDS = {
    "still": (
        ("stays", "staying", "still"),
        ("stands", "standing", "still"),
        ("rests", "resting", ""),
        ("does not move", "not moving", ""),
    ),
    "slides": (
        ("slides", "sliding", ""),
        ("slides", "sliding", "from side to side"),
        ("moves", "moving", "from side to side"),
        ("slides", "sliding", "left and right"),
        ("moves", "moving", "left and right"),
    ),
    "bounces": (
        ("bounces", "bouncing", ""),
        ("bounces", "bouncing", "up and down"),
        ("moves", "moving", "up and down"),
    ),
    "circles": (
        ("moves", "moving", "in circles"),
        ("circles", "circling", "around"),
        ("goes", "going", "round and round"),
    ),
    "diagonal": (
        ("moves", "moving", "diagonally"),
        ("slides", "sliding", "diagonally"),
        ("moves", "moving", "from corner to corner"),
    ),
    "pulses": (
        ("pulses", "pulsing", ""),
        ("grows and shrinks", "growing and shrinking", ""),
        ("pulses", "pulsing", "in size"),
    ),
}
BACKGROUND_WORDS = {
    "studio": ("in a white room", "in an empty studio", "in a studio", "in front of a white wall"),
    "night": ("under a starry night sky", "at night", "under the night sky", "in front of a starry sky"),
    "checker": ("on a checkerboard", "in front of a checkerboard", "in front of a checkered wall"),
    "stripes": ("in front of stripes", "in front of a striped wall", "before a striped wall"),
    "meadow": ("over a meadow", "in a meadow", "over grassy hills", "above the grass"),
    "sunset": ("at sunset", "in front of a sunset", "in the evening", "under an evening sky"),
    "bricks": ("in front of a brick wall", "before a brick wall", "in front of bricks"),
    "mountains": ("in the mountains", "in front of mountains", "before snowy mountains", "over the mountains"),
}


class PromptError(ValueError):
    """A prompt the toy world's tokenizer cannot read; the message holds the word or length, the rule and the remedy."""


class Thing(NamedTuple):
    """One object, every field an index into its table (a still object has speed 0)."""

    shape: int
    colour: int
    size: int
    motion: int
    speed: int


class Said(NamedTuple):
    """What a caption says of an object; the rest is left to the video so far (or, without one, to the defaults)."""

    shape: bool = True
    colour: bool = True
    size: bool = True


EVERYTHING = Said()


# ---- captions ------------------------------------------------------------------------------------------------------------------------------


def noun_phrase(rng, thing, determiner, said):
    """ "a big red star", "the same object", "it". ``determiner``: "a", "the", "the same" or "it"."""
    if determiner == "it":
        return "it"
    size = rng.choice(SIZE_WORDS[SIZES[thing.size]]) if said.size else ""
    colour = rng.choice(COLOUR_WORDS[COLOUR_NAMES[thing.colour]]) if said.colour else ""
    shape = rng.choice(SHAPE_WORDS[SHAPES[thing.shape]] if said.shape else ANY_SHAPE)
    order = rng.random()
    if size and colour and determiner == "a" and order < 0.1:
        return f"a {shape}, {size} and {colour},".replace("a object", "an object")
    words = [w for w in ((colour, size, shape) if order > 0.9 else (size, colour, shape)) if w]
    if determiner == "a" and words[0][0] in "aeiou":
        determiner = "an"
    return " ".join([determiner, *words])


def verb_phrase(rng, thing, participle=False, sides=True):
    """ "bounces quickly up and down" or its participle. ``sides=False`` avoids "left and right", for use beside "on the left"."""
    forms = MOTION_WORDS[MOTIONS[thing.motion]]
    finite, present, rest = rng.choice(forms if sides else [f for f in forms if "left" not in f[2]])
    verb, speed = present if participle else finite, SPEEDS[thing.speed]
    if MOTIONS[thing.motion] == "still" or (speed == "slowly" and rng.random() < 0.4):
        return f"{verb} {rest}".strip()
    adverb, place = rng.choice(SPEED_WORDS[speed]), rng.random()
    if place < 0.2 and adverb != "fast":
        words = (adverb, verb, rest)
    elif place < 0.6:
        words = (verb, adverb, rest)
    else:
        words = (verb, rest, adverb)
    return " ".join(w for w in words if w)


def one_object(rng, noun, thing, where):
    """A sentence about one object."""
    finite, present = verb_phrase(rng, thing), verb_phrase(rng, thing, participle=True)
    forms = [
        f"{noun} {finite} {where}",
        f"{where}, {noun} {finite}",
        f"{where} {noun} {finite}",
        f"{noun} is {present} {where}",
        f"{noun}, {where}, {finite}",
    ]
    if noun != "it":
        forms += [f"{noun} {present} {where}", f"a video of {noun} {present} {where}", f"we see {noun} {present} {where}"]
    if noun.startswith("a"):
        forms += [f"there is {noun} that {finite} {where}", f"{where} there is {noun} {present}"]
    return rng.choice(forms)


def two_objects(rng, nouns, things, where):
    """A sentence about two objects: the left one first, each clause opened by its side, so that it is plain whose word is whose."""
    finite = [verb_phrase(rng, thing, sides=False) for thing in things]
    left, right = (f"on the {side} {noun} {verb}" for side, noun, verb in zip(("left", "right"), nouns, finite))
    return rng.choice(
        [
            f"{left} and {right} {where}",
            f"{left} and {right}, {where}",
            f"{left} while {right} {where}",
            f"{left}, {right}, {where}",
            f"{where}, {left} and {right}",
            f"{where} {left}, {right}",
        ]
    )


def caption(rng, things, background, *, determiner="a", said=None, now=False):
    """A sentence for one or two objects in front of a background (indices).

    ``rng`` is a ``random.Random``. ``determiner``: "a" (new objects), "the", "it" (one object) or "the same". ``said``: one ``Said`` per
    object, default everything. ``now`` starts the sentence with the word "now".
    """
    said = said or [EVERYTHING] * len(things)
    where = rng.choice(BACKGROUND_WORDS[BACKGROUNDS[background]])
    nouns = [noun_phrase(rng, thing, determiner, s) for thing, s in zip(things, said)]
    text = one_object(rng, nouns[0], things[0], where) if len(things) == 1 else two_objects(rng, nouns, things, where)
    text = ("now " if now else "") + text.replace(",,", ",").rstrip(",")
    return text[0].upper() + text[1:] + ("." if rng.random() < 0.7 else "")


# ---- vocabulary ----------------------------------------------------------------------------------------------------------------------------

COLOUR_NAMES = tuple(COLOURS)
GRAMMAR_WORDS = (
    "a an the same it now there is that we see video of and while on to left right the scene transitions"  # sentence forms and the cut prefix
)


def all_words():
    tables = [SHAPE_WORDS, COLOUR_WORDS, SIZE_WORDS, SPEED_WORDS, BACKGROUND_WORDS]
    phrases = [phrase for table in tables for options in table.values() for phrase in options]
    phrases += [part for options in MOTION_WORDS.values() for form in options for part in form]
    return ["<pad>", "<end>", ".", ",", *sorted(set(" ".join([*phrases, *ANY_SHAPE, GRAMMAR_WORDS]).split()))]


WORDS = all_words()
TOKENS = {word: token for token, word in enumerate(WORDS)}
PAD, END = 0, 1


def tokenize(text, length=48):
    """Token ids int32 [length] and mask bool [length] (words and the end token) of a prompt; "" is the unconditional prompt.

    Raises ``PromptError`` for a word outside ``WORDS``, with the nearest known ones, and for a text longer than ``length - 1`` tokens.
    """
    ids = []
    for word in re.findall(r"[^\s.,]+|[.,]", text.lower()):
        if word not in TOKENS or word.startswith("<"):
            near = difflib.get_close_matches(word, WORDS[2:], n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise PromptError(
                f"unknown word {word!r}: {hint}The toy model knows {len(WORDS) - 2} words; longlive_jax.data.toyworld.WORDS lists them"
            )
        ids.append(TOKENS[word])
    if len(ids) + 1 > length:
        raise PromptError(f"the prompt has {len(ids)} words and signs; at most {length - 1} fit beside the end token: shorten it")
    count = len(ids) + 1
    return np.array(ids + [END] + [PAD] * (length - count), np.int32), np.arange(length) < count


def chooser(rng):
    """A fast scalar ``random.Random`` seeded from a numpy ``Generator``."""
    return random.Random(int(rng.integers(1 << 62)))
