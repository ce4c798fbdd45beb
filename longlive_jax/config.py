"""The one schema: frozen dataclasses, validated where they are built, and the presets WAN_5B, TOY and TINY.

Axis letters used everywhere: B batch, F latent frames in a call, T tokens per frame, h w latent grid, C latent channels, D width, N heads,
Dh head dim, L layers, S memory slots (frames), P prompts, M text tokens. A *frame* is a latent frame unless called a pixel frame; one latent
frame after the first stands for ``vae.time_stride`` (4) pixel frames, the first for one.

``ml_collections.ConfigDict`` is only the command line of this schema: ``to_config_dict`` and ``from_config_dict`` translate, and an unknown key
is an error that names the nearest known one.
"""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field, replace

from ml_collections import ConfigDict

CUT_PREFIX = "The scene transitions. "
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，"
    "画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


class ConfigError(ValueError):
    """A configuration value breaks a rule; the message holds the value, the rule and the remedy."""


def require(ok, message):
    if not ok:
        raise ConfigError(message)


def positive(config, *names):
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{type(config).__name__}.{name}={value} must be positive")


def nearest_multiple(value, unit):
    return max(unit, round(value / unit) * unit)


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the video diffusion transformer (spec/model.md §1.1); the defaults are Wan2.2-TI2V-5B."""

    dim: int = 3072
    ffn_dim: int = 14336
    heads: int = 24
    layers: int = 30
    channels: int = 48
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    patch: tuple[int, int] = (2, 2)  # height, width; time is never patched
    eps: float = 1e-6

    def __post_init__(self):
        positive(self, "dim", "ffn_dim", "heads", "layers", "channels", "text_dim", "text_len", "freq_dim")
        require(
            self.dim % self.heads == 0,
            f"transformer.dim={self.dim} does not split over heads={self.heads}; use dim={nearest_multiple(self.dim, self.heads)}",
        )
        require(
            self.head_dim % 2 == 0 and self.head_dim >= 6,
            f"head_dim={self.head_dim} (dim {self.dim} / heads {self.heads}) must be even and at least 6 (rotary pairs of three axes)",
        )
        require(self.freq_dim % 2 == 0, f"transformer.freq_dim={self.freq_dim} must be even (cosines, then sines); use {self.freq_dim + 1}")
        require(len(self.patch) == 2 and min(self.patch) > 0, f"transformer.patch={self.patch} must be two positive sizes (height, width)")

    @property
    def head_dim(self):
        return self.dim // self.heads


@dataclass(frozen=True)
class VAEConfig:
    """Wan2.2 causal video VAE (spec/model.md §4); the defaults are the published one. One stage per entry of ``multipliers``."""

    dim: int = 160  # encoder base width; 0: no encoder, so it only decodes
    decoder_dim: int = 256
    channels: int = 48  # latent channels C
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2  # per encoder stage; the decoder has one more
    time_downsample: tuple[bool, ...] = (False, True, True)  # one per stage but the last
    patch: int = 2
    mean: tuple[float, ...] = ()  # latent statistics, one per channel; empty: zeros
    std: tuple[float, ...] = ()  # empty: ones

    def __post_init__(self):
        positive(self, "decoder_dim", "channels", "res_blocks", "patch")
        require(self.dim >= 0, f"VAEConfig.dim={self.dim} must not be negative; 0 means a VAE that only decodes")
        require(
            len(self.time_downsample) == len(self.multipliers) - 1,
            f"vae.time_downsample has {len(self.time_downsample)} entries; it needs one per stage but the last, {len(self.multipliers) - 1}",
        )
        for name in ("mean", "std"):
            value = getattr(self, name)
            require(
                len(value) in (0, self.channels),
                f"vae.{name} has {len(value)} entries; it needs none or one per latent channel, {self.channels}",
            )
        require(all(s > 0 for s in self.std), "vae.std must be positive in every channel")

    @property
    def space_stride(self):
        return self.patch * 2 ** len(self.time_downsample)

    @property
    def time_stride(self):
        return 2 ** sum(self.time_downsample)


@dataclass(frozen=True)
class TextConfig:
    """umT5 encoder (spec/model.md §5); the defaults are umT5-XXL."""

    vocab: int = 256384
    dim: int = 4096
    attention_dim: int = 4096
    ffn_dim: int = 10240
    heads: int = 64
    layers: int = 24
    buckets: int = 32
    max_distance: int = 128
    tokenizer: str = "umt5"  # or "words": one token a word, the bundled toy's vocabulary

    def __post_init__(self):
        positive(self, "vocab", "dim", "attention_dim", "ffn_dim", "heads", "layers", "buckets", "max_distance")
        require(
            self.attention_dim % self.heads == 0,
            f"text.attention_dim={self.attention_dim} does not split over heads={self.heads}; "
            f"use attention_dim={nearest_multiple(self.attention_dim, self.heads)}",
        )
        require(self.tokenizer in ("umt5", "words"), f"text.tokenizer={self.tokenizer!r} must be 'umt5' or 'words'")


@dataclass(frozen=True)
class VideoConfig:
    """Pixel size and rate of the videos."""

    height: int = 704
    width: int = 1280
    fps: int = 24

    def __post_init__(self):
        positive(self, "height", "width", "fps")


MEMORIES = ("model", "fp8", "nvfp4")


@dataclass(frozen=True)
class StreamConfig:
    """How a video is cut into chunks and what the memory keeps (spec/inference.md §2). All sizes are latent frames."""

    chunk: int = 8
    window: int = 32  # memory slots, the current chunk's included
    sink: int = 8  # frames at the start of the video that are never evicted
    shot_sink: bool = True  # also pin the first chunk of the current shot
    shot_offset: float = 8.0  # rotary time added at every cut, absolute mode only
    relative: bool = False  # rotate keys when read, by their rank in the window
    clean_recache: bool = False  # forget the old shot before the first chunk of a new one is remembered
    recache: bool = False  # a prompt that changes within a shot is also read into what is held of the shot
    memory: str = "model"  # format of the KV memory: the model's dtype, "fp8" (E4M3), or "nvfp4"
    cut_prefix: str = CUT_PREFIX

    def __post_init__(self):
        positive(self, "chunk", "window")
        require(self.sink >= 0, f"stream.sink={self.sink} must not be negative; 0 turns the sink off")
        require(
            self.window % self.chunk == 0,
            f"stream.window={self.window} is not a multiple of chunk={self.chunk}; use {nearest_multiple(self.window, self.chunk)}",
        )
        require(
            self.sink % self.chunk == 0,
            f"stream.sink={self.sink} is not a multiple of chunk={self.chunk}, so a shot sink could be evicted; "
            f"use sink=0 or sink={nearest_multiple(self.sink, self.chunk)}",
        )
        least = self.sink + (2 if self.shot_sink and self.sink else 1) * self.chunk
        require(
            self.window >= least,
            f"stream.window={self.window} cannot hold sink={self.sink}"
            + (" with shot sinks on, which needs sink + 2 chunks" if self.shot_sink and self.sink else " and the current chunk")
            + f"; use window={least} or more",
        )
        require(math.isfinite(self.shot_offset), f"stream.shot_offset={self.shot_offset} must be finite; 0 turns it off")
        require(self.memory in MEMORIES, f"stream.memory={self.memory!r} is unknown; use one of {', '.join(MEMORIES)}")
        require(
            self.memory != "fp8" or not self.relative,
            f"stream.memory={self.memory!r} with stream.relative=True would round keys again each time they are rotated; set one of them back",
        )
        require(
            bool(self.cut_prefix.strip()),
            "stream.cut_prefix is empty, so every chunk would be a cut; use a phrase such as 'The scene transitions. '",
        )

    @property
    def pins(self):
        """Whether cuts pin a shot sink (only with a global sink, as in the public source)."""
        return self.shot_sink and self.sink > 0


@dataclass(frozen=True)
class SamplerConfig:
    """Solver of the probability flow (spec/inference.md §1.3)."""

    solver: str = "unipc"
    steps: int = 4
    shift: float = 5.0
    guidance: float = 1.0
    negative_prompt: str = NEGATIVE_PROMPT

    def __post_init__(self):
        require(self.solver in ("unipc", "euler"), f"sampler.solver={self.solver!r} must be 'unipc' or 'euler'")
        require(1 <= self.steps <= 1000, f"sampler.steps={self.steps} must lie in 1..1000")
        require(0 < self.shift < math.inf, f"sampler.shift={self.shift} must be positive and finite")
        require(math.isfinite(self.guidance), f"sampler.guidance={self.guidance} must be finite; 1 turns it off")


@dataclass(frozen=True)
class MeshConfig:
    """Devices: ``data`` copies of the batch times ``seq`` shards of the frames (and of the heads inside attention)."""

    data: int = 1
    seq: int = 1

    def __post_init__(self):
        positive(self, "data", "seq")


@dataclass(frozen=True)
class Experiment:
    """Everything that defines a model and how it streams. Cross-field rules are checked here, before anything is compiled."""

    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    dtype: str = "bfloat16"  # of activations, memory and the copy of the weights that is multiplied with
    seed: int = 0

    def __post_init__(self):
        t, v = self.transformer, self.vae
        require(
            t.channels == v.channels,
            f"transformer.channels={t.channels} and vae.channels={v.channels} must be equal: the transformer works on the VAE's latents",
        )
        require(t.text_dim == self.text.dim, f"transformer.text_dim={t.text_dim} and text.dim={self.text.dim} must be equal")
        for name, axis in (("height", 0), ("width", 1)):
            unit = v.space_stride * t.patch[axis]
            value = getattr(self.video, name)
            require(
                value % unit == 0,
                f"video.{name}={value} is not a multiple of {unit} (VAE stride {v.space_stride} x patch {t.patch[axis]}); "
                f"use {name}={nearest_multiple(value, unit)}",
            )
        seq = self.mesh.seq
        require(
            t.heads % seq == 0,
            f"transformer.heads={t.heads} does not divide by mesh.seq={seq}; use seq in {divisors(math.gcd(t.heads, self.stream.chunk))}",
        )
        require(
            self.stream.chunk % seq == 0,
            f"stream.chunk={self.stream.chunk} does not divide by mesh.seq={seq}; use seq in {divisors(math.gcd(t.heads, self.stream.chunk))}",
        )
        require(
            self.stream.memory != "nvfp4" or t.head_dim % 16 == 0,
            f"stream.memory='nvfp4' takes blocks of 16 of head_dim={t.head_dim}; use 'fp8', or a head_dim that 16 divides",
        )
        require(self.dtype in ("float32", "bfloat16"), f"dtype={self.dtype!r} must be 'float32' or 'bfloat16'")

    @property
    def grid(self):
        """Latent height and width (h, w)."""
        return self.video.height // self.vae.space_stride, self.video.width // self.vae.space_stride

    @property
    def tokens(self):
        """Tokens per latent frame T."""
        (h, w), (p, q) = self.grid, self.transformer.patch
        return (h // p) * (w // q)

    def pixel_frames(self, frames):
        """Pixel frames that ``frames`` latent frames from the start of a video decode to."""
        return self.vae.time_stride * (frames - 1) + 1

    def chunks_for(self, seconds):
        """Chunks needed for at least ``seconds`` of video."""
        pixel = math.ceil(seconds * self.video.fps)
        return max(1, math.ceil(((pixel - 1) / self.vae.time_stride + 1) / self.stream.chunk))


@dataclass(frozen=True)
class StreamJob:
    """What ``experiments/stream.py`` runs: a model, and how to sample it."""

    model: str = "toy"  # the bundled model, a folder that save_bundle wrote, or random:PRESET for untrained weights
    decoder: str = ""  # another folder whose VAE decoder takes the place of the model's; empty: none
    text_device: str = "device"  # where the text encoder works: device, host, or freed (on the device only while it reads)
    vae_device: int = -1  # number of the device that decodes while the first goes on denoising; -1: the same
    seed: int = 0
    batch: int = 1
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        positive(self, "batch")
        require(bool(self.model), "model is empty; use 'toy', a folder, or random:tiny")
        require(self.text_device in ("device", "host", "freed"), f"text_device={self.text_device!r} must be 'device', 'host' or 'freed'")
        require(self.vae_device >= -1, f"vae_device={self.vae_device} must be the number of a device, or -1 for the one that denoises")


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


def check_frames(frames, chunk):
    """Refuse a number of frames that does not split into chunks."""
    require(
        frames > 0 and frames % chunk == 0,
        f"frames={frames} does not split into chunks of {chunk}; use a multiple of {chunk}, e.g. frames={nearest_multiple(frames, chunk)}",
    )


# ---- the command line of the schema --------------------------------------------------------------------------------------------------------


def to_config_dict(config):
    """A locked ``ConfigDict`` with the fields of a config dataclass, nested ones included."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    out = ConfigDict({k: to_config_dict(v) if dataclasses.is_dataclass(v) else v for k, v in values.items()})
    return out.lock()


