"""Numbers out: metrics as JSON lines and on the console, stopwatches, progress, frame rates of a stream, provenance."""

import collections
import contextlib
import datetime
import importlib.metadata
import json
import math
import pathlib
import re
import subprocess
import sys
import time

import jax
import numpy as np

from longlive_jax.config import ConfigError, require


class NonFiniteError(ValueError):
    """A metric is NaN or infinite."""


def finite_or_raise(values, step):
    """Raise ``NonFiniteError`` naming every metric of ``values`` (name -> number or array) that is not finite at ``step``."""
    bad = {name: value for name, value in values.items() if not np.isfinite(np.asarray(value, dtype=np.float64)).all()}
    if bad:
        listed = ", ".join(f"{name}={show(np.asarray(value).tolist())}" for name, value in bad.items())
        raise NonFiniteError(
            f"step {step}: {listed} must be finite; resume from the last checkpoint with a lower learning rate, or look at the data"
        )


# ---- metrics files -------------------------------------------------------------------------------------------------------------------------

SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # JSON has no such numbers; written as strings


class MetricsWriter:
    """Appends one JSON object a line to ``path`` and prints it; every line is on its way to the disk before ``write`` returns.

    A last line torn by a crash is removed when the file is opened again. ``path`` None: console only. ``every``: print every n-th line.
    """

    def __init__(self, path=None, *, console=True, every=1):
        require(every >= 1, f"every={every} must be at least 1")
        self.console, self.every, self.lines, self.file = console, every, 0, None
        if path is not None:
            path = pathlib.Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "a+b", buffering=0)
            remove_torn_line(self.file)

    def write(self, step, values):
        """One line: ``step`` and the values (name -> number, string, array or a dict of these); jax arrays are fetched."""
        record = {"step": int(step), **plain(values)}
        if self.file is not None:
            self.file.write((json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode())
        if self.console and self.lines % self.every == 0:
            print(*(f"{name} {show(value)}" for name, value in record.items()), sep="  ", flush=True)
        self.lines += 1

    def close(self):
        if self.file is not None:
            self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close()


def remove_torn_line(file):
    """Cut an open file back to its last newline; a last line that is whole but for the newline gets it."""
    file.seek(0)
    head, newline, tail = file.read().rpartition(b"\n")
    if tail and parse(tail) is None:
        file.truncate(len(head) + len(newline))
    elif tail:
        file.write(b"\n")


def read_metrics(path):
    """The records of a metrics file, in order; a torn last line is left out. Raises ``ConfigError`` for a bad line before it."""
    path = pathlib.Path(path)
    require(path.is_file(), f"metrics {str(path)!r} do not exist; give the .jsonl file of a run")
    *lines, tail = path.read_bytes().split(b"\n")
    records = [parse(line) for line in lines]
    if None in records:
        number = records.index(None) + 1
        raise ConfigError(f"{path}, line {number}: not a JSON object; remove the line, or give the .jsonl file of a run")
    last = parse(tail)
    return records + ([last] if last is not None else [])


def parse(line):
    """The JSON object of a line, None where it holds none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return restore(record) if isinstance(record, dict) else None


def restore(value):
    if isinstance(value, dict):
        return {k: restore(v) for k, v in value.items()}
    if isinstance(value, list):
        return [restore(v) for v in value]
    return SPECIAL.get(value, value) if isinstance(value, str) else value


def plain(value):
    """``value`` as JSON types."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    array = np.asarray(value)
    return plain((array if array.dtype.kind in "biu" else array.astype(np.float64)).tolist())


def show(value):
    """A value for the console: four significant digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + " ".join(show(v) for v in value) + "]"
    return str(value)


# ---- time ----------------------------------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds and calls of named sections: ``with watch("decode"): ...``. Wait for the device inside, or the section ends too early."""

    def __init__(self, clock=time.perf_counter):
        self.clock, self.seconds, self.calls = clock, collections.Counter(), collections.Counter()

    @contextlib.contextmanager
    def __call__(self, name):
        start = self.clock()
        try:
            yield
        finally:
            self.seconds[name] += self.clock() - start
            self.calls[name] += 1

    def report(self):
        """Section -> seconds a call, for ``MetricsWriter``."""
        return {f"{name}_seconds": self.seconds[name] / self.calls[name] for name in self.seconds}

    def reset(self):
        self.seconds.clear()
        self.calls.clear()


class Progress:
    """Steps done, rate and time left: one line rewritten in place on a terminal, elsewhere a line every ``interval`` seconds.

    The rate is that of the last ``window`` updates, so that a first step that compiles is soon forgotten.
    """

    def __init__(self, total, label="", *, unit="step", stream=None, clock=time.monotonic, interval=30.0, window=20):
        require(total > 0, f"total={total} must be positive")
        self.total, self.label, self.unit, self.clock = total, label, unit, clock
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty()
        self.interval = 0.2 if self.live else interval
        self.done, self.width, self.shown = 0, 0, -math.inf
        self.start = clock()
        self.marks = collections.deque([(self.start, 0)], maxlen=window + 1)

    def update(self, count=1, note=""):
        """``count`` more are done; ``note`` is shown at the end of the line."""
        self.done += count
        now = self.clock()
        self.marks.append((now, self.done))
        if now - self.shown >= self.interval or self.done >= self.total:
            self.show(now, note)

    @property
    def rate(self):
        """Units a second; 0 before the first update."""
        (first, before), (last, after) = self.marks[0], self.marks[-1]
        return (after - before) / (last - first) if last > first else 0.0

    @property
    def eta(self):
        """Seconds left; None while the rate is unknown."""
        return max(0, self.total - self.done) / self.rate if self.rate else None

    def show(self, now, note):
        self.shown = now
        speed = f"{self.rate:.3g} {self.unit}s/s" if self.rate >= 1 or not self.rate else f"{1 / self.rate:.3g} s/{self.unit}"
        left = "" if self.eta is None else f", {clock_time(self.eta)} left"
        line = f"{self.label + ': ' if self.label else ''}{self.done}/{self.total}, {clock_time(now - self.start)}, {speed}{left}"
        line += f"  {note}" if note else ""
        if self.live:
            self.stream.write("\r" + line.ljust(self.width))
            self.width = len(line)
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    def close(self):
        """End the line, so that what follows starts on a new one."""
        if self.live and self.width:
            self.stream.write("\n")
            self.stream.flush()
            self.width = 0

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close()


def clock_time(seconds):
    """3725 -> '1:02:05'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class StreamMeter:
    """Frame rates of one streamed video; pure bookkeeping, told by the loop and by the sink.

    *Denoise FPS*: pixel frames over the seconds of the denoising loop, which the caller measures with the device waited for. *End-to-end FPS*:
    pixel frames on the host over the seconds since the meter was made, decoding and copies included. Pixel frames of one video; times the
    batch for all.
    """

    def __init__(self, chunks, fps, clock=time.perf_counter):
        self.chunks, self.fps, self.clock = chunks, fps, clock
        self.start = clock()
        self.denoised_frames, self.denoise_seconds = [], []  # one entry a chunk
        self.delivered_frames, self.delivered_at = [], []

    def denoised(self, pixel_frames, seconds):
        """A chunk of ``pixel_frames`` took ``seconds`` of denoising."""
        self.denoised_frames.append(pixel_frames)
        self.denoise_seconds.append(seconds)

    def delivered(self, pixel_frames):
        """A chunk of ``pixel_frames`` is on the host, now."""
        self.delivered_at.append(self.clock() - self.start)
        self.delivered_frames.append(pixel_frames)

    def report(self):
        """The figures so far, by name; those that have no reading yet are left out.

        ``steady_*`` leave the first chunk out, which compiles or warms up. ``eta_seconds`` goes by the steady rate.
        """
        out = {"chunks": len(self.delivered_at), "pixel_frames": sum(self.delivered_frames)}
        if sum(self.denoise_seconds):
            out["denoise_fps"] = sum(self.denoised_frames) / sum(self.denoise_seconds)
            out["chunk_seconds"] = float(np.median(self.denoise_seconds))
        if sum(self.denoise_seconds[1:]):
            out["steady_denoise_fps"] = sum(self.denoised_frames[1:]) / sum(self.denoise_seconds[1:])
        if self.delivered_at and self.delivered_at[-1] > 0:
            out["first_frame_seconds"] = self.delivered_at[0]
            out["end_to_end_fps"] = sum(self.delivered_frames) / self.delivered_at[-1]
            out["times_realtime"] = out["end_to_end_fps"] / self.fps
        if len(self.delivered_at) > 1 and self.delivered_at[-1] > self.delivered_at[0]:
            elapsed = self.delivered_at[-1] - self.delivered_at[0]
            rate = (len(self.delivered_at) - 1) / elapsed
            out["chunks_per_second"] = rate
            out["steady_end_to_end_fps"] = sum(self.delivered_frames[1:]) / elapsed
            out["eta_seconds"] = max(0, self.chunks - len(self.delivered_at)) / rate
        return out


# ---- provenance ----------------------------------------------------------------------------------------------------------------------------


def provenance(argv=None):
    """Where a number or a file comes from: versions, commit, devices, command line without this machine's folders, UTC time."""
    devices = jax.devices()
    return {
        "package": package_version(),
        "commit": commit(pathlib.Path(__file__).resolve()),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "platform": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
        "command": [without_folders(word) for word in (sys.argv if argv is None else argv)],
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def package_version():
    """The installed version; None where the package runs from a folder that was never installed."""
    try:
        return importlib.metadata.version("longlive-jax")
    except importlib.metadata.PackageNotFoundError:
        return None


def commit(file):
    """The git commit that holds ``file``, with '-dirty' where tracked files were changed; None outside a checkout or without git."""
    git = ["git", "-C", str(file.parent)]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", file.name], capture_output=True, check=False)
        if tracked.returncode:  # an installed copy inside somebody else's checkout must not take that one's commit
            return None
        found = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def without_folders(word):
    """A word of a command line with every absolute path cut to its last part."""
    return re.sub(r"""(^|[=,;\s"'(\[])/(?:[^/\s,;"'=]+/)*(?=[^/])""", r"\1", word)


__all__ = [
    "MetricsWriter", "NonFiniteError", "Progress", "Stopwatch", "StreamMeter", "clock_time", "finite_or_raise", "provenance", "read_metrics",
]  # fmt: skip
