"""Judge a toy model by the pixels of the videos it makes.

    python experiments/evaluate.py --bundle=runs/toy --out=runs/toy/evaluation
    python experiments/evaluate.py --parts=adherence,cuts --n=128 --guidance=2
    python experiments/evaluate.py --parts=image,extension,recache,endless,mending     # "all": these and the seven of a plain run
    python experiments/evaluate.py --steps=4,8 --guidance=1,2,3 --solver=unipc,euler     # compare settings on fewer prompts
    python experiments/evaluate.py --truth --n=64                                        # rendered truth through the same path

Writes ``results.json``, ``results.md`` and contact sheets (PNG) into ``--out`` and prints every figure. What is measured, and how, is said in
longlive_jax/data/toyeval.py; in toymodes.py for videos that begin with something given, are told anew, do not end or slip. Several values of a
sampler setting turn the evaluation into a comparison of all their combinations, on the same prompts and noise.
"""

import argparse
import importlib.resources
import itertools
import json
import pathlib
import sys
import time
from dataclasses import replace

import numpy as np

from longlive_jax.checkpoint import load_bundle
from longlive_jax.config import ConfigError, require
from longlive_jax.data import toyeval, toymodes
from longlive_jax.data.toyfigures import rate
from longlive_jax.data.toyplay import model_player, truth_player
from longlive_jax.metrics import plain, provenance
from longlive_jax.streaming.pictures import contact_sheet

PARTS = (*toyeval.PARTS, *toymodes.MODES)
SETTINGS = {"solver": str, "steps": int, "shift": float, "guidance": float}


# ---- tables ------------------------------------------------------------------------------------------------------------------------------


def number(row):
    """ "98.4 % (97.0 to 99.1)" """
    text = f"{row.value:.{1 if row.unit == '%' else 2}f} {row.unit}"
    return (
        text
        if row.low is None
        else text + (f" ({row.low:.1f} to {row.high:.1f})" if row.unit == "%" else f" ({row.low:.2f} to {row.high:.2f})")
    )


def line(part, row):
    """A figure for the console."""
    met = {True: "  met", False: "  NOT MET", None: ""}[row.met]
    target = "" if row.target is None else f"  target {'<=' if row.at_most else '>='} {row.target:g}{met}"
    return f"{part:10}{row.group:24}{row.measure:56}{number(row):32} n {row.n}{target}"


