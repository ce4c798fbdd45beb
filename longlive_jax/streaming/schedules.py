"""What a batch is told, chunk by chunk: one prompt for all samples, or one for each, so that every sample has its own cuts and changes."""

from longlive_jax.config import divisors, require
from longlive_jax.data.prompts import Storyboard


def one_a_chunk(prompts, batch):
    """An iterable of one entry a chunk, a string or a tuple of ``batch`` strings, from anything that ``Session.stream`` takes as prompts.

    Raises ``ConfigError`` for a single string, and for storyboards that are not as many as samples or not of one length.
    """
    require(not isinstance(prompts, str), f"prompts={prompts!r} is one string; give one per chunk, e.g. [prompt] * 6, or a Storyboard")
    if isinstance(prompts, Storyboard):
        return prompts.prompts
    if not isinstance(prompts, list | tuple):
        return prompts
    boards = [p for p in prompts if isinstance(p, Storyboard)]
    if not boards:
        return [entry(p, batch) for p in prompts]
    require(
        len(boards) == len(prompts) == batch,
        f"{len(prompts)} prompts, {len(boards)} of them storyboards, for batch={batch}; give one storyboard per sample and nothing else",
    )
    lengths = [board.chunks for board in boards]
    require(len(set(lengths)) == 1, f"the storyboards have {lengths} chunks; samples of a batch run together: give them equal lengths")
    return list(zip(*(board.prompts for board in boards), strict=True))


def entry(prompt, batch):
    """What one chunk is told: a string, or a tuple of ``batch`` strings. Raises ``ConfigError`` for another number of them."""
    if isinstance(prompt, str):
        return prompt
    ok = isinstance(prompt, list | tuple) and len(prompt) == batch and all(isinstance(p, str) for p in prompt)
    require(ok, f"a chunk's prompt is {prompt!r}; give one string, or one string for each of batch={batch} samples")
    return tuple(prompt)


def each(prompt):
    """The strings of a chunk, one for all samples or one for each."""
    return (prompt,) if isinstance(prompt, str) else prompt


def cuts(prompt, prefix, index):
    """Whether chunk ``index`` starts a new shot: a bool for one prompt, a tuple of bools for one a sample. Chunk 0 starts the video."""
    flags = tuple(index > 0 and p.startswith(prefix) for p in each(prompt))
    return flags[0] if isinstance(prompt, str) else flags


def changes(prompt, before, prefix):
    """Where the prompt is another than the chunk's before it, and no cut: a bool, or a tuple with one a sample.

    The cut prefix is no change: only the first chunk of a shot has it.
    """
    now, then = each(prompt), each(before)
    n = max(len(now), len(then))
    pairs = zip(now * (n // len(now)), then * (n // len(then)), strict=True)
    flags = tuple(not p.startswith(prefix) and p != q.removeprefix(prefix) for p, q in pairs)
    return flags[0] if n == 1 else flags


def check_early(early, chunk):
    """Refuse a number of latents by which a first chunk cannot be decoded in parts; 0: whole."""
    fits = ", ".join(map(str, divisors(chunk)))
    require(early >= 0 and chunk % max(early, 1) == 0, f"early={early} latents do not divide a chunk of {chunk}; use 0 or one of {fits}")


__all__ = ["changes", "check_early", "cuts", "each", "entry", "one_a_chunk"]
