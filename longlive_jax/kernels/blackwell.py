"""A block-scaled NVFP4 matrix product for Blackwell: Mosaic GPU, tcgen05, compiled for sm_100a and **never run on one**.

Persistent: one program an SM takes tiles of the output, 128 x 256 or 128 x 128, in a snake that keeps operands in L2, until none is left. Three
parts of a program overlap: one warp loads codes and block scales by TMA into a ring of 3 or 5 stages; one warp copies a stage's scales to
tensor memory and issues ``tcgen05.mma.kind::mxf4nvf4.block_scale``; one warpgroup scales the accumulator by the tensors' scales, rounds it to
bfloat16 and stores it. Tiles 128 wide have two accumulators, so that this last part overlaps with the next tile too; 256 wide ones have one,
because two and the scales exceed the 512 columns of tensor memory.

Scales travel in the blocked layout of ``formats.swizzle``, the one that ``tcgen05.cp`` copies. What is not here: pairs of SMs that share an
operand (two-CTA MMA), tuning on the hardware. Mosaic's interpreter of jax 0.11.2 knows ``tcgen05_mma``, but neither scaled operands nor
the copy of scales; tests run the same schedule interpreted with bfloat16 operands (``schedule``), and check the compiled instructions.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.config import require
from longlive_jax.quant.formats import BLOCK, COLUMN_TILE, ROW_TILE, as_float4, swizzle

TILE_M = 128
TILE_K = 256  # codes of a stage: 128 bytes a row, the width of the widest swizzle
STORE_COLUMNS = 64  # of the accumulator stored at a time
LOAD, MULTIPLY = 0, 1  # warps of the first warpgroup
STORE = 1  # the second warpgroup
GROUP = 8  # tiles in the width of the snake


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of a product ``[m, k] x [n, k]``; validated where it is made."""

    m: int
    n: int
    k: int
    scaled: bool = True  # E2M1 codes and block scales; False: bfloat16 operands, for the interpreter

    def __post_init__(self):
        for name, size, unit in (("rows", self.m, TILE_M), ("out", self.n, 128), ("in", self.k, self.tile_k)):
            require(
                size > 0 and size % unit == 0,
                f"the NVFP4 matmul kernel takes {name} in multiples of {unit}, not {size}: pad it to {max(-(-size // unit), 1) * unit}, "
                "or use jax.nn.scaled_matmul",
            )

    @property
    def tile_n(self):
        return 256 if self.n % 256 == 0 else 128

    @property
    def tile_k(self):
        return TILE_K if self.scaled else TILE_K // 4  # the same bytes

    @property
    def stages(self):
        """As many as shared memory holds."""
        return 5 if self.tile_n == 128 else 3

    @property
    def accumulators(self):
        return 2 if self.tile_n == 128 else 1

    @property
    def dtype(self):
        return jnp.dtype(jnp.float4_e2m1fn if self.scaled else jnp.bfloat16)


