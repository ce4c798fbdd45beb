"""Rows from the names of Wan2.2 VAE checkpoints (spec/names.md §2) to ours, original and diffusers layout: 196 tensors at full size."""

from longlive_jax.convert.table import Row


def affine(source, target, to):
    """Rows of the weight and bias of one convolution or projection."""
    return Row(rf"{source}\.weight", f"{target}.weight", to), Row(rf"{source}\.bias", f"{target}.bias")


def residual(source, target):
    return (
        Row(rf"{source}\.residual\.0\.gamma", f"{target}.norm1.gamma", "gamma4"),
        *affine(rf"{source}\.residual\.2", f"{target}.conv1", "conv5"),
        Row(rf"{source}\.residual\.3\.gamma", f"{target}.norm2.gamma", "gamma4"),
        *affine(rf"{source}\.residual\.6", f"{target}.conv2", "conv5"),
        *affine(rf"{source}\.shortcut", f"{target}.shortcut", "conv1x1_5"),
    )


def resampling(source, target):
    return (
        *affine(rf"{source}\.resample\.1", f"{target}.resample", "conv4"),
        *affine(rf"{source}\.time_conv", f"{target}.time_conv", "conv5"),
    )


def vae_table(res_blocks=2):
    """Rows for a VAE of ``res_blocks`` blocks per encoder stage; the resampling layer is numbered after the blocks of its stage."""
    down, up = r"encoder\.downsamples\.(\d+)\.downsamples", r"decoder\.upsamples\.(\d+)\.upsamples"
    part = r"(encoder|decoder)"
    return (
        *affine(r"conv1", "conv1", "conv1x1_5"),
        *affine(r"conv2", "conv2", "conv1x1_5"),
        *affine(rf"{part}\.conv1", r"\1.conv1", "conv5"),
        *residual(rf"{part}\.middle\.0", r"\1.middle.res1"),
        Row(rf"{part}\.middle\.1\.norm\.gamma", r"\1.middle.attention.norm.gamma", "gamma3"),
        *affine(rf"{part}\.middle\.1\.to_qkv", r"\1.middle.attention.to_qkv", "conv1x1_4"),
        *affine(rf"{part}\.middle\.1\.proj", r"\1.middle.attention.proj", "conv1x1_4"),
        *residual(rf"{part}\.middle\.2", r"\1.middle.res2"),
        *residual(rf"{down}\.(\d+)", r"encoder.downsamples.\1.blocks.\2"),
        *resampling(rf"{down}\.{res_blocks}", r"encoder.downsamples.\1"),
        *residual(rf"{up}\.(\d+)", r"decoder.upsamples.\1.blocks.\2"),
        *resampling(rf"{up}\.{res_blocks + 1}", r"decoder.upsamples.\1"),
        Row(rf"{part}\.head\.0\.gamma", r"\1.norm.gamma", "gamma4"),
        *affine(rf"{part}\.head\.2", r"\1.head", "conv5"),
    )


def residual_diffusers(source, target):
    return (
        Row(rf"{source}\.norm([12])\.gamma", rf"{target}.norm\{source.count('(') + 1}.gamma", "gamma4"),
        *affine(rf"{source}\.conv1", f"{target}.conv1", "conv5"),
        *affine(rf"{source}\.conv2", f"{target}.conv2", "conv5"),
        *affine(rf"{source}\.conv_shortcut", f"{target}.shortcut", "conv1x1_5"),
    )


def vae_table_diffusers():
    """The same for the names of diffusers and of MG-LightVAE; they do not depend on the number of blocks of a stage."""
    down, up = r"encoder\.down_blocks\.(\d+)", r"decoder\.up_blocks\.(\d+)"
    part, attention = r"(encoder|decoder)", r"(encoder|decoder)\.mid_block\.attentions\.0"
    return (
        *affine(r"quant_conv", "conv1", "conv1x1_5"),
        *affine(r"post_quant_conv", "conv2", "conv1x1_5"),
        *affine(rf"{part}\.conv_in", r"\1.conv1", "conv5"),
        *residual_diffusers(rf"{part}\.mid_block\.resnets\.0", r"\1.middle.res1"),
        Row(rf"{attention}\.norm\.gamma", r"\1.middle.attention.norm.gamma", "gamma3"),
        *affine(rf"{attention}\.to_qkv", r"\1.middle.attention.to_qkv", "conv1x1_4"),
        *affine(rf"{attention}\.proj", r"\1.middle.attention.proj", "conv1x1_4"),
        *residual_diffusers(rf"{part}\.mid_block\.resnets\.1", r"\1.middle.res2"),
        *residual_diffusers(rf"{down}\.resnets\.(\d+)", r"encoder.downsamples.\1.blocks.\2"),
        *resampling(rf"{down}\.downsampler", r"encoder.downsamples.\1"),
        *residual_diffusers(rf"{up}\.resnets\.(\d+)", r"decoder.upsamples.\1.blocks.\2"),
        *resampling(rf"{up}\.upsampler", r"decoder.upsamples.\1"),
        Row(rf"{part}\.norm_out\.gamma", r"\1.norm.gamma", "gamma4"),
        *affine(rf"{part}\.conv_out", r"\1.head", "conv5"),
    )


VAE_TABLE = vae_table()
VAE_TABLE_DIFFUSERS = vae_table_diffusers()
