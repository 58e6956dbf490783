"""The Triton kernels of ``_linear_fused``; imported only where there is a GPU.

Every sum over keys or queries is cut into chunks of C rows: what other chunks give comes from
states, float32 [planes, T + 1, R D + R], S before z; what the own chunk gives is the quadratic
form, in tiles of rows. Features live in registers only. Wide heads are cut into ``many_r`` tiles
of ``wide_r`` features and ``many_d`` of ``wide_d`` values.

With a log factor, ``own`` holds that of each key, ``run`` the largest up to each row, ``fade`` the
factor between a row and the edge of its chunk. Offsets between tiles are 64-bit.
"""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from triton.language.extra import libdevice  # pyright: ignore[reportMissingImports]

# One kernel for all lengths.
_LENGTHS = ("rows", "slots")


@triton.jit
def _near(x, precision: tl.constexpr):
    """The nearest numbers that tensor cores tell apart, which would cut off the rest: a bias."""
    if precision == "tf32":
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x


@triton.jit
def _read(base, i, c, step, live, width):
    """A tile, rows i and columns c, in float32; 0 where there is nothing."""
    inside = live[:, None] & (c < width)[None, :]
    at = base + i[:, None] * step + c[None, :]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _map(x, kind: tl.constexpr):
    if kind == "elu":
        x = tl.where(x > 0.0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    if kind == "relu":
        x = tl.maximum(x, 0.0)
    if kind == "mega":
        # 1 + erf has no digits left far below the mean.
        x = 0.5 * libdevice.erfc((0.7071067811865476 - x) * 2.5066282746310002)
    return x


@triton.jit
def _map_slope(x, kind: tl.constexpr):
    if kind == "elu":
        x = tl.where(x > 0.0, 1.0, tl.exp(tl.minimum(x, 0.0)))
    if kind == "relu":
        x = tl.where(x > 0.0, 1.0, 0.0)
    if kind == "mega":
        away = x - 0.7071067811865476
        x = 1.4142135623730951 * tl.exp(-6.283185307179586 * away * away)
    return x


@triton.jit
def _features(base, i, r, step, live, features, kind: tl.constexpr, precision: tl.constexpr):
    x = _read(base, i, r, step, live, features)
    inside = live[:, None] & (r < features)[None, :]
    return _near(tl.where(inside, _map(x, kind), 0.0), precision)


@triton.jit
def _counted(live, valid, at, has_valid: tl.constexpr):
    """Rows that exist and are no padding."""
    if has_valid:
        live = live & (tl.load(valid + at, mask=live, other=0) != 0)
    return live


@triton.jit
def _pairs(own, run, key, query, key_live, query_live, seen, has_log: tl.constexpr):
    """What a pair counts, 0 where the key is later; in the shape of ``seen``."""
    counts = tl.where(seen, 1.0, 0.0)
    if has_log:
        high = tl.load(own + key, mask=key_live, other=0.0)
        gap = high - tl.load(run + query, mask=query_live, other=0.0)
        counts *= tl.exp(tl.where(seen, gap, 0.0))
    return counts


@triton.jit(do_not_specialize=_LENGTHS)
def chunk_sums(
    x,
    y,
    states,
    valid,
    weight,
    extra,
    rows,
    kv_heads,
    slots,
    shift,
    x_batch,
    x_head,
    x_row,
    y_batch,
    y_head,
    y_row,
    group: tl.constexpr,
    features: tl.constexpr,
    width: tl.constexpr,
    kind: tl.constexpr,
    has_valid: tl.constexpr,
    has_weight: tl.constexpr,
    precision: tl.constexpr,
    chunk: tl.constexpr,
    tall: tl.constexpr,
    wide_r: tl.constexpr,
    many_r: tl.constexpr,
    wide_d: tl.constexpr,
    many_d: tl.constexpr,
):
    """S = sum phi(x) (weight y)^T and z = sum extra phi(x), of one chunk and ``group`` heads."""
    t = tl.program_id(0).to(tl.int64)
    plane = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    b, h = plane // kv_heads, plane % kv_heads
    r = (part // many_d) * wide_r + tl.arange(0, wide_r)
    d = (part % many_d) * wide_d + tl.arange(0, wide_d)
    i = tl.arange(0, tall)
    total = tl.zeros([wide_r, wide_d], tl.float32)
    mass = tl.zeros([wide_r], tl.float32)
    for step in range(group * (chunk // tall)):
        head = h * group + step // (chunk // tall)
        n = t * chunk + (step % (chunk // tall)) * tall
        live = n + i < rows
        # Not in the sums of queries: their padding has no slope.
        counted = _counted(live, valid, b * rows + n + i, has_valid)
        left = _features(
            x + b * x_batch + head * x_head + n * x_row,
            i,
            r,
            x_row,
            counted,
            features,
            kind,
            precision,
        )
        right = _read(y + b * y_batch + head * y_head + n * y_row, i, d, y_row, live, width)
        if has_weight:
            row = (plane * group + step // (chunk // tall)) * rows + n + i
            right = _near(right * tl.load(weight + row, mask=live, other=0.0)[:, None], precision)
            also = tl.load(extra + row, mask=live, other=0.0)
            mass += tl.sum(left * also[:, None], axis=0)
        else:
            mass += tl.sum(left, axis=0)
        total += tl.dot(tl.trans(left), right, input_precision=precision)
    size: tl.constexpr = features * (width + 1)
    to = states + (plane * slots + t + shift) * size
    inside = (r < features)[:, None] & (d < width)[None, :]
    tl.store(to + r[:, None] * width + d[None, :], total, mask=inside)
    if part % many_d == 0:
        tl.store(to + features * width + r, mass, mask=r < features)


@triton.jit
def _join(a, x, b, y):
    return a * b, x * b + y


@triton.jit(do_not_specialize=_LENGTHS)
def running_sums(
    states,
    edge,
    slots,
    size: tl.constexpr,
    back: tl.constexpr,
    has_log: tl.constexpr,
    wide: tl.constexpr,
    span: tl.constexpr,
):
    """Sums of chunks to sums up to each chunk, in place; from the last slot on if ``back``."""
    plane = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * wide + tl.arange(0, wide)
    i = tl.arange(0, span)
    steps = slots - 1
    base = states + plane * slots * size
    first = base
    if back:
        first = base + steps.to(tl.int64) * size
    carry = tl.load(first + c, mask=c < size, other=0.0)
    for start in range(0, steps, span):
        s = start + i
        live = s < steps
        if back:
            low = steps - 1 - s
            slot = low
        else:
            low = s
            slot = s + 1
        at = base + slot.to(tl.int64)[:, None] * size + c[None, :]
        inside = live[:, None] & (c < size)[None, :]
        x = tl.load(at, mask=inside, other=0.0)
        if has_log:
            here = edge + plane * slots + low
            gap = tl.load(here, mask=live, other=0.0) - tl.load(here + 1, mask=live, other=0.0)
            fade = tl.exp(gap)[:, None] + tl.zeros_like(x)
            fade, x = tl.associative_scan((fade, x), 0, _join)
            x += fade * carry[None, :]
            carry = tl.sum(tl.where((i == span - 1)[:, None], x, 0.0), axis=0)
        else:
            # A row of the running sum depends on none that follow, to the last bit.
            add = tl.sum(x, axis=0)
            x = tl.cumsum(x, axis=0) + carry[None, :]
            carry += add
        tl.store(at, x, mask=inside)


@triton.jit(do_not_specialize=_LENGTHS)
def outputs(
    q,
    k,
    v,
    states,
    valid,
    own,
    run,
    fade,
    out,
    rows,
    heads,
    slots,
    floor,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    out_batch,
    out_head,
    out_row,
    group: tl.constexpr,
    features: tl.constexpr,
    width: tl.constexpr,
    kind: tl.constexpr,
    has_valid: tl.constexpr,
    has_log: tl.constexpr,
    precision: tl.constexpr,
    chunk: tl.constexpr,
    tall: tl.constexpr,
    wide_r: tl.constexpr,
    many_r: tl.constexpr,
    wide_d: tl.constexpr,
    many_d: tl.constexpr,
):
    """phi(q) S / phi(q) z for one tile of rows of a query head, and one tile of values."""
    n = tl.program_id(0).to(tl.int64) * tall
    plane = tl.program_id(1).to(tl.int64)
    b, h = plane // heads, plane % heads
    kv = plane // group
    kv_head = h // group
    d = tl.program_id(2) * wide_d + tl.arange(0, wide_d)
    i = tl.arange(0, tall)
    live = n + i < rows
    t = n // chunk
    size: tl.constexpr = features * (width + 1)
    state = states + (kv * slots + t) * size
    q_base = q + b * q_batch + h * q_head + n * q_row
    total = tl.zeros([tall, wide_d], tl.float32)
    mass = tl.zeros([tall], tl.float32)
    r = tl.arange(0, wide_r)
    query = _features(q_base, i, r, q_row, live, features, kind, precision)
    for p in range(many_r):
        if many_r > 1:
            r = p * wide_r + tl.arange(0, wide_r)
            query = _features(q_base, i, r, q_row, live, features, kind, precision)
        s = _near(_read(state, r, d, width, r < features, width), precision)
        z = tl.load(state + features * width + r, mask=r < features, other=0.0)
        total += tl.dot(query, s, input_precision=precision)
        mass += tl.sum(query * z[None, :], axis=1)
    if has_log:
        away = tl.load(fade + kv * rows + n + i, mask=live, other=0.0)
        total *= away[:, None]
        mass *= away
    for m in range(t * chunk, n + 1, tall):
        there = m + i < rows
        counted = _counted(there, valid, b * rows + m + i, has_valid)
        k_base = k + b * k_batch + kv_head * k_head + m * k_row
        a = tl.zeros([tall, tall], tl.float32)
        for p in range(many_r):
            r = p * wide_r + tl.arange(0, wide_r)
            if many_r > 1:
                query = _features(q_base, i, r, q_row, live, features, kind, precision)
            key = _features(k_base, i, r, k_row, counted, features, kind, precision)
            a += tl.dot(query, tl.trans(key), input_precision=precision)
        seen = (m + i)[None, :] <= (n + i)[:, None]
        line = kv * rows + i
        a *= _pairs(
            own,
            run,
            (line + m)[None, :],
            (line + n)[:, None],
            there[None, :],
            live[:, None],
            seen,
            has_log,
        )
        a = _near(a, precision)
        mass += tl.sum(a, axis=1)
        value = _read(v + b * v_batch + kv_head * v_head + m * v_row, i, d, v_row, there, width)
        total += tl.dot(a, value, input_precision=precision)
    share = _share(mass, floor)
    to = out + b * out_batch + h * out_head + n * out_row
    tl.store(
        to + i[:, None] * out_row + d[None, :],
        (total * share[:, None]).to(out.dtype.element_ty),
        mask=live[:, None] & (d < width)[None, :],
    )


@triton.jit
def _share(mass, floor):
    """One over the denominator; 0 for rows without weight, where there is no floor."""
    bounded = tl.maximum(mass, floor)
    return tl.where(bounded > 0.0, 1.0 / tl.where(bounded > 0.0, bounded, 1.0), 0.0)


@triton.jit
def _past(
    p,
    q_base,
    k_base,
    v_base,
    slope_base,
    state,
    valid,
    own,
    run,
    fade,
    b,
    kv,
    n,
    rows,
    q_row,
    k_row,
    v_row,
    slope_row,
    features: tl.constexpr,
    width: tl.constexpr,
    kind: tl.constexpr,
    has_valid: tl.constexpr,
    has_log: tl.constexpr,
    precision: tl.constexpr,
    chunk: tl.constexpr,
    tall: tl.constexpr,
    wide_r: tl.constexpr,
    wide_d: tl.constexpr,
    many_d: tl.constexpr,
):
    """phi(q), sum_j (slope . v_j) phi(k_j) and sum_j phi(k_j) over what rows see, one tile."""
    i = tl.arange(0, tall)
    r = p * wide_r + tl.arange(0, wide_r)
    d = tl.arange(0, wide_d)
    live = n + i < rows
    query = _features(q_base, i, r, q_row, live, features, kind, precision)
    gain = tl.zeros([tall, wide_r], tl.float32)
    slope = _read(slope_base, i, d, slope_row, live, width)
    for u in range(many_d):
        if many_d > 1:
            d = u * wide_d + tl.arange(0, wide_d)
            slope = _read(slope_base, i, d, slope_row, live, width)
        s = _near(_read(state, r, d, width, r < features, width), precision)
        gain += tl.dot(slope, tl.trans(s), input_precision=precision)
    z = tl.load(state + features * width + r, mask=r < features, other=0.0)
    weight = tl.zeros([tall, wide_r], tl.float32) + z[None, :]
    if has_log:
        away = tl.load(fade + kv * rows + n + i, mask=live, other=0.0)
        gain *= away[:, None]
        weight *= away[:, None]
    for m in range(n // chunk * chunk, n + 1, tall):
        there = m + i < rows
        counted = _counted(there, valid, b * rows + m + i, has_valid)
        da = tl.zeros([tall, tall], tl.float32)
        for u in range(many_d):
            d = u * wide_d + tl.arange(0, wide_d)
            if many_d > 1:
                slope = _read(slope_base, i, d, slope_row, live, width)
            value = _read(v_base + m * v_row, i, d, v_row, there, width)
            da += tl.dot(slope, tl.trans(value), input_precision=precision)
        seen = (m + i)[None, :] <= (n + i)[:, None]
        line = kv * rows + i
        pair = _pairs(
            own,
            run,
            (line + m)[None, :],
            (line + n)[:, None],
            there[None, :],
            live[:, None],
            seen,
            has_log,
        )
        key = _features(k_base + m * k_row, i, r, k_row, counted, features, kind, precision)
        gain += tl.dot(_near(da * pair, precision), key, input_precision=precision)
        weight += tl.dot(_near(pair, precision), key, input_precision=precision)
    return query, gain, weight


@triton.jit(do_not_specialize=_LENGTHS)
def query_slopes(
    q,
    k,
    v,
    slope,
    states,
    valid,
    own,
    run,
    fade,
    dq,
    share,
    debt,
    rows,
    heads,
    slots,
    floor,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    slope_batch,
    slope_head,
    slope_row,
    dq_batch,
    dq_head,
    dq_row,
    group: tl.constexpr,
    features: tl.constexpr,
    width: tl.constexpr,
    kind: tl.constexpr,
    has_valid: tl.constexpr,
    has_log: tl.constexpr,
    precision: tl.constexpr,
    chunk: tl.constexpr,
    tall: tl.constexpr,
    wide_r: tl.constexpr,
    many_r: tl.constexpr,
    wide_d: tl.constexpr,
    many_d: tl.constexpr,
):
    """Gradient of a tile of queries; also one over the denominator, and the gradient of that.

    Nothing of the forward is needed for it: sum_j (slope . v_j) phi(k_j) times phi(q) is the
    numerator times the slope, in float32.
    """
    n = tl.program_id(0).to(tl.int64) * tall
    plane = tl.program_id(1).to(tl.int64)
    b, h = plane // heads, plane % heads
    kv = plane // group
    kv_head = h // group
    i = tl.arange(0, tall)
    live = n + i < rows
    q_base = q + b * q_batch + h * q_head + n * q_row
    k_base = k + b * k_batch + kv_head * k_head
    v_base = v + b * v_batch + kv_head * v_head
    slope_base = slope + b * slope_batch + h * slope_head + n * slope_row
    size: tl.constexpr = features * (width + 1)
    state = states + (kv * slots + n // chunk) * size
    query, gain, weight = _past(
        0, q_base, k_base, v_base, slope_base, state, valid, own, run, fade, b, kv, n, rows,
        q_row, k_row, v_row, slope_row, features, width, kind, has_valid, has_log, precision,
        chunk, tall, wide_r, wide_d, many_d,
    )  # fmt: skip
    mass = tl.sum(query * weight, axis=1)
    gained = tl.sum(query * gain, axis=1)
    # With one tile of features what is found is used at once, else found again below.
    for p in range(1, many_r):
        query, gain, weight = _past(
            p, q_base, k_base, v_base, slope_base, state, valid, own, run, fade, b, kv, n, rows,
            q_row, k_row, v_row, slope_row, features, width, kind, has_valid, has_log, precision,
            chunk, tall, wide_r, wide_d, many_d,
        )  # fmt: skip
        mass += tl.sum(query * weight, axis=1)
        gained += tl.sum(query * gain, axis=1)
    one = _share(mass, floor)
    owed = tl.where(mass >= floor, -gained * one * one, 0.0)
    tl.store(share + plane * rows + n + i, one, mask=live)
    tl.store(debt + plane * rows + n + i, owed, mask=live)
    to = dq + b * dq_batch + h * dq_head + n * dq_row
    for p in range(many_r):
        if many_r > 1:
            query, gain, weight = _past(
                p, q_base, k_base, v_base, slope_base, state, valid, own, run, fade, b, kv, n,
                rows, q_row, k_row, v_row, slope_row, features, width, kind, has_valid, has_log,
                precision, chunk, tall, wide_r, wide_d, many_d,
            )  # fmt: skip
        r = p * wide_r + tl.arange(0, wide_r)
        found = gain * one[:, None] + weight * owed[:, None]
        if kind != "given":
            found *= _map_slope(_read(q_base, i, r, q_row, live, features), kind)
        tl.store(
            to + i[:, None] * dq_row + r[None, :],
            found.to(dq.dtype.element_ty),
            mask=live[:, None] & (r < features)[None, :],
        )


@triton.jit(do_not_specialize=_LENGTHS)
def value_slopes(
    q,
    k,
    slope,
    states,
    valid,
    own,
    run,
    fade,
    share,
    dv,
    rows,
    kv_heads,
    slots,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    slope_batch,
    slope_head,
    slope_row,
    dv_batch,
    dv_head,
    dv_row,
    group: tl.constexpr,
    features: tl.constexpr,
    width: tl.constexpr,
    kind: tl.constexpr,
    has_valid: tl.constexpr,
    has_log: tl.constexpr,
    precision: tl.constexpr,
    chunk: tl.constexpr,
    tall: tl.constexpr,
    wide_r: tl.constexpr,
    many_r: tl.constexpr,
    wide_d: tl.constexpr,
    many_d: tl.constexpr,
):
    """Gradient of a tile of values: sum_i phi(k) phi(q_i) slope_i share_i over later rows."""
    m = tl.program_id(0).to(tl.int64) * tall
    kv = tl.program_id(1).to(tl.int64)
    b, h = kv // kv_heads, kv % kv_heads
    d = tl.program_id(2) * wide_d + tl.arange(0, wide_d)
    i = tl.arange(0, tall)
    there = m + i < rows
    counted = _counted(there, valid, b * rows + m + i, has_valid)
    t = m // chunk
    size: tl.constexpr = features * (width + 1)
    state = states + (kv * slots + t + 1) * size
    k_base = k + b * k_batch + h * k_head + m * k_row
    total = tl.zeros([tall, wide_d], tl.float32)
    r = tl.arange(0, wide_r)
    key = _features(k_base, i, r, k_row, counted, features, kind, precision)
    for p in range(many_r):
        if many_r > 1:
            r = p * wide_r + tl.arange(0, wide_r)
            key = _features(k_base, i, r, k_row, counted, features, kind, precision)
        s = _near(_read(state, r, d, width, r < features, width), precision)
        total += tl.dot(key, s, input_precision=precision)
    if has_log:
        total *= tl.load(fade + kv * rows + m + i, mask=there, other=0.0)[:, None]
    end = tl.minimum((t + 1) * chunk, rows)
    for g in range(group):
        line = kv * group + g
        for n in range(m, end, tall):
            live = n + i < rows
            q_base = q + b * q_batch + (h * group + g) * q_head + n * q_row
            a = tl.zeros([tall, tall], tl.float32)
            for p in range(many_r):
                r = p * wide_r + tl.arange(0, wide_r)
                if many_r > 1:
                    key = _features(k_base, i, r, k_row, counted, features, kind, precision)
                query = _features(q_base, i, r, q_row, live, features, kind, precision)
                a += tl.dot(key, tl.trans(query), input_precision=precision)
            seen = (m + i)[:, None] <= (n + i)[None, :]
            a *= _pairs(
                own,
                run,
                (kv * rows + m + i)[:, None],
                (kv * rows + n + i)[None, :],
                there[:, None],
                live[None, :],
                seen,
                has_log,
            )
            one = tl.load(share + line * rows + n + i, mask=live, other=0.0)
            base = slope + b * slope_batch + (h * group + g) * slope_head + n * slope_row
            rise = _read(base, i, d, slope_row, live, width)
            total += tl.dot(_near(a * one[None, :], precision), rise, input_precision=precision)
    to = dv + b * dv_batch + h * dv_head + m * dv_row
    tl.store(
        to + i[:, None] * dv_row + d[None, :],
        total.to(dv.dtype.element_ty),
        mask=there[:, None] & (d < width)[None, :],
    )


@triton.jit(do_not_specialize=_LENGTHS)
def key_slopes(
    q,
    k,
    v,
    slope,
    states,
    valid,
    own,
    run,
    fade,
    share,
    debt,
    dk,
    rows,
    kv_heads,
    slots,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    slope_batch,
    slope_head,
    slope_row,
    dk_batch,
    dk_head,
    dk_row,
    group: tl.constexpr,
    features: tl.constexpr,
    width: tl.constexpr,
    kind: tl.constexpr,
    has_valid: tl.constexpr,
    has_log: tl.constexpr,
    precision: tl.constexpr,
    chunk: tl.constexpr,
    tall: tl.constexpr,
    wide_r: tl.constexpr,
    many_r: tl.constexpr,
    wide_d: tl.constexpr,
    many_d: tl.constexpr,
):
    """Gradient of a tile of keys: sum_i phi(q_i) (share_i slope_i . v + debt_i), i later."""
    m = tl.program_id(0).to(tl.int64) * tall
    kv = tl.program_id(1).to(tl.int64)
    b, h = kv // kv_heads, kv % kv_heads
    r = tl.program_id(2) * wide_r + tl.arange(0, wide_r)
    i = tl.arange(0, tall)
    there = m + i < rows
    counted = _counted(there, valid, b * rows + m + i, has_valid)
    t = m // chunk
    size: tl.constexpr = features * (width + 1)
    state = states + (kv * slots + t + 1) * size
    v_base = v + b * v_batch + h * v_head + m * v_row
    z = tl.load(state + features * width + r, mask=r < features, other=0.0)
    total = tl.zeros([tall, wide_r], tl.float32) + z[None, :]
    d = tl.arange(0, wide_d)
    value = _read(v_base, i, d, v_row, there, width)
    for u in range(many_d):
        if many_d > 1:
            d = u * wide_d + tl.arange(0, wide_d)
            value = _read(v_base, i, d, v_row, there, width)
        s = _near(_read(state, r, d, width, r < features, width), precision)
        total += tl.dot(value, tl.trans(s), input_precision=precision)
    if has_log:
        total *= tl.load(fade + kv * rows + m + i, mask=there, other=0.0)[:, None]
    end = tl.minimum((t + 1) * chunk, rows)
    for g in range(group):
        line = kv * group + g
        for n in range(m, end, tall):
            live = n + i < rows
            head = h * group + g
            base = slope + b * slope_batch + head * slope_head + n * slope_row
            da = tl.zeros([tall, tall], tl.float32)
            for u in range(many_d):
                d = u * wide_d + tl.arange(0, wide_d)
                if many_d > 1:
                    value = _read(v_base, i, d, v_row, there, width)
                rise = _read(base, i, d, slope_row, live, width)
                da += tl.dot(value, tl.trans(rise), input_precision=precision)
            one = tl.load(share + line * rows + n + i, mask=live, other=0.0)
            owed = tl.load(debt + line * rows + n + i, mask=live, other=0.0)
            seen = (m + i)[:, None] <= (n + i)[None, :]
            pair = _pairs(
                own,
                run,
                (kv * rows + m + i)[:, None],
                (kv * rows + n + i)[None, :],
                there[:, None],
                live[None, :],
                seen,
                has_log,
            )
            da = _near((da * one[None, :] + owed[None, :]) * pair, precision)
            q_base = q + b * q_batch + head * q_head + n * q_row
            query = _features(q_base, i, r, q_row, live, features, kind, precision)
            total += tl.dot(da, query, input_precision=precision)
    if kind != "given":
        x = _read(k + b * k_batch + h * k_head + m * k_row, i, r, k_row, there, features)
        total *= _map_slope(x, kind)
    to = dk + b * dk_batch + h * dk_head + m * dk_row
    tl.store(
        to + i[:, None] * dk_row + r[None, :],
        tl.where(counted[:, None], total, 0.0).to(dk.dtype.element_ty),
        mask=there[:, None] & (r < features)[None, :],
    )
