"""Wan2.2 and umT5 tensor names to our parameter paths (spec/names.md sections 1 and 3).

Every difference between the original and the diffusers layout is a rename. Linear weights are ``[out, in]`` on both sides. The patch matrix is
the convolution with its input axes merged, channel-major ``(c, p, q)``; the 5B model, the causal one and LongLive's share all names.
"""

from longlive_jax.convert.table import Row
from longlive_jax.convert.tensors import Renamed

TRANSFORMER_TABLE = (
    Row(r"patch_embedding\.weight", "patch_embedding.weight", "patch"),
    Row(r"patch_embedding\.bias", "patch_embedding.bias"),
    Row(r"(text|time)_embedding\.0\.(weight|bias)", r"\1_embedding.up.\2"),
    Row(r"(text|time)_embedding\.2\.(weight|bias)", r"\1_embedding.down.\2"),
    Row(r"time_projection\.1\.(weight|bias)", r"time_projection.\1"),
    Row(r"blocks\.(\d+)\.modulation", r"blocks.\1.modulation", "table"),
    Row(r"blocks\.(\d+)\.(self|cross)_attn\.([qkvo])\.(weight|bias)", r"blocks.\1.\2_attn.\3.\4"),
    Row(r"blocks\.(\d+)\.(self|cross)_attn\.norm_([qk])\.weight", r"blocks.\1.\2_attn.norm_\3.weight"),
    Row(r"blocks\.(\d+)\.norm3\.(weight|bias)", r"blocks.\1.norm3.\2"),
    Row(r"blocks\.(\d+)\.ffn\.0\.(weight|bias)", r"blocks.\1.ffn.up.\2"),
    Row(r"blocks\.(\d+)\.ffn\.2\.(weight|bias)", r"blocks.\1.ffn.down.\2"),
    Row(r"head\.modulation", "head.modulation", "table"),
    Row(r"head\.head\.(weight|bias)", r"head.head.\1"),
)

TRANSFORMER_TABLE_DIFFUSERS = (
    Row(r"patch_embedding\.weight", "patch_embedding.weight", "patch"),
    Row(r"patch_embedding\.bias", "patch_embedding.bias"),
    Row(r"condition_embedder\.(text|time)_embedder\.linear_1\.(weight|bias)", r"\1_embedding.up.\2"),
    Row(r"condition_embedder\.(text|time)_embedder\.linear_2\.(weight|bias)", r"\1_embedding.down.\2"),
    Row(r"condition_embedder\.time_proj\.(weight|bias)", r"time_projection.\1"),
    Row(r"blocks\.(\d+)\.scale_shift_table", r"blocks.\1.modulation", "table"),
    Row(r"blocks\.(\d+)\.attn1\.to_([qkv])\.(weight|bias)", r"blocks.\1.self_attn.\2.\3"),
    Row(r"blocks\.(\d+)\.attn1\.to_out\.0\.(weight|bias)", r"blocks.\1.self_attn.o.\2"),
    Row(r"blocks\.(\d+)\.attn1\.norm_([qk])\.weight", r"blocks.\1.self_attn.norm_\2.weight"),
    Row(r"blocks\.(\d+)\.attn2\.to_([qkv])\.(weight|bias)", r"blocks.\1.cross_attn.\2.\3"),
    Row(r"blocks\.(\d+)\.attn2\.to_out\.0\.(weight|bias)", r"blocks.\1.cross_attn.o.\2"),
    Row(r"blocks\.(\d+)\.attn2\.norm_([qk])\.weight", r"blocks.\1.cross_attn.norm_\2.weight"),
    # The norm before cross-attention: numbered by creation in the original, by execution here.
    Row(r"blocks\.(\d+)\.norm2\.(weight|bias)", r"blocks.\1.norm3.\2"),
    Row(r"blocks\.(\d+)\.ffn\.net\.0\.proj\.(weight|bias)", r"blocks.\1.ffn.up.\2"),
    Row(r"blocks\.(\d+)\.ffn\.net\.2\.(weight|bias)", r"blocks.\1.ffn.down.\2"),
    Row(r"scale_shift_table", "head.modulation", "table"),
    Row(r"proj_out\.(weight|bias)", r"head.head.\1"),
)

UMT5_TABLE = (
    Row(r"token_embedding\.weight", "token_embedding.weight"),
    Row(r"blocks\.(\d+)\.norm([12])\.weight", r"blocks.\1.norm\2.weight"),
    Row(r"blocks\.(\d+)\.attn\.([qkvo])\.weight", r"blocks.\1.attn.\2.weight"),
    Row(r"blocks\.(\d+)\.pos_embedding\.embedding\.weight", r"blocks.\1.pos_embedding.weight"),
    Row(r"blocks\.(\d+)\.ffn\.gate\.0\.weight", r"blocks.\1.ffn.gate.weight"),
    Row(r"blocks\.(\d+)\.ffn\.(fc1|fc2)\.weight", r"blocks.\1.ffn.\2.weight"),
    Row(r"norm\.weight", "norm.weight"),
)

UMT5_TABLE_DIFFUSERS = (
    Row(r"shared\.weight", "token_embedding.weight"),
    Row(r"encoder\.block\.(\d+)\.layer\.0\.layer_norm\.weight", r"blocks.\1.norm1.weight"),
    Row(r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.([qkvo])\.weight", r"blocks.\1.attn.\2.weight"),
    Row(r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.weight", r"blocks.\1.pos_embedding.weight"),
    Row(r"encoder\.block\.(\d+)\.layer\.1\.layer_norm\.weight", r"blocks.\1.norm2.weight"),
    Row(r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\.weight", r"blocks.\1.ffn.gate.weight"),
    Row(r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1\.weight", r"blocks.\1.ffn.fc1.weight"),
    Row(r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo\.weight", r"blocks.\1.ffn.fc2.weight"),
    Row(r"encoder\.final_layer_norm\.weight", "norm.weight"),
)

# Of the full google/umt5-xxl files.
UMT5_IGNORED_DIFFUSERS = (
    (r"encoder\.embed_tokens\.weight", "the same embedding as shared.weight"),
    (r"decoder\..*|lm_head\.weight", "the decoder is not used"),
)


def transformer_table(names):
    """The transformer's table for a checkpoint with these tensor ``names``: original (``head.head``) or diffusers (``proj_out``)."""
    return TRANSFORMER_TABLE_DIFFUSERS if "proj_out.weight" in names else TRANSFORMER_TABLE


def umt5_table(names):
    """The text encoder's table and ignored tensors for a checkpoint with these ``names``: original or transformers layout."""
    return (UMT5_TABLE_DIFFUSERS, UMT5_IGNORED_DIFFUSERS) if "shared.weight" in names else (UMT5_TABLE, ())


def transformer_shapes(config):
    """Foreign shapes that ``table.export`` cannot infer, for a ``TransformerConfig``."""
    return {"patch_embedding.weight": (config.dim, config.channels, 1, *config.patch)}


def strip_container(tensors):
    """``tensors`` without what containers put around names: every ``_fsdp_wrapped_module.``, then one leading ``model.diffusion_model.``
    or ``model.``. Stays lazy. Raises ``ValueError`` when two tensors end up with one name.
    """
    names = {}
    for old in tensors:
        new = old.replace("_fsdp_wrapped_module.", "")
        for prefix in ("model.diffusion_model.", "model."):
            if new.startswith(prefix):
                new = new.removeprefix(prefix)
                break
        if new in names:
            raise ValueError(f"tensors {names[new]!r} and {old!r} both become {new!r}: the container holds two models; give one of them")
        names[new] = old
    return Renamed(tensors, names)
