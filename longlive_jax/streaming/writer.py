"""Video files in and out: H.264 in a fragmented MP4 that plays up to its last complete fragment whatever happens to the process.

A fragment holds the frames from one keyframe to the next, at most a second; it goes to disk when the next keyframe is encoded. The encoder
looks at no later frame, so a killed process loses at most a second of what ``VideoWriter.write`` took; an exception or Ctrl-C loses nothing.
"""

import contextlib
import fractions
import json
import os
import pathlib
import tempfile
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from safetensors import SafetensorError

from longlive_jax.config import ConfigError, require

CONTAINER = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}
ENCODER = {"preset": "veryfast", "tune": "zerolatency", "threads": "2"}  # a fixed number of threads: the same bytes on every machine
BT709 = 1  # colour tag: without it players guess from the picture size


class OutputError(ValueError):
    """A file cannot be written; the message says what was kept and what to do."""


def check_writable(folder):
    """Create ``folder`` if need be and prove that a file can be written there, before anything is compiled. Raises ``OutputError``."""
    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise OutputError(f"output folder {str(folder)!r} cannot be written: {error.strerror}; give another folder") from error
    return folder


def write_record(path, record):
    """Write a dict as JSON, whole or not at all. Raises ``OutputError``."""
    write_whole(path, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode(), "record")