def matmul(a, b):
    """``a [m, k]`` times the transpose of ``b [n, k]``, both ``(codes [., k/2], scales [., k/16], scale [])`` of NVFP4 -> bfloat16 ``[m, n]``.

    The reference is ``kernels.multiply``. m and n must be multiples of 128 and k of 256, else ``ConfigError``. Needs a GPU with tcgen05; see
    the module on what was never run.
    """
    sizes = [(*codes.shape[:-1], 2 * codes.shape[-1]) for codes in (a[0], b[0])]
    require(
        all(len(s) == 2 for s in sizes) and sizes[0][1] == sizes[1][1],
        f"the NVFP4 matmul kernel takes codes [rows, in/2] and [out, in/2], not {a[0].shape} and {b[0].shape}; reshape to matrices",
    )
    for (codes, scales, _), (rows, k) in zip((a, b), sizes):
        require(
            codes.dtype == jnp.uint8 and scales.dtype == jnp.float8_e4m3fn and scales.shape == (rows, k // BLOCK),
            f"NVFP4 codes {codes.dtype} {codes.shape} need scales float8_e4m3fn {(rows, k // BLOCK)}, not {scales.dtype} {scales.shape}; "
            "encode with quant.formats.encode_nvfp4",
        )
    plan = Plan(sizes[0][0], sizes[1][0], sizes[0][1])
    scale = (a[2] * b[2]).astype(jnp.float32).reshape(1)
    return product(plan, as_float4(a[0]), as_float4(b[0]), scale, (blocked(a[1]), blocked(b[1])))


def schedule(x, w, scale):
    """The kernel without block scales: bfloat16 ``x [m, k]`` times the transpose of ``w [n, k]``, times ``scale``. For the interpreter."""
    return product(Plan(*x.shape[:1], *w.shape, scaled=False), x, w, jnp.asarray(scale, jnp.float32).reshape(1), ())


def blocked(scales):
    """``[r, c] -> [r/128, c/4, 32, 16]``: ``swizzle`` with its tiles apart."""
    rows, columns = scales.shape
    return swizzle(scales).reshape(rows // ROW_TILE, columns // COLUMN_TILE, 32, 16)


def product(plan, a, b, scale, scales):
    """Run the kernel. ``scales``: blocked ones of both operands, or none."""
    return plgpu.kernel(
        functools.partial(kernel, plan),
        out_type=jax.ShapeDtypeStruct((plan.m, plan.n), jnp.bfloat16),
        grid=(plan.m // TILE_M * (plan.n // plan.tile_n),),
        grid_names=("tiles",),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        scratch_types=scratch(plan),
    )(a, b, scale, *scales)


def scratch(plan):
    """Stages in shared memory, accumulators and scales in tensor memory, barriers."""
    tiled = lambda dtype, columns: tile_transforms(dtype, columns)
    operand = lambda rows: plgpu.SMEM((plan.stages, rows, plan.tile_k), plan.dtype, transforms=tiled(plan.dtype, plan.tile_k))
    out = {
        "a_smem": operand(TILE_M),
        "b_smem": operand(plan.tile_n),
        "out_smem": plgpu.SMEM((2, TILE_M, STORE_COLUMNS), jnp.bfloat16, transforms=tiled(jnp.bfloat16, STORE_COLUMNS)),
        "accumulator": plgpu.TMEM((TILE_M, plan.accumulators * plan.tile_n), jnp.float32),
        "loaded": plgpu.Barrier(num_arrivals=4 if plan.scaled else 2, num_barriers=plan.stages),
        "consumed": plgpu.Barrier(num_arrivals=1, num_barriers=plan.stages, orders_tensor_core=True),
        "multiplied": plgpu.Barrier(num_arrivals=1, num_barriers=plan.accumulators, orders_tensor_core=True),
        "stored": plgpu.Barrier(num_arrivals=1, num_barriers=plan.accumulators, orders_tensor_core=True),
    }
    if plan.scaled:
        columns, f8 = plan.tile_k // BLOCK, jnp.float8_e4m3fn
        for name, rows in (("a", TILE_M), ("b", plan.tile_n)):
            out[f"{name}_scales_smem"] = plgpu.SMEM((plan.stages, rows // ROW_TILE, columns // COLUMN_TILE, 32, 16), f8)
            out[f"{name}_scales"] = plgpu.TMEM((rows, columns), f8, layout=plgpu.TMEMLayout.SCALES_LAYOUT)
    return out


def tile_transforms(dtype, columns):
    bits = jnp.finfo(dtype).bits
    swizzle_bytes = plgpu.find_swizzle(columns * bits)
    return plgpu.TilingTransform((8, 8 * swizzle_bytes // bits)), plgpu.SwizzleTransform(swizzle_bytes)


def kernel(plan, a, b, scale, *rest, **memory):
    """One persistent program. ``rest``: the blocked scales, and the output."""
    *scales, out = rest
    warpgroup = lax.axis_index("warpgroup")

    @plgpu.dynamic_scheduling_loop(grid_names=("tiles",), thread_axis="warpgroup", init_carry=jnp.int32(0))
    def tiles(info, carry):
        row, column = plgpu.planar_snake(info.index[0], (plan.m // TILE_M, plan.n // plan.tile_n), 1, GROUP)
        slot = lax.rem(info.local_index, jnp.int32(plan.accumulators))

        @pl.when(warpgroup != STORE)
        def produce():
            @plgpu.warp_map
            def warps(warp):
                pl.when(warp == LOAD)(lambda: load(plan, a, b, scales, memory, row, column, info.local_index))
                pl.when(warp == MULTIPLY)(lambda: multiply(plan, memory, info.local_index, slot))

        pl.when(warpgroup == STORE)(lambda: store(plan, scale, out, memory, row, column, slot))
        return carry + 1

    pl.when(warpgroup != STORE)(lambda: drain(plan, memory, tiles))
    pl.when(warpgroup == STORE)(lambda: plgpu.wait_smem_to_gmem(0))


def drain(plan, memory, tiles):
    """Observe the last phase of every barrier that is waited on only before it is used again. ``tiles``: how many this program had."""

    @plgpu.warp_map
    def warps(warp):
        for slot in range(min(plan.stages, plan.k // plan.tile_k)):
            pl.when(warp == LOAD)(functools.partial(plgpu.barrier_wait, memory["consumed"].at[slot]))
        for slot in range(plan.accumulators):
            pl.when(jnp.logical_and(warp == MULTIPLY, tiles > slot))(functools.partial(plgpu.barrier_wait, memory["stored"].at[slot]))


def load(plan, a, b, scales, memory, row, column, index):
    """TMA of all stages of a tile, each as soon as the product that read its slot is done."""

    def stage(step, _):
        slot = lax.rem(step, plan.stages)
        pl.when(jnp.logical_or(step >= plan.stages, index > 0))(lambda: plgpu.barrier_wait(memory["consumed"].at[slot]))
        inner, barrier = pl.ds(step * plan.tile_k, plan.tile_k), memory["loaded"].at[slot]
        for ref, name, place, size in ((a, "a", row, TILE_M), (b, "b", column, plan.tile_n)):
            plgpu.copy_gmem_to_smem(ref.at[pl.ds(place * size, size), inner], memory[f"{name}_smem"].at[slot], barrier)
        if scales:
            width = plan.tile_k // BLOCK // COLUMN_TILE
            for ref, name, place, size in ((scales[0], "a", row, TILE_M), (scales[1], "b", column, plan.tile_n)):
                tall = size // ROW_TILE
                source = ref.at[pl.ds(place * tall, tall), pl.ds(step * width, width)]
                plgpu.copy_gmem_to_smem(source, memory[f"{name}_scales_smem"].at[slot], barrier)

    lax.fori_loop(0, plan.k // plan.tile_k, stage, None)


def multiply(plan, memory, index, slot):
    """All products of a tile; one thread issues, so that scales are in place before the product that follows their copy."""
    pl.when(index >= plan.accumulators)(lambda: plgpu.barrier_wait(memory["stored"].at[slot]))
    steps = plan.k // plan.tile_k
    accumulator = memory["accumulator"].at[:, pl.ds(slot * plan.tile_n, plan.tile_n)]

    def stage(step, _):
        place = lax.rem(step, plan.stages)
        plgpu.barrier_wait(memory["loaded"].at[place])
        scales = {}
        if plan.scaled:
            for name in ("a", "b"):
                plgpu.async_copy_scales_to_tmem(memory[f"{name}_scales_smem"].at[place], memory[f"{name}_scales"])
            scales = {"a_scale": memory["a_scales"], "b_scale": memory["b_scales"]}
        plgpu.tcgen05_mma(
            accumulator,
            memory["a_smem"].at[place],
            memory["b_smem"].at[place].transpose((1, 0)),
            memory["consumed"].at[place],
            accumulate=step > 0,
            **scales,
        )
        pl.when(step == steps - 1)(lambda: plgpu.tcgen05_commit_arrive(memory["multiplied"].at[slot]))

    lax.fori_loop(0, steps, stage, None)


def store(plan, scale, out, memory, row, column, slot):
    """The epilogue: tensor memory to registers, times the tensors' scales, to bfloat16, by TMA to the output."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_wait(memory["multiplied"].at[slot])
    factor = scale[0]
    for i in range(plan.tile_n // STORE_COLUMNS):
        buffer = memory["out_smem"].at[i % 2]
        values = plgpu.async_load_tmem(memory["accumulator"].at[:, pl.ds(slot * plan.tile_n + i * STORE_COLUMNS, STORE_COLUMNS)])
        buffer[...] = (values * factor).astype(jnp.bfloat16)
        plgpu.commit_smem()
        columns = pl.ds(column * plan.tile_n + i * STORE_COLUMNS, STORE_COLUMNS)
        plgpu.copy_smem_to_gmem(buffer, out.at[pl.ds(row * TILE_M, TILE_M), columns])
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    plgpu.wait_load_tmem()  # all of the accumulator is read before it is handed back
    plgpu.barrier_arrive(memory["stored"].at[slot])
