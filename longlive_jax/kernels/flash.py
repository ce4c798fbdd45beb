"""Softmax attention for Hopper (Mosaic GPU, wgmma): bfloat16, head dimension 128, every query sees every key.

A program takes 128 queries of a head: two warpgroups keep 64 each in registers, a third loads keys and values by TMA, 128 at a time. A
warpgroup starts the scores of the next keys together with the weighted values of these, so that its softmax runs beside its own product, and
the two take turns at the tensor cores. Two programs, a cluster, load the keys and values of a head once for both, and the programs of a head
run at the same time, from L2.

Softmax does not depend on what is subtracted from the scores, as long as float32 holds the weights, which go to the products in bfloat16, of
the same range. So only the first 128 keys of a row are searched for a largest score, and nothing is scaled again; where the sum of a row's
weights comes near the end of that range, or is NaN, the program does its rows once more with the largest score of all keys so far.
An H100 is bound by its power here: what is not computed and not read twice is what is gained over cuDNN's kernel.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

HALF, TILE = 64, 128  # queries of a warpgroup, and of a program
KEYS, DIM, STAGES = 128, 128, 2  # keys at a time, head dimension, slots of the rings
LOAD, PAIR = 2, 2  # the third warpgroup; programs of a cluster
LIMIT = 2.0**90  # of a sum of weights; with values up to 2**36, weighted ones stay in float32's range
ROWS, WIDE = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA
TRANSFORMS = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)


def fits(q, k):
    """Whether ``attend`` takes ``q [B,M,N,Dh]``, ``k [B,K,N,Dh]``: bfloat16, Dh 128, M from 128 on in eights, K from 256 on in 128s."""
    rows, keys = q.shape[1], k.shape[1]
    alike = q.dtype == k.dtype == jnp.bfloat16 and q.shape[-1] == DIM
    return alike and rows >= TILE and rows % 8 == keys % KEYS == 0 and keys >= STAGES * KEYS


def attend(q, k, v):
    """``softmax(q k^T / sqrt(Dh)) v``: ``q [B,M,N,Dh]``, ``k``, ``v`` ``[B,K,N,Dh]``, which must ``fit`` -> ``[B,M,N,Dh]``."""
    samples, rows, heads, _ = q.shape
    tiles = pl.cdiv(rows, TILE)
    pairs, left = divmod(tiles, PAIR)
    ring = plgpu.SMEM((STAGES, KEYS, DIM), q.dtype, transforms=TRANSFORMS)
    loaded = plgpu.Barrier(num_barriers=STAGES)
    done = plgpu.ClusterBarrier(collective_axes=("pair",), num_arrivals=2, num_barriers=STAGES)
    freed, each = plgpu.Barrier(num_arrivals=2, num_barriers=STAGES), plgpu.Barrier(num_barriers=2)  # each: one a warpgroup
    own, flags = plgpu.SMEM((2, HALF, DIM), q.dtype, transforms=TRANSFORMS), plgpu.SMEM((2,), jnp.float32)
    return plgpu.kernel(
        functools.partial(kernel, pairs, k.shape[1] // KEYS),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(heads * pairs + left * pl.cdiv(heads, PAIR), samples),
        grid_names=("place", "sample"),
        cluster=(PAIR,),
        cluster_names=("pair",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="attention",
        scratch_types=[own, ring, ring, flags, each, loaded, loaded, done, done, freed, freed, each, plgpu.Barrier(num_arrivals=2)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True),
    )(q, k, v)


def kernel(pairs, steps, q, k, v, out, own, keys, values, flags, q_loaded, k_loaded, v_loaded, k_done, v_done, k_freed, v_freed, turn, decided):
    """One program. Where the tiles of a head are odd, its last one runs beside that of another head, and each loads its own."""
    place, sample, member = (lax.axis_index(name) for name in ("place", "sample", "pair"))
    heads, shared = q.shape[2], place < q.shape[2] * pairs
    head = jnp.where(shared, lax.div(place, jnp.int32(max(pairs, 1))), (place - heads * pairs) * PAIR + member)
    head = jnp.minimum(head, heads - 1)  # an odd number of heads: the last program does what another does, alike
    tile = jnp.where(shared, lax.rem(place, jnp.int32(max(pairs, 1))) * PAIR + member, pairs * PAIR)
    first = jnp.minimum(tile * TILE, q.shape[1] - TILE)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == LOAD)
    def produce():
        plgpu.set_max_registers(40, action="decrease")
        rings = lambda k_free, v_free: ((k, keys, k_loaded, k_free), (v, values, v_loaded, v_free))
        load = lambda axes, *done: functools.partial(load_all, steps, axes, (sample, head), *rings(*done))
        pl.when(shared)(load("pair", k_done, v_done))
        pl.when(~shared)(load(None, k_done, v_done))
        pl.when(careful_needed(flags, decided))(load(None, k_freed, v_freed))

    @pl.when(warpgroup != LOAD)
    def consume():
        plgpu.set_max_registers(232, action="increase")
        rows = pl.ds(first + warpgroup * HALF, HALF)
        plgpu.copy_gmem_to_smem(q.at[sample, rows, head], own.at[warpgroup], q_loaded.at[warpgroup])
        plgpu.barrier_wait(q_loaded.at[warpgroup])
        queries = plgpu.load(own.at[warpgroup], layout=WIDE)

        def attended(careful, *done):
            pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
            stream = functools.partial(attend_half, careful, steps, warpgroup, queries, keys, values, k_loaded, v_loaded, *done, turn)
            y, sums = pl.run_scoped(stream, plgpu.ACC((HALF, DIM), jnp.float32))
            pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(turn.at[0]))
            own[warpgroup] = (y / spread(sums, DIM)).astype(own.dtype)
            return jnp.max(sums)

        flags[warpgroup] = attended(False, k_done, v_done)
        plgpu.barrier_arrive(decided)

        @pl.when(careful_needed(flags, decided))
        def again():
            attended(True, k_freed, v_freed)

        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own.at[warpgroup], out.at[sample, rows, head])
        plgpu.wait_smem_to_gmem(0)


def careful_needed(flags, decided):
    """Whether weights of this program's rows left the range of their reference, NaN included; waits for both warpgroups."""
    plgpu.barrier_wait(decided)
    return ~(jnp.maximum(flags[0], flags[1]) < LIMIT)


