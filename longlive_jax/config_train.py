"""The schema of the training scripts. ``configs/*.py`` fill it in; ``experiments/train_*.py`` read it.

Keys that only say how a run is watched (``WATCHING``) may change when it is resumed; all others must stay.
"""

import dataclasses
from dataclasses import dataclass, field

from longlive_jax.config import Experiment, positive, require

WATCHING = ("train.stop_after_minutes", "train.log_every", "train.checkpoint_every", "train.sample_every", "train.keep", "data.workers", "vae")


def share(config, *names):
    for name in names:
        value = vars(config)[name]
        require(0 <= value <= 1, f"{type(config).__name__}.{name}={value} is a share; use a number in 0..1")


@dataclass(frozen=True)
class TrainConfig:
    """Length of a run and what it writes. The learning rate depends on step / total alone."""

    batch: int = 8  # clips
    steps: int = 0  # length of the run; 0: as many steps as fit into ``minutes``, measured once and kept in the checkpoint
    minutes: float = 0.0
    stop_after_minutes: float = 0.0  # write a checkpoint and leave after so long; the same command goes on. 0: never
    dtype: str = "bfloat16"  # of activations and of the copy of the weights that is multiplied with; masters are float32
    log_every: int = 50  # steps; the device is waited for only then
    checkpoint_every: int = 1000
    sample_every: int = 1000  # pictures; 0: none
    keep: int = 2  # checkpoints kept

    def __post_init__(self):
        positive(self, "batch", "log_every", "checkpoint_every", "keep")
        require(
            (self.steps > 0) != (self.minutes > 0),
            f"train.steps={self.steps} and train.minutes={self.minutes}: set exactly one of them above 0, it is the length of the run",
        )
        require(self.dtype in ("float32", "bfloat16"), f"train.dtype={self.dtype!r} must be 'float32' or 'bfloat16'")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW everywhere, or Muon for the matrices of the blocks and AdamW for the rest."""

    kind: str = "adamw"
    lr: float = 1e-3
    warmup: float = 0.03  # share of the run in which the rate rises
    decay: float = 0.4  # share of the run, the last one, in which it falls to 0; linear both
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.01
    clip: float = 1.0  # norm of the gradient
    ema: float = 0.999

    def __post_init__(self):
        require(self.kind in ("adamw", "muon"), f"optimizer.kind={self.kind!r} must be 'adamw' or 'muon'")
        positive(self, "lr", "clip")
        share(self, "warmup", "decay", "b1", "b2", "ema")
        require(self.warmup + self.decay <= 1, f"optimizer.warmup={self.warmup} and decay={self.decay} overlap; their sum must not be above 1")


@dataclass(frozen=True)
class ClipConfig:
    """Clips of the toy world, element i a function of (seed, i)."""

    seed: int = 0
    chunks: int = 6  # of ``stream.chunk`` latents, for the transformer
    frames: int = 17  # pixel frames, for the VAE
    gap: bool = True  # half of the clips have a random gap after the first chunk: a far global sink
    shot_gap: float = 0.5  # share of the clips with a cut in which one shot has a gap after its first chunk: a far shot sink
    recall: float = 0.0  # share of the clips with one object through many shots that leave out what it is
    mistakes: float = 0.0  # share of the clips in which a chunk or two show something else than they say, and the next one mends it
    workers: int = 0  # processes that sample; 0: threads of this one

    def __post_init__(self):
        positive(self, "chunks", "frames")
        share(self, "shot_gap", "recall", "mistakes")
        require(self.frames % 4 == 1, f"data.frames={self.frames} must be 4k + 1, e.g. {max(1, self.frames // 4 * 4 + 1)}")


@dataclass(frozen=True)
class RingConfig:
    """Encoded clips kept on the device. Which clips it holds at a step is a function of the step (``data.pipeline.made``)."""

    size: int = 4096  # clips
    group: int = 64  # clips made at a time
    every: int = 40  # steps between two groups; a clip is used about batch * every / group times
    part: int = 16  # clips rendered and encoded at once

    def __post_init__(self):
        positive(self, "size", "group", "every", "part")
        require(self.size % self.group == 0, f"ring.size={self.size} must be a multiple of ring.group={self.group}")
        require(self.group % self.part == 0, f"ring.group={self.group} must be a multiple of ring.part={self.part}")


@dataclass(frozen=True)
class ObjectiveConfig:
    """Teacher forcing with one noise level a chunk."""

    shift: float = 3.0  # of the uniform noise level
    drop_text: float = 0.1  # share of the clips that see the empty prompt
    context_noise: float = 0.15  # the clean half gets noise of a level up to this, its t stays 0
    context_share: float = 0.7  # in so many of the clips
    cut_weight: float = 1.0  # of the loss of a chunk that begins a later shot: it alone needs the prompt and the far memory
    first_weight: float = 1.0  # of the first latent of such a chunk, times cut_weight: it alone replaces the whole picture
    recache: float = 0.0  # share of the clips whose history before a change inside a shot reads the new prompt, as a rebuilt memory does

    def __post_init__(self):
        positive(self, "shift", "cut_weight", "first_weight")
        share(self, "drop_text", "context_noise", "context_share", "recache")


@dataclass(frozen=True)
class VAELossConfig:
    """``mean(w (|d| + 2 d^2)) + latent mean(z^2)`` with weights ``w = 1 + edge * (strength of the edge)`` and noise on z."""

    edge: float = 4.0
    noise: float = 0.07
    latent: float = 5e-4


@dataclass(frozen=True)
class VAERun:
    """What experiments/train_vae.py needs."""

    experiment: Experiment = field(default_factory=Experiment)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1))
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: ClipConfig = field(default_factory=ClipConfig)
    loss: VAELossConfig = field(default_factory=VAELossConfig)
    init: str = ""  # bundle whose VAE is trained on; empty: random weights

    def __post_init__(self):
        require(self.optimizer.kind == "adamw", "optimizer.kind='muon' is for the transformer's matrices; train the VAE with 'adamw'")
        check_mesh(self)
        require(self.experiment.mesh.seq == 1, f"mesh.seq={self.experiment.mesh.seq}: the VAE trains on mesh.data only; use mesh.seq=1")


@dataclass(frozen=True)
class ARRun:
    """What experiments/train_ar.py needs."""

    experiment: Experiment = field(default_factory=Experiment)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1))
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: ClipConfig = field(default_factory=ClipConfig)
    ring: RingConfig = field(default_factory=RingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    vae: str = ""  # folder that train_vae wrote
    init: str = ""  # bundle whose transformer and text encoder are trained on; empty: random weights
    rules: str = ""  # train_ar or train_dmd: linears of the blocks in NVFP4, forward and backward (quant.rewrite); empty: in train.dtype

    def __post_init__(self):
        require(self.rules in ("", "train_ar", "train_dmd"), f"rules={self.rules!r} are no rules of training; use train_ar or train_dmd")
        check_mesh(self)


def check_mesh(run):
    data = run.experiment.mesh.data
    require(run.train.batch % data == 0, f"train.batch={run.train.batch} is not a multiple of mesh.data={data}; use train.batch={data}")


def flat_config(config, path=""):
    """Dotted key -> value, as plain JSON types."""
    out = {}
    for f in dataclasses.fields(config):
        value, name = vars(config)[f.name], path + f.name
        if dataclasses.is_dataclass(value):
            out.update(flat_config(value, name + "."))
        else:
            out[name] = list(value) if isinstance(value, tuple) else value
    return out
