"""Pictures and videos of any shape become frames of the session's size; what is cropped is said, what cannot be read is refused by name."""

import numpy as np
import pytest
from PIL import Image

from longlive_jax.config import ConfigError
from longlive_jax.streaming.inputs import read_frames, read_image
from longlive_jax.streaming.writer import VideoWriter


def bands(height, width):
    """Red, green and blue columns of equal width."""
    picture = np.zeros((height, width, 3), np.uint8)
    for i in range(3):
        picture[:, i * width // 3 : (i + 1) * width // 3, i] = 200
    return picture


def test_image_of_the_right_size_is_taken_as_it_is(tmp_path, caplog):
    picture = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_image(tmp_path / "p.png", 32, 64), picture)
    assert not caplog.records


def test_image_covers_the_frame_and_keeps_its_middle(tmp_path, caplog):
    Image.fromarray(bands(64, 192)).save(tmp_path / "wide.png")
    out = read_image(tmp_path / "wide.png", 32, 32)  # the middle third, at half size: green alone
    assert out.shape == (32, 32, 3) and out.dtype == np.uint8
    assert np.abs(out[:, 3:-3].astype(int) - [0, 200, 0]).max() == 0
    assert "wide.png is 64x192; for 32x32 64 pixels left and right are cropped, 67%" in caplog.text
    Image.fromarray(bands(64, 192).transpose(1, 0, 2)).convert("RGBA").save(tmp_path / "tall.png")
    np.testing.assert_array_equal(read_image(tmp_path / "tall.png", 32, 32), out.transpose(1, 0, 2))
    assert "for 32x32 64 pixels at top and bottom are cropped, 67%" in caplog.text
    caplog.clear()
    np.testing.assert_array_equal(read_image(tmp_path / "wide.png", 32, 32, say=False), out)
    assert not caplog.records


def test_photograph_is_turned_as_its_camera_says(tmp_path):
    picture = Image.fromarray(bands(64, 96))
    exif = picture.getexif()
    exif[0x0112] = 6  # a quarter turn
    picture.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png", 96, 64), np.rot90(bands(64, 96), -1))


def test_video_comes_frame_by_frame(tmp_path, caplog):
    path = tmp_path / "v.mp4"
    with VideoWriter(path, fps=24, height=64, width=192) as writer:
        writer.write(np.repeat(bands(64, 192)[None], 5, 0))
    frames = read_frames(path, 32, 32)
    first = next(frames)
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8
    assert np.abs(first[:, 4:-4].astype(int) - [0, 200, 0]).max() <= 12 and len(list(frames)) == 4
    assert "v.mp4 is 64x192; for 32x32 64 pixels left and right are cropped, 67%" in caplog.text


def test_what_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "note.txt").write_text("no picture")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    for name, message in (
        ("nowhere.png", "image .*nowhere.png' does not exist; give a picture file"),
        ("note.txt", "is not an image"),
        ("torn.png", "is not an image"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_image(tmp_path / name, 32, 32)
    for name, message in (("nowhere.mp4", "video .*nowhere.mp4' does not exist"), ("note.txt", "is not a video")):
        with pytest.raises(ConfigError, match=message):
            read_frames(tmp_path / name, 32, 32)
