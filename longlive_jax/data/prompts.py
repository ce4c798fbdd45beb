"""Prompts: a folder of captions, a text file or a list of strings becomes one prompt for every chunk of a video.

Two written forms, one result, a ``Storyboard``:

*Folder* (the format of the public examples): one numbered ``<k>.json`` a shot with a field ``caption``; ``global.json`` is ignored;
``shot_durations.txt`` may hold the chunks of every shot. ``<folder>/caption`` is read instead of the folder where it exists.

*Lines* (a text file, or strings given in code): one shot a line. Blank lines and lines that start with ``#`` are skipped::

    [6] A red ball rolls over wet sand.          six chunks
    + [2] The ball turns blue.                   the same shot goes on under a new prompt, for two chunks
    A lighthouse at night.                       a cut; takes what the counts above leave

The first chunk of every shot but the first carries the cut prefix, which is what the sampler reads as a cut.
Source: spec inference §8.3, training §5.3.
"""

import json
import pathlib
import re
from dataclasses import dataclass
from typing import NamedTuple

from longlive_jax.config import CUT_PREFIX, ConfigError, require

MOST = 10**7  # chunks of a shot
LINE = re.compile(r"(?P<plus>\+)?\s*(?:\[(?P<count>[^\]]*)\])?\s*(?P<text>.*)", re.DOTALL)


class Shot(NamedTuple):
    """Chunks ``start`` to ``stop - 1`` under one prompt (without cut prefix); ``cut`` says whether a cut comes before them."""

    start: int
    stop: int
    prompt: str
    cut: bool


class Part(NamedTuple):
    """What was written for one run of chunks: its text, whether it continues the shot before it, and its chunks (None: not said)."""

    text: str
    continues: bool = False
    count: int | None = None
    where: str = ""  # for messages


@dataclass(frozen=True)
class Storyboard:
    """One prompt for every chunk. ``unused`` holds the prompts that came too late for the number of chunks."""

    prompts: tuple[str, ...]
    cut_prefix: str = CUT_PREFIX
    unused: tuple[str, ...] = ()

    def __post_init__(self):
        require(len(self.prompts) > 0, "a storyboard of 0 prompts has no chunk; give at least one prompt")
        require(bool(self.cut_prefix.strip()), f"cut_prefix={self.cut_prefix!r} is blank, so every chunk would be a cut; use {CUT_PREFIX!r}")

    @property
    def chunks(self):
        return len(self.prompts)

    @property
    def cuts(self):
        """Which chunks start a new shot, a tuple of bools; never chunk 0."""
        return tuple(i > 0 and p.startswith(self.cut_prefix) for i, p in enumerate(self.prompts))

    @property
    def shots(self):
        """The run-length view: a tuple of ``Shot``, a new one at every cut and at every change of the prompt."""
        out = []
        for i, (prompt, cut) in enumerate(zip(self.prompts, self.cuts)):
            text = prompt.removeprefix(self.cut_prefix) if cut else prompt
            if out and not cut and out[-1].prompt == text:
                out[-1] = out[-1]._replace(stop=i + 1)
            else:
                out.append(Shot(i, i + 1, text, cut))
        return tuple(out)

    def describe(self, width=100):
        """The run-length list as text, one line a run, prompts shortened to ``width`` characters (0: whole)."""
        lines = []
        for shot in self.shots:
            span = f"chunk {shot.start}" if shot.stop == shot.start + 1 else f"chunks {shot.start}-{shot.stop - 1}"
            mark = "cut, " if shot.cut else "same shot, " if shot.start else ""
            lines.append(f"{span}: {mark}{shorten(shot.prompt, width)}")
        lines += [f"not reached in {self.chunks} chunks: {shorten(text, width)}" for text in self.unused]
        return "\n".join(lines)


def shorten(text, width):
    line = " ".join(text.split())
    return line if not width or len(line) <= width else line[: width - 1].rstrip() + "…"


# ---- from what was written to one prompt a chunk -------------------------------------------------------------------------------------------


