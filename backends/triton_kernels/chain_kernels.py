"""y[at + b p + j] = f(scale[b, j] sum_i x[first + b block + i//run jump + i%run step] w[b, i, j] + bias[b p + j]), a tile at a time.

A program makes a tile of rows and columns of one block b, its sums in float32. With few rows there are too few tiles to fill a device, so
the i may be split among programs as well; `collected` then adds their sums, always in the same order. Only what Triton's interpreter runs
whichever way triton was imported is used: no tl.sum, tl.zeros or tl.sigmoid.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def product(
    x, w, scale, bias, y, partial, rows, x_row, y_row, at, first, block, run, jump, step, q, p, valid, width,
    ONE_RUN: tl.constexpr, ACTIVATION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of rows and columns, blocks, splits. partial: (SPLIT, rows, blocks*p) float32, where SPLIT > 1."""
    tiles_t, tiles_p = (rows + BLOCK_T - 1) // BLOCK_T, (p + BLOCK_P - 1) // BLOCK_P
    inside = tl.program_id(0) % (GROUP * tiles_p)  # GROUP tiles of rows, column by column: neighbours share tiles in the cache
    top = tl.program_id(0) // (GROUP * tiles_p) * GROUP
    height = tl.minimum(tiles_t - top, GROUP)
    b, part = tl.program_id(1), tl.program_id(2)
    t = (top + inside % height) * BLOCK_T + tl.arange(0, BLOCK_T)
    j = inside // height * BLOCK_P + tl.arange(0, BLOCK_P)
    source = x + t.to(tl.int64)[:, None] * x_row + (first + b * block)
    weight = w + b.to(tl.int64) * q * p + j[None, :]
    total = tl.full((BLOCK_T, BLOCK_P), 0.0, tl.float32)
    for begin in range(part * BLOCK_Q, q, SPLIT * BLOCK_Q):
        i = begin + tl.arange(0, BLOCK_Q)
        place = i * step if ONE_RUN else i // run * jump + i % run * step
        there = (i < q) & (b * q + i < valid)
        values = tl.load(source + place[None, :], mask=(t < rows)[:, None] & there[None, :], other=0.0)
        factor = tl.load(weight + i[:, None] * p, mask=(i < q)[:, None] & (j < p)[None, :], other=0.0)
        if INTERPRETED:  # which multiplies bfloat16 as if it were integers
            total = tl.dot(values.to(tl.float32), factor.to(tl.float32), total)
        else:
            total = tl.dot(values, factor.to(values.dtype), total, input_precision="ieee")
    column = b * p + j
    wanted = (j < p) & (column < width)
    kept = (t < rows)[:, None] & wanted[None, :]
    if SPLIT > 1:
        row = (part.to(tl.int64) * rows + t)[:, None] * (tl.num_programs(1) * p)
        tl.store(partial + row + column[None, :], total, mask=kept)
    else:
        made = ended(total, scale, bias, column[None, :], wanted[None, :], ACTIVATION)
        tl.store(y + t.to(tl.int64)[:, None] * y_row + at + column[None, :], made.to(y.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["rows"])
def collected(
    partial, scale, bias, y, rows, columns, y_row, at, width, ACTIVATION: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The sums of all splits, ended. Grid: rows, tiles of columns."""
    t, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wanted = column < width
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for part in range(SPLIT):
        total += tl.load(partial + (part * rows + t) * columns + column, mask=wanted, other=0.0)
    made = ended(total, scale, bias, column, wanted, ACTIVATION)
    tl.store(y + t * y_row + at + column, made.to(y.dtype.element_ty), mask=wanted)


@triton.jit
def copied(x, y, pairs, count, x_row, y_row, BLOCK: tl.constexpr):
    """y[pairs[c, 1]] = x[pairs[c, 0]], zero where that is negative. Grid: rows, tiles of pairs."""
    t, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(pairs + 2 * c, mask=c < count, other=-1)
    target = tl.load(pairs + 2 * c + 1, mask=c < count, other=0)
    tl.store(y + t * y_row + target, tl.load(x + t * x_row + source, mask=source >= 0, other=0.0), mask=c < count)


@triton.jit
def ended(y, scale, bias, column, wanted, ACTIVATION: tl.constexpr):
    """activation(scale y + bias); what is not a number stays so."""
    if scale is not None:
        y *= tl.load(scale + column, mask=wanted, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + column, mask=wanted, other=0.0).to(tl.float32)
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)
    elif ACTIVATION == "gelu":
        y *= 0.5 * (1 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu-tanh":  # (1 + tanh u) / 2 = 1 / (1 + e^-2u), u = sqrt(2 / pi) (y + 0.044715 y^3)
        y /= 1 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACTIVATION == "silu":
        y /= 1 + tl.exp(-y)
    return y
