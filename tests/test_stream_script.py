"""experiments/stream.py as a user runs it, on an untrained TINY model."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from longlive_jax.config import CUT_PREFIX, TINY
from longlive_jax.streaming.writer import probe, read_video
from tests import run_folder

ROOT = pathlib.Path(__file__).resolve().parents[1]
STAR, RING = "A red star bounces in a meadow.", "A blue ring stands still at night."
pytestmark = pytest.mark.slow


@pytest.fixture
def start(tmp_path):
    """Options -> the running script, in an empty folder; killed at the end of the test if it still runs. Without ``--cache`` runs share one."""
    children = []

    def begin(*options):
        settings = run_folder.PLAIN if any(word.startswith("--cache=") for word in options) else run_folder.QUICK
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), **settings}
        words = [sys.executable, str(ROOT / "experiments/stream.py"), "--config=" + str(ROOT / "configs/stream.py:tiny")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        children.append(subprocess.Popen([*words, *options], cwd=tmp_path, env=environment, **pipes))
        return children[-1]

    yield begin
    for child in children:
        child.kill()
        child.wait()


@pytest.fixture
def run(start):
    """Options -> what the script printed; it must end well."""

    def whole(*options):
        child = start(*options)
        out, errors = child.communicate(timeout=240)
        assert child.returncode == 0, errors
        return out

    return whole


def prompts_folder(path, captions, durations=None):
    path.mkdir(parents=True)
    for number, caption in enumerate(captions):
        (path / f"{number}.json").write_text(json.dumps({"caption": caption}))
    (path / "global.json").write_text(json.dumps({"caption": "not a shot"}))
    if durations:
        (path / "shot_durations.txt").write_text(durations)
    return path


def until(child, chunks):
    """Read what a running child prints up to that chunk."""
    for line in child.stdout:
        if f"chunk {chunks}/" in line:
            return
    raise AssertionError(child.stderr.read())


def reported(text):
    return max(map(int, re.findall(r"chunk (\d+)/", text)))


def test_folder_of_captions_to_video_sheet_and_record(run, tmp_path):
    prompts_folder(tmp_path / "story", [STAR, RING, STAR], "3 2 1")
    told = run("--prompts=story", "--out=out/deep", "--config.seed=7", "--config.sampler.steps=2")
    assert sorted(f.name for f in (tmp_path / "out/deep").iterdir()) == ["story.json", "story.mp4", "story.png"]
    info = probe(tmp_path / "out/deep/story.mp4")
    assert info == (TINY.pixel_frames(6 * TINY.stream.chunk), 24.0, 32, 64, "h264")
    record = json.loads((tmp_path / "out/deep/story.json").read_text())
    assert (record["ending"], record["seed"], record["config"]["seed"], record["config"]["model"]) == ("complete", 7, 7, "random:tiny")
    assert record["prompts"] == [STAR, STAR, STAR, CUT_PREFIX + RING, RING, CUT_PREFIX + STAR]
    assert record["experiment"]["stream"]["window"] == TINY.stream.window and record["platform"] == "cpu"
    timings = record["timings"]
    assert (timings["chunks"], timings["pixel_frames"]) == (6, info.frames)
    assert min(timings[k] for k in ("denoise_fps", "end_to_end_fps", "first_frame_seconds", "chunks_per_second")) > 0
    assert str(tmp_path) not in json.dumps(record)
    sheet = np.asarray(Image.open(tmp_path / "out/deep/story.png"))
    assert sheet.shape[0] > 3 * 128  # three rows
    lines = told.splitlines()
    assert lines[0] == "story: 6 chunks, 45 frames, 1.9 s" and lines[1] == f"chunks 0-2: {STAR}" and lines[2] == f"chunks 3-4: cut, {RING}"
    assert re.fullmatch(
        r"  chunk 4/6 cut: [\d.]+ chunks/s, denoise [\d.]+ fps, end to end [\d.]+ fps, first frame after [\d.]+ s, 0:\d\d to go", lines[7]
    )
    assert lines[-1] == "complete: out/deep/story.mp4, out/deep/story.png, out/deep/story.json"


def test_lines_seconds_and_several_videos(run, tmp_path):
    """A folder of storyboards without counts: every video has the asked length, shots share it."""
    for name in ("one", "two"):
        prompts_folder(tmp_path / "set" / name, [STAR, RING])
    run("--prompts=set", "--seconds=1.5", "--out=out")
    names = [f"{n}.{kind}" for n in ("one", "two") for kind in ("json", "mp4", "png")]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == names
    chunks = TINY.chunks_for(1.5)
    for name in ("one", "two"):
        assert probe(tmp_path / f"out/{name}.mp4").frames == TINY.pixel_frames(chunks * TINY.stream.chunk) >= 36
        prompts = json.loads((tmp_path / f"out/{name}.json").read_text())["prompts"]
        assert len(prompts) == chunks and prompts.index(CUT_PREFIX + RING) == (chunks + 1) // 2


def test_batch_makes_a_video_a_seed(run, tmp_path):
    (tmp_path / "story.txt").write_text(f"[2] {STAR}\n")
    run("--prompts=story.txt", "--out=out", "--config.seed=4", "--config.batch=2")
    names = [f"story-{seed}.{kind}" for seed in (4, 5) for kind in ("json", "mp4", "png")]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == names
    first, second = (read_video(tmp_path / f"out/story-{seed}.mp4") for seed in (4, 5))
    assert first.shape == second.shape == (13, 32, 64, 3) and np.abs(first.astype(int) - second).mean() > 1


def test_dry_run_makes_nothing(run, tmp_path):
    told = run("--dry-run", "--out=out/deep", "--cache=compiled", "--seconds=2")
    assert list(tmp_path.iterdir()) == []
    assert told.startswith("film: 7 chunks, 53 frames, 2.2 s\nchunks 0-2: A big red star")
    assert told.endswith("model random:tiny, unipc 2 steps, guidance 1.0; dry run: nothing made\n")


def test_second_start_finds_its_programs_and_a_seed_is_a_file(run, tmp_path):
    (tmp_path / "story.txt").write_text(f"[2] {STAR}\n+ [1] {RING}\n")
    run("--prompts=story.txt", "--out=a", "--cache=compiled", "--config.seed=1")
    kept = sorted((tmp_path / "compiled").rglob("*-cache"))
    assert any("advance" in f.name for f in kept) and any("decode_chunk" in f.name for f in kept)
    run("--prompts=story.txt", "--out=b", "--cache=compiled", "--config.seed=1")
    run("--prompts=story.txt", "--out=c", "--cache=compiled", "--config.seed=2")
    assert sorted((tmp_path / "compiled").rglob("*-cache")) == kept
    a, b, c = ((tmp_path / name / "story.mp4").read_bytes() for name in "abc")
    assert a == b and a != c
    assert json.loads((tmp_path / "a/story.json").read_text())["prompts"] == [STAR, STAR, RING]


def test_ctrl_c_keeps_every_reported_chunk_and_stops(start, tmp_path):
    for name in ("one", "two"):
        prompts_folder(tmp_path / "set" / name, [STAR, RING])
    child = start("--prompts=set", "--seconds=600", "--out=out")
    until(child, 12)
    child.send_signal(signal.SIGINT)
    rest, errors = child.communicate(timeout=60)
    assert child.returncode == 130 and "Traceback" not in errors
    chunks = max(12, reported(rest) if "chunk" in rest else 12)
    assert "interrupted: out/one.mp4, out/one.png, out/one.json" in rest and "two:" not in rest
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["one.json", "one.mp4", "one.png"]
    frames = read_video(tmp_path / "out/one.mp4")
    assert len(frames) >= TINY.pixel_frames(chunks * TINY.stream.chunk)
    record = json.loads((tmp_path / "out/one.json").read_text())
    assert record["ending"] == "interrupted" and record["timings"]["chunks"] == chunks


def test_workers_share_the_videos_and_save_where_they_are_stopped(start, tmp_path):
    """A signal reaches every worker once: chunks under way end, so that the state is where the video is. The third video is not begun."""
    for name in ("one", "two", "three"):
        prompts_folder(tmp_path / "set" / name, [STAR])
    child = start("--prompts=set", "--seconds=600", "--out=out", "--workers=2", "--save_state")
    seen = set()
    for line in child.stdout:
        seen |= {line[:3]} if "chunk 9/" in line else set()
        if seen == {"[0]", "[1]"}:
            break
    child.send_signal(signal.SIGTERM)
    rest, errors = child.communicate(timeout=60)
    assert child.returncode == 130 and "Traceback" not in errors + rest and "stopping after the chunks under way" in rest
    names = {f.name for f in (tmp_path / "out").iterdir()}
    made = sorted(name for name in ("one", "two", "three") if f"{name}.state" in names)
    assert len(made) == 2 and names == {f"{name}.{kind}" for name in made for kind in ("json", "mp4", "png", "state")}
    for name in made:
        record = json.loads((tmp_path / f"out/{name}.json").read_text())
        chunks = int(load_file(tmp_path / f"out/{name}.state")["['state'].chunk"])
        assert record["ending"] == "interrupted" and record["timings"]["chunks"] == chunks >= 9
        assert probe(tmp_path / f"out/{name}.mp4").frames == TINY.pixel_frames(chunks * TINY.stream.chunk)


def test_kill_9_keeps_all_but_the_last_second(start, tmp_path):
    child = start("--seconds=600", "--out=out")
    until(child, 12)
    child.kill()
    rest, _ = child.communicate(timeout=60)
    chunks = max(12, reported(rest) if "chunk" in rest else 12)
    frames = read_video(tmp_path / "out/film.mp4")
    assert len(frames) >= TINY.pixel_frames(chunks * TINY.stream.chunk) - TINY.video.fps > 60
    record = json.loads((tmp_path / "out/film.json").read_text())
    assert record["ending"] == "unfinished" and len(record["prompts"]) == TINY.chunks_for(600)


def test_a_bundle_opens_without_the_training_libraries():
    """Checkpoint and data libraries take a second to import; who only streams does not wait for them."""
    code = "import sys, longlive_jax; longlive_jax.load('toy'); print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "flax" in done.stdout and not {"orbax", "tensorstore", "grain"} & set(done.stdout.split())
