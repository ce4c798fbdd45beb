"""Make videos: prompts in, mp4s that play while they grow, contact sheets and records out.

    experiments/stream.py [--config=configs/stream.py:toy] [--prompts=FILE_OR_FOLDER] [--seconds=16] [--out=outputs/stream] [--dry-run]
    experiments/stream.py --image=FILE_OR_FOLDER | --video=FILE | --state=FILE     what a video starts from
    experiments/stream.py --samples=4 | --latents | --save_state | --workers=0     how many, of what, and on how many GPUs

Without ``--prompts`` the film of the README. The first run makes no download; Ctrl-C keeps everything made so far. Of several videos those
that fail are named at the end, and those that an earlier run finished are passed over.
"""

import contextlib
import dataclasses
import difflib
import gc
import hashlib
import importlib.resources
import itertools
import logging
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

import longlive_jax
from longlive_jax.config import ConfigError, StreamJob, from_config_dict, replace, require, to_config_dict
from longlive_jax.data.prompts import storyboard
from longlive_jax.data.toywords import PromptError
from longlive_jax.metrics import StreamMeter, clock_time, provenance
from longlive_jax.streaming import jobs
from longlive_jax.streaming.bundles import folder_of, open_experiment, open_tokenizer
from longlive_jax.streaming.inputs import read_frames, read_image
from longlive_jax.streaming.pictures import Album
from longlive_jax.streaming.writer import LatentsWriter, OutputError, VideoWriter, check_writable, write_record

HERE = pathlib.Path(__file__).resolve().parents[1]
FILM = importlib.resources.files("longlive_jax.assets").joinpath("prompts/toy.txt")

config_flags.DEFINE_config_file("config", str(HERE / "configs/stream.py:toy"), "What to run; --config.sampler.steps=4 and the like override.")
flags.DEFINE_string("prompts", None, "A prompt file (one shot a line), a folder of captions, or a folder of such files or folders.")
flags.DEFINE_float("seconds", None, "Length of what is made; default: what the prompts say, else 16.")
flags.DEFINE_string("out", "outputs/stream", "Folder for NAME.mp4, NAME.png and NAME.json; of several samples NAME-SEED.mp4 and so on.")
flags.DEFINE_string("image", None, "The first frame: a picture for all prompts, or a folder of pictures named like the prompts.")
flags.DEFINE_string("video", None, "A video that goes on; it is the beginning of what is written.")
flags.DEFINE_string("shows", None, "What --video shows: a prompt, or a prompt file with its cuts; default: the first of the prompts.")
flags.DEFINE_string("state", None, "A state of --save_state that goes on; the prompts are those of the new chunks.")
flags.DEFINE_bool("rest", False, "With --state: the prompts are those of the whole video; go on where it stopped.")
flags.DEFINE_bool("save_state", False, "Also write NAME.state at the end, or when Ctrl-C stops the run after the chunks under way.")
flags.DEFINE_integer("samples", None, "Videos a prompt, from seeds seed, seed + 1, ..., config.batch at a time; default: config.batch.")
flags.DEFINE_bool("latents", False, "Write latents, NAME.safetensors [frames,h,w,C], and no video.")
flags.DEFINE_bool("again", False, "Make anew also what an earlier run finished.")
flags.DEFINE_integer("workers", 1, "Processes that share the videos, each on a GPU of its own; 0: one for every GPU.")
flags.DEFINE_string("shard", "0/1", "PART/PARTS of the videos, for several machines: 0/2 on one and 1/2 on the other.")
flags.DEFINE_string("claims", None, "Folder in which workers say what they make; set by --workers.")
flags.DEFINE_string("cache", "~/.cache/longlive_jax", "Folder for compiled programs, so that the next start is quick; empty: none.")
flags.DEFINE_bool("dry_run", False, "Check everything, say what would be made, and stop before compiling.", short_name="n")
FLAGS = flags.FLAGS


# ---- what is asked for ---------------------------------------------------------------------------------------------------------------------


