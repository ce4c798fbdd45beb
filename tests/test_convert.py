"""The conversion table: what it maps, what it refuses, and that export returns the bits."""

import json
import logging

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from longlive_jax import tree
from longlive_jax.config import WAN_5B, TransformerConfig
from longlive_jax.convert import wan
from longlive_jax.convert.table import TRANSFORMS, ConversionError, Row, convert, export, source_shape, target_shape
from longlive_jax.convert.tensors import open_tensors
from longlive_jax.model.transformer import VideoTransformer
from tests.shared import golden

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


# ---- Wan and umT5 names --------------------------------------------------------------------------------------------------------------------

WB = ("weight", "bias")
ATTENTIONS = {"self_attn": "attn1", "cross_attn": "attn2"}
PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}


def transformer_names(layers):
    """(original, diffusers, ours) of every tensor, written out by hand from spec/names.md."""
    embed = "condition_embedder"
    rows = [(f"patch_embedding.{w}",) * 3 for w in WB]
    for kind in ("text", "time"):
        for old, linear, new in ((0, "linear_1", "up"), (2, "linear_2", "down")):
            rows += [(f"{kind}_embedding.{old}.{w}", f"{embed}.{kind}_embedder.{linear}.{w}", f"{kind}_embedding.{new}.{w}") for w in WB]
    rows += [(f"time_projection.1.{w}", f"{embed}.time_proj.{w}", f"time_projection.{w}") for w in WB]
    for i in range(layers):
        b = f"blocks.{i}"
        rows.append((f"{b}.modulation", f"{b}.scale_shift_table", f"{b}.modulation"))
        for o, d in ATTENTIONS.items():
            rows += [(f"{b}.{o}.{p}.{w}", f"{b}.{d}.{q}.{w}", f"{b}.{o}.{p}.{w}") for p, q in PROJECTIONS.items() for w in WB]
            rows += [(f"{b}.{o}.norm_{p}.weight", f"{b}.{d}.norm_{p}.weight", f"{b}.{o}.norm_{p}.weight") for p in "qk"]
        rows += [(f"{b}.norm3.{w}", f"{b}.norm2.{w}", f"{b}.norm3.{w}") for w in WB]
        rows += [(f"{b}.ffn.0.{w}", f"{b}.ffn.net.0.proj.{w}", f"{b}.ffn.up.{w}") for w in WB]
        rows += [(f"{b}.ffn.2.{w}", f"{b}.ffn.net.2.{w}", f"{b}.ffn.down.{w}") for w in WB]
    rows.append(("head.modulation", "scale_shift_table", "head.modulation"))
    return rows + [(f"head.head.{w}", f"proj_out.{w}", f"head.head.{w}") for w in WB]


def umt5_names(layers):
    rows = [("token_embedding.weight", "shared.weight", "token_embedding.weight")]
    for i in range(layers):
        o, a, f = f"blocks.{i}", f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        rows.append((f"{o}.norm1.weight", f"{a}.layer_norm.weight", f"{o}.norm1.weight"))
        rows += [(f"{o}.attn.{p}.weight", f"{a}.SelfAttention.{p}.weight", f"{o}.attn.{p}.weight") for p in "qkvo"]
        bias = f"{a}.SelfAttention.relative_attention_bias.weight"
        rows.append((f"{o}.pos_embedding.embedding.weight", bias, f"{o}.pos_embedding.weight"))
        rows.append((f"{o}.norm2.weight", f"{f}.layer_norm.weight", f"{o}.norm2.weight"))
        rows.append((f"{o}.ffn.gate.0.weight", f"{f}.DenseReluDense.wi_0.weight", f"{o}.ffn.gate.weight"))
        rows.append((f"{o}.ffn.fc1.weight", f"{f}.DenseReluDense.wi_1.weight", f"{o}.ffn.fc1.weight"))
        rows.append((f"{o}.ffn.fc2.weight", f"{f}.DenseReluDense.wo.weight", f"{o}.ffn.fc2.weight"))
    return [*rows, ("norm.weight", "encoder.final_layer_norm.weight", "norm.weight")]


