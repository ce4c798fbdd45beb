"""The umT5 text encoder of any size and its tokenizer (spec/model.md section 5).

Attention has no ``1/sqrt(d)`` and a relative-position table in every layer; only padded keys are masked.
"""

import functools
import html
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax.config import require
from longlive_jax.model.layers import Linear, RMSNorm


@functools.cache
def bucket_boundaries(buckets, max_distance):
    """The least distance of each bucket of one direction: exact up to half of them, then logarithmic up to ``max_distance``."""
    half, exact = buckets // 2, buckets // 4
    log = half - exact
    require(buckets >= 4, f"text.buckets={buckets} must be at least 4: near and far, before and after")
    require(max_distance > exact, f"text.max_distance={max_distance} must be more than a quarter of buckets={buckets}")
    least = list(range(exact))
    for k in range(log):  # the least n with log * ln(n / exact) / ln(max_distance / exact) >= k, in whole numbers
        least.append(next(n for n in range(exact, max_distance + 1) if n**log * exact**k >= max_distance**k * exact**log))
    return tuple(least)


@functools.cache
def relative_buckets(length, buckets, max_distance):
    """Bucket of every (query, key) pair, int32 ``[length, length]``: by distance, keys after the query in the upper half."""
    offset = np.arange(length) - np.arange(length)[:, None]  # key - query
    bucket = np.searchsorted(bucket_boundaries(buckets, max_distance), np.abs(offset), side="right") - 1
    return (bucket + (offset > 0) * (buckets // 2)).astype(np.int32)


@functools.cache
def first_biases(buckets, heads, max_distance):
    """Position biases to start training from, float32 ``[buckets, heads]``: heads look back and ahead by turns, each half as far as the last.

    With biases near zero an encoder is a bag of words, and one that nothing pulls out of it: what reads it cannot use an order that is not
    there, so no gradient asks for one. Here words know their neighbours from the start.
    """
    distance = np.array(bucket_boundaries(buckets, max_distance), np.float32)
    fall = -distance[:, None] * 2.0 ** -(np.arange(heads) // 2)
    back = np.where(np.arange(heads) % 2 == 0, fall, -4.0)  # keys before the query and itself
    ahead = np.where(np.arange(heads) % 2 == 1, fall, -4.0)
    return np.concatenate([back, ahead]).astype(np.float32)


class Embedding(nnx.Module):
    """Integers to rows of ``weight [count, dim]``."""

    def __init__(self, weight):
        self.weight = nnx.Param(weight)

    def __call__(self, ids):
        return self.weight[...][ids]


class Attention(nnx.Module):
    """Self-attention ``[N, M, D] -> [N, M, D]`` with scores and softmax in float32."""

    def __init__(self, config, *, rngs):
        d, a = config.dim, config.attention_dim
        self.heads = config.heads
        self.q = Linear(d, a, bias=False, rngs=rngs, std=(d * a // config.heads) ** -0.5)  # in place of 1/sqrt(d) in the scores
        self.k = Linear(d, a, bias=False, rngs=rngs)
        self.v = Linear(d, a, bias=False, rngs=rngs)
        self.o = Linear(a, d, bias=False, rngs=rngs)

    def __call__(self, x, bias, mask):
        """``bias [M, M, heads]`` over (query, key), ``mask [N, M]`` of keys."""
        q, k, v = (f(x).reshape(*x.shape[:2], self.heads, -1) for f in (self.q, self.k, self.v))
        scores = jnp.einsum("nqhd,nkhd->nhqk", q, k, preferred_element_type=jnp.float32)
        scores += bias.astype(jnp.float32).transpose(2, 0, 1)
        scores = jnp.where(mask[:, None, None] > 0, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, -1).astype(x.dtype)
        return self.o(jnp.einsum("nhqk,nkhd->nqhd", weights, v).reshape(*x.shape[:2], -1))


class GatedMLP(nnx.Module):
    """``fc2(fc1(x) * gelu(gate(x)))``."""

    def __init__(self, config, *, rngs):
        self.gate = Linear(config.dim, config.ffn_dim, bias=False, rngs=rngs)
        self.fc1 = Linear(config.dim, config.ffn_dim, bias=False, rngs=rngs)
        self.fc2 = Linear(config.ffn_dim, config.dim, bias=False, rngs=rngs)

    def __call__(self, x):
        return self.fc2(self.fc1(x) * jax.nn.gelu(self.gate(x), approximate=True))


class Block(nnx.Module):
    def __init__(self, config, *, rngs):
        self.norm1 = RMSNorm(config.dim)
        self.attn = Attention(config, rngs=rngs)
        self.norm2 = RMSNorm(config.dim)
        self.ffn = GatedMLP(config, rngs=rngs)
        self.pos_embedding = Embedding(jnp.asarray(first_biases(config.buckets, config.heads, config.max_distance)))

    def __call__(self, x, buckets, mask):
        x = x + self.attn(self.norm1(x), self.pos_embedding(buckets), mask)
        return x + self.ffn(self.norm2(x))


class TextEncoder(nnx.Module):
    """umT5: token ids to one vector a token, in the dtype of the embedding table."""

    def __init__(self, config, *, rngs):
        self.config = config
        self.token_embedding = Embedding(jax.random.normal(rngs.params(), (config.vocab, config.dim)))
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = RMSNorm(config.dim)

    def __call__(self, ids, mask):
        """``ids [N, M]``, ``mask [N, M]`` (positive: a token) -> ``[N, M, dim]``. Padded rows hold values too; see ``encode_prompts``."""
        buckets = relative_buckets(ids.shape[1], self.config.buckets, self.config.max_distance)
        x = self.token_embedding(ids)
        for block in self.blocks:
            x = block(x, buckets, mask)
        return self.norm(x)


def encode_prompts(encoder, ids, mask):
    """What the transformer is conditioned on, ``[N, M, dim]``: the encoding with every row past the prompt exactly zero.

    A prompt is as long as its mask has positive entries. The transformer does not mask text: its zero rows are attended to.
    """
    length = jnp.sum(mask > 0, -1, keepdims=True)
    keep = jnp.arange(ids.shape[1]) < length
    return jnp.where(keep[..., None], encoder(ids, mask), 0)


def clean_prompt(text):
    """Repaired encoding, HTML entities resolved twice, runs of white space collapsed: as umT5 prompts were cleaned in training."""
    try:
        import ftfy
    except ImportError as error:
        raise ImportError("the umT5 tokenizer needs the package ftfy; install longlive-jax[wan]") from error
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


class Umt5Tokenizer:
    """Prompts to umT5 ids, from a ``tokenizer.json`` or the folder that holds it. Needs the extra ``longlive-jax[wan]``.

    Raises ``FileNotFoundError`` if there is no such file and ``ConfigError`` if it has no ``</s>`` and ``<pad>``.
    """

    def __init__(self, path, length=512):
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError("the umT5 tokenizer needs the package tokenizers; install longlive-jax[wan]") from error
        path = pathlib.Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; give the tokenizer.json of google/umt5-xxl or its folder")
        require(length >= 1, f"tokenizer length={length} must be at least 1: every prompt ends in </s>")
        self.tokenizer = Tokenizer.from_file(str(path))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.length = length
        self.end, self.pad = (self.tokenizer.token_to_id(token) for token in ("</s>", "<pad>"))
        require(self.end is not None and self.pad is not None, f"{path} is not a umT5 tokenizer: it lacks </s> or <pad>")

    def __call__(self, prompts):
        """``prompts``: N strings -> (ids, mask), int32 ``[N, length]``: each cut to ``length`` with ``</s>`` at its end, then padded."""
        ids = np.full((len(prompts), self.length), self.pad, np.int32)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            words = self.tokenizer.encode(clean_prompt(prompt), add_special_tokens=False).ids
            tokens = [*words[: self.length - 1], self.end]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return ids, mask
