"""Make a video: prompts in, an mp4 that plays while it grows, a contact sheet and a record out.

    experiments/stream.py [--config=configs/stream.py:toy] [--prompts=FILE_OR_FOLDER] [--seconds=16] [--out=outputs/stream] [--dry-run]

Without ``--prompts`` the film of the README. The first run makes no download; Ctrl-C keeps everything made so far.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import importlib.resources
import logging
import pathlib
import platform
import re
import signal
import sys

import jax
from absl import app, flags
from ml_collections import config_flags

import longlive_jax
from longlive_jax.config import ConfigError, StreamJob, from_config_dict, replace, require, to_config_dict
from longlive_jax.data.prompts import read_storyboards, storyboard
from longlive_jax.data.toywords import PromptError
from longlive_jax.metrics import StreamMeter, clock_time, provenance
from longlive_jax.streaming.bundles import open_experiment, open_model, open_tokenizer
from longlive_jax.streaming.pictures import Album
from longlive_jax.streaming.writer import OutputError, VideoWriter, check_writable, write_record

HERE = pathlib.Path(__file__).resolve().parents[1]
FILM = importlib.resources.files("longlive_jax.assets").joinpath("prompts/toy.txt")

config_flags.DEFINE_config_file("config", str(HERE / "configs/stream.py:toy"), "What to run; --config.sampler.steps=4 and the like override.")
flags.DEFINE_string("prompts", None, "A prompt file (one shot a line), a folder of captions, or a folder of such folders.")
flags.DEFINE_float("seconds", None, "Length of the video; default: what the prompts say, else 16.")
flags.DEFINE_string("out", "outputs/stream", "Folder for NAME.mp4, NAME.png and NAME.json; with a batch, NAME-SEED.mp4 and so on.")
flags.DEFINE_string("cache", "~/.cache/longlive_jax", "Folder for compiled programs, so that the next start is quick; empty: none.")
flags.DEFINE_bool("dry_run", False, "Check everything, say what would be made, and stop before compiling.", short_name="n")
FLAGS = flags.FLAGS


def boards(experiment, path, seconds):
    """``[(name, Storyboard)]`` for the prompts at ``path``, or the README's film."""
    require(seconds is None or 0 < seconds < 1e9, f"--seconds={seconds} must be positive")
    chunks = None if seconds is None else experiment.chunks_for(seconds)
    if path is None:
        lines = FILM.read_text().splitlines()
        return [("film", storyboard(lines, chunks, cut_prefix=experiment.stream.cut_prefix, source="assets/prompts/toy.txt"))]
    read = lambda chunks: read_storyboards(path, chunks, cut_prefix=experiment.stream.cut_prefix)
    try:
        return read(chunks)
    except ConfigError:
        if chunks is not None:
            raise
        return read(experiment.chunks_for(16))  # no counts in the prompts


def make_video(session, name, board, out, job):
    """One storyboard to ``out/name.{mp4,png,json}``; what was made before a failure or Ctrl-C stays. Returns whether it is whole."""
    e = session.experiment
    names = [name] if job.batch == 1 else [f"{name}-{job.seed + b}" for b in range(job.batch)]
    files = {kind: [out / f"{n}.{kind}" for n in names] for kind in ("mp4", "png")} | {"json": [out / f"{name}.json"]}
    print(headline(e, name, board), flush=True)
    meter, albums = StreamMeter(board.chunks, e.video.fps), [Album() for _ in names]
    record = {"ending": "unfinished", "seed": job.seed, "prompts": list(board.prompts), "timings": {}, **provenance()}
    record |= {"config": dataclasses.asdict(job), "experiment": dataclasses.asdict(e)}
    write_record(files["json"][0], record)  # what a run that is killed leaves
    for old in files["png"]:
        old.unlink(missing_ok=True)
    starts = {shot.start: shot.prompt for shot in board.shots}
    size = {"fps": e.video.fps, "height": e.video.height, "width": e.video.width}
    try:
        with contextlib.ExitStack() as stack:
            writers = [stack.enter_context(VideoWriter(path, **size)) for path in files["mp4"]]
            for chunk in stack.enter_context(contextlib.closing(session.stream(board, seed=job.seed, batch=job.batch))):
                videos = chunk.frames[None] if job.batch == 1 else chunk.frames
                for writer, album, frames in zip(writers, albums, videos):
                    writer.write(frames)
                    album.add(frames, starts.get(chunk.index))
                meter.denoised(videos.shape[1], chunk.denoise_seconds)
                meter.delivered(videos.shape[1])
                print(f"  chunk {chunk.index + 1}/{board.chunks}{' cut' if chunk.cut else ''}: {summary(meter.report())}", flush=True)
        ending = "complete"
    except KeyboardInterrupt:
        ending = "interrupted"
    write_record(files["json"][0], record | {"ending": ending, "timings": meter.report()})
    for album, path in zip(albums, files["png"]):
        album.save(path)
    print(f"{ending}: {', '.join(str(f) for group in files.values() for f in group if f.exists())}", flush=True)
    return ending == "complete"


