"""Contact sheets: one PNG that shows a video shot by shot, each row under its prompt."""

import io
import pathlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from longlive_jax.config import require
from longlive_jax.streaming.writer import write_whole

GAP = 8  # pixels around thumbnails and captions
# Tried in this order for captions beyond ASCII, which is all that the font that comes with Pillow can draw.
FONTS = ("NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc", "Arial Unicode.ttf", "NotoSans-Regular.ttf", "DejaVuSans.ttf")


def contact_sheet(rows, captions, path, *, columns=6, height=128, lines=3):
    """Write a PNG with one row a shot (or chunk): its caption above ``columns`` thumbnails at even times from the first frame to the last.

    rows: sequence of uint8 [T,H,W,3], one a caption, e.g. ``np.split(video, first_frames_of_later_shots)``; a caption is wrapped and ends in an
    ellipsis after ``lines`` lines. height: of a thumbnail, pixels. Returns the path. Raises ``ConfigError``, ``OutputError``.
    """
    path = pathlib.Path(path)
    require(
        len(rows) == len(captions) > 0, f"{len(rows)} rows of frames and {len(captions)} captions given; give one caption a row, at least one"
    )
    for number, row in enumerate(rows):
        ok = row.dtype == np.uint8 and row.ndim == 4 and row.shape[-1] == 3 and min(row.shape) > 0
        require(ok, f"row {number} holds {row.dtype}{list(row.shape)}; give uint8[T, H, W, 3] with at least one frame")
    strips = [[thumbnail(row[i], height) for i in even_times(len(row), columns)] for row in rows]
    width = max(columns * (strip[0].width + GAP) for strip in strips) + GAP
    size = max(12, height // 9)
    fonts = [font_for(caption, size) for caption in captions]
    texts = [fit_lines(caption, font, width - 2 * GAP, lines) for caption, font in zip(captions, fonts)]
    line = round(size * 1.3)

    total = GAP + sum(len(text) * line + height + 2 * GAP for text in texts)
    sheet = Image.new("RGB", (width, total), "white")
    draw, y = ImageDraw.Draw(sheet), GAP
    for strip, text, font in zip(strips, texts, fonts):
        for words in text:
            draw.text((GAP, y), words, fill="black", font=font)
            y += line
        for column, picture in enumerate(strip):
            sheet.paste(picture, (GAP + column * (picture.width + GAP), y))
        y += height + 2 * GAP
    png = io.BytesIO()
    sheet.save(png, format="PNG")
    write_whole(path, png.getvalue(), "contact sheet")
    return path


class Album:
    """Collects the pictures of a contact sheet while a video streams, in bounded memory: at most ``rows`` shots, the start of each."""

    def __init__(self, columns=6, rows=16, chunks=4):
        self.columns, self.rows, self.chunks = columns, rows, chunks
        self.captions, self.shots = [], []

    def add(self, frames, caption=None):
        """Frames uint8 ``[T,H,W,3]`` of the next chunk; a ``caption`` starts a new row."""
        if caption is not None and len(self.shots) <= self.rows:
            self.captions.append(caption)
            self.shots.append([])
        if len(self.shots[-1]) < self.chunks:
            self.shots[-1].append(frames[:: max(1, len(frames) // self.columns)])

    def save(self, path):
        """Write the sheet; nothing if there is no picture."""
        if self.shots:
            shots = self.shots[: self.rows]
            contact_sheet([np.concatenate(s) for s in shots], self.captions[: len(shots)], path, columns=self.columns)


def even_times(frames, columns):
    """``columns`` frame numbers from first to last at even distances; fewer where there are fewer frames."""
    return np.unique(np.rint(np.linspace(0, frames - 1, columns)).astype(int))


def thumbnail(frame, height):
    """A PIL image of a uint8 frame [H,W,3], scaled to ``height``."""
    width = max(1, round(frame.shape[1] * height / frame.shape[0]))
    shrink = Image.Resampling.LANCZOS if height < frame.shape[0] else Image.Resampling.NEAREST
    return Image.fromarray(np.ascontiguousarray(frame)).resize((width, height), shrink)


def font_for(text, size):
    """A font that draws ``text``: Pillow's own for ASCII (the same picture on every machine), else the first of ``FONTS`` on this machine."""
    if not text.replace("…", "").isascii():
        for name in FONTS:
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
    return ImageFont.load_default(size)


def fit_lines(text, font, width, limit):
    """``text`` broken at spaces, or inside a word that is longer than a line, into at most ``limit`` lines of ``width`` pixels."""
    out, line = [], ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if font.getlength(joined) <= width:
            line = joined
            continue
        if line:
            out.append(line)
        while font.getlength(word) > width:
            n = next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            out.append(word[:n])
            word = word[n:]
        line = word
    out += [line] if line else []
    if len(out) > limit:
        last = out[limit - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        out = [*out[: limit - 1], last.rstrip() + "…"]
    return out


__all__ = ["contact_sheet"]
