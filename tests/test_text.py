"""The umT5 encoder against the reference, its sizes, its padding, and the tokenizer."""

import importlib
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax import tree
from longlive_jax.config import TINY, TOY, WAN_5B, ConfigError, TextConfig
from longlive_jax.convert.table import convert, export
from longlive_jax.convert.tensors import open_tensors
from longlive_jax.convert.wan import UMT5_TABLE
from longlive_jax.model.text import TextEncoder, Umt5Tokenizer, bucket_boundaries, encode_prompts, relative_buckets
from tests.shared import golden, shared


def golden_encoder():
    arrays = golden("umt5.npz")
    m = json.loads(str(arrays["meta"]))
    config = TextConfig(m["vocab"], m["dim"], m["dim_attn"], m["dim_ffn"], m["num_heads"], m["num_layers"], m["num_buckets"])
    module = tree.abstract(lambda: TextEncoder(config, rngs=nnx.Rngs(0)))
    tensors = open_tensors(shared("golden", "umt5.npz"), "weights/")
    return tree.with_params(module, convert(UMT5_TABLE, tensors, tree.flat_params(module))), arrays


def test_encoder_is_the_reference_encoder():
    encoder, arrays = golden_encoder()
    out = jax.jit(lambda e, i, m: e(i, m))(encoder, arrays["ids"], arrays["mask"])
    assert np.abs(out - arrays["out"]).max() <= 1e-4 * np.abs(arrays["out"]).max()
    np.testing.assert_allclose(out, arrays["out"], atol=1e-4)


def test_prompts_end_in_zero_rows():
    encoder, arrays = golden_encoder()
    ids, mask, out = (arrays[k] for k in ("ids", "mask", "out"))
    found = jax.jit(encode_prompts)(encoder, ids, mask)
    np.testing.assert_allclose(found, out * mask[..., None], atol=1e-4)
    assert 0 < mask.mean() < 1 and not np.asarray(found)[mask == 0].any()
    # What stands in the padding, and how much of it there is, changes nothing.
    longer, wider = np.pad(np.where(mask, ids, 5), ((0, 0), (0, 3)), constant_values=7), np.pad(mask, ((0, 0), (0, 3)))
    np.testing.assert_allclose(jax.jit(encode_prompts)(encoder, longer, wider)[:, : ids.shape[1]], found, atol=1e-5)


def test_export_returns_the_checkpoint():
    encoder, _ = golden_encoder()
    tensors = open_tensors(shared("golden", "umt5.npz"), "weights/")
    back = export(UMT5_TABLE, tree.flat_params(encoder))
    assert set(back) == set(tensors) and all(back[n].tobytes() == np.asarray(tensors[n]).tobytes() for n in tensors)


def test_full_size():
    module = tree.abstract(lambda: TextEncoder(WAN_5B.text, rngs=nnx.Rngs(0)))
    params = tree.flat_params(module)
    assert tree.count(module) == 5_680_910_336 and len(params) == 242
    names = [[row.name(path) for row in UMT5_TABLE if row.name(path)] for path in params]
    assert all(len(n) == 1 for n in names) and len({n[0] for n in names}) == 242


def test_bucket_boundaries():
    assert bucket_boundaries(32, 128) == (0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91)
    table = relative_buckets(512, 32, 128)
    assert table.shape == (512, 512) and table[100, 100] == 0
    for distance, bucket in ((1, 1), (7, 7), (11, 8), (12, 9), (15, 9), (16, 10), (90, 14), (91, 15), (128, 15), (400, 15)):
        assert table[500, 500 - distance] == bucket  # the key stands before the query
        assert table[0, distance] == bucket + 16
    # Away from the boundaries, where float rounding cannot matter, the formula itself.
    n = np.array([9, 10, 13, 20, 30, 40, 60, 80, 100])
    np.testing.assert_array_equal(table[n, 0], 8 + np.floor(np.log(n / 8) / np.log(16) * 8))


def test_a_fresh_encoder_is_well_scaled_and_trains():
    config = TextConfig(vocab=512, dim=64, attention_dim=96, ffn_dim=128, heads=4, layers=1)
    encoder = jax.jit(lambda: TextEncoder(config, rngs=nnx.Rngs(0)))()
    ids = np.random.default_rng(0).integers(0, config.vocab, (2, 16))
    mask = np.ones_like(ids)
    assert abs(np.std(encoder.token_embedding.weight[...]) - 1) < 0.05
    attention = encoder.blocks[0].attn
    x = np.random.default_rng(1).normal(size=(64, config.dim))
    q, k = ((x @ np.asarray(f.weight[...]).T).reshape(64, config.heads, -1) for f in (attention.q, attention.k))
    assert 0.7 < np.std(np.einsum("qhd,khd->hqk", q, k)) < 1.4

    def loss(encoder):
        return jnp.mean(encode_prompts(encoder, ids, mask) ** 2 * np.arange(config.dim))

    gradients = tree.flat_params(jax.jit(jax.grad(loss))(encoder))
    assert all(np.isfinite(g).all() and np.abs(g).max() > 1e-6 for g in map(np.asarray, gradients.values()))


