"""The delta rule with n factors a token, S <- e^{g_t} S, then n times S <- S + beta k (v - S^T k)^T, in chunks; o_t = scale S^T q_t.

A sub-step is one factor: sub-step s is of token s // n, is gated where s % n = 0 and read where s % n = n - 1, which makes DeltaProduct
(Siems et al., arXiv:2502.10297) a delta rule over sub-steps. Within a chunk of C of them, G the running sum of gates, the WY form (Yang
et al., arXiv:2406.06484): D_ij = e^{G_i - G_j}, i >= j, T = (I + strict_lower(beta K K^T o D))^-1 beta, A = scale (Q K^T) o D, and with the
state S before it

    U = T (V - e^G K S),    o = scale e^G Q S + A U,    S' = e^{G_C} S + K^T (e^{G_C - G} U).

States and sums are float32. What a state is multiplied by is of type OPERAND, the inputs' own, and the state is rounded to it as it is
read; T is made and applied in products of 32 bits. `within` makes T and A, which need no state, of all chunks at once. `across` then goes
from chunk to chunk, S on chip; its programs share nothing, a batch element, a head and a tile of v's width each. With T = I, U = V: linear
attention and retention.
"""

import triton
import triton.language as tl

RESET = tl.constexpr(-1e4)  # a logarithm whose exponential is 0; an infinite one would make 0 times infinity of sums


