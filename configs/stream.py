"""How to sample a model.

Command: ``uv run experiments/stream.py --config=configs/stream.py:toy`` (the default).
Runs anywhere.

The argument names the preset that gives the numbers: ``toy`` (the bundled model), ``tiny`` (untrained weights, for trials of the machinery), or
``wan_5b`` (give ``--config.model=FOLDER``). Numbers are overrides: ``--config.sampler.steps=4 --config.sampler.guidance=1.5``.
"""

from longlive_jax.config import StreamJob, preset, to_config_dict


def get_config(name="toy"):
    e = preset(name)
    model = {"toy": "toy", "tiny": "random:tiny"}.get(name, name)
    return to_config_dict(StreamJob(model=model, sampler=e.sampler, stream=e.stream, mesh=e.mesh))