def test_activations_follow_the_weights():
    ids = np.arange(6).reshape(2, 3)

    def out(dtype):
        return encode_prompts(tree.cast(TextEncoder(TINY.text, rngs=nnx.Rngs(0)), dtype), ids, np.ones_like(ids))

    for dtype in (jnp.bfloat16, jnp.float32):
        assert jax.eval_shape(lambda dtype=dtype: out(dtype)) == jax.ShapeDtypeStruct((2, 3, TINY.text.dim), dtype)


@pytest.mark.parametrize("buckets, distance, why", [(2, 128, "at least 4"), (32, 8, "more than a quarter")])
def test_impossible_buckets_are_refused(buckets, distance, why):
    with pytest.raises(ConfigError, match=why):
        relative_buckets(4, buckets, distance)


# ---- the tokenizer -------------------------------------------------------------------------------------------------------------------------

VOCABULARY = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "red": 4, "&": 5, "fox": 6}


class WordTokenizer:
    """What Umt5Tokenizer uses of ``tokenizers.Tokenizer``: words to ids, by a vocabulary in a JSON file."""

    @classmethod
    def from_file(cls, path):
        self = cls()
        with open(path) as file:
            self.vocabulary = json.load(file)
        return self

    def no_truncation(self):
        pass

    def no_padding(self):
        pass

    def token_to_id(self, token):
        return self.vocabulary.get(token)

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return types.SimpleNamespace(ids=[self.vocabulary.get(word, 2) for word in text.split(" ")] if text else [])


@pytest.fixture
def packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", types.SimpleNamespace(Tokenizer=WordTokenizer))
    monkeypatch.setitem(sys.modules, "ftfy", types.SimpleNamespace(fix_text=lambda text: text.replace("fÃ¶x", "fox")))


def test_tokenizer_cleans_cuts_and_pads(packages, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(VOCABULARY))
    tokenizer = Umt5Tokenizer(tmp_path, length=5)
    ids, mask = tokenizer(["  a\n red\t\u00a0&amp;amp;  ", "", "a a a a a a", "fÃ¶x"])
    np.testing.assert_array_equal(ids, [[3, 4, 5, 1, 0], [1, 0, 0, 0, 0], [3, 3, 3, 3, 1], [6, 1, 0, 0, 0]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    assert ids.dtype == mask.dtype == np.int32
    assert Umt5Tokenizer(tmp_path / "tokenizer.json")(["a"])[0].shape == (1, 512)


def test_bad_tokenizers_are_refused(packages, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist"):
        Umt5Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"<pad>": 0}))
    with pytest.raises(ConfigError, match="lacks </s> or <pad>"):
        Umt5Tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="length=0 must be at least 1"):
        Umt5Tokenizer(tmp_path, length=0)


def test_missing_packages_name_the_extra(packages, monkeypatch, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(VOCABULARY))
    tokenizer = Umt5Tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ImportError, match=r"ftfy; install longlive-jax\[wan\]"):
        tokenizer(["a"])
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"tokenizers; install longlive-jax\[wan\]"):
        Umt5Tokenizer(tmp_path)


def test_with_the_real_packages(tmp_path):
    tokenizers, _ = pytest.importorskip("tokenizers"), pytest.importorskip("ftfy")
    processors = importlib.import_module("tokenizers.processors")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCABULARY, "<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    words.enable_truncation(2)
    words.enable_padding(length=9)
    words.save(str(tmp_path / "tokenizer.json"))
    ids, mask = Umt5Tokenizer(tmp_path, length=4)(["a  red &amp;amp; fox", "a â\x80\x9c"])
    np.testing.assert_array_equal(ids, [[3, 4, 5, 1], [3, 2, 1, 0]])
    np.testing.assert_array_equal(mask.sum(-1), [4, 3])


def test_a_fresh_encoder_knows_the_order_of_words():
    """The same word in another place among the same words reads otherwise; without that, training never learns whose word is whose."""
    encoder = TextEncoder(TOY.text, rngs=nnx.Rngs(0))
    left, right, red, blue = 5, 6, 7, 8
    first, second = (
        encode_prompts(encoder, jnp.array([ids]), jnp.ones((1, 4), bool))[0] for ids in ([left, red, right, blue], [left, blue, right, red])
    )
    a, b = first[1], second[3]  # "red", on the left and on the right
    assert float(a @ b / (jnp.linalg.norm(a) * jnp.linalg.norm(b))) < 0.95