def table(head, rows):
    lines = [" | ".join(map(str, cells)) for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {text} |" for text in lines) + "\n"


def markdown(parts, title, settings):
    """All figures: those with a target first, then part by part; groups with a figure for every attribute as one line each."""
    aimed = [(part.name, row) for part in parts for row in part.rows if row.target is not None]
    target = lambda row: f"{'≤' if row.at_most else '≥'} {row.target:g}"
    out = [f"# {title}\n", ", ".join(f"{k} {v}" for k, v in settings.items()) + ". In brackets: 95 % intervals.\n"]
    if aimed:
        cells = [(name, r.group, r.measure, number(r), r.n, target(r), "yes" if r.met else "**no**") for name, r in aimed]
        out.append(table(("part", "group", "measure", "value", "streams", "target", "met"), cells))
    for part in parts:
        groups = {name: [r for r in part.rows if r.group == name] for name in dict.fromkeys(r.group for r in part.rows)}
        wide = {name: rows for name, rows in groups.items() if [r.measure for r in rows] == list(toyeval.KEYS)}
        rest = [r for name, rows in groups.items() if name not in wide for r in rows]
        out.append(f"## {part.name}\n")
        if wide:
            head = (part.name, *toyeval.KEYS, "streams", "readings")
            out.append(table(head, [(name, *map(number, rows), rows[0].n, rows[0].readings) for name, rows in wide.items()]))
        if rest:
            out.append(table(("group", "measure", "value", "streams"), [(r.group, r.measure, number(r), r.n) for r in rest]))
    return "\n".join(out)


# ---- contact sheets ----------------------------------------------------------------------------------------------------------------------


def faults(seen, i, chunks):
    """What is wrong in the chunks that were read: "all right" or "wrong: shape in chunk 2, 3"."""
    wrong = {}
    for k in chunks:
        for key, right in toyeval.verdicts(toyeval.take(seen.readings[k], [i]), [seen.scenes[i]], k).items():
            if not right[0] and key not in ("four", "all"):
                wrong.setdefault(key, []).append(str(k))
    return "all right" if not wrong else "wrong: " + "; ".join(f"{key} in chunk {', '.join(at)}" for key, at in wrong.items())


def prompt_rows(seen):
    for i, clip in enumerate(seen.clips):
        yield clip, f"{i + 1}. {seen.scenes[i].captions[0]} [{faults(seen, i, sorted(seen.readings))}]"


def shot_rows(seen):
    for i, clip in enumerate(seen.clips):
        scene, found = seen.scenes[i], seen.cuts[i]
        begins = [0, *np.flatnonzero(scene.cut)]
        for s, (k, end) in enumerate(itertools.pairwise([*begins, len(scene.cut)])):
            start, stop = scene.span(k, end - 1)
            there = "" if s == 0 else ", cut on its frame" if any(abs(f - start) <= toyeval.NEAR for f in found) else ", CUT MISSED"
            yield clip[start:stop], f"{i + 1}, shot {s + 1}, chunk {k}{there}. {scene.captions[k]} [{faults(seen, i, range(k, end))}]"


def change_rows(seen):
    at = toyeval.CHANGE_AT
    for i, clip in enumerate(seen.clips):
        scene = seen.scenes[i]
        late = toyeval.verdicts(toyeval.take(seen.late[at], [i]), [scene], at)[scene.change[at]][0]
        start = scene.span(at - 1)[0]
        yield (
            clip[start:],
            f"{i + 1}. {scene.captions[at - 1]} -> {scene.captions[at]} [{scene.change[at]}: {'obeyed' if late else 'NOT obeyed'}]",
        )


def stream_rows(seen, most=16):
    """The chunks that were read, of streams with a fault first: in one of the four attributes, then in another."""
    told = [faults(seen, i, sorted(seen.readings)) for i in range(len(seen.clips))]
    rank = lambda i: 0 if any(f"{key} in chunk" in told[i] for key in toyeval.FOUR) else 1 if told[i] != "all right" else 2
    for i in sorted(range(len(told)), key=rank)[:most]:
        yield seen.clips[i], f"{i + 1}. {seen.scenes[i].captions[0]} [{told[i]}]"


SHEETS = {
    "adherence": ("prompts.png", prompt_rows, 8),
    "cuts": ("shots.png", shot_rows, 6),
    "change": ("changes.png", change_rows, 12),
    "image": ("images.png", prompt_rows, 8),
    "extension": ("extensions.png", prompt_rows, 8),
    "recache": ("recached.png", change_rows, 12),
    "endless": ("endless.png", stream_rows, 24),
    "mending": ("mended.png", prompt_rows, 12),
}


def write_sheet(part, folder):
    name, rows, columns = SHEETS[part.name]
    clips, captions = zip(*rows(part.seen))
    contact_sheet(clips, captions, folder / name, columns=columns, height=96)


# ---- comparison of settings --------------------------------------------------------------------------------------------------------------


def compare(players, n, seed):
    """Adherence of ``players`` (label -> player) on the same ``n`` prompts, chunks 1 and 2 and the first by itself, as one ``Part``."""
    scenes = toyeval.prompts(np.random.default_rng([seed, 7919, len(toyeval.PARTS)]), n, 3)
    rows, seconds, seen = [], {}, None
    for label, player in players.items():
        start = time.monotonic()
        seen = toyeval.observe(player, scenes, range(3))
        first, *later = [toyeval.verdicts(seen.readings[k], scenes, k) for k in range(3)]
        rows += [rate(label, key, toyeval.stack(later, key)) for key in toyeval.KEYS]
        rows += [rate(f"{label}, first chunk", key, first[key][:, None]) for key in toyeval.KEYS]
        seconds[label] = time.monotonic() - start
    return toyeval.Part("compare", rows, {"seconds, compilation included": seconds}, seen)


def settings_of(experiment, args):
    """The experiments of all combinations of the sampler settings given, by label."""
    given = {key: vars(args)[key] for key in SETTINGS if vars(args)[key]}
    combinations = [dict(zip(given, values)) for values in itertools.product(*given.values())]
    label = lambda c: ", ".join(f"{key} {value}" for key, value in c.items()) or "defaults"
    return {label(c): replace(experiment, sampler=replace(experiment.sampler, **c)) for c in combinations}


# ---- the program -------------------------------------------------------------------------------------------------------------------------


def values_of(kind):
    """A parser of "4,8"."""

    def values(text):
        return [kind(value) for value in text.split(",")]

    return values


def show(values):
    return ",".join(f"{value}" for value in values)


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    packaged = importlib.resources.files("longlive_jax.assets") / "toy"
    parser.add_argument("--bundle", default=str(packaged), help="folder of the model")
    parser.add_argument("--out", default="evaluation", help="folder for results and contact sheets")
    parser.add_argument("--parts", "--only", default=",".join(toyeval.PARTS), help=f"parts, with commas between, or all: {', '.join(PARTS)}")
    parser.add_argument("--n", type=int, default=512, help="prompts, images and extended videos; half as many changes, a quarter storyboards")
    parser.add_argument("--long", type=int, default=64, help="streams of the recall, drift and endless parts")
    parser.add_argument("--latents", type=int, default=1100, help="latent frames of a stream of the endless part")
    parser.add_argument("--compare_n", type=int, default=128, help="prompts a combination, where several settings are compared")
    parser.add_argument("--batch", type=int, default=64, help="videos made at once")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and noise")
    parser.add_argument("--truth", action="store_true", help="play rendered truth in place of the model")
    for key, kind in SETTINGS.items():
        parser.add_argument(
            f"--{key}", type=values_of(kind), default=[], help=f"sampler {key} in place of the bundle's; several values are compared"
        )
    args = parser.parse_args(argv)
    names = [name.strip() for name in args.parts.split(",") if name.strip()]
    args.parts = PARTS if names == ["all"] else toyeval.check_parts(names, PARTS)
    for name in ("n", "long", "compare_n", "batch"):
        require(vars(args)[name] >= 1, f"--{name}={vars(args)[name]} must be at least 1")
    return args


def judge(args, player):
    """Yields the parts asked for."""
    plain, more = ([name for name in args.parts if name in names] for names in (toyeval.PARTS, toymodes.MODES))
    yield from toyeval.evaluate(player, plain, n=args.n, long=args.long, seed=args.seed)
    yield from toymodes.evaluate(player, more, n=args.n, long=args.long, seed=args.seed, latents=args.latents)


def run(args, bundle):
    """Yields the parts as they are done; ``bundle``: what ``load_bundle`` gives, None for rendered truth."""
    if bundle is None:
        yield from judge(args, truth_player(args.batch))
        return
    experiment, *modules = bundle
    options = settings_of(experiment, args)
    player = lambda e, **more: model_player(e, *modules, batch=args.batch, seed=args.seed, **more)
    if len(options) > 1:
        yield compare({label: player(e, guided=True) for label, e in options.items()}, args.compare_n, args.seed)
        return
    (experiment,) = options.values()
    yield from judge(args, player(experiment))


def main(argv=None, bundle=None):
    """The evaluation; ``bundle`` in place of the folder's. Returns the list of ``toyeval.Part``."""
    args = arguments(argv)
    bundle = None if args.truth else bundle or load_bundle(args.bundle)
    folder = pathlib.Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {} if args.truth else {key: show(vars(args)[key] or [vars(bundle[0].sampler)[key]]) for key in SETTINGS}
    settings = {"model": "rendered truth" if args.truth else pathlib.Path(args.bundle).name, **chosen, "n": args.n, "long": args.long}
    settings |= {"batch": args.batch, "seed": args.seed}
    parts, seconds, start = [], {}, time.monotonic()
    for part in run(args, bundle):
        parts.append(part)
        seconds[part.name] = round(time.monotonic() - start, 1)
        start = time.monotonic()
        print(*(line(part.name, row) for row in part.rows), f"{part.name}: {seconds[part.name]} s", sep="\n", flush=True)
        if part.name in SHEETS:
            write_sheet(part, folder)
        record = {"provenance": provenance(), "settings": settings, "seconds": seconds}
        record["parts"] = {p.name: {"rows": [r._asdict() | {"met": r.met} for r in p.rows], "details": p.details} for p in parts}
        (folder / "results.json").write_text(json.dumps(plain(record), indent=1, ensure_ascii=False))
        (folder / "results.md").write_text(markdown(parts, "Evaluation", settings))
    return parts


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
