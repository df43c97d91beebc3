"""The kernels. Only `triton_path` imports this, when it needs them: triton decides at import whether they are
compiled or interpreted (TRITON_INTERPRET=1).

Legend. M packs (row, token, group): the queries of one key head, `plan` says which. BLOCK_M of them are a
tile, BLOCK_N keys a block; BLOCK_D is D rounded up to a power of two. `factor` is the scores' scale times
log2(e): softmax is computed in powers of two. Strides count elements; addresses are 64-bit. UPCAST computes
in float32 whatever the tensors hold: triton's interpreter is silently wrong in bfloat16.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that change from batch to batch and that no address depends on: no new compilation for each.
COUNTS = ["H", "S", "M", "splits", "length"]


@triton.jit
def _rows_of(at, inside, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """[len(at), BLOCK_D], the rows that begin there; zero where not inside and beyond D."""
    d = tl.arange(0, BLOCK_D)
    x = tl.load(at[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _block_of(at, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """The same where all rows are inside: without a mask if D is a power of two."""
    d = tl.arange(0, BLOCK_D)
    pointer = at[:, None] + d[None, :]
    if D == BLOCK_D:
        x = tl.load(pointer)
    else:
        x = tl.load(pointer, mask=(d < D)[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _queries_of(queries, m, m_end, G: tl.constexpr):
    """(inside, row, token, group) of M indices."""
    inside = m < m_end
    at = queries + 4 * (m // G)
    row = tl.load(at, mask=inside, other=0).to(tl.int64)
    token = tl.load(at + 1, mask=inside, other=0).to(tl.int64)
    return inside, row, token, m % G


@triton.jit
def _own_of(queries, m, m_end, G: tl.constexpr):
    """The first and last suffix key that each query sees, in the table `keys`; none beyond the end."""
    at = queries + 4 * (m // G)
    begin = tl.load(at + 2, mask=m < m_end, other=0)
    return begin, begin + tl.load(at + 1, mask=m < m_end, other=-1)


@triton.jit
def _chunk_of(chunks, chunk):
    """(bank, first position, first block, block after the last, blocks before it in the run). Blocks of a
    chunk follow one another: with a table entry for each, the pipeline would wait for it at every load."""
    at = chunks + 4 * chunk
    return tl.load(at).to(tl.int64), tl.load(at + 1).to(tl.int64), 0, tl.load(at + 2), tl.load(at + 3)


@triton.jit
def _mixed_keys(n, key_begin, key_count, own_begin, suffix_count, keys, begin, end):
    """Keys `n` of a tile's loose prefix keys followed by its suffix keys: (is loose, is suffix, bank or row,
    position or token) and which are visible [BLOCK_M, BLOCK_N]. `begin`, `end`: a query's first and last
    suffix key in `keys`."""
    loose = n < key_count
    own = (n >= key_count) & (n < key_count + suffix_count)
    index = tl.where(loose, key_begin, own_begin - key_count) + n
    bank = tl.load(keys + 2 * index, mask=loose | own, other=0).to(tl.int64)
    position = tl.load(keys + 2 * index + 1, mask=loose | own, other=-1).to(tl.int64)
    own = own & (position >= 0)  # what stands beyond a row's length must not even be multiplied by zero
    suffix = n - key_count + own_begin
    causal = (suffix[None, :] >= begin[:, None]) & (suffix[None, :] <= end[:, None])
    return loose, own, bank, position, loose[None, :] | causal


@triton.jit
def _mixed_of(
    P, p_n, p_t, X, x_r, x_t, loose, own, bank, position,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_D] from the prefixes P where loose, else from the suffixes X. Two loads: a choice of
    pointers would hide from triton that rows are aligned, and cost a load for each element."""
    prefix = _rows_of(P + (bank * p_n + position * p_t), loose, D, BLOCK_D, UPCAST)
    suffix = _rows_of(X + (bank * x_r + position * x_t), own, D, BLOCK_D, UPCAST)
    return tl.where(loose[:, None], prefix, suffix)


@triton.jit
def _absorb(acc, total, peak, new_peak, shift, scores, factor, v):
    """One block of keys into the running softmax: `shift` is `new_peak`, finite."""
    p = tl.exp2(scores * factor - shift[:, None])
    shrink = tl.exp2(peak - shift)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total * shrink + tl.sum(p, 1), new_peak


