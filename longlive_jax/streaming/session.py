"""A running video: prompts in, frames out, chunk by chunk, for ever, in bounded memory.

    bundle = longlive_jax.load("toy")
    session = longlive_jax.Session(bundle)
    for chunk in session.stream(storyboard(["a red star bounces ...", "a blue ring ..."], chunks=8)):
        show(chunk.frames)

``start`` and ``step`` are the same thing one call at a time. A state is a value: ``fork`` it before a step to try two continuations, ``save``
it to go on tomorrow. Everything a call needs is in its arguments; a session holds models, settings and compiled functions.
"""

import collections
import contextlib
import dataclasses
import difflib
import functools
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.config import ConfigError, SamplerConfig, StreamConfig, check_frames, require
from longlive_jax.data import toywords
from longlive_jax.data.prompts import Storyboard
from longlive_jax.diffusion.rollout import given_first
from longlive_jax.diffusion.solvers import make_solver
from longlive_jax.quant.balance import balance
from longlive_jax.sharding import make_mesh
from longlive_jax.streaming.decode import DecodePipeline, on_mesh_of, placement
from longlive_jax.streaming.extension import extend
from longlive_jax.streaming.programs import advance, decode_chunk, encode_clip, first_carry, first_state, read_rows, rebuild, take_in
from longlive_jax.streaming.reading import PromptReader
from longlive_jax.streaming.schedules import changes, check_early, cuts, each, entry, one_a_chunk
from longlive_jax.streaming.states import check_fits, load_arrays, save_arrays
from longlive_jax.tree import cast, deferred


@dataclass(frozen=True)
class Chunk:
    """What ``Session.stream`` yields. ``frames`` uint8 ``[T,H,W,3]`` (``[B,T,H,W,3]`` for a batch); the first chunk has 3 fewer.

    ``prompt`` and ``cut`` are tuples of one per sample where the samples have schedules of their own.
    """

    index: int
    prompt: str | tuple[str, ...]
    cut: bool | tuple[bool, ...]
    frames: np.ndarray
    denoise_seconds: float


