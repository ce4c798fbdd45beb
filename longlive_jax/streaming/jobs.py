"""What a command asks for, as tasks: storyboards, what their videos start from, the names of their files, and which are finished.

A finished task is known by its records: they say ``complete`` and carry the same request, a digest of all that decides the pixels.
"""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
from dataclasses import dataclass

from longlive_jax.config import replace, require
from longlive_jax.data.prompts import Storyboard, caption_files, captions_folder, read_prompts, read_storyboards, sample_folders
from longlive_jax.streaming.bundles import open_model
from longlive_jax.streaming.extension import count_chunks
from longlive_jax.streaming.inputs import read_image
from longlive_jax.streaming.writer import probe

log = logging.getLogger("longlive_jax")
MOST = 10**6  # samples
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Task:
    """Videos of one storyboard that run together, one a sample; at most one of ``image``, ``video`` and ``state`` is what they start from."""

    title: str
    names: tuple[str, ...]  # of the files, one a sample, no suffix
    board: Storyboard
    seed: int  # of the first sample
    image: pathlib.Path | None = None
    video: pathlib.Path | None = None
    shows: str | tuple[str, ...] = ""  # what the video shows, one prompt or one a chunk
    state: pathlib.Path | None = None
    latents: bool = False

    @property
    def batch(self):
        return len(self.names)

    @property
    def begins(self):
        """``(kind, file)`` of what the videos start from, or None."""
        kinds = {"image": self.image, "video": self.video, "state": self.state}
        return next(((kind, path) for kind, path in kinds.items() if path is not None), None)


# ---- storyboards and pictures --------------------------------------------------------------------------------------------------------------


def read_boards(path, chunks=None, *, cut_prefix):
    """``[(name, Storyboard)]`` of a file, a folder of captions, or a folder of either; with two of one name, ``ConfigError``.

    A folder of text files is the public source's layout for images (spec/inference.md §8.3): a file a video, a line a shot.
    """
    path = pathlib.Path(path)
    folder = captions_folder(path) if path.is_dir() else path
    texts = [f for f in sorted(folder.glob("*.txt")) if f.name != "shot_durations.txt"] if path.is_dir() else []
    if not texts or caption_files(folder):
        return read_storyboards(path, chunks, cut_prefix=cut_prefix)
    boards = [(f.stem, read_prompts(f, chunks, cut_prefix=cut_prefix)) for f in texts]
    boards += read_storyboards(path, chunks, cut_prefix=cut_prefix) if sample_folders(folder) else []
    names = [name for name, _ in boards]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"{folder} holds a text file and a folder of the name {', '.join(twice)}; rename one, their videos would be one file")
    return sorted(boards, key=lambda pair: pair[0])


def image_layout(path):
    """``(prompts, images)`` of a folder that holds folders of these names, the public source's layout; else ``(path, None)``."""
    folder = pathlib.Path(path)
    both = folder / "prompts", folder / "images"
    return both if all(f.is_dir() for f in both) else (path, None)


def pictures(path, names):
    """Name -> image file: one file for all, or in a folder the one that is called like the prompts. Raises ``ConfigError``."""
    path = pathlib.Path(path)
    if not path.is_dir():
        return dict.fromkeys(names, path)
    found = {}
    for file in sorted(path.iterdir()):
        if file.suffix.lower() in PICTURES:
            found.setdefault(file.stem, []).append(file)
    missing = [name for name in names if name not in found]
    remedy = "name pictures like the prompts' files or folders, or give one file for all"
    require(not missing, f"{path} has no picture for {', '.join(missing[:5])} ({len(missing)} of {len(names)}); {remedy}")
    twice = [name for name in names if len(found[name]) > 1]
    require(not twice, f"{path} has {len(found[twice[0]])} pictures for {twice[0]}; leave one" if twice else "")
    return {name: found[name][0] for name in names}


def video_chunks(experiment, path):
    """``(chunks, VideoInfo)`` of a video that is to go on; refuses one that cannot be read or is shorter than a chunk."""
    found, chunk = probe(path), experiment.stream.chunk
    return count_chunks(found.frames, (experiment.pixel_frames(chunk), experiment.vae.time_stride * chunk)), found


def read_shown(experiment, text, video):
    """What a video shows: ``text`` itself, or one prompt a chunk where that is a file or a folder of prompts, cuts included."""
    if not os.path.exists(text):  # a long prompt is no name of a file, which pathlib would raise for
        return text
    return read_prompts(text, video_chunks(experiment, video)[0], cut_prefix=experiment.stream.cut_prefix).prompts


