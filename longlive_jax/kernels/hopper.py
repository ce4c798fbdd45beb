"""An FP8 matrix product for Hopper (Mosaic GPU, wgmma): scales, bias and activation are applied to the sums in registers, rounded once, to
bfloat16 or to the FP8 values that the next product takes.

No library GEMM takes a scale a row, so that XLA writes a product in bfloat16 and reads it again for the scales. Persistent: one program an SM
takes tiles of the output, 128 x 256 or 128 x 128, in a snake that keeps operands in L2. One warpgroup loads by TMA into a ring of four stages
of 128 columns; two multiply 64 rows each, into 128 or 64 registers a thread, and store what they made through shared memory, 64 columns at a
time. The last tile of rows begins 128 rows before the end: where 128 does not divide them, some rows are made twice, alike. TMA wants the rows
in eights.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE_M, TILE_K, STAGES = 128, 128, 4
HALF = 64  # rows of a warpgroup, and columns of the output stored at a time
LOAD = 2  # the third warpgroup
GROUP = 8  # tiles in the width of the snake
ACTIVATIONS = (None, "gelu")
PROGRAMS = 132  # SMs of an H100; a chip with fewer runs the rest after the first
EXPONENT = -2.302208198144325, -0.1029432397  # -2 sqrt(2 / pi) / ln 2, and that times 0.044715


def fits(rows, shape):
    """Whether ``product`` takes ``rows`` of activations and a weight ``[out, in]``: rows from 128 on in eights, in from 512 and out in 128s."""
    return len(shape) == 2 and rows >= TILE_M and rows % 8 == shape[0] % 128 == shape[1] % TILE_K == 0 and shape[1] >= STAGES * TILE_K


def product(x, w, bias=None, activation=None, rounding=None):
    """``activation(x [..., in]`` times the transpose of ``w [out, in]`` ``+ bias [out])`` -> bfloat16 ``[..., out]``; both must ``fit``.

    x, w: ``(E4M3 values, float32 scales [..., 1])``, a scale a row. activation: None or "gelu", its tanh form. All of it in float32.
    rounding: float32 scales ``[..., 1]`` of the result -> E4M3 values instead, which saturate; 0 where a scale is 0, NaN where it is NaN.
    """
    k, n = x[0].shape[-1], w[0].shape[0]
    values, scale = x[0].reshape(-1, k), x[1].reshape(-1)
    m, tile_n = values.shape[0], 256 if n % 256 == 0 else 128
    grid = pl.cdiv(m, TILE_M), n // tile_n
    tiled = lambda columns, size: (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(columns * size))
    f8, out = jnp.float8_e4m3fn, jnp.dtype(jnp.bfloat16 if rounding is None else jnp.float8_e4m3fn)
    rows = (scale,) if rounding is None else (scale, rounding.reshape(-1))
    y = plgpu.kernel(
        functools.partial(kernel, grid, tile_n, k // TILE_K, activation, len(rows)),
        out_type=jax.ShapeDtypeStruct((m, n), out),
        grid=(min(PROGRAMS, grid[0] * grid[1]),),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="fp8_product",
        scratch_types=[
            plgpu.SMEM((STAGES, TILE_M, TILE_K), f8, transforms=tiled(TILE_K, 1)),
            plgpu.SMEM((STAGES, tile_n, TILE_K), f8, transforms=tiled(TILE_K, 1)),
            plgpu.SMEM((2, 2, HALF, HALF), out, transforms=tiled(HALF, out.itemsize)),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True),
    )(values, w[0], *rows, w[1].reshape(-1), *(() if bias is None else (bias,)))
    return y.reshape(*x[0].shape[:-1], n)


def kernel(grid, tile_n, steps, activation, scales, x, w, *rest):
    """One program. ``rest``: ``scales`` of rows, scales of columns, the bias if there is one, the output; then what ``product`` lists."""
    *rest, out, a, b, stage, loaded, consumed = rest
    rows, columns = rest[:scales], rest[scales:]
    warpgroup = lax.axis_index("warpgroup")

    def tiles(body):
        @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="program")
        def tile(info):
            row, column = plgpu.planar_snake(info.index[0], grid, 1, GROUP)
            body(info.local_index * steps, jnp.minimum(row * TILE_M, out.shape[0] - TILE_M), column * tile_n)

    @pl.when(warpgroup == LOAD)
    def produce():
        plgpu.set_max_registers(40, action="decrease")
        tiles(functools.partial(load, steps, ((x, a), (w, b)), loaded, consumed))
        for slot in range(STAGES):  # there are at least as many steps
            plgpu.barrier_wait(consumed.at[slot])

    @pl.when(warpgroup != LOAD)
    def consume():
        plgpu.set_max_registers(232, action="increase")

        def tile(first, row, column):
            row = row + warpgroup * HALF
            sums = functools.partial(multiply, first, steps, a, b, loaded, consumed, warpgroup)
            y = pl.run_scoped(sums, plgpu.ACC((HALF, tile_n), jnp.float32))
            scale, *rounding = (plgpu.load(r.at[pl.ds(row, HALF)], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False) for r in rows)
            of_rows = scale, *(jnp.where(r == 0, 0.0, 1 / r) for r in rounding)
            for i in range(tile_n // HALF):
                place = pl.ds(column + i * HALF, HALF)
                part = finish(y[:, i * HALF : (i + 1) * HALF], of_rows, [c.at[place] for c in columns], activation)
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                stage[warpgroup, i % 2] = part.astype(out.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(stage.at[warpgroup, i % 2], out.at[pl.ds(row, HALF), place])

        tiles(tile)
        plgpu.wait_smem_to_gmem(0)


def load(steps, operands, loaded, consumed, first, row, column):
    """TMA of all stages of a tile, each as soon as the products that read its slot are done. ``first``: steps before this tile."""

    def step(i, _):
        slot = lax.rem(first + i, jnp.int32(STAGES))
        pl.when(first + i >= STAGES)(lambda: plgpu.barrier_wait(consumed.at[slot]))
        for (source, ring), start in zip(operands, (row, column), strict=True):
            plgpu.copy_gmem_to_smem(source.at[pl.ds(start, ring.shape[1]), pl.ds(i * TILE_K, TILE_K)], ring.at[slot], loaded.at[slot])

    lax.fori_loop(0, steps, step, None)


def multiply(first, steps, a, b, loaded, consumed, warpgroup, acc):
    """The sums of 64 rows of a tile; a slot is handed back when the next one's product has begun."""

    def step(i, _):
        slot = lax.rem(first + i, jnp.int32(STAGES))
        plgpu.barrier_wait(loaded.at[slot])
        plgpu.wgmma(acc, a.at[slot, pl.ds(warpgroup * HALF, HALF)], b.at[slot].transpose((1, 0)))
        plgpu.wgmma_wait(1)
        pl.when(i > 0)(lambda: plgpu.barrier_arrive(consumed.at[lax.rem(first + i + STAGES - 1, jnp.int32(STAGES))]))

    lax.fori_loop(0, steps, step, None)
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(consumed.at[lax.rem(first + steps - 1, jnp.int32(STAGES))])
    return acc[...]


def finish(y, rows, columns, activation):
    """Scales, bias and activation of sums ``[64, 64]``. ``rows``: values of 64 scales, and of factors of the result; ``columns``: refs of 64
    scales, and of the bias."""

    def spread(values, axis):
        return plgpu.layout_cast(lax.broadcast_in_dim(values.astype(jnp.float32), y.shape, (axis,)), plgpu.Layout.WGMMA)

    column, *bias = (spread(plgpu.load(c, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False), 1) for c in columns)
    y = y * spread(rows[0], 0) * column
    for b in bias:
        y = y + b
    if activation == "gelu":  # y sigmoid(2 u) = y (1 + tanh(u)) / 2, exact in the tail too
        y = y / (1 + jnp.exp2(y * (EXPONENT[0] + EXPONENT[1] * y * y)))
    for factor in rows[1:]:
        y = y * spread(factor, 0)
    return y
