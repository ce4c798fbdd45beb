"""The bundled toy model. The argument names the run: ``vae``, ``ar``, and for tests ``vae_tiny``, ``ar_tiny``.

    python experiments/train_vae.py --config=configs/toy.py:vae --workdir=runs/vae
    python experiments/train_ar.py  --config=configs/toy.py:ar  --workdir=runs/ar --config.vae=runs/vae/bundle

Any number is an override: ``--config.train.batch=8 --config.optimizer.lr=5e-4``. Running a command again resumes it. Where a command may
only run for 10 minutes: ``--config.train.stop_after_minutes=9``, and again until it says that it is done.

Hardware, time and result: one H100 80 GB. ``vae``, 4 minutes: 9,097 steps, 34.3 dB on clips not trained on. ``ar``, 18 minutes in two runs:
7,001 steps, then 12,500 from there with ``--config.init``: all four attributes 98.9 %, but a minute's shot lost 6.6 points. The bundled weights
went on from there: the VAE with cuts in its clips (35.8 dB), the transformer for 17 minutes with ``--config.data.recall=0.15
--config.objective.cut_weight=1.5 --config.objective.first_weight=3``, and for 4 more, on an H200, with ``--config.objective.recache=0.65
--config.data.mistakes=0.5``; the record in the bundle's folder holds every command. Compilation, filling the ring and the commands' own start
come on top, a minute or two each. experiments/RESULTS.md says what that model can do.
"""

import difflib

from longlive_jax.config import TINY, TOY, ConfigError, to_config_dict
from longlive_jax.config_train import ARRun, ClipConfig, ObjectiveConfig, OptimizerConfig, RingConfig, TrainConfig, VAELossConfig, VAERun

WATCH_TINY = dict(dtype="float32", log_every=5, checkpoint_every=5, sample_every=0)

RUNS = {
    "vae": VAERun(
        experiment=TOY,
        train=TrainConfig(batch=8, minutes=5.0, log_every=50, checkpoint_every=1000, sample_every=1000),
        optimizer=OptimizerConfig(kind="adamw", lr=1.5e-3, decay=0.5, weight_decay=0.01, ema=0.998),
        data=ClipConfig(frames=17),
        loss=VAELossConfig(),
    ),
    "ar": ARRun(
        experiment=TOY,
        train=TrainConfig(batch=16, minutes=18.0, log_every=50, checkpoint_every=1000, sample_every=2000),
        optimizer=OptimizerConfig(kind="muon", lr=2e-3, decay=0.35, ema=0.999),
        data=ClipConfig(chunks=6, recall=0.4),
        ring=RingConfig(size=4096, group=64, every=40, part=16),
        objective=ObjectiveConfig(cut_weight=4.0),
    ),
    "vae_tiny": VAERun(
        experiment=TINY,
        train=TrainConfig(batch=2, steps=20, **WATCH_TINY),
        optimizer=OptimizerConfig(ema=0.9),
        data=ClipConfig(frames=5),
        loss=VAELossConfig(),
    ),
    "ar_tiny": ARRun(
        experiment=TINY,
        train=TrainConfig(batch=2, steps=20, **WATCH_TINY),
        optimizer=OptimizerConfig(ema=0.9),
        data=ClipConfig(chunks=3),
        ring=RingConfig(size=8, group=4, every=6, part=2),
        objective=ObjectiveConfig(),
    ),
}


def get_config(name="ar"):
    if name not in RUNS:
        near = difflib.get_close_matches(name, RUNS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"configs/toy.py has no run {name!r}; {hint}known: {', '.join(RUNS)}")
    return to_config_dict(RUNS[name])
