"""The conversion table: what it maps, what it refuses, and that export returns the bits."""

import logging

import ml_dtypes
import numpy as np
import pytest

from longlive_jax.convert.table import TRANSFORMS, ConversionError, Row, convert, export, source_shape, target_shape

SOURCES = {
    "copy": (3, 4), "gamma4": (3, 1, 1, 1), "gamma3": (3, 1, 1), "table": (1, 6, 5), "conv5": (2, 3, 4, 5, 6), "conv4": (2, 3, 4, 5),
    "conv1x1_5": (2, 3, 1, 1, 1), "conv1x1_4": (2, 3, 1, 1), "patch": (5, 3, 1, 2, 4),
}  # fmt: skip
TARGETS = {
    "copy": (3, 4), "gamma4": (3,), "gamma3": (3,), "table": (6, 5), "conv5": (4, 5, 6, 3, 2), "conv4": (4, 5, 3, 2),
    "conv1x1_5": (2, 3), "conv1x1_4": (2, 3), "patch": (5, 24),
}  # fmt: skip


def bits(shape, dtype=np.float32):
    """Random bit patterns, NaNs included."""
    raw = np.random.default_rng(0).integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
    return raw.view(dtype)[..., 0]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("to", TRANSFORMS)
def test_every_transform_returns_the_bits(to, dtype):
    x = bits(SOURCES[to], dtype)
    table = [Row(r"a\.(\d+)\.w", r"x.\1.weight", to)]
    params = convert(table, {"a.7.w": x}, {"x.7.weight": np.empty(TARGETS[to])})
    assert params["x.7.weight"].shape == TARGETS[to] == target_shape(to, x.shape)
    back = export(table, params, {"a.7.w": x.shape})
    assert list(back) == ["a.7.w"] and back["a.7.w"].shape == x.shape and back["a.7.w"].dtype == x.dtype
    assert back["a.7.w"].tobytes() == x.tobytes()
    assert source_shape(to, TARGETS[to]) == (None if to == "patch" else x.shape)


def test_layouts():
    x = np.arange(5 * 3 * 2 * 4).reshape(5, 3, 1, 2, 4)
    y = convert([Row("w", "w", "patch")], {"w": x}, {"w": np.empty((5, 24))})["w"]
    assert y[1, (2 * 2 + 1) * 4 + 3] == x[1, 2, 0, 1, 3]  # channel-major
    k = np.arange(2 * 3 * 4 * 5 * 6).reshape(2, 3, 4, 5, 6)
    z = convert([Row("w", "w", "conv5")], {"w": k}, {"w": np.empty((4, 5, 6, 3, 2))})["w"]
    assert z[3, 4, 5, 2, 1] == k[1, 2, 3, 4, 5]


def test_names_go_both_ways():
    row = Row(r"(encoder|decoder)\.up\.(\d+)\.([qk])\.w", r"\1.\2.part_\3.again_\2")
    assert row.path("decoder.up.11.q.w") == "decoder.11.part_q.again_11"
    assert row.name("decoder.11.part_q.again_11") == "decoder.up.11.q.w"
    assert row.name("decoder.11.part_q.again_12") is None and row.name("decoder.11.part_v.again_11") is None
    assert row.path("decoder.up.11.q.weight") is None


def test_one_error_lists_everything():
    table = [Row(r"a\.(\d)", r"x.\1"), Row(r"b\.(\d)", r"x.\1", "gamma4"), Row(r"(a|c)\.9", r"y.\1")]
    tensors = {
        "a.0": np.ones(3),
        "b.0": np.ones((3, 1, 1, 1)),
        "a.1": np.ones(4),
        "b.2": np.ones(3),
        "a.9": np.ones(1),
        "odd": np.ones(1),
        "c.9": np.ones(1),
    }
    shapes = {f"x.{i}": np.empty(3) for i in range(4)}
    with pytest.raises(ConversionError) as error:
        convert(table, tensors, shapes)
    assert error.value.problems == {
        "targets given twice": ["x.0 by a.0 and b.0"],
        "wrong shapes": [
            "a.1 (4,) becomes (4,) by 'copy'; x.1 is (3,)",
            "b.2 (3,) does not suit 'gamma4'; x.2 is (3,)",
        ],
        "sources that several rows match": ["a.9 -> x.9 -> y.a"],
        "sources that no row matches": ["odd"],
        "sources whose target the model lacks": ["c.9 -> y.c"],
        "targets without a source": ["x.3"],
    }
    message = str(error.value)
    assert (
        "7 problems" in message
        and "wrong shapes (2):" in message
        and all(line in message for lines in error.value.problems.values() for line in lines)
    )


