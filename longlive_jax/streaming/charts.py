"""Tables of numbers as pictures: one PNG, the size of a number as the colour of its cell."""

import io
import math

from PIL import Image, ImageDraw

from longlive_jax.config import require
from longlive_jax.streaming.pictures import font_for
from longlive_jax.streaming.writer import write_whole

COLOUR = (214, 96, 77)  # of the largest number; 0 and less are white


def grid_picture(path, title, rows, columns, cells, unit="%", cell=(96, 24)):
    """Write a PNG of ``cells``, (row, column) -> number, under ``title``; what is missing stays white. Raises ``ConfigError``, ``OutputError``.

    ``rows``, ``columns``: their names, in order. ``cell``: width and height of one in pixels.
    """
    require(rows and columns and cells, f"a picture of {len(rows)} rows, {len(columns)} columns and {len(cells)} numbers shows nothing")
    edge, (width, height) = 8, cell
    font = font_for(title, 13)
    left, top = 2 * edge + math.ceil(max(map(font.getlength, rows))), 2 * edge + 2 * height
    right = max(left + len(columns) * width, edge + math.ceil(font.getlength(title)))
    sheet = Image.new("RGB", (right + edge, top + len(rows) * height + edge), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((edge, edge), title, fill="black", font=font)
    for j, column in enumerate(columns):
        draw.text((left + j * width + 4, top - height), column, fill="black", font=font)
    most = max(max(cells.values()), 1e-9)
    for i, row in enumerate(rows):
        y = top + i * height
        draw.text((edge, y + 4), row, fill="black", font=font)
        for j, column in enumerate(columns):
            if (row, column) not in cells:
                continue
            value, x = cells[row, column], left + j * width
            depth = max(0.0, value / most)
            draw.rectangle((x, y, x + width - 2, y + height - 2), fill=tuple(round(255 - depth * (255 - c)) for c in COLOUR))
            draw.text((x + 4, y + 4), f"{value:.2f} {unit}", fill="black", font=font)
    png = io.BytesIO()
    sheet.save(png, format="PNG")
    write_whole(path, png.getvalue(), "picture")


__all__ = ["grid_picture"]