@triton.jit(do_not_specialize=COUNTS)
def forward(
    Q, PK, PV, SK, SV, OUT, LSE, PART, PART_LSE, tiles, queries, chunks, keys,
    q_r, q_h, q_t, pk_n, pk_h, pk_t, pv_n, pv_h, pv_t, sk_r, sk_h, sk_t, sv_r, sv_h, sv_t, o_r, o_h, o_t,
    H, S, M, factor, splits,
    G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (tile, key head, split). Writes OUT and LSE [R, H, S]; with SPLIT its share of both, still in
    powers of two, to PART [splits, Hkv, M, D] and PART_LSE [splits, Hkv, M]."""
    head = tl.program_id(1).to(tl.int64)
    tile = tiles + 8 * tl.program_id(0)
    m_end, chunk_begin, chunk_count = tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    key_begin, key_count = tl.load(tile + 4), tl.load(tile + 5)
    own_begin, suffix_count = tl.load(tile + 6), tl.load(tile + 7)
    m = tl.load(tile) + tl.arange(0, BLOCK_M)
    inside, row, token, group = _queries_of(queries, m, m_end, G)
    query_head = head * G + group
    q = _rows_of(Q + (row * q_r + query_head * q_h + token * q_t), inside, D, BLOCK_D, UPCAST)

    mixed = key_count + suffix_count
    if SPLIT:
        split = tl.program_id(2)
        end = chunks + 4 * (chunk_begin + chunk_count - 1)
        some = chunk_count > 0
        blocks = tl.load(end + 2, mask=some, other=0) + tl.load(end + 3, mask=some, other=0)
        share = (blocks + splits - 1) // splits
        mixed = tl.where(split == splits - 1, mixed, 0)  # the last share of blocks is the smallest

    acc = tl.full([BLOCK_M, BLOCK_D], 0.0, tl.float32)
    total = tl.full([BLOCK_M], 0.0, tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for chunk in range(chunk_begin, chunk_begin + chunk_count):
        bank, start, first, last, before = _chunk_of(chunks, chunk)
        if SPLIT:
            last = tl.minimum(last, tl.maximum((split + 1) * share - before, 0))
            first = tl.minimum(last, tl.maximum(split * share - before, 0))
        k_base, v_base = PK + bank * pk_n + head * pk_h, PV + bank * pv_n + head * pv_h
        for block in range(first, last):
            position = start + block * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
            k = _block_of(k_base + position * pk_t, D, BLOCK_D, UPCAST)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
            v = _block_of(v_base + position * pv_t, D, BLOCK_D, UPCAST)
            acc, total, peak = _absorb(acc, total, peak, new_peak, new_peak, scores, factor, v)

    begin, end = _own_of(queries, m, m_end, G)
    for n in tl.range(0, mixed, BLOCK_N, num_stages=1):
        loose, own, bank, position, visible = _mixed_keys(
            n + tl.arange(0, BLOCK_N), key_begin, key_count, own_begin, suffix_count, keys, begin, end
        )
        k = _mixed_of(
            PK + head * pk_h, pk_n, pk_t, SK + head * sk_h, sk_r, sk_t, loose, own, bank, position,
            D, BLOCK_D, UPCAST,
        )  # fmt: skip
        v = _mixed_of(  # before the scores, so that both loads are under way at once
            PV + head * pv_h, pv_n, pv_t, SV + head * sv_h, sv_r, sv_t, loose, own, bank, position,
            D, BLOCK_D, UPCAST,
        )  # fmt: skip
        scores = tl.where(visible, tl.dot(q, tl.trans(k), input_precision="ieee"), float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # no key yet: -inf - -inf is NaN
        acc, total, peak = _absorb(acc, total, peak, new_peak, shift, scores, factor, v)

    total = tl.where(peak == float("-inf"), 1.0, total)  # a share without keys
    out, lse = acc * (1.0 / total)[:, None], peak + tl.log2(total)
    d = tl.arange(0, BLOCK_D)
    if SPLIT:
        at = (split * tl.num_programs(1) + head) * M + m
        tl.store(PART_LSE + at, lse, mask=inside)
        tl.store(PART + at[:, None] * D + d[None, :], out, mask=inside[:, None] & (d < D)[None, :])
    else:
        _finish(OUT, LSE, out, lse, inside, row, query_head, token, o_r, o_h, o_t, H, S, D, BLOCK_D)


@triton.jit
def _finish(
    OUT, LSE, out, lse, inside, row, head, token, o_r, o_h, o_t, H, S, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Write what is done; `lse` in powers of two."""
    d = tl.arange(0, BLOCK_D)
    at = row * o_r + head * o_h + token * o_t
    mask = inside[:, None] & (d < D)[None, :]
    tl.store(OUT + at[:, None] + d[None, :], out.to(OUT.dtype.element_ty), mask=mask)
    tl.store(LSE + (row * H + head) * S + token, lse * 0.6931471805599453, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def combine(
    OUT, LSE, PART, PART_LSE, tiles, queries, o_r, o_h, o_t, H, S, M, splits,
    G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (tile, key head): the shares of `forward` with SPLIT into OUT and LSE."""
    head = tl.program_id(1).to(tl.int64)
    tile = tiles + 8 * tl.program_id(0)
    m = tl.load(tile) + tl.arange(0, BLOCK_M)
    inside, row, token, group = _queries_of(queries, m, tl.load(tile + 1), G)
    acc = tl.full([BLOCK_M, BLOCK_D], 0.0, tl.float32)
    total = tl.full([BLOCK_M], 0.0, tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for split in range(0, splits):
        at = (split * tl.num_programs(1) + head) * M + m
        lse = tl.load(PART_LSE + at, mask=inside, other=0.0)
        part = _rows_of(PART + at * D, inside, D, BLOCK_D, False)
        new_peak = tl.maximum(peak, lse)
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight, shrink = tl.exp2(lse - shift), tl.exp2(peak - shift)
        acc = acc * shrink[:, None] + part * weight[:, None]
        total = total * shrink + weight
        peak = new_peak
    out, lse = acc * (1.0 / total)[:, None], peak + tl.log2(total)
    _finish(OUT, LSE, out, lse, inside, row, head * G + group, token, o_r, o_h, o_t, H, S, D, BLOCK_D)


@triton.jit(do_not_specialize=COUNTS)
def backward_queries(
    Q, PK, PV, SK, SV, DOUT, LSE, DELTA, DQ, tiles, queries, chunks, keys,
    q_r, q_h, q_t, pk_n, pk_h, pk_t, pv_n, pv_h, pv_t, sk_r, sk_h, sk_t, sv_r, sv_h, sv_t, o_r, o_h, o_t,
    dq_r, dq_h, dq_t, H, S, factor, scale,
    G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (tile, key head): DQ, by the tables of `forward`. DELTA [R, H, S]: (dout * out).sum - dlse."""
    head = tl.program_id(1).to(tl.int64)
    tile = tiles + 8 * tl.program_id(0)
    m_end, chunk_begin, chunk_count = tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    key_begin, key_count = tl.load(tile + 4), tl.load(tile + 5)
    own_begin, suffix_count = tl.load(tile + 6), tl.load(tile + 7)
    m = tl.load(tile) + tl.arange(0, BLOCK_M)
    inside, row, token, group = _queries_of(queries, m, m_end, G)
    query_head = head * G + group
    q = _rows_of(Q + (row * q_r + query_head * q_h + token * q_t), inside, D, BLOCK_D, UPCAST)
    dout = _rows_of(DOUT + (row * o_r + query_head * o_h + token * o_t), inside, D, BLOCK_D, UPCAST)
    at = (row * H + query_head) * S + token
    lse = tl.load(LSE + at, mask=inside, other=0.0) * 1.4426950408889634
    delta = tl.load(DELTA + at, mask=inside, other=0.0)

    acc = tl.full([BLOCK_M, BLOCK_D], 0.0, tl.float32)
    for chunk in range(chunk_begin, chunk_begin + chunk_count):
        bank, start, first, last, _ = _chunk_of(chunks, chunk)
        k_base, v_base = PK + bank * pk_n + head * pk_h, PV + bank * pv_n + head * pv_h
        for block in range(first, last):
            position = start + block * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
            k = _block_of(k_base + position * pk_t, D, BLOCK_D, UPCAST)
            v = _block_of(v_base + position * pv_t, D, BLOCK_D, UPCAST)
            p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * factor - lse[:, None])
            slope = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
            acc = tl.dot(slope.to(k.dtype), k, acc, input_precision="ieee")

    begin, end = _own_of(queries, m, m_end, G)
    for n in tl.range(0, key_count + suffix_count, BLOCK_N, num_stages=1):
        loose, own, bank, position, visible = _mixed_keys(
            n + tl.arange(0, BLOCK_N), key_begin, key_count, own_begin, suffix_count, keys, begin, end
        )
        k = _mixed_of(
            PK + head * pk_h, pk_n, pk_t, SK + head * sk_h, sk_r, sk_t, loose, own, bank, position,
            D, BLOCK_D, UPCAST,
        )  # fmt: skip
        scores = tl.where(visible, tl.dot(q, tl.trans(k), input_precision="ieee"), float("-inf"))
        p = tl.exp2(scores * factor - lse[:, None])
        v = _mixed_of(
            PV + head * pv_h, pv_n, pv_t, SV + head * sv_h, sv_r, sv_t, loose, own, bank, position,
            D, BLOCK_D, UPCAST,
        )  # fmt: skip
        slope = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
        acc = tl.dot(slope.to(k.dtype), k, acc, input_precision="ieee")

    d = tl.arange(0, BLOCK_D)
    at = row * dq_r + query_head * dq_h + token * dq_t
    dq = (acc * scale).to(DQ.dtype.element_ty)
    tl.store(DQ + at[:, None] + d[None, :], dq, mask=inside[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def backward_keys(
    Q, K, V, DOUT, LSE, DELTA, DK, DV, queries, bounds, readers,
    q_r, q_h, q_t, k_n, k_h, k_t, v_n, v_h, v_t, o_r, o_h, o_t, dk_n, dk_h, dk_t, dv_n, dv_h, dv_t,
    H, S, length, factor, scale,
    G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Program (block of a bank's keys, key head): DK and DV, of a prefix or (CAUSAL) of a row's suffix.

    A bank is one prefix or one row, `length` its number of positions. No atomics: a program owns its keys and
    walks over the queries that read them, so that results do not depend on timing.
    """
    head = tl.program_id(1).to(tl.int64)
    per_bank = (length + BLOCK_N - 1) // BLOCK_N
    bank = (tl.program_id(0) // per_bank).to(tl.int64)
    position = (tl.program_id(0) % per_bank) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    exists = position < length
    k = _rows_of(K + (bank * k_n + head * k_h + position * k_t), exists, D, BLOCK_D, UPCAST)
    v = _rows_of(V + (bank * v_n + head * v_h + position * v_t), exists, D, BLOCK_D, UPCAST)
    dk = tl.full([BLOCK_N, BLOCK_D], 0.0, tl.float32)
    dv = tl.full([BLOCK_N, BLOCK_D], 0.0, tl.float32)
    for reader in range(tl.load(bounds + tl.program_id(0)), tl.load(bounds + tl.program_id(0) + 1)):
        m_begin, m_end = tl.load(readers + 4 * reader), tl.load(readers + 4 * reader + 1)
        low, high = tl.load(readers + 4 * reader + 2), tl.load(readers + 4 * reader + 3)
        read = (position >= low) & (position < high)
        for start in range(m_begin, m_end, BLOCK_M):
            inside, row, token, group = _queries_of(queries, start + tl.arange(0, BLOCK_M), m_end, G)
            query_head = head * G + group
            q = _rows_of(Q + (row * q_r + query_head * q_h + token * q_t), inside, D, BLOCK_D, UPCAST)
            dout = _rows_of(DOUT + (row * o_r + query_head * o_h + token * o_t), inside, D, BLOCK_D, UPCAST)
            at = (row * H + query_head) * S + token
            lse = tl.load(LSE + at, mask=inside, other=0.0) * 1.4426950408889634
            delta = tl.load(DELTA + at, mask=inside, other=0.0)
            visible = read[:, None] & inside[None, :]
            if CAUSAL:
                visible = visible & (position[:, None] <= token[None, :])
            # Transposed, [BLOCK_N, BLOCK_M]: no product then needs a transposed operand of its own making.
            scores = tl.where(visible, tl.dot(k, tl.trans(q), input_precision="ieee"), float("-inf"))
            p = tl.exp2(scores * factor - lse[None, :])
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
            slope = p * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta[None, :])
            slope = tl.where(visible, slope, 0.0)  # beyond a length v may hold anything
            dk = tl.dot(slope.to(q.dtype), q, dk, input_precision="ieee")

    d = tl.arange(0, BLOCK_D)
    mask = exists[:, None] & (d < D)[None, :]
    at = bank * dk_n + head * dk_h + position * dk_t
    tl.store(DK + at[:, None] + d[None, :], (dk * scale).to(DK.dtype.element_ty), mask=mask)
    at = bank * dv_n + head * dv_h + position * dv_t
    tl.store(DV + at[:, None] + d[None, :], dv.to(DV.dtype.element_ty), mask=mask)


# How triton took this module and its own functions; under TRITON_INTERPRET=1 neither is compiled.
COMPILED = isinstance(forward, triton.JITFunction) and isinstance(tl.max, triton.JITFunction)
INTERPRETED = not isinstance(forward, triton.JITFunction) and not isinstance(tl.max, triton.JITFunction)