def from_config_dict(kind, values, path=""):
    """Build the dataclass ``kind`` from a (nested) mapping. Missing keys keep their defaults.

    Raises ``ConfigError`` for an unknown key, with the nearest known one, or for a value of another type.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    out = {}
    for key, value in dict(values).items():
        name = f"{path}{key}"
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {path}{near[0]}?" if near else f"known keys: {', '.join(fields)}"
            raise ConfigError(f"unknown config key {name!r}; {hint}")
        out[key] = convert(hints[key], value, name)
    return kind(**out)


def convert(hint, value, name):
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_config_dict(hint, value, f"{name}.")
    if typing.get_origin(hint) is types.UnionType:
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return convert(next(o for o in options if o is not type(None)), value, name)
    if typing.get_origin(hint) is tuple:
        require(isinstance(value, (list, tuple)), f"config key {name}={value!r} must be a sequence")
        return tuple(convert(typing.get_args(hint)[0], v, name) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    require(
        isinstance(value, hint) and (hint is bool or not isinstance(value, bool)),
        f"config key {name}={value!r} must be of type {hint.__name__}",
    )
    return value


# ---- presets -------------------------------------------------------------------------------------------------------------------------------

WAN_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
WAN_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip

WAN_VAE = VAEConfig(mean=WAN_MEAN, std=WAN_STD)
# Pruned decoders of the same latents (spec/names.md §5): MG-LightVAE.pth and MG-LightVAE_v2.pth, each with an encoder as narrow.
MG_LIGHTVAE = replace(WAN_VAE, dim=80, decoder_dim=128)
MG_LIGHTVAE_V2 = replace(WAN_VAE, dim=40, decoder_dim=64)

WAN_5B = Experiment(vae=WAN_VAE)

# The bundled model: 128x128 pixels, 8x8 latents, the stream geometry of the 5B model.
TOY = Experiment(
    transformer=TransformerConfig(dim=256, ffn_dim=640, heads=4, layers=8, channels=32, text_dim=128, text_len=48, freq_dim=128, patch=(1, 1)),
    vae=VAEConfig(dim=12, decoder_dim=24, channels=32, res_blocks=1),
    text=TextConfig(vocab=256, dim=128, attention_dim=128, ffn_dim=256, heads=4, layers=2, tokenizer="words"),
    video=VideoConfig(height=128, width=128),
    sampler=SamplerConfig(steps=8, shift=3.0, guidance=2.5, negative_prompt=""),
    dtype="float32",
)

# For tests: the 5B structure at the least size that keeps every part.
TINY = Experiment(
    transformer=TransformerConfig(dim=64, ffn_dim=96, heads=8, layers=2, channels=4, text_dim=16, text_len=48, freq_dim=32, patch=(1, 1)),
    vae=VAEConfig(dim=4, decoder_dim=4, channels=4, multipliers=(1, 2, 2, 2), res_blocks=1),
    text=TextConfig(vocab=256, dim=16, attention_dim=16, ffn_dim=32, heads=2, layers=1, tokenizer="words"),
    video=VideoConfig(height=32, width=64),
    stream=StreamConfig(chunk=2, window=8, sink=2, shot_offset=2.0),
    sampler=SamplerConfig(steps=2, negative_prompt=""),
    dtype="float32",
)

PRESETS = {"wan_5b": WAN_5B, "toy": TOY, "tiny": TINY}


def preset(name):
    """The preset called ``name`` (wan_5b, toy or tiny)."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        raise ConfigError(f"unknown preset {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(PRESETS)}"))
    return PRESETS[name]


__all__ = [
    "CUT_PREFIX", "MG_LIGHTVAE", "MG_LIGHTVAE_V2", "NEGATIVE_PROMPT", "PRESETS", "TINY", "TOY", "WAN_5B", "WAN_VAE", "ConfigError",
    "Experiment", "MeshConfig", "SamplerConfig", "StreamConfig", "StreamJob", "TextConfig", "TransformerConfig", "VAEConfig", "VideoConfig",
    "check_frames", "from_config_dict", "preset", "replace", "require", "to_config_dict",
]  # fmt: skip