def boards(experiment, path, seconds):
    """``[(name, Storyboard)]`` for the prompts at ``path``, or the README's film."""
    require(seconds is None or 0 < seconds < 1e7, f"--seconds={seconds} must be positive and less than 1e7")
    chunks = None if seconds is None else experiment.chunks_for(seconds)
    if path is None:
        lines = FILM.read_text().splitlines()
        return [("film", storyboard(lines, chunks, cut_prefix=experiment.stream.cut_prefix, source="assets/prompts/toy.txt"))]
    read = lambda chunks: jobs.read_boards(path, chunks, cut_prefix=experiment.stream.cut_prefix)
    try:
        return read(chunks)
    except ConfigError:
        if chunks is not None:
            raise
        return read(experiment.chunks_for(16))  # no counts in the prompts


def plan(job, experiment):
    """The tasks of the command line; reads prompts, no weights."""
    empty = [name for name in ("prompts", "image", "video", "state", "out") if FLAGS[name].value == ""]
    require(not empty, f"--{empty and empty[0]}= is empty; name a file or folder, or leave it out")
    prompts, images = (None, None) if FLAGS.prompts is None else jobs.image_layout(FLAGS.prompts)
    images = FLAGS.image or images
    starts = {"image": images, "video": FLAGS.video, "state": FLAGS.state}
    given = [f"{kind}={path}" for kind, path in starts.items() if path is not None]
    require(len(given) < 2, f"{' and '.join(given)}: a video starts from one of them; an image is a first frame, so leave out the others")
    require(not (FLAGS.video and FLAGS.latents), "--latents=True with --video: latents that go on from a video need its decoder; make a video")
    require(FLAGS.video is not None or FLAGS.shows is None, f"--shows={FLAGS.shows!r} says what --video shows; give a video")
    require(FLAGS.state is not None or not FLAGS.rest, "--rest goes on where a state stopped; give --state")
    todo = boards(experiment, prompts, FLAGS.seconds)
    samples = job.batch if FLAGS.samples is None else FLAGS.samples
    alone = FLAGS.state is None or (len(todo) == 1 and samples == job.batch)
    require(alone, f"--state={FLAGS.state} goes on with one batch of one prompt; {len(todo)} prompts with {samples} samples are asked for")
    found = None if images is None else jobs.pictures(images, [name for name, _ in todo])
    path = lambda name: None if name is None else pathlib.Path(name)
    tasks = jobs.make_tasks(todo, job, samples=samples, images=found, video=path(FLAGS.video), state=path(FLAGS.state), latents=FLAGS.latents)
    if FLAGS.video is not None:
        shows = FLAGS.shows and jobs.read_shown(experiment, FLAGS.shows, FLAGS.video)
        tasks = [replace(task, shows=shows or task.board.prompts[0]) for task in tasks]
    if job.decoder:
        folder_of(job.decoder)  # refuses what is no bundle
    return jobs.one_shard(tasks, FLAGS.shard)


def open_session(job):
    """The ``Session`` of the job; nothing is compiled."""
    there = jax.devices()
    number = job.vae_device
    require(number < len(there), f"vae_device={number} is not there: {len(there)} device(s), counted from 0; use -1 for the one that denoises")
    device = None if number < 0 else there[number]
    return longlive_jax.Session(jobs.open_job(job), tokenizer=open_tokenizer(job.model), vae_device=device, text_device=job.text_device)


def go_on(session, task):
    """``(task, (state, carry))`` where the task starts from a saved state: files are named after the chunk, so that no earlier part is lost."""
    point = session.load(task.state, task.batch)
    first = int(point[0].chunk)
    board = task.board
    if FLAGS.rest:
        require(first < board.chunks, f"{task.state} is at chunk {first} and the prompts end after {board.chunks}; give more --seconds")
        board = replace(board, prompts=board.prompts[first:])
    require(point[1] is not None or task.latents, f"{task.state} was saved without the decoder's carry, so only --latents can go on from it")
    rename = lambda name: f"{name}-from-{first}"
    return replace(task, title=rename(task.title), names=tuple(map(rename, task.names)), board=board), point


