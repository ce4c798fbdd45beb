"""Make a video: prompts in, an mp4 that plays while it grows, a contact sheet and a record out.

    experiments/stream.py [--config=configs/stream.py:toy] [--prompts=FILE_OR_FOLDER] [--seconds=16] [--out=outputs/stream] [--dry-run]

Without ``--prompts`` the film of the README. The first run makes no download; Ctrl-C keeps everything made so far.
"""

import dataclasses
import importlib.resources
import logging
import pathlib
import sys

from absl import app, flags
from ml_collections import config_flags

import longlive_jax
from longlive_jax.config import ConfigError, StreamJob, from_config_dict, replace
from longlive_jax.data.prompts import read_storyboards, storyboard
from longlive_jax.data.toywords import PromptError
from longlive_jax.metrics import StreamMeter, provenance
from longlive_jax.streaming.bundles import open_model
from longlive_jax.streaming.pictures import Album
from longlive_jax.streaming.writer import OutputError, VideoWriter, check_writable, write_record

HERE = pathlib.Path(__file__).resolve().parents[1]
FILM = importlib.resources.files("longlive_jax.assets").joinpath("prompts/toy.txt")

config_flags.DEFINE_config_file("config", str(HERE / "configs/stream.py:toy"), "What to run; --config.sampler.steps=4 and the like override.")
flags.DEFINE_string("prompts", None, "A prompt file (one shot a line), a folder of captions, or a folder of such folders.")
flags.DEFINE_float("seconds", None, "Length of the video; default: what the prompts say, else 16.")
flags.DEFINE_string("out", "outputs/stream", "Folder for NAME.mp4, NAME.png and NAME.json.")
flags.DEFINE_bool("dry_run", False, "Check everything, say what would be made, and stop before compiling.", short_name="n")
FLAGS = flags.FLAGS


def boards(experiment, path, seconds):
    """``[(name, Storyboard)]`` for the prompts at ``path``, or the README's film."""
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


def make_video(session, name, board, seed, out, job):
    """One storyboard to ``out/name.{mp4,png,json}``; what was made before a failure or Ctrl-C stays. Returns whether it is whole."""
    e = session.experiment
    video, files = e.video, {kind: out / f"{name}.{kind}" for kind in ("mp4", "png", "json")}
    print(headline(e, name, board), flush=True)
    meter, album, ending = StreamMeter(board.chunks, video.fps), Album(), "complete"
    starts = {shot.start: shot.prompt for shot in board.shots}
    try:
        with VideoWriter(files["mp4"], fps=video.fps, height=video.height, width=video.width) as writer:
            for chunk in session.stream(board, seed=seed):
                writer.write(chunk.frames)
                meter.denoised(len(chunk.frames), chunk.denoise_seconds)
                meter.delivered(len(chunk.frames))
                album.add(chunk.frames, starts.get(chunk.index))
                print(f"  chunk {chunk.index + 1}/{board.chunks}{' cut' if chunk.cut else ''}: {summary(meter.report())}", flush=True)
    except KeyboardInterrupt:
        ending = "interrupted"
    record = {"ending": ending, "seed": seed, "prompts": list(board.prompts), "timings": meter.report(), **provenance()}
    write_record(files["json"], record | {"config": dataclasses.asdict(job), "experiment": dataclasses.asdict(e)})
    album.save(files["png"])
    print(f"{ending}: {', '.join(str(f) for f in files.values() if f.exists())}", flush=True)
    return ending == "complete"


def headline(experiment, name, board):
    frames = experiment.pixel_frames(board.chunks * experiment.stream.chunk)
    return f"{name}: {board.chunks} chunks, {frames} frames, {frames / experiment.video.fps:.1f} s\n{board.describe()}"


def summary(report):
    names = {"denoise_fps": "denoise {:.1f} fps", "end_to_end_fps": "end to end {:.1f} fps"}
    names |= {"first_frame_seconds": "first frame after {:.1f} s", "eta_seconds": "{:.0f} s to go"}
    return ", ".join(text.format(report[name]) for name, text in names.items() if name in report)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; options start with --")
    logging.getLogger("longlive_jax").setLevel(logging.INFO)
    job = from_config_dict(StreamJob, FLAGS.config)
    out = pathlib.Path(FLAGS.out)
    check_writable(out)
    bundle = open_model(job.model)
    experiment = replace(bundle.experiment, sampler=job.sampler, stream=job.stream, mesh=job.mesh)
    todo = boards(experiment, FLAGS.prompts, FLAGS.seconds)
    session = longlive_jax.Session(bundle._replace(experiment=experiment))
    for _, board in todo:
        session.check(board)
    if FLAGS.dry_run:
        for name, board in todo:
            print(headline(experiment, name, board))
        sampler = experiment.sampler
        print(f"model {job.model}, {sampler.solver} {sampler.steps} steps, guidance {sampler.guidance}; dry run: nothing made")
        return
    whole = [make_video(session, name, board, job.seed, out, job) for name, board in todo]
    if not all(whole):
        sys.exit(130)


def run():
    try:
        app.run(main)
    except (ConfigError, OutputError, PromptError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()
