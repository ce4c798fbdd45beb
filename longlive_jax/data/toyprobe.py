"""What quantising each layer does to its product, on what the toy model gives it: no video is made, and every layer is judged alone."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from longlive_jax.data.toyeval import prompts
from longlive_jax.data.toyplay import truth_player
from longlive_jax.data.toywords import tokenize
from longlive_jax.diffusion.flow import TIME_SCALE, add_noise
from longlive_jax.model.frames import block_causal, clip_frames
from longlive_jax.model.text import encode_prompts
from longlive_jax.model.transformer import stack_blocks
from longlive_jax.ops.matmul import matmul
from longlive_jax.quant.rewrite import published, rewrite
from longlive_jax.tree import Leaf, cast, flat_params, with_params


@functools.partial(jax.tree_util.register_dataclass, data_fields=("weight", "others", "number"), meta_fields=("note",))
@dataclass(frozen=True)
class Probe(Leaf):
    """A dense weight that tells how far the products of other kinds are from its own: ``note(number, kind -> squares)``, on the host."""

    weight: jax.Array
    others: dict  # kind -> leaf
    number: jax.Array  # [] of the weight
    note: Callable

    @property
    def shape(self):
        return self.weight.shape

    @property
    def dtype(self):
        return self.weight.dtype


def squares(weight, other, x):
    """Sums of the squares of the difference of two products, and of the first."""
    y, z = (matmul(w, x).astype(jnp.float32) for w in (weight, other))
    return jnp.stack([jnp.sum((z - y) ** 2), jnp.sum(y**2)])


@matmul.register(Probe)
def probing(w, x):
    io_callback(w.note, None, w.number, {kind: squares(w.weight, leaf, x) for kind, leaf in w.others.items()})
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
    sums = {kind: np.zeros((len(paths), 2)) for kind in kinds}

    def note(number, found):
        for kind, values in found.items():
            sums[kind][int(number)] += values

    probe = lambda i, path: Probe(params[path], {kind: quantised[kind][path] for kind in kinds}, jnp.int32(i), note)
    model = stack_blocks(with_params(transformer, params | {path: probe(i, path) for i, path in enumerate(paths)}))
    noise = jax.random.normal(jax.random.key(seed), z.shape)
    rows = clip_frames(n, z.shape[1], experiment.stream.chunk)
    visible = block_causal(rows, rows)
    velocity = jax.jit(lambda model, noisy, t, prompt: model(noisy, t, model.read(prompt), rows, visible)[0])
    for sigma in times:
        t = jnp.full(z.shape[:2], sigma)
        jax.block_until_ready(velocity(model, add_noise(z, noise, t), TIME_SCALE * t, prompt))
    jax.effects_barrier()
    error = lambda total: float(np.sqrt(total[0] / max(total[1], 1e-30)))
    return {kind: dict(zip(paths, map(error, sums[kind]), strict=True)) for kind in kinds}


__all__ = ["layer_sensitivity"]