# ---- one task ------------------------------------------------------------------------------------------------------------------------------


def make(session, task, point, out, requests, job, stopped):
    """A task's files under ``out``; what was made before a failure or Ctrl-C stays. Returns whether they are whole."""
    e = session.experiment
    meter, albums = StreamMeter(task.board.chunks, e.video.fps), [] if task.latents else [Album() for _ in task.names]
    begins = None if task.begins is None else {"kind": task.begins[0], "file": task.begins[1].name, "shows": task.shows}
    record = {"ending": "unfinished", "begins": begins, "prompts": list(task.board.prompts), "timings": {}, **provenance()}
    record |= {"config": dataclasses.asdict(job), "experiment": dataclasses.asdict(e)}
    own = [{"seed": None if task.state else task.seed + b, "request": request} for b, request in enumerate(requests)]
    files = {kind: [out / f"{name}.{kind}" for name in task.names] for kind in ("safetensors" if task.latents else "mp4", "png", "json")}
    files |= {"state": [out / f"{task.names[0]}.state"]} if FLAGS.save_state else {}
    for path, fields in zip(files["json"], own):
        write_record(path, record | fields)  # what a run that is killed leaves
    for old in (*files["png"], *files.get("state", ())):
        old.unlink(missing_ok=True)
    ended = (lambda state, carry: session.save(files["state"][0], state, carry)) if FLAGS.save_state else None
    prompts = itertools.takewhile(lambda _: not stopped.is_set(), task.board.prompts)
    try:
        if session.text is not None:
            session.text.ahead(list(dict.fromkeys(task.board.prompts))[: session.text.keep])
        if task.latents:
            write_latents(session, task, prompts, point, files["safetensors"], meter, ended)
        else:
            write_videos(session, task, prompts, point, files["mp4"], albums, meter, ended)
        ending = "complete" if len(meter.delivered_at) == task.board.chunks else "interrupted"
    except KeyboardInterrupt:
        ending = "interrupted"
    for path, fields in zip(files["json"], own):
        write_record(path, record | fields | {"ending": ending, "timings": meter.report()})
    for album, path in zip(albums, files["png"]):
        album.save(path)
    print(f"{ending}: {', '.join(str(f) for group in files.values() for f in group if f.exists())}", flush=True)
    return ending == "complete"


def write_videos(session, task, prompts, point, paths, albums, meter, ended):
    """The chunks of ``prompts`` to mp4s, one a sample, after those of a given video; notes them in ``albums`` and ``meter``."""
    e, (state, carry) = session.experiment, point
    size = {"fps": e.video.fps, "height": e.video.height, "width": e.video.width}
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(VideoWriter(path, **size)) for path in paths]

        def show(videos, caption=None):
            for writer, album, frames in zip(writers, albums, videos, strict=True):
                writer.write(frames)
                album.add(frames, caption)

        if task.video is not None:
            told = ["given: " + (task.shows if isinstance(task.shows, str) else task.shows[0])]  # one row of the sheet
            shown = lambda frames: show([frames] * task.batch, told.pop() if told else None)
            frames = read_frames(task.video, e.video.height, e.video.width)
            state, carry = session.extend(frames, task.shows, seed=task.seed, batch=task.batch, shown=shown)
            print(f"  {writers[0].frames} given frames", flush=True)
        first = 0 if state is None else int(state.chunk)
        starts = {first + shot.start: shot.prompt for shot in task.board.shots}
        chunks = session.stream(prompts, **beginning(session, task, state, ended), carry=carry)
        for chunk in stack.enter_context(contextlib.closing(chunks)):
            videos = chunk.frames[None] if task.batch == 1 else chunk.frames
            show(videos, starts.get(chunk.index))
            note(meter, task, videos.shape[1], chunk.denoise_seconds, " cut" if np.any(chunk.cut) else "")


