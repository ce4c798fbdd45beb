"""Tasks of a command line: their names and seeds, what tells one request from another, and what a model cannot make."""

import dataclasses

import numpy as np
import pytest

from longlive_jax.config import TINY, ConfigError, StreamJob, replace
from longlive_jax.data.prompts import storyboard
from longlive_jax.streaming import jobs
from longlive_jax.streaming.bundles import random_bundle
from longlive_jax.streaming.session import Session
from longlive_jax.streaming.writer import VideoWriter

STAR, RING = "A red star bounces in a meadow.", "A blue ring stands still at night."
BOARD = storyboard([f"[2] {STAR}"])
JOB = StreamJob(model="random:tiny", seed=7, batch=2)


def test_samples_run_together_and_are_named_by_their_seeds():
    tasks = jobs.make_tasks([("a", BOARD), ("b", BOARD)], JOB, samples=4)
    assert [(t.title, t.names, t.seed) for t in tasks[:2]] == [("a-7", ("a-7", "a-8"), 7), ("a-9", ("a-9", "a-10"), 9)]
    assert [t.title for t in tasks[2:]] == ["b-7", "b-9"]
    (alone,) = jobs.make_tasks([("a", BOARD)], replace(JOB, batch=1))
    assert (alone.title, alone.names, alone.batch, alone.begins) == ("a", ("a",), 1, None)
    assert [jobs.one_shard(tasks, f"{i}/3") for i in range(3)] == [[tasks[0], tasks[3]], [tasks[1]], [tasks[2]]]


def test_a_request_is_another_where_the_pixels_may_be(tmp_path):
    """And the same where only the layout differs; contents of files count, not their names."""
    (task,) = jobs.make_tasks([("a", BOARD)], JOB)
    (tmp_path / "x.png").write_bytes(b"1")
    (tmp_path / "y.png").write_bytes(b"1")
    (tmp_path / "z.png").write_bytes(b"2")
    ask = lambda job=JOB, e=TINY, sample=0, **changes: jobs.request(dataclasses.replace(task, **changes), sample, job, e)
    with_image = [ask(image=tmp_path / f"{name}.png") for name in "xyz"]
    other = [
        ask(sample=1),
        ask(board=storyboard([f"[3] {STAR}"])),
        ask(latents=True),
        ask(replace(JOB, decoder="other")),
        ask(e=replace(TINY, sampler=replace(TINY.sampler, steps=3))),
        with_image[0],
        with_image[2],
        ask(video=tmp_path / "x.png"),
    ]
    assert len({ask(), *other}) == 1 + len(other) and with_image[0] == with_image[1]
    assert ask(replace(JOB, text_device="host")) == ask() == ask(seed=6, sample=1)


def test_what_a_model_without_a_vae_cannot_make(tmp_path):
    session = Session(random_bundle(TINY)._replace(vae=None))
    (task,) = jobs.make_tasks([("a", BOARD)], JOB)
    with pytest.raises(ConfigError, match="this model has no VAE, so it cannot make videos; ask for latents"):
        jobs.check_tasks(session, [task])
    jobs.check_tasks(session, [dataclasses.replace(task, latents=True)])
    with pytest.raises(ConfigError, match=r"this model has no VAE, so it cannot read a\.png; leave it out"):
        jobs.check_tasks(session, [dataclasses.replace(task, latents=True, image="a.png")])


def test_a_video_of_another_rate_is_said_and_one_of_several_shots_is_told_by_a_file(tmp_path, caplog):
    with VideoWriter(tmp_path / "v.mp4", fps=30, height=32, width=64) as writer:
        writer.write(np.zeros((5, 32, 64, 3), np.uint8))
    (task,) = jobs.make_tasks([("a", BOARD)], JOB, video=tmp_path / "v.mp4", shows=STAR)
    jobs.check_files(TINY, [task])
    (tmp_path / "cut.txt").write_text(f"{STAR}\n{RING}\n")
    with VideoWriter(tmp_path / "long.mp4", fps=24, height=32, width=64) as writer:
        writer.write(np.zeros((5 + 3 * 8, 32, 64, 3), np.uint8))
    assert jobs.read_shown(TINY, str(tmp_path / "cut.txt"), tmp_path / "long.mp4") == (STAR, STAR, TINY.stream.cut_prefix + RING, RING)
    for prompt in (STAR, STAR * 100):
        assert jobs.read_shown(TINY, prompt, tmp_path / "long.mp4") == prompt
    assert "v.mp4 has 30 frames a second; they are taken one by one and shown at 24" in caplog.text