@triton.jit(do_not_specialize=["time", "chunks", "g_batch"])
def within(
    q, k, g, beta, attention, inverse, time, chunks, heads, queries, keys, key, factors, g_batch, g_time, scale,
    DECAY: tl.constexpr, DELTA: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: batch*heads*chunks. attention: (batch, heads, GROUP, chunks, C, C), inverse: (batch, heads, chunks, C, C), C = 2^LEVELS."""
    chunk, task = tl.program_id(0) % chunks, (tl.program_id(0) // chunks).to(tl.int64)
    batch, head = task // heads, task % heads
    i, d, length = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K), time * factors
    s = chunk * CHUNK + i
    square = i[:, None] * CHUNK + i[None, :]
    row, column = i[:, None], i[None, :]
    ks = written(k, batch * length + s, s < length, keys, head * keys // heads, key, d).to(OPERAND)
    seen = tl.where(row >= column, 1.0, 0.0)
    if DECAY:  # sums from j on, by a product with a triangle of ones: after a reset, differences of sums from the begin are rounding alone
        gate = gates(g + batch * g_batch + head, s, length, factors, g_time)
        sums = tl.dot(seen, tl.where(row > column, gate[:, None], 0.0), input_precision=EXACT)
        seen = tl.where(row >= column, tl.exp(sums), 0.0)
    if DELTA:
        betas = tl.load(beta + (batch * length + s) * heads + head, mask=s < length, other=0.0).to(tl.float32)
        lower = tl.dot(ks, tl.trans(ks), input_precision="ieee") * betas[:, None] * seen  # what is on the diagonal joins nothing
        made = tl.where(row == column, 1.0, 0.0)
        for level in range(LEVELS):  # inverses of blocks on the diagonal, each twice as large as the last
            joins = (row >> (level + 1) == column >> (level + 1)) & (row >> level != column >> level)
            below = tl.dot(tl.where(joins, lower, 0.0), made, input_precision=EXACT)
            made -= tl.dot(made, below, input_precision=EXACT)
        tl.store(inverse + (task * chunks + chunk) * CHUNK * CHUNK + square, made * betas[None, :])
    for n in tl.static_range(GROUP):
        number = head * queries // heads + n
        qs = asked(q, batch, s, time, queries, number, key, factors, d).to(OPERAND)
        rows = tl.dot(qs, tl.trans(ks), input_precision="ieee") * seen * scale
        tl.store(attention + ((task * GROUP + n) * chunks + chunk) * CHUNK * CHUNK + square, rows)


@triton.jit(do_not_specialize=["time", "chunks", "g_batch"])
def across(
    q, k, v, g, attention, inverse, before, out, after, time, chunks, heads, queries, keys, key, width, factors, g_batch, g_time, scale,
    DECAY: tl.constexpr, DELTA: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    OPERAND: tl.constexpr, ROUGH: tl.constexpr,
):  # fmt: skip
    """Grid: batch*heads, tiles of the width. before, after: (batch, heads, key, width); out: (batch, time, heads*GROUP, width)."""
    task = tl.program_id(0).to(tl.int64)
    batch, head = task // heads, task % heads
    i, d, c = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    length, square = time * factors, i[:, None] * CHUNK + i[None, :]
    place = task * key * width + d[:, None] * width + c[None, :]
    held = (d < key)[:, None] & (c < width)[None, :]
    state = tl.full((BLOCK_K, BLOCK_V), 0.0, tl.float32)
    if before is not None:
        state = tl.load(before + place, mask=held, other=0.0).to(tl.float32)
    for chunk in range(0, chunks):
        s = chunk * CHUNK + i
        step = batch * length + s
        there, wide = s < length, (c < width)[None, :]
        ks = written(k, step, there, keys, head * keys // heads, key, d).to(OPERAND)
        write = written(v, step, there, heads, head, width, c)
        since = tl.full((CHUNK,), 1.0, tl.float32)
        if DECAY:
            rates = g + batch * g_batch + head
            gate = gates(rates, s, length, factors, g_time)
            since = tl.exp(tl.associative_scan(gate, 0, plus))
            following = tl.where(i + 1 < CHUNK, gates(rates, s + 1, length, factors, g_time), 0.0)
            until = tl.exp(tl.associative_scan(following, 0, plus, reverse=True))
            whole = tl.exp(tl.reduce(gate, 0, plus))
        if DELTA:
            write -= tl.dot(ks, state.to(OPERAND), input_precision="ieee") * since[:, None]
            write = tl.dot(tl.load(inverse + (task * chunks + chunk) * CHUNK * CHUNK + square), write, input_precision=ROUGH)
        for n in tl.static_range(GROUP):
            qs = asked(q, batch, s, time, queries, head * queries // heads + n, key, factors, d).to(OPERAND)
            found = tl.dot(qs, state.to(OPERAND), input_precision="ieee") * (since * scale)[:, None]
            rows = tl.load(attention + ((task * GROUP + n) * chunks + chunk) * CHUNK * CHUNK + square)
            found += tl.dot(rows, write, input_precision=ROUGH)
            target = ((batch * time + s // factors)[:, None] * heads * GROUP + head * GROUP + n) * width + c[None, :]
            tl.store(out + target, found.to(out.dtype.element_ty), mask=(there & (s % factors == factors - 1))[:, None] & wide)
        if DECAY:
            state *= whole
            write *= until[:, None]
        state += tl.dot(tl.trans(ks), write.to(OPERAND), input_precision="ieee")
    tl.store(after + place, state.to(after.dtype.element_ty), mask=held)


@triton.jit
def gates(g, s, length, factors, g_time):
    """(C,): the logarithm at each token's first sub-step, 0 at the others; no number stays none."""
    found = tl.load(g + s // factors * g_time, mask=(s < length) & (s % factors == 0), other=0.0).to(tl.float32)
    return tl.where(found < RESET, RESET, found)


@triton.jit
def asked(q, batch, s, time, queries, number, key, factors, d):
    """(C, columns): a query at each token's last sub-step, zeros at the others."""
    return written(q, batch * time + s // factors, (s < time * factors) & (s % factors == factors - 1), queries, number, key, d)


@triton.jit
def written(x, step, there, heads, head, width, d):
    """(C, columns) float32: columns d of one head's rows of x (steps, heads, width), zeros where there are none."""
    place = (step[:, None] * heads + head) * width + d[None, :]
    return tl.load(x + place, mask=there[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def plus(a, b):
    return a + b