@pytest.mark.parametrize(
    "names, count, tables",
    [
        (transformer_names(30), 825, (wan.TRANSFORMER_TABLE, wan.TRANSFORMER_TABLE_DIFFUSERS)),
        (umt5_names(24), 242, (wan.UMT5_TABLE, wan.UMT5_TABLE_DIFFUSERS)),
    ],
)
def test_every_published_name_has_one_row(names, count, tables):
    assert len(names) == count and len({ours for *_, ours in names}) == count
    for layout, table in enumerate(tables):
        assert len({row[layout] for row in names}) == count
        for row in names:
            paths = [path for path in (r.path(row[layout]) for r in table) if path]
            assert paths == [row[2]]
            assert [name for name in (r.name(row[2]) for r in table) if name] == [row[layout]]


def test_the_full_transformer_is_filled():
    module = tree.abstract(lambda: VideoTransformer(WAN_5B.transformer, rngs=nnx.Rngs(0)))
    assert tree.count(module) == 4_999_787_712
    assert set(tree.flat_params(module)) == {path for *_, path in transformer_names(30)}


def test_layouts_are_told_apart_by_their_names():
    original, diffusers, _ = zip(*transformer_names(1))
    assert wan.transformer_table(original) is wan.TRANSFORMER_TABLE
    assert wan.transformer_table(diffusers) is wan.TRANSFORMER_TABLE_DIFFUSERS
    original, hf, ours = zip(*umt5_names(1))
    assert wan.umt5_table(original) == (wan.UMT5_TABLE, ())
    table, ignored = wan.umt5_table(hf)
    extra = {name: np.ones(1) for name in ("encoder.embed_tokens.weight", "decoder.block.0.x", "lm_head.weight")}
    tensors = {name: np.full(1, i) for i, name in enumerate(hf)} | extra
    out = convert(table, tensors, {path: np.ones(1) for path in ours}, ignored)
    assert {path: int(x[0]) for path, x in out.items()} == {path: i for i, path in enumerate(ours)}


def test_a_golden_transformer_goes_in_and_comes_out():
    arrays = golden("dit_causal.npz")
    meta = json.loads(str(arrays["meta"]))
    config = TransformerConfig(
        meta["dim"], meta["ffn_dim"], meta["heads"], meta["layers"], meta["in_dim"], meta["text_dim"], meta["text_len"], meta["freq_dim"]
    )
    tensors = {name.removeprefix("weights/"): x for name, x in arrays.items() if name.startswith("weights/")}
    assert set(tensors) == {name for name, *_ in transformer_names(config.layers)}
    shapes = tree.flat_params(tree.abstract(lambda: VideoTransformer(config, rngs=nnx.Rngs(0))))
    params = convert(wan.TRANSFORMER_TABLE, tensors, shapes)
    back = export(wan.TRANSFORMER_TABLE, params, wan.transformer_shapes(config))
    assert set(back) == set(tensors)
    assert all(back[n].tobytes() == x.tobytes() and back[n].shape == x.shape for n, x in tensors.items())


def test_container_prefixes_are_stripped():
    tensors = {"model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.norm3.bias": 1, "model.model.x": 2, "head.head.bias": 3}
    assert dict(wan.strip_container(tensors)) == {"blocks.0.norm3.bias": 1, "model.x": 2, "head.head.bias": 3}
    assert dict(wan.strip_container({"model.diffusion_model.a": 1})) == {"a": 1}
    with pytest.raises(ValueError, match=r"'model\.a' and 'a' both become 'a'"):
        wan.strip_container({"model.a": 1, "a": 2})


# ---- files ---------------------------------------------------------------------------------------------------------------------------------


def some_tensors():
    kinds = (np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8, ml_dtypes.float8_e4m3fn)
    return {f"t.{np.dtype(kind).name}": bits((2, i + 1), kind) for i, kind in enumerate(kinds)} | {"scalar": np.array(3.5, np.float32)}