def headline(experiment, name, board):
    frames = experiment.pixel_frames(board.chunks * experiment.stream.chunk)
    return f"{name}: {board.chunks} chunks, {frames} frames, {frames / experiment.video.fps:.1f} s\n{board.describe()}"


def summary(report):
    """The progress line: rates without the first chunk, which compiles, as soon as there is a second."""
    steady = report | {name: report["steady_" + name] for name in ("denoise_fps", "end_to_end_fps") if "steady_" + name in report}
    names = {"chunks_per_second": "{:.2f} chunks/s", "denoise_fps": "denoise {:.1f} fps", "end_to_end_fps": "end to end {:.1f} fps"}
    names |= {"first_frame_seconds": "first frame after {:.1f} s"}
    parts = [text.format(steady[name]) for name, text in names.items() if name in steady]
    return ", ".join(parts + ([f"{clock_time(report['eta_seconds'])} to go"] if "eta_seconds" in report else []))


def parse(argv):
    """absl's flags, also written with dashes (``--dry-run``), with unknown config keys and presets as plain messages."""
    argv = [re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in argv]
    known = dotted(to_config_dict(StreamJob()))
    for word in argv:
        key = re.match(r"--?config\.([^=]+)", word)
        if key and key[1] not in known:
            near = difflib.get_close_matches(key[1], known, n=1)
            hint = f"did you mean config.{near[0]}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"unknown config key 'config.{key[1]}'; {hint}")
    try:
        return FLAGS(argv)
    except flags.Error as error:
        root = error
        while root.__context__ is not None:
            root = root.__context__
        if isinstance(root, ConfigError):  # from inside the config file
            raise root from None
        raise


def dotted(config, path=""):
    """The dotted names of a config's values."""
    return [n for k, v in config.items() for n in (dotted(v, f"{path}{k}.") if isinstance(v, type(config)) else [path + k])]


def use_cache(folder):
    """Keep compiled programs in ``folder``, apart for every processor, whose code another may not run. A cache set in JAX goes first."""
    if not folder or jax.config.jax_compilation_cache_dir:
        return
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else [platform.processor()]
    kind = "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    folder = pathlib.Path(folder).expanduser() / f"{platform.machine()}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}"
    try:
        check_writable(folder)
    except OutputError:
        return  # no cache, then: the video does not depend on it
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; options start with --")
    logging.getLogger("longlive_jax").setLevel(logging.INFO)
    job = from_config_dict(StreamJob, FLAGS.config)
    out = pathlib.Path(FLAGS.out)
    check_writable(next(p for p in (out, *out.absolute().parents) if p.exists()))
    own = {"sampler": job.sampler, "stream": job.stream, "mesh": job.mesh}
    experiment = replace(open_experiment(job.model), **own)
    todo = boards(experiment, FLAGS.prompts, FLAGS.seconds)
    session = longlive_jax.Session(open_model(job.model)._replace(experiment=experiment), tokenizer=open_tokenizer(job.model))
    session.check_batch(job.seed, job.batch)
    for _, board in todo:
        session.check(board)
    if FLAGS.dry_run:
        for name, board in todo:
            print(headline(experiment, name, board))
        sampler = experiment.sampler
        print(f"model {job.model}, {sampler.solver} {sampler.steps} steps, guidance {sampler.guidance}; dry run: nothing made")
        return
    check_writable(out)
    use_cache(FLAGS.cache)
    for name, board in todo:
        if not make_video(session, name, board, out, job):
            sys.exit(130)


def run():
    for number in (signal.SIGINT, signal.SIGTERM):  # the latter too ends a video in good order; the former also where a shell ignores it
        signal.signal(number, signal.default_int_handler)
    try:
        app.run(main, flags_parser=parse)
    except (ConfigError, OutputError, PromptError, flags.Error) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run()
