"""Video files: round trip, determinism, and what is left after kill -9, Ctrl-C and a full disk."""

import json
import pathlib
import re
import resource
import signal
import subprocess
import sys
import wave

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from longlive_jax.config import ConfigError
from longlive_jax.streaming.pictures import contact_sheet, fit_lines, font_for
from longlive_jax.streaming.writer import LatentsWriter, OutputError, VideoWriter, check_writable, probe, read_video, repair, write_record

SIZE = {"fps": 24, "height": 32, "width": 48}
CHUNKS = [29, *[32] * 4]


def numbered(start, count, height=32, width=48):
    """Frames that tell their number: grey value 40 + 8·(i mod 20), with a coloured stripe; uint8 [count,height,width,3]."""
    out = np.empty((count, height, width, 3), np.uint8)
    out[:] = (40 + 8 * (np.arange(start, start + count) % 20))[:, None, None, None]
    out[:, :, : width // 4] = (200, 60, 30)
    return out


def check_numbered(frames):
    grey = frames[:, 8:-8, 24:-4].astype(float).mean((1, 2, 3))
    assert np.abs(grey - (40 + 8 * (np.arange(len(frames)) % 20))).max() < 3


def write_all(path, counts):
    done = 0
    with VideoWriter(path, **SIZE) as writer:
        for count in counts:
            writer.write(numbered(done, count))
            done += count
    return done


def test_round_trip_keeps_frames_order_and_colour(tmp_path):
    total = write_all(tmp_path / "a.mp4", CHUNKS)
    frames = read_video(tmp_path / "a.mp4")
    assert frames.shape == (total, 32, 48, 3) and frames.dtype == np.uint8
    check_numbered(frames)
    assert np.abs(frames[:, :, 2:10].astype(int) - (200, 60, 30)).max() <= 4  # a wrong colour matrix is off by more than 10
    info = probe(tmp_path / "a.mp4")
    assert info == (total, 24.0, 32, 48, "h264") and info.seconds == total / 24
    assert (read_video(tmp_path / "a.mp4", 30, 40) == frames[30:40]).all()


def test_same_frames_same_bytes(tmp_path):
    write_all(tmp_path / "a.mp4", CHUNKS)
    write_all(tmp_path / "b.mp4", CHUNKS)
    write_all(tmp_path / "c.mp4", [1] * 7 + [sum(CHUNKS) - 7])
    first = (tmp_path / "a.mp4").read_bytes()
    assert (tmp_path / "b.mp4").read_bytes() == first and (tmp_path / "c.mp4").read_bytes() == first


CHILD = """
import signal, sys, numpy as np
signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background may have left it ignored
from longlive_jax.streaming.writer import VideoWriter
from tests.test_writer import SIZE, numbered
done = 0
with VideoWriter(sys.argv[1], **SIZE) as writer:
    while True:
        writer.write(numbered(done, 32 if done else 29))
        done += 32 if done else 29
        print(done, flush=True)
"""


def interrupted(path, signum, acknowledged=6):
    """Start a writer that never ends, send it ``signum`` after some chunks; the last frame count that it acknowledged."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    lines = [int(child.stdout.readline()) for _ in range(acknowledged)]
    child.send_signal(signum)
    rest, errors = child.communicate(timeout=60)
    return [*lines, *map(int, re.findall(r"\d+\n", rest))][-1], child.returncode, errors


ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_kill_9_loses_less_than_one_fragment(tmp_path):
    done, code, _ = interrupted(tmp_path / "a.mp4", signal.SIGKILL)
    assert code == -signal.SIGKILL
    frames = read_video(tmp_path / "a.mp4")
    assert len(frames) >= done - SIZE["fps"] > 100
    check_numbered(frames)
    assert repair(tmp_path / "a.mp4") == len(frames)


def test_ctrl_c_loses_nothing(tmp_path):
    done, code, errors = interrupted(tmp_path / "a.mp4", signal.SIGINT)
    assert code != 0 and "KeyboardInterrupt" in errors
    frames = read_video(tmp_path / "a.mp4")
    assert len(frames) >= done
    check_numbered(frames)


def test_exception_leaves_the_whole_video(tmp_path):
    with pytest.raises(RuntimeError, match="elsewhere"), VideoWriter(tmp_path / "a.mp4", **SIZE) as writer:
        writer.write(numbered(0, 40))
        raise RuntimeError("elsewhere")
    assert probe(tmp_path / "a.mp4").frames == 40


def test_failure_of_another_video_leaves_the_whole_video(tmp_path):
    with pytest.raises(OutputError, match="no such"), VideoWriter(tmp_path / "a.mp4", **SIZE) as writer:
        writer.write(numbered(0, 40))
        VideoWriter(tmp_path / "no such" / "b.mp4", **SIZE)
    assert probe(tmp_path / "a.mp4").frames == 40


LIMITED = """
import resource, sys, numpy as np
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
from longlive_jax.streaming.writer import OutputError, VideoWriter
rng = np.random.default_rng(0)
try:
    with VideoWriter(sys.argv[1], fps=24, height=64, width=96) as writer:
        for _ in range(40):
            writer.write(rng.integers(0, 256, (32, 64, 96, 3), np.uint8))
except OutputError as error:
    print(error)
"""


def test_full_file_system_keeps_whole_fragments_and_says_how_many(tmp_path):
    path = tmp_path / "a.mp4"
    told = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    kept = int(re.search(r"kept the first (\d+) frames", told)[1])
    assert "File too large after" in told and "free space or give another folder" in told
    assert kept > 0 and len(read_video(path)) == kept == probe(path).frames


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no /dev/full")
def test_full_disk():
    with pytest.raises(OutputError, match="cannot be opened for writing: No space left on device; give another path"):
        VideoWriter("/dev/full", **SIZE)


def test_disk_that_fills_up_in_the_last_fragment(tmp_path):
    """The error of ``close`` is reported like that of ``write``."""
    writer = VideoWriter(tmp_path / "a.mp4", **SIZE)
    writer.write(numbered(0, 30))

    class Full:
        def mux(self, packets):
            raise OSError(28, "No space left on device")

        def close(self):
            raise OSError(28, "No space left on device")

    container, writer.container = writer.container, Full()
    with pytest.raises(OutputError, match=r"No space left on device after 30 frames; kept the first 2[0-9] frames"):
        writer.close()
    writer.close()
    container.close()


def test_repair_cuts_a_torn_file_back(tmp_path):
    write_all(tmp_path / "a.mp4", CHUNKS)
    data = (tmp_path / "a.mp4").read_bytes()
    for end in np.linspace(0, len(data), 23).astype(int):
        (tmp_path / "b.mp4").write_bytes(data[:end])
        kept = repair(tmp_path / "b.mp4")
        if kept:
            frames = read_video(tmp_path / "b.mp4")
            assert len(frames) == kept
            check_numbered(frames)
    assert kept == sum(CHUNKS) and (tmp_path / "b.mp4").read_bytes() == data


def test_video_without_frames_leaves_no_file(tmp_path):
    VideoWriter(tmp_path / "a.mp4", **SIZE).close()
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 33}, "33x48: H.264 yuv420p needs an even height and width; use 34x48"),
        ({"width": 0}, "32x0"),
        ({"fps": 0}, "fps=0 must be positive"),
        ({"crf": 60}, "crf=60 must lie in"),
    ],
)
def test_settings_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        VideoWriter(tmp_path / "a.mp4", **{**SIZE, **change})
    assert not (tmp_path / "a.mp4").exists()


def test_frames_refused(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", **SIZE) as writer:
        with pytest.raises(ConfigError, match=r"float64\[2, 32, 48, 3\] given; this video takes uint8\[T, 32, 48, 3\]"):
            writer.write(np.zeros((2, 32, 48, 3)))
        with pytest.raises(ConfigError, match=r"uint8\[2, 48, 32, 3\]"):
            writer.write(np.zeros((2, 48, 32, 3), np.uint8))
        writer.write(numbered(0, 1))
    with pytest.raises(ConfigError, match="is closed after 1 frames"):
        writer.write(numbered(0, 1))


def test_missing_folder_and_unwritable_folder(tmp_path):
    with pytest.raises(OutputError, match=r"cannot be opened for writing: No such file or directory; give another path"):
        VideoWriter(tmp_path / "no" / "a.mp4", **SIZE)
    assert check_writable(tmp_path / "new" / "deep").is_dir() and not list((tmp_path / "new" / "deep").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot be written: .*; give another folder"):
        check_writable(tmp_path / "file")


def test_record_is_whole_or_untouched(tmp_path):
    write_record(tmp_path / "r.json", {"prompt": "ein Bär", "chunks": 3})
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8")) == {"prompt": "ein Bär", "chunks": 3}
    assert [f.name for f in tmp_path.iterdir()] == ["r.json"]
    with pytest.raises(OutputError, match=r"cannot be written: .*; what stood there before is unchanged"):
        write_record(tmp_path / "no" / "r.json", {})
    with pytest.raises(TypeError):
        write_record(tmp_path / "r.json", {"bad": object()})
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["chunks"] == 3


def test_reading_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not exist; give a video file"):
        read_video(tmp_path / "no.mp4")
    (tmp_path / "text.mp4").write_text("no video " * 100)
    with pytest.raises(ConfigError, match="is not a video that can be read"):
        probe(tmp_path / "text.mp4")
    write_all(tmp_path / "a.mp4", [5])
    with pytest.raises(ConfigError, match=r"holds no frame in 9\.\.end"):
        read_video(tmp_path / "a.mp4", 9)
    with wave.open(str(tmp_path / "a.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(8000))
    with pytest.raises(ConfigError, match="has no video stream"):
        probe(tmp_path / "a.wav")


# ---- contact sheets ------------------------------------------------------------------------------------------------------------------------


def test_contact_sheet_shows_even_times_of_every_row(tmp_path):
    rows = [numbered(0, 20), numbered(3, 4)]
    path = contact_sheet(rows, ["first", "second"], tmp_path / "sheet.png", columns=3, height=64)
    sheet = np.asarray(Image.open(path)).astype(int)
    assert sheet.shape[1] == 3 * 96 + 4 * 8
    middle = [8 + c * 104 + 60 for c in range(3)]
    found = [[sheet[y, x, 0] for x in middle] for y in sheet_rows(sheet)]
    assert found == [[40, 120, 192], [64, 80, 88]]  # frames 0, 10 (9.5), 19; and 3, 5 (4.5), 6


def sheet_rows(sheet):
    """The y of the middle of each row of thumbnails: runs of the stripe colour in the first column."""
    hit = np.flatnonzero(np.abs(sheet[:, 12] - (200, 60, 30)).max(-1) < 3)
    return [int(run[len(run) // 2]) for run in np.split(hit, np.flatnonzero(np.diff(hit) > 1) + 1)]


def test_captions_wrap_and_are_cut_with_an_ellipsis():
    font = font_for("word", 14)
    lines = fit_lines("word " * 200, font, 200, 3)
    assert len(lines) == 3 and lines[-1].endswith("…") and all(font.getlength(line) <= 200 for line in lines)
    assert fit_lines("one\n two", font, 200, 3) == ["one two"]
    unbroken = fit_lines("長" * 100, font, 200, 9)
    assert len(unbroken) > 1 and all(font.getlength(line) <= 200 for line in unbroken)


def test_contact_sheet_takes_any_script(tmp_path):
    for number, caption in enumerate(["Ein Bär – naïve", "Лес ночью", "北極熊在河邊", "🙂 fun", ""]):
        assert contact_sheet([numbered(0, 2)], [caption], tmp_path / f"{number}.png").is_file()


def test_contact_sheet_refuses(tmp_path):
    with pytest.raises(ConfigError, match="1 rows of frames and 2 captions"):
        contact_sheet([numbered(0, 2)], ["a", "b"], tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"row 0 holds uint8\[0, 32, 48, 3\]"):
        contact_sheet([numbered(0, 0)], ["a"], tmp_path / "a.png")
    with pytest.raises(OutputError, match=r"contact sheet .* cannot be written"):
        contact_sheet([numbered(0, 2)], ["a"], tmp_path / "no" / "a.png")


# ---- latents -------------------------------------------------------------------------------------------------------------------------------


def test_latents_are_a_whole_file_after_every_chunk_and_on_a_full_disk(tmp_path):
    z = np.arange(5 * 40 * 40 * 3, dtype=np.float32).reshape(5, 40, 40, 3)
    writer = LatentsWriter(tmp_path / "x.safetensors")
    for i in range(2):
        writer.write(z[2 * i : 2 * i + 2])
        np.testing.assert_array_equal(load_file(tmp_path / "x.safetensors")["latents"], z[: 2 * i + 2])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, before[1]))  # stands for the disk: a part of the next frame goes in
    try:
        with pytest.raises(OutputError, match="File too large; kept the first 4 frames; free space or give another folder"):
            writer.write(z[4:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    np.testing.assert_array_equal(load_file(tmp_path / "x.safetensors")["latents"], z[:4])
