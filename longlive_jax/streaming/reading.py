"""Prompts to text embeddings, with the encoder where its memory can be spared.

A umT5 encoder is larger than the transformer that it serves (11.4 GB in bfloat16), and it works only when a prompt is new. ``PromptReader``
runs it on the device, or on the host, or brings it to the device for every reading; ``int8_encoder`` halves its matrices.

    bundle = longlive_jax.load(folder, text="host")
    reader = PromptReader(bundle.text, tokenizer, placement="host")
    session.read_embeddings(reader.read(["a red panda walks along a log"]))
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.config import ConfigError, require
from longlive_jax.quant.rewrite import rewrite
from longlive_jax.streaming.programs import embed_prompts
from longlive_jax.tree import flat_params, with_params

PLACEMENTS = ("device", "host", "freed")
LENGTHS = 128  # tokens: prompts are encoded at the next multiple of it, and the rows after it are zeros
INT8_RULES = ((r"blocks\.\d+\.(attn|ffn)\.\w+\.weight", "int8"),)


def host_device():
    """The device of JAX that computes on the host. Raises ``ConfigError`` where JAX was told to do without one."""
    try:
        return jax.devices("cpu")[0]
    except RuntimeError as error:
        raise ConfigError(f"a text encoder on the host needs JAX's CPU backend ({error}); add cpu to JAX_PLATFORMS, e.g. cuda,cpu") from error


def int8_encoder(encoder):
    """``(encoder, report)``: the encoder with its matrices in int8, one scale a row, and what that saves. Each is encoded where it lies.

    The embedding table, the norms and the position tables stay as they are.
    """
    params, report = rewrite(flat_params(encoder), INT8_RULES)
    return with_params(encoder, params), report


class PromptReader:
    """Reads prompts once: the embeddings of the last ``keep`` distinct prompts are held, ``keep * M * E`` values.

    ``encoder``: a ``TextEncoder``; ``tokenize``: prompts -> (ids, mask) ``[N, M]``. ``placement``:

    - ``"device"``: the encoder is used where its weights are;
    - ``"host"``: weights and computing on the host. No device memory, and a new prompt takes the host's time;
    - ``"freed"``: the weights wait on the host, are copied to the device for a reading and dropped after it. Between readings no device memory;
      ``ahead(storyboard.prompts)`` reads all prompts with one copy.

    Of an encoder that was loaded on the device, the device's copy goes when the last reference to it does: ``load(..., text="host")`` never
    makes one. Raises ``ConfigError`` for an unknown placement or a ``keep`` that is not positive.
    """

    def __init__(self, encoder, tokenize, *, placement="device", keep=64):
        require(placement in PLACEMENTS, f"placement={placement!r} of the text encoder must be one of {', '.join(PLACEMENTS)}")
        require(keep > 0, f"keep={keep} embeddings must be positive")
        place = {"device": lambda e: e, "host": lambda e: jax.device_put(e, host_device()), "freed": jax.device_get}[placement]
        self.encoder, self.tokenize, self.placement, self.keep = place(encoder), tokenize, placement, keep
        self.known = collections.OrderedDict()

    def read(self, prompts):
        """Embeddings ``[B, M, E]`` of ``prompts``, zero past each prompt; only those that are not held are encoded, one at a time.

        Raises ``ConfigError`` without a tokenizer, and what the tokenizer raises.
        """
        prompts = list(prompts)
        require(self.tokenize is not None, "this model's tokenizer needs files that are not in the bundle; pass tokenizer= to Session")
        require(prompts, "there are no prompts to read; give at least one")
        new = [p for p in dict.fromkeys(prompts) if p not in self.known]
        self.known.update(zip(new, self.encode(new) if new else ()))
        for prompt in prompts:
            self.known.move_to_end(prompt)
        held = [self.known[p] for p in prompts]
        while len(self.known) > self.keep:
            self.known.popitem(last=False)
        return np.concatenate(held) if self.placement == "host" else jnp.concatenate(held)

    def ahead(self, prompts):
        """Read what a storyboard will need, where that saves copies of the weights to the device."""
        if self.placement == "freed" and prompts:
            self.read(prompts)

    def encode(self, prompts):
        """One embedding ``[1, M, E]`` for each of ``prompts``."""
        ids, mask = self.tokenize(prompts)
        encoder = jax.device_put(self.encoder) if self.placement == "freed" else self.encoder
        return [self.embed(encoder, ids[i : i + 1], mask[i : i + 1]) for i in range(len(prompts))]

    def embed(self, encoder, ids, mask):
        """One prompt ``[1, M]`` -> ``[1, M, E]``. What is padding neither costs much nor changes anything."""
        length = min(ids.shape[1], -(-max(1, int(mask.sum())) // LENGTHS) * LENGTHS)
        rest = ((0, 0), (0, ids.shape[1] - length), (0, 0))
        rows = embed_prompts(encoder, ids[:, :length], mask[:, :length])
        return np.pad(jax.device_get(rows), rest) if self.placement == "host" else jnp.pad(rows, rest)
