"""What experiments/stream.py can start from and make, on an untrained TINY model; many command lines in one process share programs."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from longlive_jax.config import TINY
from longlive_jax.streaming.writer import VideoWriter, probe, read_video
from tests import run_folder

ROOT = pathlib.Path(__file__).resolve().parents[1]
STAR, RING = "A red star bounces in a meadow.", "A blue ring stands still at night."
pytestmark = pytest.mark.slow

# Exit code or message, what was said, and how many programs there were, of every command line.
CHILD = """
import contextlib, io, json, os, sys
from absl.testing import flagsaver
from experiments import stream
from longlive_jax.streaming.programs import advance, decode_chunk, embed_prompts, encode_clip, encode_piece, take_in
out = []
for words in json.loads(sys.argv[1]):
    os.environ["JAX_PLATFORMS"], os.environ["CUDA_VISIBLE_DEVICES"] = ("", words.pop()) if "," in words[-1] else ("cpu", "")
    sys.argv = ["stream.py", *words]
    with flagsaver.flagsaver(), contextlib.redirect_stdout(io.StringIO()) as told, contextlib.redirect_stderr(told):
        try:
            stream.run()
            code = 0
        except SystemExit as end:
            code = end.code or 0
    compiled = sum(f._cache_size() for f in (advance, decode_chunk, embed_prompts, encode_clip, encode_piece, take_in))
    out.append([code, told.getvalue(), compiled])