def write_whole(path, data, what):
    """Write bytes, whole or not at all. Raises ``OutputError``, which calls the file ``what``."""
    with whole_file(path, what) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def whole_file(path, what):
    """A temporary path for the block to write, renamed to ``path`` when it ends well. Raises ``OutputError``, which calls the file ``what``."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        remedy = "what stood there before is unchanged: free space or give another folder"
        raise OutputError(
            f"{what} {str(path)!r} cannot be written: {error.strerror if isinstance(error, OSError) else error}; {remedy}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


class LatentsWriter:
    """Appends latents ``[F,h,w,C]`` to a safetensors file (``latents``, float32), which is whole after every ``write``.

    Raises ``OutputError`` where the file cannot be written; what was written before is then kept.
    """

    HEADER = 256  # bytes, so that frames need not move when their number grows

    def __init__(self, path):
        self.path, self.frames, self.end = pathlib.Path(path), 0, self.HEADER

    def write(self, z):
        z = np.ascontiguousarray(z, np.float32)
        frames, end = self.frames + len(z), self.end + z.nbytes
        about = {"dtype": "F32", "shape": [frames, *z.shape[1:]], "data_offsets": [0, end - self.HEADER]}
        text = json.dumps({"latents": about}).encode().ljust(self.HEADER - 8)
        try:
            with open(self.path, "r+b" if self.frames else "wb", buffering=0) as file:
                try:
                    file.seek(self.end)
                    left = memoryview(z).cast("B")
                    while left:  # a disk that is almost full takes a part
                        left = left[file.write(left) :]
                    file.seek(0)
                    file.write(len(text).to_bytes(8, "little") + text)
                except OSError:
                    file.truncate(self.end if self.frames else 0)
                    raise
        except OSError as error:
            told = f"kept the first {self.frames} frames; free space or give another folder"
            raise OutputError(f"latents {str(self.path)!r} cannot be written: {error.strerror}; {told}") from error
        self.frames, self.end = frames, end


class VideoWriter:
    """Writes uint8 RGB frames [T,H,W,3] to one ``.mp4`` under its final name, from one thread at a time.

    The same frames give the same bytes, however they are split over calls. ``frames`` counts what was taken. Raises ``ConfigError`` for odd
    sizes or other frames than declared, ``OutputError`` where the file cannot be written; it is then cut back to its last complete fragment.
    """

    def __init__(self, path, *, fps, height, width, crf=18):
        require(
            height % 2 == 0 and width % 2 == 0 and min(height, width) > 0,
            f"video size {height}x{width}: H.264 yuv420p needs an even height and width; use {height + height % 2}x{width + width % 2}",
        )
        require(fps > 0, f"fps={fps} must be positive")
        require(0 <= crf <= 51, f"crf={crf} must lie in 0 (lossless) .. 51; 18 is visually lossless")
        self.path, self.height, self.width, self.frames = pathlib.Path(path), height, width, 0
        self.fps = fractions.Fraction(fps).limit_denominator(1001)
        self.container = av.open(str(path), "w", format="mp4", options=CONTAINER)
        self.stream = self.container.add_stream("libx264", rate=self.fps, options={**ENCODER, "crf": str(crf)})
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "yuv420p"
        codec = self.stream.codec_context
        codec.gop_size = max(1, round(self.fps))  # a keyframe, so a fragment, at least every second
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        codec.color_range = ColorRange.MPEG
        try:
            self.container.start_encoding()
        except OSError as error:
            raise OutputError(f"video {str(path)!r} cannot be opened for writing: {error.strerror}; give another path") from error
        self.closed = False

    def write(self, frames):
        """Append frames, uint8 [T,H,W,3] in RGB."""
        frames = np.asarray(frames)
        require(not self.closed, f"{str(self.path)!r} is closed after {self.frames} frames; open a new writer")
        require(
            frames.dtype == np.uint8 and frames.shape[1:] == (self.height, self.width, 3),
            f"frames of {frames.dtype}{list(frames.shape)} given; this video takes uint8[T, {self.height}, {self.width}, 3]",
        )
        try:
            for rgb in frames:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
                picture = picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
                picture.pts = self.frames
                self.container.mux(self.stream.encode(picture))
                self.frames += 1
        except OSError as error:
            self.fail(error)

    def close(self):
        """Write what the encoder and the last fragment hold, and end the file, or remove it if no frame came. A second call does nothing."""
        if self.closed:
            return
        self.closed = True
        try:
            if self.frames:
                self.container.mux(self.stream.encode(None))
            self.container.close()
        except OSError as error:
            self.fail(error)
        if not self.frames and self.path.is_file():
            self.path.unlink()

    def fail(self, error):
        self.closed = True
        try:
            self.container.close()
        except OSError:
            pass  # the disk that refused the frames refuses the trailer too
        kept = repair(self.path)
        told = f"kept the first {kept} frames ({kept / float(self.fps):.1f} s), which play" if kept else "no frame was kept"
        raise OutputError(
            f"video {str(self.path)!r}: {error.strerror} after {self.frames} frames; {told}; free space or give another folder"
        ) from error

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close()


def repair(path):
    """Cut a file that was torn in mid-fragment (full disk, power loss) back to its last complete one; returns the frames left."""
    path = pathlib.Path(path)
    if not path.is_file():
        return 0
    keep, playable, size = 0, False, path.stat().st_size
    with open(path, "r+b") as file:
        while len(head := file.read(8)) == 8:
            start, length, kind = file.tell() - 8, int.from_bytes(head[:4], "big"), head[4:]
            if length < 8 or start + length > size:
                break
            playable = playable or kind == b"mdat"
            if kind != b"moof":  # the index of a fragment counts only with the frames after it
                keep = start + length
            file.seek(start + length)
        if keep < size:
            file.truncate(keep)
    return probe(path).frames if playable else 0


# ---- reading -------------------------------------------------------------------------------------------------------------------------------


class VideoInfo(NamedTuple):
    frames: int
    fps: float
    height: int
    width: int
    codec: str

    @property
    def seconds(self):
        return self.frames / self.fps


def probe(path):
    """``VideoInfo`` of a file; frames are counted, not taken from a header that an unfinished file does not have. Raises ``ConfigError``."""
    with open_video(path) as container:
        stream = container.streams.video[0]
        frames = sum(packet.size > 0 and not packet.is_corrupt for packet in whole(container.demux(stream)))
        return VideoInfo(frames, float(stream.average_rate or stream.guessed_rate), stream.height, stream.width, stream.codec_context.name)


def read_video(path, start=0, stop=None):
    """Frames ``start`` to ``stop`` (None: all) as uint8 RGB [T,H,W,3]; an unfinished file gives what it holds. Raises ``ConfigError``."""
    frames = []
    with open_video(path) as container:
        for i, frame in enumerate(whole(container.decode(video=0))):
            if stop is not None and i >= stop:
                break
            if i >= start:
                frames.append(frame.to_ndarray(format="rgb24"))
    span = f"{start}..{'end' if stop is None else stop}"
    require(len(frames) > 0, f"video {str(path)!r} holds no frame in {span}; give a longer video or an earlier range")
    return np.stack(frames)


def open_video(path):
    require(pathlib.Path(path).is_file(), f"video {str(path)!r} does not exist; give a video file")
    try:
        container = av.open(str(path))
    except av.FFmpegError as error:
        hint = "give an mp4, mov, mkv or webm file, or repair() one torn by a crash"
        raise ConfigError(f"{str(path)!r} is not a video that can be read ({error.strerror}); {hint}") from error
    if not container.streams.video:
        container.close()
        raise ConfigError(f"{str(path)!r} has no video stream; give a video file")
    return container


def whole(items):
    """The items up to the torn end of an unfinished file."""
    try:
        yield from items
    except (av.error.InvalidDataError, av.error.EOFError):
        return


__all__ = [
    "LatentsWriter",
    "OutputError",
    "VideoInfo",
    "VideoWriter",
    "check_writable",
    "probe",
    "read_video",
    "repair",
    "whole_file",
    "write_record",
    "write_whole",
]