def load_all(steps, axes, place, *rings):
    """TMA of all keys and values, each as soon as its slot is free, and the wait for the last reader."""

    def step(i, _):
        slot = lax.rem(i, jnp.int32(STAGES))
        for source, ring, loaded, done in rings:
            pl.when(i >= STAGES)(functools.partial(plgpu.barrier_wait, done.at[slot]))
            part = source.at[place[0], pl.ds(i * KEYS, KEYS), place[1]]
            plgpu.copy_gmem_to_smem(part, ring.at[slot], loaded.at[slot], collective_axes=axes)

    lax.fori_loop(0, steps, step, None)
    for slot in range(STAGES):
        for *_, done in rings:
            plgpu.barrier_wait(done.at[slot])


def spread(x, columns):
    return lax.broadcast_in_dim(x, (HALF, columns), (0,))


def attend_half(careful, steps, warpgroup, q, keys, values, k_loaded, v_loaded, k_done, v_done, turn, acc):
    """64 queries over all keys: sums of values weighted by ``exp2(score - reference)`` ``[64, Dh]``, and of the weights ``[64]``.

    The reference is a row's largest score, of its first keys or, ``careful``, of all so far: then sums are scaled as it grows.
    """
    slot_of = lambda i: lax.rem(jnp.int32(i), jnp.int32(STAGES))
    scale = DIM**-0.5 * math.log2(math.e)

    def wait_for_keys(i):
        pl.when(i < steps)(lambda: plgpu.barrier_wait(k_loaded.at[slot_of(i)]))

    def weighted(i, p):
        plgpu.barrier_wait(v_loaded.at[slot_of(i)])
        plgpu.wgmma(acc, p, values.at[slot_of(i)])

    def scores(i, p, s):
        """The scores of keys ``i``, while the weights ``p`` of the keys before meet their values."""
        plgpu.barrier_wait(turn.at[warpgroup])
        plgpu.wgmma(s, q, keys.at[slot_of(i)].transpose((1, 0)))
        if p is not None:
            weighted(i - 1, p)
        plgpu.barrier_arrive(turn.at[1 - warpgroup])
        s = plgpu.wgmma_accumulator_load(s, wait_n=0 if p is None else 1)
        plgpu.barrier_arrive(k_done.at[slot_of(i)])
        return s

    def softmax(i, p, reference, sums):
        s = pl.run_scoped(functools.partial(scores, i, p), plgpu.ACC((HALF, KEYS), jnp.float32))
        shrink = None
        if careful or p is None:
            before, reference = reference, jnp.maximum(reference, s.max(1) * scale)
            shrink = jnp.exp2(before - reference)
            sums = sums * shrink
        p = jnp.exp2(s * scale - spread(reference, KEYS))
        out = lax.optimization_barrier((p, reference, sums + p.sum(1), *([shrink] if careful else [])))
        wait_for_keys(i + 1)  # here, so that the assembler leaves what is before it before the next wait
        return out

    def step(i, carry):
        p, reference, sums, *shrink = softmax(i, *carry)
        if careful:
            y = plgpu.wgmma_accumulator_load(acc, wait_n=0)
            acc[...] = y * spread(shrink[0], DIM)
        else:
            plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(v_done.at[slot_of(i - 1)])
        return p.astype(q.dtype), reference, sums

    row = lambda fill: plgpu.layout_cast(jnp.full((HALF,), fill, jnp.float32), ROWS)
    wait_for_keys(0)
    p, reference, sums, *_ = softmax(0, None, row(-jnp.inf), row(0))
    p, _, sums = lax.fori_loop(1, steps, step, (p.astype(q.dtype), reference, sums))
    weighted(steps - 1, p)
    y = plgpu.wgmma_accumulator_load(acc, wait_n=0)
    plgpu.barrier_arrive(v_done.at[slot_of(steps - 1)])
    return y, sums
