"""Decode attention over packed codes, as three launches that a CUDA graph can hold.

1. `prepare`: rotate the queries once.
2. `split`: each program reads a part of the packed tokens of one KV head, for all query rows of that head together.
   Keys are the left operand of the dot (16 tokens a warp), the query rows, padded to 8, the right one. A part begins
   with the scores of its groups' means; the first parts of a head attend to the exact tokens (sinks and window) before,
   while `prepare` still runs, and take as many packed tokens less.
3. `merge`: join the parts by their maxima and sums, and rotate the sum of values back once.

Scores are kept in base 2. Soft caps bend them before anything is masked; a query head's learned sink is one more
score in `merge`, without a value. Values may have other dims (VD) than keys. A packed key is
`center + mean_of_group + scale * level`; the first two enter as a bias that is the same for a whole group. Weights are
multiplied by the value's scale before the second dot.

| launch | grid | reads | writes |
|---|---|---|---|
| `prepare` | (head, block of dims) | queries, rotation, center | QP, QS (head, BM, D); BASE (head, block, BM) |
| `split` | (part, head) | all of these, codes, exact tokens | O (head, slot, BM, D); M, L (head, slot, BM) |
| `merge` | (batch, query, query head), as one number | O, M, L, rotation | the output (batch, query, query head, D) |

A "head" is a KV head of one row of the batch; its BM query rows are (query head of the group, query token), padded.
Slots are `splits` parts of packed tokens, whose sums are still rotated, then `PARTS` parts of exact ones, not rotated.
Codes are (batch, kv_heads, tokens, bytes) as `quant.packing` lays them out; all strides are in elements, and the last
axes are contiguous. Names in capitals are pointers or known when a kernel is compiled.
"""

import triton
import triton.language as tl

from turboquant.kernels.triton.levels import halves, load_table, quarters, word_halves, word_quarters

FLOOR = tl.constexpr(-1e30)  # not -inf: the maximum of a part without tokens is subtracted from itself
LOG2_E = 1.4426950408889634