def write_latents(session, task, prompts, point, paths, meter, ended):
    """The latents of ``prompts``, float32 ``[frames,h,w,C]``, to one file a sample, chunk by chunk."""
    e, writers, began = session.experiment, [LatentsWriter(path) for path in paths], time.perf_counter()
    for index, z in session.stream_latents(prompts, **beginning(session, task, point[0], ended)):
        for writer, latents in zip(writers, np.asarray(z, np.float32), strict=True):
            writer.write(latents)
        frames = e.vae.time_stride * z.shape[1] - (e.vae.time_stride - 1 if index == 0 else 0)
        began, before = time.perf_counter(), began
        note(meter, task, frames, began - before)


def beginning(session, task, state, ended):
    """What ``Session.stream`` and ``stream_latents`` are told beside the prompts."""
    video = session.experiment.video
    image = None if task.image is None else read_image(task.image, video.height, video.width, say=False)  # said when it was checked
    return {"seed": task.seed, "batch": task.batch, "image": image, "state": state, "ended": ended}


def note(meter, task, frames, seconds, mark=""):
    """A chunk of so many pixel frames is there, after so many seconds of denoising."""
    meter.denoised(frames, seconds)
    meter.delivered(frames)
    print(f"  chunk {len(meter.delivered_at)}/{task.board.chunks}{mark}: {summary(meter.report())}", flush=True)


def headline(experiment, task):
    new = task.board.chunks * experiment.stream.chunk
    fresh = task.video is None and task.state is None
    frames = experiment.pixel_frames(new) if fresh else new * experiment.vae.time_stride
    begins = "" if task.begins is None else f", from {task.begins[0]} {task.begins[1]}"
    samples = "" if task.batch == 1 else f", {task.batch} samples"
    length = f"{task.board.chunks} chunks, {frames} frames, {frames / experiment.video.fps:.1f} s"
    return f"{task.title}: {length}{samples}{begins}\n{task.board.describe()}"


def summary(report):
    """The progress line: rates without the first chunk, which compiles, as soon as there is a second."""
    steady = report | {name: report["steady_" + name] for name in ("denoise_fps", "end_to_end_fps") if "steady_" + name in report}
    names = {"chunks_per_second": "{:.2f} chunks/s", "denoise_fps": "denoise {:.1f} fps", "end_to_end_fps": "end to end {:.1f} fps"}
    names |= {"first_frame_seconds": "first frame after {:.1f} s"}
    parts = [text.format(steady[name]) for name, text in names.items() if name in steady]
    return ", ".join(parts + ([f"{clock_time(report['eta_seconds'])} to go"] if "eta_seconds" in report else []))


# ---- the command line ----------------------------------------------------------------------------------------------------------------------


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


# ---- all tasks -----------------------------------------------------------------------------------------------------------------------------


def make_all(session, tasks, point, out, job, stopped):
    """Every task that is not finished. A failure is said and the others go on; with one task it is raised. Returns the exit code."""
    failed, several = [], len(tasks) > 1 or FLAGS.claims is not None or FLAGS.shard != "0/1"
    for number, task in enumerate(tasks, 1):
        place = f"{number}/{len(tasks)} " if several else ""
        requests = [jobs.request(task, b, job, session.experiment) for b in range(task.batch)]
        if FLAGS.claims is not None and not claimed(number):
            continue
        if several and not FLAGS.again and jobs.is_finished(out, task, requests):
            print(f"{place}{task.title}: finished by an earlier run; --again makes it anew", flush=True)
            continue
        print(place + headline(session.experiment, task), flush=True)
        try:
            if not make(session, task, point, out, requests, job, stopped):
                return 130
        except (ValueError, RuntimeError, OSError, MemoryError) as error:
            if not several:
                raise
            failed.append(task.title)
            if not isinstance(error, ConfigError | OutputError | PromptError):
                traceback.print_exc()
            print(f"error: {task.title}: {error}", file=sys.stderr, flush=True)
    return f"error: {len(failed)} of {len(tasks)} failed: {', '.join(failed)}; the same command makes what is missing" if failed else 0


