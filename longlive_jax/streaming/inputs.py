"""Pictures and videos in: files to uint8 frames of a session's size, one by one."""

import logging
import pathlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from longlive_jax.config import ConfigError, require
from longlive_jax.streaming.writer import open_video, whole

log = logging.getLogger("longlive_jax")


def read_image(path, height, width, say=True):
    """The image file as uint8 RGB ``[height,width,3]``, scaled to cover that size; ``say`` logs what is cropped. Raises ``ConfigError``."""
    path = pathlib.Path(path)
    require(path.is_file(), f"image {str(path)!r} does not exist; give a picture file")
    try:
        with Image.open(path) as image:
            picture = ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ConfigError(f"{str(path)!r} is not an image that can be read ({error}); give a whole png, jpeg or webp file") from error
    if say:
        say_crop(path, picture.height, picture.width, height, width)
    return fit(picture, height, width)


def read_frames(path, height, width):
    """The frames of a video file one by one, each as ``read_image`` gives it; one frame is in memory at a time. Raises ``ConfigError``."""
    container = open_video(path)
    stream = container.streams.video[0]
    say_crop(path, stream.height, stream.width, height, width)
    return frames_of(container, height, width)


def frames_of(container, height, width):
    with container:
        for frame in whole(container.decode(video=0)):
            yield fit(frame.to_image(), height, width)


def cover(height, width, to_height, to_width):
    """The middle box ``(left, top, right, bottom)`` of a ``height`` x ``width`` picture that has the shape of the other size; floats."""
    scale = max(to_height / height, to_width / width)
    rows, columns = to_height / scale, to_width / scale
    left, top = (width - columns) / 2, (height - rows) / 2
    return left, top, left + columns, top + rows


def fit(picture, height, width):
    """A PIL picture as uint8 ``[height,width,3]``: its middle box, resized with an antialiasing filter."""
    box = cover(picture.height, picture.width, height, width)
    return np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS, box=box))


def say_crop(path, height, width, to_height, to_width):
    """A log line where a picture does not have the shape of the video."""
    left, top, right, bottom = cover(height, width, to_height, to_width)
    lost = 1 - (right - left) * (bottom - top) / (height * width)
    if lost > 1e-6:
        sides = f"{left:.0f} pixels left and right" if left > top else f"{top:.0f} pixels at top and bottom"
        log.warning("%s is %dx%d; for %dx%d %s are cropped, %.0f%%", path, height, width, to_height, to_width, sides, 100 * lost)


__all__ = ["read_frames", "read_image"]