print(json.dumps(out))
"""

REFUSED = {
    "--image=a.png --video=v.mp4": "image=a.png and video=v.mp4: a video starts from one of them; an image is a first frame, so leave",
    "--image=a.png --state=s.state": "image=a.png and state=s.state: a video starts from one of them",
    "--prompts=i2v --video=v.mp4": "image=i2v/images and video=v.mp4: a video starts from one of them",
    "--video=v.mp4 --latents": "--latents=True with --video: latents that go on from a video need its decoder; make a video",
    "--shows=star": "--shows='star' says what --video shows; give a video",
    "--rest": "--rest goes on where a state stopped; give --state",
    "--state=s.state --samples=2": "--state=s.state goes on with one batch of one prompt; 1 prompts with 2 samples are asked for",
    "--state=nowhere": "no saved state at nowhere; save one with --save_state or Session.save, or check the path",
    "--state=note.txt": "saved state note.txt cannot be read",
    "--image=nowhere.png": "image 'nowhere.png' does not exist; give a picture file",
    "--image=note.txt": "'note.txt' is not an image that can be read",
    "--prompts=story.txt --image=i2v/images": "i2v/images has no picture for story (1 of 1); name pictures like the prompts' files or folders",
    "--prompts=i2v/prompts --image=twice": "twice has 2 pictures for a; leave one",
    "--prompts=same": "same holds a text file and a folder of the name a; rename one, their videos would be one file",
    "--video=nowhere.mp4": "video 'nowhere.mp4' does not exist; give a video file",
    "--video=note.txt": "'note.txt' is not a video that can be read",
    "--video=short.mp4": "the video has 4 pixel frames and the first chunk takes 5 (each further one 8); give at least 5 frames",
    "--video=v.mp4 --shows=dragon": "unknown word 'dragon'",
    "--samples=3 --config.batch=2": "samples=3 is not a positive multiple of batch=2, which runs together; use 4",
    "--samples=0": "samples=0 is not a positive multiple of batch=1, which runs together; use 1",
    "--shard=2/2": "shard='2/2' must be PART/PARTS with parts counted from 0, e.g. 0/4 to 3/4",
    "--workers=-1": "--workers=-1 must not be negative; 0 means one for every GPU",
    "--samples=4 --workers=3 0,1": "--workers=3 and 2 GPU(s) are visible; use --workers=0 for all of them",
    "--samples=4 --workers=0 --config.mesh.data=2 0,1": "--workers=2 gives every video one device, and the mesh has 2; use one or the other",
    "--samples=4 --workers=2 --config.mesh.seq=2": "--workers=2 gives every video one device, and the mesh has 2; use one or the other",
    "--config.vae_device=1": "vae_device=1 is not there: 1 device(s), counted from 0; use -1 for the one that denoises",
    "--config.vae_device=-2": "vae_device=-2 must be the number of a device, or -1 for the one that denoises",
    "--config.text_device=gpu": "text_device='gpu' must be 'device', 'host' or 'freed'",
    "--config.decoder=nowhere": "no model 'nowhere': It is neither a bundled model",
}  # fmt: skip
MADE = [
    "--prompts=story.txt --latents --out=whole --config.seed=5",
    "--prompts=first.txt --latents --out=parts --config.seed=5 --save_state",
    "--prompts=story.txt --latents --out=parts --state=parts/first.state --rest",
    "--prompts=story.txt --out=parts --state=parts/first.state",
    "--prompts=first.txt --latents --out=seeds --config.seed=5 --samples=2 --config.text_device=host",
    "--prompts=i2v --latents --out=image",
    "--prompts=i2v --latents --out=image",
    "--prompts=i2v --latents --out=image --config.seed=1",
    "--prompts=i2v --latents --out=half --shard=1/2",
    "--prompts=first.txt --video=v.mp4 --shows=first.txt --out=video --save_state --config.text_device=freed",
    "--prompts=story.txt --state=video/first.state --out=video",
    "--prompts=i2v/prompts --out=broken",
    "--prompts=first.txt --latents --out=parts --state=parts/first.state --rest",
    "--video=v.mp4 --dry-run --out=dry",
]


def lay_out(folder):
    """The files that the command lines name."""
    for name in ("i2v/prompts", "i2v/images", "twice", "same/a", "broken/a.mp4"):
        (folder / name).mkdir(parents=True)
    (folder / "note.txt").write_text("no picture")
    (folder / "story.txt").write_text(f"[2] {STAR}\n[1] {RING}\n")
    (folder / "first.txt").write_text(f"[2] {STAR}\n")
    save_file({"x": np.zeros(1)}, folder / "s.state")
    for name in ("i2v/prompts/a.txt", "i2v/prompts/b.txt", "same/a.txt"):
        (folder / name).write_text(f"[1] {STAR}\n[1] {RING}\n")
    (folder / "same/a/0.json").write_text(json.dumps({"caption": STAR}))
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 64, 3), np.uint8)
    for name, picture in zip(("i2v/images/a.png", "i2v/images/b.webp"), pictures):
        Image.fromarray(picture).save(folder / name)
    for name in ("a.png", "twice/a.png", "twice/a.jpg", "twice/b.png"):
        Image.fromarray(pictures[0]).save(folder / name)
    for name, frames in (("v.mp4", 7), ("short.mp4", 4)):
        with VideoWriter(folder / name, fps=24, height=32, width=64) as writer:
            writer.write(np.repeat(pictures[:1], frames, 0))


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """``(folder, {command line: [exit code or message, what was said, programs]})``; ``again`` is the line that is run twice."""
    folder = tmp_path_factory.mktemp("ways")
    lay_out(folder)
    lines = [line for line in (*REFUSED, *MADE)]
    words = [[f"--config={ROOT / 'configs/stream.py'}:tiny", *line.split()] for line in lines]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), **run_folder.QUICK}
    child = [sys.executable, "-c", CHILD, json.dumps(words)]
    done = subprocess.run(child, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    keys = [line if line not in lines[:i] else "again" for i, line in enumerate(lines)]
    return folder, dict(zip(keys, results, strict=True))


def test_refused_before_anything_is_compiled(ended):
    for line, words in REFUSED.items():
        code, told, compiled = ended[1][line]
        assert isinstance(code, str) and code.startswith("error: ") and words in code, (line, code)
        assert compiled == 0 and "Traceback" not in told, (line, told)
    assert not (ended[0] / "outputs").exists()


def latents(path):
    (x,) = load_file(path).values()
    assert x.dtype == np.float32 and x.shape[1:] == (*TINY.grid, TINY.transformer.channels)
    return x


def record(path):
    return json.loads(path.read_text())


def test_a_saved_state_goes_on_as_if_the_run_had_not_stopped(ended):
    folder, lines = ended
    assert all(lines[line][0] == 0 for line in MADE[:3]), [lines[line] for line in MADE[:3]]
    whole = latents(folder / "whole/story.safetensors")
    assert len(whole) == 3 * TINY.stream.chunk
    parts = [latents(folder / f"parts/{name}.safetensors") for name in ("first", "story-from-2")]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    after = record(folder / "parts/story-from-2.json")
    assert after["ending"] == "complete" and after["seed"] is None and after["begins"] == {"kind": "state", "file": "first.state", "shows": ""}
    assert len(after["prompts"]) == 1 and after["timings"]["pixel_frames"] == 8
    assert "was saved without the decoder's carry, so only --latents can go on from it" in lines[MADE[3]][0]
    assert "parts/first.state is at chunk 2 and the prompts end after 2; give more --seconds" in lines[MADE[12]][0]


def test_samples_are_the_videos_of_their_seeds(ended):
    folder, lines = ended
    first = latents(folder / "seeds/first-5.safetensors")
    np.testing.assert_allclose(first, latents(folder / "parts/first.safetensors"), atol=1e-4)
    assert np.abs(first - latents(folder / "seeds/first-6.safetensors")).max() > 0.1
    assert record(folder / "seeds/first-6.json")["seed"] == 6 and "2/2 first-6: 2 chunks" in lines[MADE[4]][1]


def test_pictures_named_like_the_prompts_are_first_frames(ended):
    folder, lines = ended
    assert "1/2 a: 2 chunks, 13 frames, 0.5 s, from image i2v/images/a.png" in lines[MADE[5]][1]
    a, b = (latents(folder / f"image/{name}.safetensors") for name in "ab")  # seed 1, made over what seed 0 had made
    assert np.abs(a[0] - b[0]).max() > 0.01
    np.testing.assert_array_equal(latents(folder / "half/b.safetensors")[0], b[0])  # another seed, the same picture
    assert np.abs(latents(folder / "half/b.safetensors")[1:] - b[1:]).max() > 0.1
    assert record(folder / "image/b.json")["begins"]["file"] == "b.webp" and not (folder / "half/a.json").exists()


def test_what_is_finished_is_passed_over(ended):
    """Under the same prompts, pictures and seed, of which every record holds a digest."""
    _, lines = ended
    told = [f"{i}/2 {name}: finished by an earlier run; --again makes it anew" for i, name in ((1, "a"), (2, "b"))]
    assert lines["again"][1].splitlines() == told
    assert "finished" not in lines[MADE[5]][1] + lines[MADE[7]][1]


def test_a_video_goes_on_and_is_the_beginning(ended):
    """The 5 of 7 frames that fill a chunk, and two chunks; saved, one more video, of three."""
    folder, lines = ended
    code, told, _ = lines[MADE[9]]
    assert code == 0 and "  5 given frames\n  chunk 1/2: " in told
    assert probe(folder / "video/first.mp4").frames == 5 + 2 * 8
    assert record(folder / "video/first.json")["begins"] == {"kind": "video", "file": "v.mp4", "shows": [STAR]}
    assert lines[MADE[10]][0] == 0 and len(read_video(folder / "video/story-from-3.mp4")) == 3 * 8
    code, told, _ = lines[MADE[13]]
    assert code == 0 and ", from video v.mp4\n" in told and "dry run: nothing made" in told and not (folder / "dry").exists()


def test_a_failure_is_said_and_the_others_go_on(ended):
    folder, lines = ended
    code, told, _ = lines[MADE[11]]
    assert code == "error: 1 of 2 failed: a; the same command makes what is missing"
    assert "error: a: video 'broken/a.mp4' cannot be opened for writing" in told
    assert probe(folder / "broken/b.mp4").frames == 13 and record(folder / "broken/a.json")["ending"] == "unfinished"