class Session:
    """Streams videos from a ``Bundle``.

    ``settings``: any field of ``SamplerConfig`` or ``StreamConfig`` (steps, guidance, shift, solver, negative_prompt, window, sink,
    shot_sink, shot_offset, relative, clean_recache); the bundle's experiment gives the rest. ``vae_device``: a device for decoding alone.
    ``tokenizer``: prompts -> (ids, mask), for models whose tokenizer files are not in the bundle. ``negative``: embeddings ``[B,M,E]``
    in place of the negative prompt. ``text_device``: where the text encoder works, ``"device"``, ``"host"`` or ``"freed"`` (``PromptReader``).

    Raises ``ConfigError`` for unknown or impossible settings, before anything is compiled.
    """

    def __init__(self, bundle, *, vae_device=None, tokenizer=None, negative=None, text_device="device", **settings):
        self.experiment = apply_settings(bundle.experiment, settings)
        e = self.experiment
        self.mesh = make_mesh(e.mesh.data, e.mesh.seq)
        self.decode_device = vae_device or (placement(self.mesh, e.grid[0]) if self.mesh.size > 1 else None)
        self.separate = vae_device is not None
        dtype = jnp.dtype(e.dtype)
        self.transformer = cast(bundle.transformer if e.stream.memory == "model" else balance(bundle.transformer), dtype)
        self.weights = deferred(self.transformer)
        self.vae = None if bundle.vae is None else jax.device_put(cast(bundle.vae, dtype), self.decode_device)
        self.tokenize = tokenizer or word_tokenizer(e)
        self.text = None if bundle.text is None else PromptReader(cast(bundle.text, dtype), self.tokenize, placement=text_device)
        self.solver = make_solver(e.sampler.solver, e.sampler.steps, e.sampler.shift)
        self.negative_embeddings = negative

    def on_mesh(self):
        """The mesh as context; one device needs none, and its arrays then compile once, wherever they come from."""
        return jax.set_mesh(self.mesh) if self.mesh.size > 1 else contextlib.nullcontext()

    @property
    def guided(self):
        return self.experiment.sampler.guidance != 1.0

    @functools.cached_property
    def negative(self):
        """Text of the other branch of guidance, or None at scale 1."""
        if not self.guided:
            return None
        given = self.negative_embeddings
        ok = given is not None or self.text is not None
        require(ok, "guidance needs a negative prompt and this session has no text encoder to read one; give embeddings, Session(negative=...)")
        return self.read(self.experiment.sampler.negative_prompt) if given is None else self.read_embeddings(given)

    # ---- prompts

    def read(self, prompts):
        """Keys and values of one prompt, or of one prompt per sample, as ``step`` takes them."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        require(self.text is not None, "this session has no text encoder, so it cannot read prompts; use read_embeddings")
        return self.read_embeddings(self.text.read(prompts))

    def read_embeddings(self, embeddings):
        """The same from text embeddings ``[B,M,E]``, zero past each prompt."""
        with self.on_mesh():
            return read_rows(self.transformer, jnp.asarray(embeddings)[:, None])

    # ---- one call at a time

    def start(self, seed=0, batch=1):
        """The state before the first chunk. Sample ``b`` draws its noise from seed ``seed + b``, whatever the batch."""
        self.check_batch(seed, batch)
        with self.on_mesh():
            state = self.empty_state(seed, batch)
            return jax.device_put(state, self.shardings(state)) if self.mesh.size > 1 else state

    def empty_state(self, seed, batch):
        return first_state(np.arange(seed, seed + batch, dtype=np.uint32), experiment=self.experiment, guided=self.guided)

    def shardings(self, state):
        """Where a state lives on a mesh of several devices: samples over ``data``, the memory's heads over ``seq``."""
        place = lambda *axes: jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec(*axes))
        where = jax.tree.map(lambda x: place("data", None, None, "seq") if x.ndim == 5 else place("data") if x.ndim else place(), state)
        return replace(where, held=jax.tree.map(lambda x: place("data"), state.held))

    def step(self, state, text, *, cut=False, noise=None, given=None):
        """The next chunk: ``(state, latents [B,F,h,w,C])``. The given state is consumed (``fork`` keeps a copy).

        ``text``: from ``read``; ``cut``: the chunk starts a new shot, a bool or one per sample; ``noise [B,F,h,w,C]`` replaces the
        drawn noise; ``given = (latents, mask [B,F])``: known frames. Every ``B`` may be 1, for all samples alike, but that of the noise.
        """
        e, shape = self.experiment, self.chunk_shape(state)
        text, negative, cut = self.told(state, text, cut)
        if given is not None:
            sizes = tuple(np.shape(given[0])), tuple(np.shape(given[1]))
            ok = all(x in (part, (1, *part[1:])) for x, part in zip(sizes, (shape, shape[:2])))
            require(ok, f"given latents and mask have shapes {sizes}; this chunk takes [B,F,h,w,C] = {shape} and [B,F] = {shape[:2]}, or B=1")
        if noise is not None:
            noise = jnp.asarray(noise)
            require(noise.shape == shape, f"noise has shape {noise.shape}; this chunk takes [B,F,h,w,C] = {shape}")
        guidance = jnp.float32(e.sampler.guidance)
        with self.on_mesh():
            return advance(self.weights, self.solver, state, text, negative, cut, guidance, noise, given, stream=e.stream, shape=shape[1:])

    def chunk_shape(self, state):
        """``(B, F, h, w, C)`` of a chunk of latents."""
        e = self.experiment
        return state.offset.shape[0], e.stream.chunk, *e.grid, e.transformer.channels

    def remember(self, state, latents, text, *, cut=False):
        """The state after a chunk whose latents ``[B,F,h,w,C]`` (or ``[1,F,h,w,C]``) are known, as if it had been generated.

        ``text``, ``cut`` as in ``step``. The given state is consumed.
        """
        shape, latents = self.chunk_shape(state), jnp.asarray(latents)
        ok = latents.shape[1:] == shape[1:] and latents.shape[0] in (1, shape[0])
        require(ok, f"latents have shape {latents.shape}; this chunk takes [B,F,h,w,C] = {shape}, or B=1 for all samples")
        text, negative, cut = self.told(state, text, cut)
        with self.on_mesh():
            return take_in(self.weights, state, spread(shape[0], latents), text, negative, cut, stream=self.experiment.stream)

    def recache(self, state, text, *, changed=True):
        """The state with what is held of the current shot read again under ``text``; ``changed``: a bool or one per sample.

        ``stream`` does so by itself where a prompt changes without a cut. Needs ``recache=True`` when the session is made. The given state is
        consumed.
        """
        require(state.held is not None, "this state keeps no latents to read again; make the session with recache=True")
        text, _, changed = self.told(state, text, changed, "changed")
        with self.on_mesh():
            return rebuild(self.weights, state, text, changed, stream=self.experiment.stream)

    def told(self, state, text, flag, name="cut"):
        """``text``, the negative text and a flag, each for every sample of a state; refuses what is of another batch or other settings."""
        self.check_state(state)
        batch = state.offset.shape[0]
        size = np.shape(flag)
        require(size in ((), (1,), (batch,)), f"{name} has shape {size} for a state of batch={batch}; give one bool, or one for each sample")
        rows = lambda tree: max((x.shape[0] for x in jax.tree.leaves(tree)), default=1)
        remedy = f"a state of batch={batch}; give one, or one for each sample"
        require(rows(text) in (1, batch), f"text is of {rows(text)} prompts for {remedy}")
        require(rows(self.negative) in (1, batch), f"negative is of {rows(self.negative)} prompts for {remedy}")
        return spread(batch, text), spread(batch, self.negative), jnp.broadcast_to(jnp.asarray(flag, bool), (batch,))

    def decode_start(self, batch=1):
        """The decoder's carry before a video."""
        return first_carry(self.vae, batch=batch, grid=self.experiment.grid)

    def decode_step(self, carry, z):
        """``(carry, pixels [B,4F,H,W,3])`` in [-1, 1]; the 3 leading frames of the first chunk mean nothing. The given carry is consumed."""
        with on_mesh_of(self.decode_device):
            return decode_chunk(self.vae, carry, z)

    def encode_image(self, image):
        """The latent ``[1,1,h,w,C]`` of an image uint8 ``[H,W,3]`` of the session's size."""
        return encode_clip(self.vae, jnp.asarray(self.check_image(image), jnp.float32)[None, None] / 127.5 - 1)

    # ---- whole videos

    def stream(self, prompts, *, seed=0, batch=1, image=None, noise=None, ahead=1, early=0, state=None, carry=None, ended=None):
        """An iterator of one ``Chunk`` per prompt.

        ``prompts``: a ``Storyboard``, or any iterable of one prompt per chunk, asked for as the video goes (live prompts); a prompt that
        starts with the cut prefix starts a new shot. Samples of a batch may have schedules of their own: a prompt may be a sequence of one
        string per sample, or ``prompts`` a list of one ``Storyboard`` per sample. ``ahead``: chunks that may be under way before the oldest is
        yielded; 0 waits for each chunk, so that the next prompt can answer it. ``early``: the first chunk is decoded and yielded by so many
        latents at a time, as ``Chunk``s of one number; 0: whole. ``image`` uint8 ``[H,W,3]``: the first frame.
        ``noise [B,frames,h,w,C]``: for the whole video. ``state``, ``carry``: go on from a saved or forked point or from ``extend``, in place
        of ``seed`` and ``batch``; both are consumed. ``ended(state, carry)``: is given the point after the last chunk when the prompts end.

        Raises ``ConfigError`` (and what the tokenizer raises for a list of prompts) at the call, before anything is compiled.
        """
        require(self.vae is not None, "this session has no VAE, so it cannot make pictures; use stream_latents")
        require(ahead >= 0, f"ahead={ahead} must not be negative; 0 waits for each chunk")
        check_early(early, self.experiment.stream.chunk)
        prompts, first, batch = self.checked(prompts, seed, batch, image, noise, state)
        require(first == 0 or carry is not None, f"the given state is at chunk {first}, so the decoder's carry at that point is needed too")
        return self.play(enumerate(prompts, first), state, carry, seed, batch, image, noise, ahead, early, ended)

    def stream_latents(self, prompts, *, seed=0, batch=1, image=None, noise=None, state=None, ended=None):
        """An iterator of ``(chunk number, latents [B,F,h,w,C])``; arguments and errors as for ``stream``. Only an image needs a VAE.

        ``ended(state, None)``: as there.
        """
        prompts, first, batch = self.checked(prompts, seed, batch, image, noise, state)
        last = None if ended is None else lambda state: ended(state, None)
        walk = lambda: self.walk(enumerate(prompts, first), self.start(seed, batch) if state is None else state, image, noise, last=last)
        return ((index, z) for index, _, _, _, z in walk())

    def play(self, prompts, state, carry, seed, batch, image, noise, ahead, early, ended):
        """The chunks of ``stream``, whose checks are done; ``prompts``: pairs of chunk number and prompt."""
        drop = self.experiment.vae.time_stride - 1 if state is None or int(state.chunk) == 0 else 0
        state = self.start(seed, batch) if state is None else state
        carry = self.decode_start(batch) if carry is None else carry
        done, waiting = collections.deque(), collections.deque()
        sink = lambda frames: done.append((frames, pipeline.latents_at))
        before, last = 0.0, []
        compiled = self.compile_ahead(state, carry) if image is None and noise is None else list
        with DecodePipeline(self.decode_step, carry, sink, depth=max(1, ahead), device=self.decode_device, drop=drop) as pipeline:
            # One device: let it finish decoding before a step, so that the time of a chunk is the denoising's.
            ready = lambda: (compiled(), None if self.separate else jax.block_until_ready(pipeline.carry))
            for index, prompt, cut, began, z in self.walk(prompts, state, image, noise, ready, last.append):
                parts = jnp.split(z, z.shape[1] // early, 1) if early and index == 0 else [z]
                for part, since in zip(parts, [began, *[None] * len(parts)]):
                    waiting.append((Chunk(index, prompt, cut, None, 0.0), since))
                    pipeline.submit(part)
                    while len(pipeline.under_way) > ahead:
                        error = pipeline.settle()
                        if error is not None:
                            raise error
                    while done:  # the device is at the next part or chunk meanwhile
                        chunk, before = finished(*waiting.popleft(), *done.popleft(), before)
                        yield chunk
            pipeline.close()
            while done:
                chunk, before = finished(*waiting.popleft(), *done.popleft(), before)
                yield chunk
            if ended is not None:
                ended(last[0], pipeline.carry)

    def compile_ahead(self, state, carry):
        """Compile the step and the decoder of ``play`` on a CPU beside each other and what comes before them; returns what waits for both.

        Tracing is done at the call. A GPU is left alone: its compiler measures kernels, which work beside it would disturb.
        """
        if self.decode_device is not None or jax.default_backend() != "cpu":
            return list
        e, batch, like = self.experiment, state.offset.shape[0], jax.ShapeDtypeStruct
        rows = like((1, 1, e.transformer.text_len, e.transformer.text_dim), e.dtype)
        text = jax.eval_shape(lambda rows: spread(batch, read_rows(self.transformer, rows)), rows)
        told = text, text if self.guided else None, like((batch,), bool), like((), jnp.float32), None, None
        step = advance.lower(self.weights, self.solver, state, *told, stream=e.stream, shape=self.chunk_shape(state)[1:])
        workers = ThreadPoolExecutor(2, thread_name_prefix="compile")
        jobs = [workers.submit(step.compile)]
        jobs.append(workers.submit(decode_chunk.lower(self.vae, carry, step.out_info[1]).compile))
        workers.shutdown(wait=False)
        return lambda: [job.result() for job in jobs]

    def walk(self, prompts, state, image, noise, ready=lambda: None, last=None):
        """A step for every pair of chunk number and prompt: yields number, prompt, cut, when it began, and the latents ``[B,F,h,w,C]``.

        ``ready()`` is called before a step, ``last(state)`` after all. With ``recache``, a prompt that changes without a cut is first read into
        the memory.
        """
        stream, shape = self.experiment.stream, self.chunk_shape(state)
        before, text, n = None, None, stream.chunk
        for index, prompt in prompts:
            prompt = entry(prompt, shape[0])
            cut = cuts(prompt, stream.cut_prefix, index)
            if prompt != before:
                text = self.read(prompt)
            part = None if noise is None else noise[:, index * n : (index + 1) * n]
            given = None
            if image is not None and index == 0:
                latent = jax.device_get(self.encode_image(image))  # from the decoder's device to wherever the step runs
                given = given_first(latent, jnp.zeros(shape))
            ready()
            began = time.perf_counter()
            if stream.recache and before is not None:
                changed = changes(prompt, before, stream.cut_prefix)
                state = self.recache(state, text, changed=changed) if np.any(changed) else state
            before = prompt
            state, z = self.step(state, text, cut=cut, noise=part, given=given)
            yield index, prompt, cut, began, z
        if last is not None:
            last(state)

    def extend(self, video, prompts, *, seed=0, batch=1, shown=None):
        """``(state, carry)`` at the end of a given video, for ``stream(..., state=state, carry=carry)``: the video goes on.

        ``video``: uint8 ``[P,H,W,3]``, or any iterable of frames ``[H,W,3]`` (``inputs.read_frames``), encoded and remembered chunk by chunk in
        bounded memory. Whole chunks are kept, 29 + 32 k pixel frames for chunks of 8; what is left at the end is dropped and said in the log.
        ``prompts``: what the video shows, one prompt for all of it, or one per chunk as ``stream`` takes them, cuts included. Every sample of a
        batch goes on from the same video with its own noise. ``shown(frames)``: is given each chunk's frames as the decoder shows them,
        uint8 ``[T,H,W,3]``: what follows continues these, not the original's pixels.

        Raises ``ConfigError`` for frames of another size, a video shorter than a chunk, and prompts that are not one per chunk.
        """
        return extend(self, video, prompts, seed, batch, shown)

    # ---- what is refused

    def check(self, prompts):
        """Refuse prompts that cannot be read, before anything is compiled; one entry per chunk or a ``Storyboard``."""
        if self.tokenize is not None:
            self.tokenize(sorted({p for prompt in (prompts.prompts if isinstance(prompts, Storyboard) else prompts) for p in each(prompt)}))

    def checked(self, prompts, seed, batch, image, noise, state):
        """One prompt per chunk, the number of the first chunk, and the batch, for the arguments of ``stream``; refuses what cannot be."""
        first = 0 if state is None else int(state.chunk)
        batch = batch if state is None else state.offset.shape[0]
        self.check_batch(seed, batch)
        prompts = one_a_chunk(prompts, batch)
        if state is not None:
            self.check_state(state)
            held, n = int(state.memory.frame.max()) + 1, self.experiment.stream.chunk
            ok = held in (0, first * n)
            require(ok, f"the given state is at frame {held} after {first} chunks, and chunks have {n} frames here; make it with this session")
        if image is not None:
            require(self.vae is not None, "this session has no VAE, so it cannot read an image; give latents to step")
            self.vae.check_encoder()
            require(first == 0, f"an image starts a video, but the given state is at chunk {first}; leave one of the two out")
            self.check_image(image)
        if known := isinstance(prompts, list | tuple):
            self.check(prompts)
        if noise is not None:
            self.check_noise(noise, batch, first + (len(prompts) if known else 1))
        return prompts, first, batch

    def check_state(self, state):
        """Refuse a state that was made under other settings of the memory. What a state does not show may differ: docs/sampling.md.

        Reads shapes only, so it waits for no device.
        """
        stream, memory = self.experiment.stream, state.memory
        pairs = {
            "window": (memory.slots, stream.window),
            "sink": (memory.sink, stream.sink),
            "relative": (memory.relative, stream.relative),
            "recache": (state.held is not None, stream.recache),
            "guidance": (state.unguided is not None, self.guided),
        }
        wrong = [f"{name} is {there}, here {here}" for name, (there, here) in pairs.items() if there != here]
        require(not wrong, f"the given state was made under other settings ({'; '.join(wrong)}); make it with this session")

    def check_batch(self, seed, batch):
        data = self.experiment.mesh.data
        require(batch > 0, f"batch={batch} must be positive")
        require(batch % data == 0, f"batch={batch} does not divide over mesh.data={data}; use a multiple of {data}")
        require(0 <= seed <= 2**32 - batch, f"seed={seed} must lie in 0..{2**32 - batch} for a batch of {batch}")
        weights = self.transformer, None if self.separate else self.vae
        check_fits(jax.eval_shape(lambda: self.empty_state(seed, batch)), self.experiment.stream, weights, self.mesh.size)

    def check_noise(self, noise, batch, chunks):
        e = self.experiment
        rest = (*e.grid, e.transformer.channels)
        ok = noise.ndim == 5 and (noise.shape[0], *noise.shape[2:]) == (batch, *rest)
        require(ok, f"noise has shape {tuple(noise.shape)}; this video takes [B,frames,h,w,C] with B={batch} and h,w,C={rest}")
        check_frames(noise.shape[1], e.stream.chunk)
        need = chunks * e.stream.chunk
        require(noise.shape[1] >= need, f"noise has {noise.shape[1]} frames for {chunks} chunks of {e.stream.chunk}; give {need} frames")

    def check_image(self, image):
        size = (self.experiment.video.height, self.experiment.video.width, 3)
        require(tuple(image.shape) == size, f"image has shape {tuple(image.shape)}; this model takes {size}: resize or crop it")
        require(image.dtype == np.uint8, f"image is {image.dtype}; give uint8, 0 to 255")
        return image

    # ---- states as values

    def fork(self, state):
        """A copy of a state (or of any pytree of arrays): a step consumes its state, the copy stays."""
        return jax.tree.map(jnp.copy, state)

    def save(self, path, state, carry=None):
        """Write a state and the decoder's carry to one file, complete or not at all. Raises ``OutputError``."""
        save_arrays(path, {"state": state, "carry": carry})

    def load(self, path, batch=1):
        """``(state, carry)`` from ``save`` (carry None where none was saved), for a session of the same model and settings.

        Raises ``ConfigError`` listing every array that is missing or of another size.
        """
        carry = None if self.vae is None else jax.eval_shape(lambda: self.decode_start(batch))
        like = {"state": jax.eval_shape(lambda: self.empty_state(0, batch)), "carry": carry}
        out = load_arrays(path, like, optional=("carry",))
        state = jax.device_put(out["state"], self.shardings(out["state"])) if self.mesh.size > 1 else out["state"]
        return state, out["carry"]


def spread(batch, tree):
    """A tree of arrays ``[1,...]`` or ``[B,...]``, for every sample."""
    return jax.tree.map(lambda x: x if x.shape[0] == batch else jnp.broadcast_to(x, (batch, *x.shape[1:])), tree)


def finished(chunk, began, frames, ended, before):
    """The chunk with its frames and its time, and when its latents were there; it began once those of the chunk before it were."""
    began, ended = (before, before) if began is None else (began, ended)  # a later part of a chunk took no more
    seconds = ended - max(began, before)
    return replace(chunk, frames=frames[0] if frames.shape[0] == 1 else frames, denoise_seconds=seconds), ended


def apply_settings(experiment, settings):
    """The experiment with sampler and stream fields replaced by name."""
    names = {kind: [f.name for f in dataclasses.fields(kind)] for kind in (SamplerConfig, StreamConfig)}
    known = [n for fields in names.values() for n in fields]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(f"unknown session setting {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"))
    pick = lambda kind: {n: v for n, v in settings.items() if n in names[kind]}
    sampler, stream = replace(experiment.sampler, **pick(SamplerConfig)), replace(experiment.stream, **pick(StreamConfig))
    return replace(experiment, sampler=sampler, stream=stream)


def word_tokenizer(experiment):
    """The bundled word tokenizer, or None for models that need tokenizer files."""
    if experiment.text.tokenizer != "words":
        return None

    def tokenize(prompts):
        pairs = [toywords.tokenize(p, experiment.transformer.text_len) for p in prompts]
        return tuple(np.stack(x) for x in zip(*pairs, strict=True))

    return tokenize