# ---- tasks ---------------------------------------------------------------------------------------------------------------------------------


def make_tasks(boards, job, *, samples=None, images=None, **start):
    """A ``Task`` for every storyboard and batch of samples; ``images``: name -> file; ``start``: further fields of all.

    Raises ``ConfigError`` for samples that are no whole batches.
    """
    samples = job.batch if samples is None else samples
    least = -(-max(samples, 1) // job.batch) * job.batch
    require(samples == least, f"samples={samples} is not a positive multiple of batch={job.batch}, which runs together; use {least}")
    require(samples <= MOST, f"samples={samples} of a prompt are more than {MOST}; give several commands other seeds")
    out = []
    for name, board in boards:
        for seed in range(job.seed, job.seed + samples, job.batch):
            names = (name,) if samples == 1 else tuple(f"{name}-{s}" for s in range(seed, seed + job.batch))
            title = name if samples == job.batch else f"{name}-{seed}"
            out.append(Task(title, names, board, seed, None if images is None else images[name], **start))
    return out


def one_shard(tasks, shard):
    """The tasks of part ``i/n`` (parts 0/n to (n-1)/n): every n-th one. Raises ``ConfigError``."""
    part, _, parts = shard.partition("/")
    ok = part.isdecimal() and parts.isdecimal() and int(part) < int(parts)
    require(ok, f"shard={shard!r} must be PART/PARTS with parts counted from 0, e.g. 0/4 to 3/4")
    return tasks[int(part) :: int(parts)]


def check_files(experiment, tasks):
    """Refuse pictures, videos and states that cannot be read, before weights are: reads every picture and counts the frames of videos."""
    e = experiment
    for path in dict.fromkeys(task.image for task in tasks if task.image is not None):
        read_image(path, e.video.height, e.video.width)
    for path in dict.fromkeys(task.video for task in tasks if task.video is not None):
        _, found = video_chunks(e, path)
        if abs(found.fps - e.video.fps) > 0.01:
            log.warning("%s has %.4g frames a second; they are taken one by one and shown at %d", path, found.fps, e.video.fps)
    for path in dict.fromkeys(task.state for task in tasks if task.state is not None):
        require(path.is_file(), f"no saved state at {path}; save one with --save_state or Session.save, or check the path")


def check_tasks(session, tasks):
    """Refuse what the model cannot make, before anything is compiled; reads every prompt."""
    vae = session.vae
    for task in tasks:
        session.check_batch(task.seed, task.batch)
        shown = [task.shows] if isinstance(task.shows, str) else task.shows
        session.check([prompt for prompt in (*task.board.prompts, *shown) if prompt])
        require(vae is not None or task.latents, "this model has no VAE, so it cannot make videos; ask for latents")
        if task.begins is not None and task.state is None:
            require(vae is not None, f"this model has no VAE, so it cannot read {task.begins[1]}; leave it out")
            vae.check_encoder()


# ---- what is finished ----------------------------------------------------------------------------------------------------------------------


def request(task, sample, job, experiment):
    """A digest of all that decides the pixels of a sample, contents of given files included. Layout on devices and batch do not."""
    told = dataclasses.asdict(experiment)
    told = {key: value for key, value in told.items() if key not in ("mesh", "seed")}
    told |= {"model": job.model, "decoder": job.decoder, "seed": task.seed + sample, "prompts": task.board.prompts, "latents": task.latents}
    if task.begins is not None:
        kind, path = task.begins
        told |= {"begins": kind, "shows": task.shows, "contents": digest(path)}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_finished(out, task, requests):
    """Whether ``out`` holds all files of a task, under records that say so; ``requests``: of every sample."""
    suffix = "safetensors" if task.latents else "mp4"
    return all((out / f"{n}.{suffix}").is_file() and record_says(out / f"{n}.json", r) for n, r in zip(task.names, requests, strict=True))


def record_says(path, asked):
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("ending") == "complete" and record.get("request") == asked


# ---- models --------------------------------------------------------------------------------------------------------------------------------


def open_job(job):
    """The ``Bundle`` of a ``StreamJob``, under the job's sampler, stream and mesh."""
    bundle = open_model(job.model, decoder=job.decoder or None, text="device" if job.text_device == "device" else "host")
    return bundle._replace(experiment=replace(bundle.experiment, sampler=job.sampler, stream=job.stream, mesh=job.mesh))


__all__ = [
    "Task",
    "check_files",
    "check_tasks",
    "image_layout",
    "is_finished",
    "make_tasks",
    "one_shard",
    "open_job",
    "pictures",
    "read_boards",
    "read_shown",
    "request",
]