def storyboard(lines, chunks=None, *, chunks_per_shot=0, cut_prefix=CUT_PREFIX, source="prompts"):
    """A ``Storyboard`` from strings in the line syntax above.

    ``chunks``: the video's chunks; None takes the sum of the counts, which all lines must then have (``chunks_per_shot`` > 0 counts as one).
    Raises ``ConfigError`` for what ``build`` refuses and for a line that cannot be read.
    """
    if isinstance(lines, str):
        lines = [lines]
    parts = [
        parse_line(line, f"{source}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    return build(parts, chunks, chunks_per_shot=chunks_per_shot, cut_prefix=cut_prefix, source=source)


def parse_line(line, where):
    found = LINE.fullmatch(line.strip())
    plus, count, text = found["plus"] is not None, found["count"], found["text"].strip()
    require(
        not (count is not None and text.startswith("+")),
        f"{where}: {shorten(line, 60)!r} has its + after the count; write '+ [{count}] prompt' to go on with the shot",
    )
    return Part(text, plus, None if count is None else parse_count(count, where), where)


def parse_count(text, where):
    number = text.strip()
    require(re.fullmatch(r"[+-]?[0-9]+", number) is not None, f"{where}: {number!r} is not a whole number of chunks; write e.g. 6")
    require(int(number) > 0, f"{where}: {number} chunks is not positive; give every shot at least 1 chunk, or leave the shot out")
    require(int(number) <= MOST, f"{where}: {number} chunks are more than {MOST}; give fewer, and go on from a saved state")
    return int(number)


def build(parts, chunks, *, chunks_per_shot, cut_prefix, source):
    """Lay ``parts`` out over ``chunks`` (spec inference §8.3).

    A part's own count goes before ``chunks_per_shot``, that before an even split of what is left, the first parts taking the extra.
    Parts are cut off at ``chunks`` in order; if they do not fill it, the last one is stretched to the end. Raises ``ConfigError``.
    """
    require(len(parts) > 0, f"{source} holds no prompt; write at least one")
    require(chunks is None or chunks > 0, f"chunks={chunks} must be positive")
    require(chunks_per_shot >= 0, f"chunks_per_shot={chunks_per_shot} must not be negative; 0 splits evenly")
    require(not parts[0].continues, f"{parts[0].where}: the first line starts with '+', but there is no shot to continue; remove the '+'")
    prefix = cut_prefix.strip()
    texts = []
    for part in parts:
        cuts = bool(prefix) and part.text.startswith(prefix)
        require(
            not (cuts and part.continues),
            f"{part.where}: '+' continues the shot, but the prompt starts with the cut prefix {prefix!r}; remove one of the two",
        )
        text = part.text.removeprefix(prefix).strip() if cuts else part.text
        require(bool(text), f"{part.where}: the prompt is empty; write one, or remove the shot")
        texts.append(text)
    counts = spread([part.count or chunks_per_shot for part in parts], chunks, source)

    prompts, used = [], 0
    for part, text, count in zip(parts, texts, counts):
        count = min(count, chunks - len(prompts)) if chunks else count
        if count:
            first = text if part.continues or not prompts else cut_prefix + text
            prompts += [first, *[text] * (count - 1)]
            used += 1
    if chunks and len(prompts) < chunks:
        prompts += [texts[-1]] * (chunks - len(prompts))
    return Storyboard(tuple(prompts), cut_prefix, tuple(texts[used:]))


def spread(counts, chunks, source):
    """Fill the zeros in ``counts`` with an even split of the chunks that the other counts leave."""
    open_parts = counts.count(0)
    if not open_parts:
        return counts
    require(
        chunks is not None,
        f"{source}: {open_parts} of {len(counts)} prompts do not say their chunks; give chunks=, chunks_per_shot= or a count for each",
    )
    left = chunks - sum(counts)
    require(
        left >= open_parts,
        f"{source}: {len(counts)} prompts need at least {sum(counts) + open_parts} chunks, but chunks={chunks}; "
        f"use chunks={sum(counts) + open_parts} or more, or fewer prompts",
    )
    each, extra = divmod(left, open_parts)
    shares = iter([each + 1] * extra + [each] * (open_parts - extra))
    return [count or next(shares) for count in counts]


# ---- files ---------------------------------------------------------------------------------------------------------------------------------


def read_prompts(path, chunks=None, *, chunks_per_shot=0, cut_prefix=CUT_PREFIX):
    """The ``Storyboard`` of a folder of captions or of a text file; arguments as for ``storyboard``. Raises ``ConfigError``."""
    path = existing(path)
    options = {"chunks_per_shot": chunks_per_shot, "cut_prefix": cut_prefix, "source": str(path)}
    if path.is_file():
        return storyboard(read_text(path).splitlines(), chunks, **options)
    folder = captions_folder(path)
    files = caption_files(folder)
    if not files:
        inner = [f.name for f in sample_folders(folder)]
        hint = f"name one of its storyboards ({', '.join(inner[:5])}) or use read_storyboards" if inner else "put 0.json, 1.json, ... into it"
        raise ConfigError(f"{folder} holds no <number>.json of its own; {hint}")
    captions = [read_caption(f) for f in files]
    counts = read_durations(folder / "shot_durations.txt", len(captions))
    return build([Part(c, False, n, str(f)) for c, n, f in zip(captions, counts, files)], chunks, **options)


def read_storyboards(path, chunks=None, *, chunks_per_shot=0, cut_prefix=CUT_PREFIX):
    """Every storyboard of a folder of folders, ``[(name, Storyboard), ...]`` sorted by name; a single one gives a list of one."""
    path = existing(path)
    options = {"chunks_per_shot": chunks_per_shot, "cut_prefix": cut_prefix}
    folder = path if path.is_file() else captions_folder(path)
    if path.is_file() or caption_files(folder):
        return [(path.stem if path.is_file() else path.resolve().name, read_prompts(path, chunks, **options))]
    samples = sample_folders(folder)
    require(len(samples) > 0, f"{folder} holds no storyboard; it needs sub-folders with 0.json, 1.json, ... or these files themselves")
    return [(sample.name, read_prompts(sample, chunks, **options)) for sample in samples]


def existing(path):
    path = pathlib.Path(path)
    require(path.exists(), f"prompts {str(path)!r} do not exist; give a text file with one shot a line, or a folder of <number>.json captions")
    return path


def captions_folder(path):
    return path / "caption" if (path / "caption").is_dir() else path


def sample_folders(folder):
    """Sub-folders that hold captions, sorted by name; hidden ones and others are passed over."""
    inner = sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    return [f for f in inner if caption_files(captions_folder(f))]


def caption_files(folder):
    """The ``*.json`` of a folder but ``global.json``: names that are no numbers first, then by number."""

    def order(file):
        numeric = file.stem.isdecimal()
        return numeric, int(file.stem) if numeric else 0, file.stem

    return sorted((f for f in folder.glob("*.json") if f.name != "global.json"), key=order)


def read_text(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def read_caption(path):
    try:
        record = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg}); correct it, or write the prompts as a text file"
        ) from error
    known = record if isinstance(record, dict) else {}
    require(isinstance(known.get("caption"), str), f'{path} has no text field "caption" (fields: {", ".join(known) or "none"}); add one')
    return known["caption"].strip()


def read_durations(path, shots):
    """Chunks of every shot from ``shot_durations.txt`` (whole numbers between commas or white space); all None where it does not exist."""
    if not path.is_file():
        return [None] * shots
    counts = [parse_count(word, str(path)) for word in re.split(r"[,\s]+", read_text(path).strip()) if word]
    require(len(counts) == shots, f"{path} holds {len(counts)} durations for {shots} shots; write one number for each <number>.json")
    return counts


__all__ = ["Shot", "Storyboard", "read_prompts", "read_storyboards", "storyboard"]