def claimed(number):
    """Whether this worker is the first to ask for a task."""
    try:
        (pathlib.Path(FLAGS.claims) / str(number)).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def visible_gpus():
    """What CUDA_VISIBLE_DEVICES may name, without starting CUDA in this process."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(i) for i in range(listed.count("GPU "))]


def count_workers(tasks, mesh, gpus):
    """How many processes share the tasks."""
    count = FLAGS.workers
    require(count >= 0, f"--workers={count} must not be negative; 0 means one for every GPU")
    enough = count <= max(1, len(gpus)) or not gpus
    require(enough, f"--workers={count} and {len(gpus)} GPU(s) are visible; use --workers=0 for all of them")
    count = min(count or max(1, len(gpus)), len(tasks))
    devices = mesh.data * mesh.seq
    require(count < 2 or devices == 1, f"--workers={count} gives every video one device, and the mesh has {devices}; use one or the other")
    return count


def spread(count, gpus):
    """Run this command in ``count`` processes, each on its GPU (without any, all on the processor); returns the exit code.

    A worker takes the next video that none has taken, so all end at about the same time. Signals are passed on to each once.
    """
    with tempfile.TemporaryDirectory() as claims, contextlib.ExitStack() as stack:
        words = [sys.executable, *sys.argv, "--workers=1", f"--claims={claims}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        own = [{**os.environ, "CUDA_VISIBLE_DEVICES": gpus[i]} if gpus else {**os.environ} for i in range(count)]
        children = [stack.enter_context(subprocess.Popen(words, env=environment, **pipes)) for environment in own]
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: [child.send_signal(number) for child in children if child.poll() is None])

        def relay(i):
            for line in children[i].stdout:
                print(f"[{i}] {line}", end="", flush=True)

        readers = [threading.Thread(target=relay, args=(i,)) for i in range(count)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        codes = [child.wait() for child in children]
    if 130 in codes:
        return 130
    bad = [f"{i} (code {code})" for i, code in enumerate(codes) if code]
    return f"error: workers that did not end well: {', '.join(bad)}; the same command makes what is missing" if bad else 0


def stop_softly(stopped):
    """The first Ctrl-C lets the chunks under way end, so that the saved state is where the video is; the second stops at once."""

    def stop(*_):
        stopped.set()
        print("stopping after the chunks under way; once more stops at once", file=sys.stderr, flush=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; options start with --")
    logging.getLogger("longlive_jax").setLevel(logging.INFO)
    job = from_config_dict(StreamJob, FLAGS.config)
    out = pathlib.Path(FLAGS.out)
    check_writable(next(p for p in (out, *out.absolute().parents) if p.exists()))
    experiment = replace(open_experiment(job.model), sampler=job.sampler, stream=job.stream, mesh=job.mesh)
    tasks, gpus = plan(job, experiment), visible_gpus()
    workers = count_workers(tasks, job.mesh, gpus)
    if workers > 1 and not FLAGS.dry_run:
        sys.exit(spread(workers, gpus))
    jobs.check_files(experiment, tasks)
    session, point = open_session(job), (None, None)
    jobs.check_tasks(session, tasks)
    if FLAGS.state is not None:
        (task,) = tasks
        task, point = go_on(session, task)
        tasks = [task]
    if FLAGS.dry_run:
        for task in tasks:
            print(headline(experiment, task))
        sampler = experiment.sampler
        print(f"model {job.model}, {sampler.solver} {sampler.steps} steps, guidance {sampler.guidance}; dry run: nothing made")
        return
    check_writable(out)
    use_cache(FLAGS.cache)
    stopped = threading.Event()
    if FLAGS.save_state:
        stop_softly(stopped)
    code = make_all(session, tasks, point, out, job, stopped)
    if code:
        sys.exit(code)


def run():
    gc.freeze()  # what the imports made stays, so no collection need look at it
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
