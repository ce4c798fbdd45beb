"""Metrics files that survive a crash, progress, stopwatches, stream rates, provenance."""

import io
import json
import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import metrics
from longlive_jax.config import ConfigError
from longlive_jax.metrics import MetricsWriter, NonFiniteError, Progress, Stopwatch, StreamMeter, finite_or_raise, provenance, read_metrics


class Clock:
    """A clock that the test sets."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_lines_round_trip(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    values = {
        "loss": jnp.float32(0.5),
        "half": jnp.bfloat16(0.25),
        "count": np.int64(3),
        "ok": np.bool_(True),
        "rows": np.arange(3),
        "name": "Bär",
        "part": {"a": 1},
        "none": None,
    }
    with MetricsWriter(path, console=False) as writer:
        writer.write(1, values)
        writer.write(2, {"loss": math.nan, "top": -math.inf, "low": jnp.array([1.0, jnp.inf])})
    first, second = read_metrics(path)
    assert first == {
        "step": 1, "loss": 0.5, "half": 0.25, "count": 3, "ok": True, "rows": [0, 1, 2], "name": "Bär", "part": {"a": 1}, "none": None,
    }  # fmt: skip
    assert math.isnan(second["loss"]) and second["top"] == -math.inf and second["low"] == [1.0, math.inf]
    for line in path.read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_console_shows_every_nth_line_in_four_digits(capsys):
    with MetricsWriter(every=2) as writer:
        for step in range(3):
            writer.write(step, {"loss": 0.123456, "rows": [1.0, 2.5]})
    assert capsys.readouterr().out == "step 0  loss 0.1235  rows [1 2.5]\nstep 2  loss 0.1235  rows [1 2.5]\n"


def test_a_killed_process_loses_no_line(tmp_path):
    path = tmp_path / "m.jsonl"
    code = (
        "import os, signal, sys\nfrom longlive_jax.metrics import MetricsWriter\nw = MetricsWriter(sys.argv[1], console=False)\n"
        "for i in range(50): w.write(i, {'x': i})\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False, cwd=pathlib.Path(__file__).resolve().parents[1])
    assert [r["x"] for r in read_metrics(path)] == list(range(50))


@pytest.mark.parametrize(
    ("tail", "steps"),
    [(b'{"step": 2, "lo', [1, 3]), (b'{"step": 2}', [1, 2, 3]), (b"", [1, 3]), (b'{"step": 2, "a": "\xc3', [1, 3])],
)
def test_torn_last_line_is_left_out_and_repaired(tmp_path, tail, steps):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n' + tail)
    assert [r["step"] for r in read_metrics(path)] == steps[:-1]
    with MetricsWriter(path, console=False) as writer:
        writer.write(3, {})
    assert [r["step"] for r in read_metrics(path)] == steps


def test_reading_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"do not exist; give the \.jsonl file"):
        read_metrics(tmp_path / "no.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"step": 1}\n[2]\n{"step": 3}\n')
    with pytest.raises(ConfigError, match=r"bad\.jsonl, line 2: not a JSON object"):
        read_metrics(tmp_path / "bad.jsonl")
    with pytest.raises(ConfigError, match="every=0"):
        MetricsWriter(every=0)


def test_finite_or_raise_names_the_metrics_and_the_step():
    finite_or_raise({"loss": 1.0, "rows": jnp.zeros(3)}, 7)
    with pytest.raises(NonFiniteError, match=r"step 7: loss=nan, rows=\[0 inf\] must be finite; resume") as caught:
        finite_or_raise({"loss": jnp.nan, "fine": 2, "rows": jnp.array([0.0, jnp.inf])}, 7)
    assert "fine" not in str(caught.value)


def test_stopwatch_adds_sections_up():
    clock = Clock()
    watch = Stopwatch(clock)
    for seconds in (2, 4):
        with watch("decode"):
            clock.now += seconds
    with pytest.raises(KeyError), watch("write"):
        clock.now += 1
        raise KeyError
    assert watch.seconds == {"decode": 6, "write": 1} and watch.report() == {"decode_seconds": 3, "write_seconds": 1}
    watch.reset()
    assert watch.report() == {}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_lines_where_there_is_no_terminal():
    clock, stream = Clock(), io.StringIO()
    with Progress(8, "stream", unit="chunk", stream=stream, clock=clock, interval=30) as progress:
        for _ in range(8):
            clock.now += 10
            progress.update(note="x")
    assert stream.getvalue().splitlines() == [
        "stream: 1/8, 0:10, 10 s/chunk, 1:10 left  x",
        "stream: 4/8, 0:40, 10 s/chunk, 0:40 left  x",
        "stream: 7/8, 1:10, 10 s/chunk, 0:10 left  x",
        "stream: 8/8, 1:20, 10 s/chunk, 0:00 left  x",
    ]


def test_progress_in_place_on_a_terminal():
    clock, stream = Clock(), Terminal()
    with Progress(3, stream=stream, clock=clock) as progress:
        clock.now += 0.5
        progress.update(note="a long note")
        clock.now += 0.5
        progress.update()
    first, second = stream.getvalue().split("\r")[1:]
    assert first == "1/3, 0:00, 2 steps/s, 0:01 left  a long note"
    assert second == "2/3, 0:01, 2 steps/s, 0:00 left".ljust(len(first)) + "\n"  # the longer line before is painted over


def test_progress_forgets_a_slow_first_step():
    clock = Clock()
    progress = Progress(100, stream=io.StringIO(), clock=clock, window=4)
    assert progress.rate == 0 and progress.eta is None
    for seconds in (300, 1, 1, 1, 1):
        clock.now += seconds
        progress.update()
    assert progress.rate == 1 and progress.eta == 95


def test_progress_refuses_and_formats():
    with pytest.raises(ConfigError, match="total=0 must be positive"):
        Progress(0)
    assert [metrics.clock_time(s) for s in (0, 59.6, 3725)] == ["0:00", "1:00", "1:02:05"]


def test_stream_meter_figures():
    clock = Clock()
    meter = StreamMeter(chunks=5, fps=24, clock=clock)
    assert meter.report() == {"chunks": 0, "pixel_frames": 0}
    clock.now += 3
    meter.denoised(29, 2.0)
    meter.delivered(29)
    assert meter.report() == {
        "chunks": 1, "pixel_frames": 29, "denoise_fps": 14.5, "chunk_seconds": 2.0, "first_frame_seconds": 3.0,
        "end_to_end_fps": 29 / 3, "times_realtime": 29 / 3 / 24,
    }  # fmt: skip
    for _ in range(2):
        meter.denoised(32, 1.0)
        clock.now += 1.6
        meter.delivered(32)
    report = meter.report()
    assert report["denoise_fps"] == 93 / 4 and report["steady_denoise_fps"] == 32 and report["chunk_seconds"] == 1
    assert report["end_to_end_fps"] == pytest.approx(93 / 6.2) and report["steady_end_to_end_fps"] == pytest.approx(20)
    assert report["chunks_per_second"] == pytest.approx(1 / 1.6) and report["eta_seconds"] == pytest.approx(3.2)
    assert report["first_frame_seconds"] == 3


def test_provenance_says_what_ran(tmp_path):
    here = provenance(["/opt/bin/run.py", "--out=/data/x/video.mp4", "a/b", "and/or", "--p", "/data/p/", "gs://bucket/x"])
    assert here["command"] == ["run.py", "--out=video.mp4", "a/b", "and/or", "--p", "p/", "gs://bucket/x"]
    assert (here["jax"], here["platform"], here["devices"], here["processes"]) == (jax.__version__, "cpu", len(jax.devices()), 1)
    assert here["time"].endswith("+00:00") and {"package", "commit", "jaxlib", "device"} < set(here)
    assert "/" not in " ".join(provenance()["command"][:1])
    json.dumps(here)


def test_commit_is_that_of_the_checkout_which_holds_the_file(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t", *words], check=True, capture_output=True)

    file = tmp_path / "code.py"
    file.write_text("1")
    assert metrics.commit(file) is None  # no checkout
    git("init")
    (tmp_path / "other.py").write_text("1")
    git("add", "other.py")
    git("commit", "-m", "one")
    assert metrics.commit(file) is None  # a checkout that does not hold it
    git("add", "code.py")
    git("commit", "-m", "two")
    clean = metrics.commit(file)
    assert len(clean) == 40
    file.write_text("2")
    assert metrics.commit(file) == clean + "-dirty"
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert metrics.commit(file) is None  # no git


def test_version_is_none_where_not_installed(monkeypatch):
    def absent(name):
        raise metrics.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metrics.importlib.metadata, "version", absent)
    assert metrics.package_version() is None
