"""What quantising each layer does to its product, on what the toy model gives it: no video is made, and every layer is judged alone."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.data.toyeval import prompts
from longlive_jax.data.toyplay import truth_player
from longlive_jax.data.toywords import tokenize
from longlive_jax.diffusion.flow import TIME_SCALE, add_noise
from longlive_jax.model.frames import block_causal, clip_frames
from longlive_jax.model.text import encode_prompts
from longlive_jax.ops.matmul import matmul
from longlive_jax.quant.rewrite import published, rewrite
from longlive_jax.tree import Leaf, cast, flat_params, with_params


@dataclass(frozen=True)
class Probe(Leaf):
    """A dense weight that notes how far the products of other kinds are from its own. For calls under ``jax.disable_jit``."""

    weight: jax.Array
    others: dict  # kind -> leaf
    notes: dict  # kind -> list of (squares of the difference, squares of the product)

    @property
    def shape(self):
        return self.weight.shape

    @property
    def dtype(self):
        return self.weight.dtype


@jax.jit
def squares(weight, other, x):
    y, z = (matmul(w, x).astype(jnp.float32) for w in (weight, other))
    return jnp.sum((z - y) ** 2), jnp.sum(y**2)


@matmul.register(Probe)
def probing(w, x):
    for kind, leaf in w.others.items():
        w.notes[kind].append(squares(w.weight, leaf, x))
    return matmul(w.weight, x)


def layer_sensitivity(bundle, kinds, n=4, times=(0.9, 0.5, 0.1), seed=0):
    """Kind -> path -> relative error of the layer's product, weight and activations quantised, on what it is given in the dense model.

    The input: ``n`` rendered clips of one chunk as latents, noised to each sigma of ``times``.
    """
    experiment, transformer, vae, text = bundle
    scenes = prompts(np.random.default_rng([seed, 4241]), n, 1)
    frames = next(truth_player(n).play(scenes))
    z = jax.jit(lambda vae, video: vae.encode(video))(vae, frames.astype(jnp.float32) / 127.5 - 1)
    ids = map(np.stack, zip(*(tokenize(scene.captions[0], experiment.transformer.text_len) for scene in scenes)))
    prompt = jax.jit(encode_prompts)(text, *map(jnp.asarray, ids))[:, None]
    params = flat_params(transformer)
    quantised = {kind: rewrite(cast(params, jnp.bfloat16), published(kind))[0] for kind in kinds}
    paths = [path for path in params if isinstance(quantised[kinds[0]][path], Leaf)]
    probes = {path: Probe(params[path], {kind: quantised[kind][path] for kind in kinds}, {kind: [] for kind in kinds}) for path in paths}
    model = with_params(transformer, params | probes)
    noise = jax.random.normal(jax.random.key(seed), z.shape)
    rows = clip_frames(n, z.shape[1], experiment.stream.chunk)
    for sigma in times:
        t = jnp.full(z.shape[:2], TIME_SCALE * sigma)
        noisy = add_noise(z, noise, jnp.full(z.shape[:2], sigma))
        with jax.disable_jit():  # a probe notes values, which there are none of inside a program
            model(noisy, t, model.read(prompt), rows, block_causal(rows, rows))
    total = lambda notes: np.sum(jax.device_get(notes), 0, dtype=np.float64)
    error = lambda notes: float(np.sqrt(total(notes)[0] / max(total(notes)[1], 1e-30)))
    return {kind: {path: error(probe.notes[kind]) for path, probe in probes.items()} for kind in kinds}


__all__ = ["layer_sensitivity"]