@triton.jit
def _times(x, HIGH, LOW, first, factor, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    """Columns first..first+BLOCK of factor * x @ matrix.T; a matrix that 16 bits do not hold exactly has a low part."""
    inner = tl.arange(0, DP)
    outer = first + tl.arange(0, BLOCK)
    inside = (inner[:, None] < D) & (outer[None, :] < D)
    place = outer[None, :] * D + inner[:, None]
    y = tl.dot(x, tl.load(HIGH + place, mask=inside, other=0.0))
    if not EXACT:
        y += tl.dot(x, tl.load(LOW + place, mask=inside, other=0.0))
    return y * factor


@triton.jit
def prepare(
    # Queries (batch, heads, TQ, D); rotation, and QJL's projection after it, as `rotations.Parts`; center of the keys.
    Q, HIGH, LOW, SKETCH_HIGH, SKETCH_LOW, CENTER,
    # Written: see the module's table; BIAS is `split`'s BASE.
    QP, QS, BIAS,
    # Factor on scores, base 2; factor of the rotation's parts; strides of Q; from QP to what fp16 leaves out of it.
    scaling, factor, q_b, q_h, q_t, rest,
    # Shapes as in `split`; BP: query rows as a dot needs them (16 or more); BLOCK: dims a program.
    KV_HEADS: tl.constexpr, G: tl.constexpr, TQ: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
    BP: tl.constexpr, BLOCK: tl.constexpr,
    # Switches: the matrix needs no low part, keys have a center, keys have a QJL stage, launches may overlap.
    EXACT: tl.constexpr, CENTERED: tl.constexpr, SKETCHED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (head, block): a block of the rotated queries, as fp16 and what fp16 leaves out (`rest` further on)."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    head, first = tl.program_id(0), tl.program_id(1) * BLOCK
    batch, kv_head = head // KV_HEADS, head % KV_HEADS
    rows, dims, outer = tl.arange(0, BP), tl.arange(0, DP), first + tl.arange(0, BLOCK)
    real = rows < G * TQ
    # Products with the batch are 64 bits wide everywhere: a long cache has more elements than 2^31.
    places = batch.to(tl.int64) * q_b + (kv_head * G + rows // TQ) * q_h + (rows % TQ) * q_t
    x = tl.load(Q + places[:, None] + dims[None, :], mask=real[:, None] & (dims[None, :] < D), other=0.0)
    y = _times(x, HIGH, LOW, first, scaling * factor, D, DP, BLOCK, EXACT)
    target = (head * BM + rows)[:, None] * D + outer[None, :]
    inside = (rows[:, None] < BM) & (outer[None, :] < D)
    high = y.to(tl.float16)
    tl.store(QP + target, high, mask=inside)
    tl.store(QP + rest + target, (y - high.to(tl.float32)).to(tl.float16), mask=inside)
    if SKETCHED:  # S q of QJL (Algorithm 2 of the paper): signs are read against it and never projected back
        sketch = _times(x, SKETCH_HIGH, SKETCH_LOW, first, scaling, D, DP, BLOCK, False)
        tl.store(QS + target, sketch.to(tl.float16), mask=inside)
    bias = tl.zeros([BP], tl.float32)
    if CENTERED:  # this block's share of <q, center>, the same for every key; `split` adds the blocks up
        center = tl.load(CENTER + head * D + outer, mask=outer < D, other=0.0).to(tl.float32)
        bias = tl.sum(y * center[None, :], 1)
    tl.store(BIAS + (head * tl.num_programs(1) + tl.program_id(1)) * BM + rows, bias, mask=rows < BM)


@triton.jit
def _codes(AT, inside, slices, ROW: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr, AXIS: tl.constexpr):
    """A tile of bytes; masked only where a tile may end behind the tokens, or is wider than a slice."""
    if WHOLE and ROW == COLUMNS:
        return tl.load(AT)
    elif AXIS == 1:
        return tl.load(AT, mask=inside[:, None] & (slices[None, :] < ROW), other=0)
    else:
        return tl.load(AT, mask=inside[None, :] & (slices[:, None] < ROW), other=0)


@triton.jit
def _scale(SCALES, TOPS, n, packed_length, factor, SHARED: tl.constexpr):
    """Scales of tokens n in float32, zero behind the last; in units of a top where `SHARED` tokens share one."""
    inside = n < packed_length
    scale = tl.load(SCALES + n, mask=inside, other=0).to(tl.float32) * factor
    if SHARED:
        scale *= tl.load(TOPS + n // SHARED, mask=inside, other=0.0).to(tl.float32)
    return scale


@triton.jit
def _biases(BIAS, tile, biases, rows, base, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
            GROUP_MEANS: tl.constexpr):  # fmt: skip
    """What is added to the scores of a tile's tokens, (BN or 1, BM)."""
    if not GROUP_MEANS:
        return base[None, :]
    elif GROUP >= BN:  # the tile lies within one group; the one behind the last is fetched too, and clamped
        return tl.load(BIAS + rows * biases + tl.minimum(tile * BN // GROUP, biases - 1))[None, :]
    else:  # several groups in a tile: a load a group, for a gather of each token's bias is many more
        token = tl.arange(0, BN)
        bias = tl.zeros([BN, BM], tl.float32)
        for part in tl.static_range(BN // GROUP):
            group = tl.minimum(tile * (BN // GROUP) + part, biases - 1)
            bias = tl.where(token[:, None] // GROUP == part, tl.load(BIAS + rows * biases + group)[None, :], bias)
        return bias


@triton.jit
def _mean_scores(MEANS, QP, q, rest, slice: tl.constexpr, group, there, j, D: tl.constexpr, SLICE: tl.constexpr):
    """One slice of <query, mean of a group>, (groups, BM); the queries in two parts, for means are large."""
    place = group[:, None] * D + slice * SLICE + j[None, :]
    means = tl.load(MEANS + place, mask=there[:, None] & (j[None, :] < SLICE), other=0).to(tl.float16)
    low = tl.load(QP + rest + slice * SLICE + j[:, None], mask=j[:, None] < SLICE, other=0.0)
    return tl.dot(means, low, tl.dot(means, q))


@triton.jit
def _capped(s, cap):
    """Cap * tanh(s / cap), by an exponential that does not overflow; all in base 2."""
    x = tl.abs(s) / cap
    fall = tl.exp2(x * (-2 * 1.4426950408889634))
    bent = cap * (1 - fall) / (1 + fall)
    return tl.where(s < 0, -bent, bent)


@triton.jit
def _attend_exact(
    Q, EK, EV, O, M, L, at, begin, end, exact_length, scaling, cap, places, rows,
    TQ: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, VD: tl.constexpr, VDP: tl.constexpr, BM: tl.constexpr,
    BE: tl.constexpr, ROWS: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Attend to exact tokens begin..end, tokens as the left operand, and write the part."""
    dims, value_dims, token = tl.arange(0, DP), tl.arange(0, VDP), tl.arange(0, BE)
    within, value_within = dims < D, value_dims < VD
    x = tl.load(Q + places[None, :] + dims[:, None], mask=within[:, None] & (rows < ROWS)[None, :], other=0.0)
    last_seen = exact_length - TQ + rows % TQ  # causality: the last TQ exact tokens are the queries' own
    m = tl.full([BM], FLOOR, tl.float32)
    l = tl.zeros([BE, BM], tl.float32)
    o = tl.zeros([VDP, BM], tl.float32)
    for first in tl.range(begin, end, BE, num_stages=1):
        n = first + token
        inside = n < end
        keys = tl.load(EK + n[:, None] * D + dims[None, :], mask=inside[:, None] & within[None, :], other=0.0)
        value_at = EV + n[None, :] * VD + value_dims[:, None]
        values = tl.load(value_at, mask=inside[None, :] & value_within[:, None], other=0.0)
        s = tl.dot(keys, x) * scaling
        if CAPPED:
            s = _capped(s, cap)
        s = tl.where((n[:, None] <= last_seen[None, :]) & inside[:, None], s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 0))
        p = tl.exp2(s - top[None, :])
        shrink = tl.exp2(m - top)
        l = l * shrink[None, :] + p
        o = tl.dot(values, p.to(values.dtype), o * shrink[None, :])
        m = top
    tl.store(M + at, m)
    tl.store(L + at, tl.sum(l, 0))
    tl.store(O + at[None, :].to(tl.int64) * VD + value_dims[:, None], o, mask=value_within[:, None])


# Lengths change from step to step; a kernel specialized on them would be compiled again and again.
@triton.jit(
    do_not_specialize=[
        "exact_length", "packed_length", "biases", "splits", "kt_b", "kt_h", "mt_b", "mt_h", "vt_b", "vt_h", "gain_b",
        "gain_h",
    ]
)  # fmt: skip
def split(
    # Queries (batch, heads, TQ, D) and exact tokens (batch, kv_heads, exact, D), 16 bits, not rotated.
    Q, EK, EV,
    # Of `prepare`: rotated and sketched queries, fp16; <q, center> by blocks. BIAS (head, BM, biases) is written here.
    QP, QS, BASE, BIAS,
    # Keys: low and high plane, scales (uint8, fp16 where nothing is shared), tops a group, means int8 and their tops.
    K, K_HIGH, KS, KT, MEANS, MEAN_TOPS,
    # QJL stage of keys: the plane of signs and the norms of errors.
    SIGN, GAIN,
    # Values: as keys, without means. Where WORDS, their planes are read as int16.
    V, V_HIGH, VS, VT,
    # Written, float32: see the module's table.
    O, M, L,
    # (packed, exact) tokens, int32, where ON_DEVICE; (batch,) pads in front of packed tokens, where PADDED.
    LENGTHS, STARTS,
    # Levels: `levels.tables` (LUT for the interpreter, TABLE for `prmt`) and `levels.late_bytes` or `late_words`.
    KEY_LUT, KEY_TABLE, VALUE_LUT, VALUE_TABLE, SIGN_LUT, SIGN_TABLE, LATE, VALUE_LATE,
    # Counts: exact tokens, packed tokens, groups with a mean, parts of packed tokens; elements from QP to its rest.
    exact_length, packed_length, biases, splits, rest,
    # Factors: on scores of exact tokens, and where all are capped (base 2); of stored key scales, error norms and value
    # scales.
    scaling, cap, key_factor, gain_factor, value_factor,
    # Strides over the batch and KV heads (q_h: query heads, q_t: query tokens), in the order of the pointers.
    q_b, q_h, q_t, ek_b, ek_h, ev_b, ev_h,
    k_b, k_h, k1_b, k1_h, ks_b, ks_h, kt_b, kt_h, mean_b, mean_h, mt_b, mt_h, sign_b, sign_h, gain_b, gain_h,
    v_b, v_h, v1_b, v1_h, vs_b, vs_h, vt_b, vt_h,
    # Shape: KV heads of a row, query heads a KV head, query tokens; dims of keys and of values, each as they are and up
    # to a power of two; bits.
    KV_HEADS: tl.constexpr, G: tl.constexpr, TQ: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, VD: tl.constexpr,
    VDP: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    # Tiles: padded query rows, packed tokens, exact tokens.
    BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr,
    # Tokens a group (0: none), tokens that share a scale's top (0: none), whether groups of keys have means.
    GROUP: tl.constexpr, KEY_TOPS: tl.constexpr, VALUE_TOPS: tl.constexpr, GROUP_MEANS: tl.constexpr,
    # Switches; ASM: assembly (False under the interpreter), WORDS: values are read two bytes at a time.
    SKETCHED: tl.constexpr, CAPPED: tl.constexpr, ON_DEVICE: tl.constexpr, PADDED: tl.constexpr, ASM: tl.constexpr,
    WORDS: tl.constexpr,
    # Stages of the load pipeline; columns of a slice of keys, values (bytes or words) and signs, up to powers of two.
    STAGES: tl.constexpr, KW: tl.constexpr, VW: tl.constexpr, SW: tl.constexpr,
    # Blocks of BASE to add up, groups whose means are scored at once, parts that attend to exact tokens, overlap.
    BASES: tl.constexpr, NG: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (part, head): scores, weights and weighted values of one part of a head's tokens."""
    part, head = tl.program_id(0), tl.program_id(1)
    batch, kv_head = (head // KV_HEADS).to(tl.int64), head % KV_HEADS
    if ON_DEVICE:
        packed_length, exact_length = tl.load(LENGTHS), tl.load(LENGTHS + 1)
    start = tl.load(STARTS + batch).to(tl.int32) if PADDED else 0
    rows, token = tl.arange(0, BM), tl.arange(0, BN)

    # The first PARTS parts have exact tokens too, so they take as many packed ones less, or none.
    tiles, skipped, span = tl.cdiv(packed_length, BN), start // BN, tl.cdiv(tl.cdiv(exact_length, PARTS), BE) * BE
    taken = tl.cdiv(span, BN)
    share = tl.cdiv(tiles - skipped + PARTS * taken, splits)
    if (taken >= share) & (splits > PARTS):
        share = tl.cdiv(tiles - skipped, splits - PARTS)
        taken = share
    first = skipped + part * share - tl.minimum(part, PARTS) * taken
    last = tl.minimum(first + share - tl.where(part < PARTS, taken, 0), tiles)
    if part < PARTS:
        places = batch * q_b + (kv_head * G + rows // TQ) * q_h + (rows % TQ) * q_t
        _attend_exact(
            Q, EK + batch * ek_b + kv_head * ek_h, EV + batch * ev_b + kv_head * ev_h, O, M, L,
            (head * (splits + PARTS) + splits + part) * BM + rows, part * span,
            tl.minimum(part * span + span, exact_length), exact_length, scaling, cap, places, rows,
            TQ, D, DP, VD, VDP, BM, BE, G * TQ, CAPPED,
        )  # fmt: skip

    # Codes are packed in whole groups, so tiles that divide a group need no masks.
    WHOLE: tl.constexpr = GROUP > 0 and GROUP % BN == 0
    KROW: tl.constexpr = D // 2 if KEY_BITS == 4 else D // 8 if KEY_BITS == 1 else D // 4
    KSLICE: tl.constexpr = D // 2 if KEY_BITS == 4 else D // 4
    VSLICE: tl.constexpr = VD // 2 if VALUE_BITS == 4 else VD // 4
    WIDE: tl.constexpr = 2 if WORDS else 1  # bytes of a value's row that are read as one number
    VUNITS: tl.constexpr = VSLICE // WIDE
    VROW: tl.constexpr = VUNITS // 2 if VALUE_BITS == 1 else VUNITS
    kj, vj, sj = tl.arange(0, KW), tl.arange(0, VW), tl.arange(0, SW)
    # One column of the table a token: a scalar would become a uniform register, which `prmt` cannot read.
    ta, tb, tc, td = load_table(KEY_TABLE, token)
    key_table = (ta[:, None], tb[:, None], tc[:, None], td[:, None])
    ua, ub, uc, ud = load_table(VALUE_TABLE, vj)
    value_table = (ua[:, None], ub[:, None], uc[:, None], ud[:, None])
    key_late, value_late = tl.load(LATE + kj)[None, :], tl.load(VALUE_LATE + vj)[:, None]

    K += batch * k_b + kv_head * k_h
    K_HIGH += batch * k1_b + kv_head * k1_h
    KS += batch * ks_b + kv_head * ks_h
    KT += batch * kt_b + kv_head * kt_h
    V += batch * v_b + kv_head * v_h
    V_HIGH += batch * v1_b + kv_head * v1_h
    VS += batch * vs_b + kv_head * vs_h
    VT += batch * vt_b + kv_head * vt_h
    BIAS += head * BM * biases

    # Values are read in units of this part's greatest scale, so that fp16 weights neither overflow nor vanish.
    unit = 0.0
    EACH: tl.constexpr = VALUE_TOPS if VALUE_TOPS else 1
    for at in range(first * BN // EACH, tl.cdiv(tl.minimum(last * BN, packed_length), EACH), 256):
        place = at + tl.arange(0, 256)
        held = tl.load((VT if VALUE_TOPS else VS) + place, mask=place < tl.cdiv(packed_length, EACH), other=0.0)
        unit = tl.maximum(unit, tl.max(held.to(tl.float32), 0))
    per_unit = tl.where(unit > 0, 1 / tl.maximum(unit, 1e-30), 0.0)

    if EARLY:  # all above needs nothing of `prepare`
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    QP += head * BM * D + rows[None, :] * D
    q0 = tl.load(QP + kj[:, None], mask=kj[:, None] < KSLICE, other=0.0)
    q1 = tl.load(QP + KSLICE + kj[:, None], mask=kj[:, None] < KSLICE, other=0.0)
    if KEY_BITS != 4:
        q2 = tl.load(QP + 2 * KSLICE + kj[:, None], mask=kj[:, None] < KSLICE, other=0.0)
        q3 = tl.load(QP + 3 * KSLICE + kj[:, None], mask=kj[:, None] < KSLICE, other=0.0)
    base = tl.zeros([BM], tl.float32)
    for block in tl.static_range(BASES):
        base += tl.load(BASE + (head * BASES + block) * BM + rows)
    if GROUP_MEANS:
        MEANS += batch * mean_b + kv_head * mean_h
        MEAN_TOPS += batch * mt_b + kv_head * mt_h
        behind = tl.cdiv(tl.minimum(last * BN, packed_length), GROUP)
        for at in tl.range(first * BN // GROUP, behind, NG, num_stages=1):
            group = at + tl.arange(0, NG)
            there = group < behind
            bias = _mean_scores(MEANS, QP, q0, rest, 0, group, there, kj, D, KSLICE)
            bias += _mean_scores(MEANS, QP, q1, rest, 1, group, there, kj, D, KSLICE)
            if KEY_BITS != 4:
                bias += _mean_scores(MEANS, QP, q2, rest, 2, group, there, kj, D, KSLICE)
                bias += _mean_scores(MEANS, QP, q3, rest, 3, group, there, kj, D, KSLICE)
            bias *= (tl.load(MEAN_TOPS + group, mask=there, other=0.0).to(tl.float32) / 127)[:, None]
            tl.store(BIAS + rows[None, :] * biases + group[:, None], bias + base[None, :], mask=there[:, None])
        tl.debug_barrier()  # biases go through memory to other threads of this program
    if SKETCHED:
        sign_table = load_table(SIGN_TABLE, token[:, None])
        sign_late = tl.load(LATE + sj)[None, :]
        QS += head * BM * D + rows[None, :] * D
        s0 = tl.load(QS + sj[:, None], mask=sj[:, None] < D // 4, other=0.0)
        s1 = tl.load(QS + D // 4 + sj[:, None], mask=sj[:, None] < D // 4, other=0.0)
        s2 = tl.load(QS + D // 2 + sj[:, None], mask=sj[:, None] < D // 4, other=0.0)
        s3 = tl.load(QS + 3 * (D // 4) + sj[:, None], mask=sj[:, None] < D // 4, other=0.0)
        SIGN += batch * sign_b + kv_head * sign_h
        GAIN += batch * gain_b + kv_head * gain_h
    m = tl.full([BM], FLOOR, tl.float32)
    l = tl.zeros([BN, BM], tl.float32)  # a sum for each place of a tile; they are added up once, behind the loop
    # One sum for each slice of the dims; with WORDS o0 and o1 (to o3 below 4 bits) are even dims, the rest odd ones.
    o0 = tl.zeros([VW, BM], tl.float32)
    o1, o2, o3, o4, o5, o6, o7 = o0, o0, o0, o0, o0, o0, o0
    n = first * BN + token
    key_at = K + n[:, None] * KROW + (kj % KROW if KEY_BITS == 1 else kj)[None, :]
    value_at = V + n[None, :] * VROW + (vj % VROW if VALUE_BITS == 1 else vj)[:, None]
    # Scales and biases of the next tile are fetched while this one is computed.
    key_scale = _scale(KS, KT, n, packed_length, key_factor, KEY_TOPS)
    value_scale = _scale(VS, VT, n, packed_length, per_unit, VALUE_TOPS)
    bias = _biases(BIAS, first, biases, rows, base, BM, BN, GROUP, GROUP_MEANS)
    for tile in tl.range(first, last, num_stages=STAGES):
        n = tile * BN + token
        inside = n < packed_length
        codes = _codes(key_at, inside, kj, KSLICE, KW, WHOLE, 1)
        if KEY_BITS == 4:
            k0, k1 = halves(codes, KEY_LUT, key_table, ASM)
            s = tl.dot(k0, q0) + tl.dot(k1, q1)
        else:
            high = codes
            if KEY_BITS == 3:
                high_at = K_HIGH + n[:, None] * (D // 8) + (kj % (D // 8))[None, :]
                high = _codes(high_at, inside, kj, KSLICE, KW, WHOLE, 1)
            k0, k1, k2, k3 = quarters(codes, high, key_late, KEY_LUT, key_table, KEY_BITS, ASM)
            # Two chains of two dots: the next `mma` of a chain waits four times as long as one of another chain.
            s = tl.dot(k1, q1, tl.dot(k0, q0)) + tl.dot(k3, q3, tl.dot(k2, q2))
        s = s * key_scale[:, None] + bias
        if SKETCHED:  # + c |e| <S q, sign(S e)> (Algorithm 2, DeQuant); c is in gain_factor
            sign_at = SIGN + n[:, None] * (D // 8) + (sj % (D // 8))[None, :]
            signs = _codes(sign_at, inside, sj, D // 4, SW, WHOLE, 1)
            e0, e1, e2, e3 = quarters(signs, signs, sign_late, SIGN_LUT, sign_table, 1, ASM)
            t = tl.dot(e1, s1, tl.dot(e0, s0)) + tl.dot(e3, s3, tl.dot(e2, s2))
            s += t * (tl.load(GAIN + n, mask=inside, other=0.0).to(tl.float32) * gain_factor)[:, None]
        if CAPPED:
            s = _capped(s, cap)
        if PADDED:
            inside &= n >= start
        if PADDED or not WHOLE:
            s = tl.where(inside[:, None], s, float("-inf"))
        key_scale = _scale(KS, KT, n + BN, packed_length, key_factor, KEY_TOPS)
        bias = _biases(BIAS, tile + 1, biases, rows, base, BM, BN, GROUP, GROUP_MEANS)
        # Softmax as it goes: what was summed so far shrinks when a greater score comes.
        top = tl.maximum(m, tl.max(s, 0))
        shrink = tl.exp2(m - top)
        p = tl.exp2(s - top[None, :])
        l = l * shrink[None, :] + p
        m = top
        weights = (p * value_scale[:, None]).to(tl.float16)
        value_scale = _scale(VS, VT, n + BN, packed_length, per_unit, VALUE_TOPS)
        codes = _codes(value_at, inside, vj, VUNITS, VW, WHOLE, 0)
        high = codes
        if VALUE_BITS == 3:
            high_at = V_HIGH + n[None, :] * (VUNITS // 2) + (vj % (VUNITS // 2))[:, None]
            high = _codes(high_at, inside, vj, VUNITS, VW, WHOLE, 0)
        if WORDS:
            if VALUE_BITS == 4:
                v0, v1, v2, v3 = word_halves(codes, VALUE_LUT, value_table, ASM)
            else:
                v0, v1, v2, v3, v4, v5, v6, v7 = word_quarters(
                    codes, high, value_late, VALUE_LUT, value_table, VALUE_BITS, ASM
                )
                o4 = tl.dot(v4, weights, o4 * shrink[None, :])
                o5 = tl.dot(v5, weights, o5 * shrink[None, :])
                o6 = tl.dot(v6, weights, o6 * shrink[None, :])
                o7 = tl.dot(v7, weights, o7 * shrink[None, :])
        else:
            v0, v1, v2, v3 = quarters(codes, high, value_late, VALUE_LUT, value_table, VALUE_BITS, ASM)
        o0 = tl.dot(v0, weights, o0 * shrink[None, :])
        o1 = tl.dot(v1, weights, o1 * shrink[None, :])
        o2 = tl.dot(v2, weights, o2 * shrink[None, :])
        o3 = tl.dot(v3, weights, o3 * shrink[None, :])
        key_at += BN * KROW
        value_at += BN * VROW

    # A part is not divided by its sum: `merge` does that once. The first bytes of words are dims 2j, the second 2j + 1.
    at = (head * (splits + PARTS) + part) * BM + rows
    tl.store(M + at, m)
    tl.store(L + at, tl.sum(l, 0))
    target = O + at[None, :].to(tl.int64) * VD + WIDE * vj[:, None]
    kept = vj[:, None] < VUNITS
    unit *= value_factor
    tl.store(target, o0 * unit, mask=kept)
    tl.store(target + VSLICE, o1 * unit, mask=kept)
    if VALUE_BITS == 4:
        tl.store(target + 1, o2 * unit, mask=kept)
        tl.store(target + 1 + VSLICE, o3 * unit, mask=kept)
    else:
        tl.store(target + 2 * VSLICE, o2 * unit, mask=kept)
        tl.store(target + 3 * VSLICE, o3 * unit, mask=kept)
        if WORDS:
            tl.store(target + 1, o4 * unit, mask=kept)
            tl.store(target + 1 + VSLICE, o5 * unit, mask=kept)
            tl.store(target + 1 + 2 * VSLICE, o6 * unit, mask=kept)
            tl.store(target + 1 + 3 * VSLICE, o7 * unit, mask=kept)


@triton.jit(do_not_specialize=["splits"])
def merge(
    # What `split` wrote; the rotation of values as `rotations.Parts`; (heads,) learned sinks; the output (batch, TQ,
    # heads, D), where D are the dims of values.
    O, M, L, HIGH, LOW, SINK, OUT,
    # Parts of packed tokens; factor of the rotation's parts.
    splits, factor,
    # Shapes as in `split`; SP: all slots up to a power of two, BS: parts read at once, BLOCK: dims rotated at once.
    KV_HEADS: tl.constexpr, G: tl.constexpr, TQ: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
    SP: tl.constexpr, BS: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr, SINKS: tl.constexpr,
    PARTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (row): join the parts of one query row, rotate back, add the exact tokens, and divide by the sum."""
    pid = tl.program_id(0)  # batch, query, head: the order of the output
    query_head, query = pid % (KV_HEADS * G), pid // (KV_HEADS * G) % TQ
    head = pid // (KV_HEADS * G * TQ) * KV_HEADS + query_head // G
    row = (query_head % G) * TQ + query
    base = head * (splits + PARTS) * BM + row
    parts, dims, block = tl.arange(0, SP), tl.arange(0, DP), tl.arange(0, BLOCK)
    # The first block of the matrix is no work of `split`, so it is fetched before that has ended.
    matrix = tl.load(
        HIGH + dims[:, None] * D + block[None, :], mask=(dims[:, None] < D) & (block[None, :] < D), other=0.0
    )
    if EARLY:
        tl.extra.cuda.gdc_wait()
    m = tl.load(M + base + parts * BM, mask=parts < splits + PARTS, other=FLOOR)
    l = tl.load(L + base + parts * BM, mask=parts < splits + PARTS, other=0.0)
    y = tl.zeros([DP], tl.float32)
    top = tl.max(m, 0)
    if SINKS:
        sink = tl.load(SINK + query_head).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, sink)
    total = tl.sum(tl.exp2(m - top) * l, 0)
    if SINKS:
        total += tl.exp2(sink - top)
    for start in range(0, splits, BS):
        some = start + tl.arange(0, BS)
        place = (base + some[:, None] * BM).to(tl.int64) * D + dims[None, :]
        o = tl.load(O + place, mask=(some[:, None] < splits) & (dims[None, :] < D), other=0.0)
        weight = tl.exp2(tl.load(M + base + some * BM, mask=some < splits, other=FLOOR) - top)
        y += tl.sum(o * weight[:, None], 0)
    exact = splits + tl.arange(0, PARTS)
    exact_weight = tl.exp2(tl.load(M + base + exact * BM) - top)
    for first in tl.static_range(0, DP, BLOCK):
        outer = first + block
        inside = (dims[:, None] < D) & (outer[None, :] < D)
        if first:
            matrix = tl.load(HIGH + dims[:, None] * D + outer[None, :], mask=inside, other=0.0)
        whole = matrix.to(tl.float32)  # one row a program: a sum of products in float32, no dot
        if not EXACT:
            whole += tl.load(LOW + dims[:, None] * D + outer[None, :], mask=inside, other=0.0).to(tl.float32)
        back = tl.sum(y[:, None] * whole, 0) * factor
        place = (base + exact[:, None] * BM).to(tl.int64) * D + outer[None, :]
        own = tl.load(O + place, mask=(outer < D)[None, :], other=0.0)
        result = (back + tl.sum(own * exact_weight[:, None], 0)) / total
        tl.store(OUT + pid.to(tl.int64) * D + outer, result.to(OUT.dtype.element_ty), mask=outer < D)