def same(tensors, arrays):
    assert set(tensors) == set(arrays) and len(tensors) == len(arrays)
    for name, x in arrays.items():
        assert tensors[name].shape == x.shape and tensors[name].dtype == x.dtype
        assert np.asarray(tensors[name]).tobytes() == x.tobytes()


def test_safetensors_file_and_folder(tmp_path):
    arrays = some_tensors()
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    same(open_tensors(tmp_path / "model.safetensors"), arrays)
    same(open_tensors(tmp_path), arrays)
    picked = open_tensors(str(tmp_path), prefix="t.")
    same(picked, {n.removeprefix("t."): x for n, x in arrays.items() if n.startswith("t.")})
    assert np.asarray(picked["float16"], np.float32).dtype == np.float32


def sharded(folder):
    arrays = some_tensors()
    places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(arrays)}
    for file in set(places.values()):
        save_file({n: x for n, x in arrays.items() if places[n] == file}, folder / file)
    (folder / "part.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return arrays, places


def test_sharded_folder(tmp_path):
    arrays, places = sharded(tmp_path)
    same(open_tensors(tmp_path), arrays)
    same(open_tensors(tmp_path / "part.safetensors.index.json"), arrays)
    (tmp_path / "part.safetensors.index.json").write_text(json.dumps({"weight_map": places | {"ghost": "part-0.safetensors"}}))
    with pytest.raises(ValueError, match=r"1 tensors that are not in their file: ghost in part-0\.safetensors"):
        open_tensors(tmp_path)
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 files of which 1 are missing: part-1\.safetensors"):
        open_tensors(tmp_path)


def test_npz(tmp_path):
    arrays = {"weights/a.b": np.ones((2, 3), np.float32), "x": np.arange(3)}
    np.savez(tmp_path / "all.npz", **arrays)
    same(open_tensors(tmp_path / "all.npz"), arrays)
    same(open_tensors(tmp_path / "all.npz", "weights/"), {"a.b": arrays["weights/a.b"]})
    with pytest.raises(KeyError, match="nothing"):
        open_tensors(tmp_path / "all.npz")["nothing"]
    (tmp_path / "cut.npz").write_bytes((tmp_path / "all.npz").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cut\.npz is not a whole npz"):
        open_tensors(tmp_path / "cut.npz")


def header(entry):
    text = json.dumps({"a": entry}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content, why",
    [
        (b"abc", "not a whole safetensors file"),
        ((100).to_bytes(8, "little") + b"{}", "header alone needs 108"),
        ((2).to_bytes(8, "little") + b"no", "not JSON"),
        (header({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}) + bytes(7), "truncated: .* tensor 'a' ends at"),
        (header({"dtype": "F32", "shape": [2], "data_offsets": [0, 7]}) + bytes(7), "has 7 bytes instead of 8"),
        (header({"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}) + bytes(8), "dtype C64; known are"),
    ],
)
def test_broken_files_are_refused(tmp_path, content, why):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=why):
        open_tensors(tmp_path)


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        open_tensors(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds 0 index files and 0"):
        open_tensors(tmp_path)
    (tmp_path / "x.bin").touch()
    with pytest.raises(ValueError, match=r"x\.bin has an unknown format"):
        open_tensors(tmp_path / "x.bin")
    np.savez(tmp_path / "x.npz", a=np.ones(1))
    with pytest.raises(ValueError, match=r"starts with 'weights/'; it has a"):
        open_tensors(tmp_path / "x.npz", "weights/")


@pytest.mark.parametrize("header", ["[]", '{"x": 3}', '{"x": {"dtype": "F32", "shape": [1]}}'])
def test_a_header_of_something_else_is_named(tmp_path, header):
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(ValueError, match=r"x\.safetensors is not a safetensors file: its header names no dtype"):
        open_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_torn_index_is_named(tmp_path, text):
    (tmp_path / "x.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.safetensors\.index\.json is no whole index of shards .*; copy it again"):
        open_tensors(tmp_path / "x.safetensors.index.json")