def test_long_lists_are_cut_in_the_message_only():
    with pytest.raises(ConversionError, match=r"no row matches \(100\)[\s\S]* and 60 more") as error:
        convert([], {f"n{i}": np.ones(1) for i in range(100)}, {})
    assert len(error.value.problems["sources that no row matches"]) == 100


def test_export_refuses():
    table = [Row("a", "x", "patch"), Row("b", "y"), Row("c", "y")]
    with pytest.raises(ConversionError) as error:
        export(table, {"x": np.ones((2, 3)), "y": np.ones(1), "z": np.ones(1)})
    assert error.value.problems == {
        "parameters whose foreign shape must be given": ["x -> a"],
        "parameters that several rows make": ["y"],
        "parameters that no row makes": ["z"],
    }
    with pytest.raises(ConversionError, match=r"a \(2, 5, 1, 1, 1\) becomes \(2, 5\) by 'patch'; x is \(2, 3\)"):
        export(table, {"x": np.ones((2, 3))}, {"a": (2, 5, 1, 1, 1)})


def test_ignored_needs_a_reason_and_no_row(caplog):
    tensors = {"a": np.ones(1), "rope.cos": np.ones(1), "rope.sin": np.ones(1)}
    with caplog.at_level(logging.INFO, "longlive_jax"):
        out = convert([Row("a", "x")], tensors, {"x": np.empty(1)}, ignored=[(r"rope\..*", "tables are computed")])
    assert list(out) == ["x"] and "2 tensors ignored: tables are computed" in caplog.text
    with pytest.raises(ConversionError, match="several rows match"):
        convert([Row("a", "x")], {"a": np.ones(1)}, {"x": np.empty(1)}, ignored=[("a", "both mapped and ignored")])


@pytest.mark.parametrize(
    "source, target, to, why",
    [
        ("a", "b", "transpose", "not a transform"),
        ("a.b", "b", "copy", "read backwards"),
        (r"(a(b))", r"\1", "copy", "read backwards"),
        (r"(?:a|b)", "x", "copy", "read backwards"),
        (r"(\d)", "x", "copy", "must use every group"),
        ("a", r"\1", "copy", "must use every group"),
    ],
)
def test_a_row_that_cannot_be_inverted_is_refused(source, target, to, why):
    with pytest.raises(ValueError, match=why):
        Row(source, target, to)


class Watched(dict):
    """A lazy mapping of arrays that records when values are read."""

    class Handle:
        def __init__(self, array, log):
            self.array, self.log, self.shape = array, log, array.shape

        def __array__(self, dtype=None, copy=None):
            self.log.append(len(self.array))
            return self.array

    def __init__(self, arrays, log):
        super().__init__({name: self.Handle(array, log) for name, array in arrays.items()})


def test_values_are_read_one_by_one_and_only_when_all_fits():
    reads, events = [], []
    lazy = Watched({"a": np.ones(1), "b": np.ones(2)}, reads)
    table = [Row("([abc])", r"\1")]
    with pytest.raises(ConversionError):
        convert(table, lazy, {"a": np.empty(1), "b": np.empty(3)})
    assert reads == []

    def place(path, x):
        events.append((path, tuple(reads), x.dtype))
        return path

    assert convert(table, lazy, {"b": np.empty(2), "a": np.empty(1)}, dtype=np.float16, place=place) == {
        "b": "b",
        "a": "a",
    }
    assert events == [("b", (2,), np.float16), ("a", (2, 1), np.float16)]
