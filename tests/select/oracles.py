"""Selections and attention by the definitions, pair by pair, in float64 and loops.

Axes: H query heads, N queries (the last of M keys), D head width, S tokens of a block.
"""

from __future__ import annotations

import math

import torch

F64 = torch.float64


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def causal(n, m):
    """Row r is the token n - m + r."""
    return torch.arange(m) <= torch.arange(m - n, m)[:, None]


def rep(x, heads):
    return x.repeat_interleave(heads // x.shape[0], dim=0)


def probs(q, k, allow):
    """[H, N, M] of q [H, N, D] over k [H, M, D]."""
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    return logits.masked_fill(~allow, -torch.inf).softmax(-1)


def attend(q, k, v, allow):
    """Dense masked attention of one row of a batch: out [H, N, Dv] and lse [H, N]."""
    k, v = rep(k, len(q)), rep(v, len(q))
    logits = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~allow, -torch.inf)
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def top(score, count):
    """The places of the ``count`` largest."""
    return set(score.argsort(descending=True)[:count].tolist())


def probe(q, k, rows):
    """Column and offset mass of the last rows of one head: [M] each."""
    n, m = len(q), len(k)
    rows = min(rows, n)
    weight = probs(q[None], k[None], causal(n, m))[0]
    columns, offsets = torch.zeros(m, dtype=F64), torch.zeros(m, dtype=F64)
    for r in range(n - rows, n):
        for j in range(m - n + r + 1):
            columns[j] += weight[r, j]
            offsets[m - n + r - j] += weight[r, j]
    return columns, offsets


def ideal_vertical_slash(q, k, nv, ns, *, rows=64, first=30, last=100):
    """The paper's exact mask [H, N, M], before any rounding to blocks, with V and D."""
    k = rep(k, len(q))
    n, m = q.shape[1], k.shape[1]
    allow, columns, offsets = torch.zeros(len(q), n, m, dtype=torch.bool), [], []
    for h in range(len(q)):
        v, s = probe(q[h], k[h], rows)
        v[:first] = math.inf
        s[:last] = math.inf
        columns.append(top(v, min(m, max(nv, first))))
        offsets.append(top(s, min(m, max(ns, last))))
        for r in range(n):
            i = m - n + r
            for j in range(i + 1):
                allow[h, r, j] = j in columns[h] or i - j in offsets[h]
    return allow, columns, offsets


def blocks_to_mask(chosen, n, m, size):
    """A set of (query block, key block) of absolute numbers as a causal mask [N, M]."""
    i, j = torch.arange(m - n, m)[:, None], torch.arange(m)
    table = torch.zeros(-(-m // size), -(-m // size), dtype=torch.bool)
    for a, b in chosen:
        if b <= a:
            table[a, b] = True
    return table[i // size, j // size] & causal(n, m)


def along(offsets, m, size):
    """Blocks that hold a pair of rows of a whole block at the given offsets."""
    count = -(-m // size)
    return {
        (a, (i - o) // size)
        for a in range(count)
        for i in range(a * size, (a + 1) * size)
        for o in offsets
        if i >= o
    }


def vertical_slash(q, k, nv, ns, size, **more):
    """What is executed: single columns, and the blocks that the offsets touch."""
    n, m = q.shape[1], k.shape[1]
    _, columns, offsets = ideal_vertical_slash(q, k, nv, ns, **more)
    masks = []
    for own, near in zip(columns, offsets, strict=True):
        mask = blocks_to_mask(along(near, m, size) | diagonal(m, size), n, m, size)
        mask[:, sorted(own)] = True
        masks.append(mask & causal(n, m))
    return torch.stack(masks)


def diagonal(m, size):
    return {(a, a) for a in range(-(-m // size))}


def mean_blocks(x, start, size):
    """Means of rows that stand at start, start + 1, ...: by absolute block."""
    return {
        b: torch.stack([x[i] for i in range(len(x)) if (start + i) // size == b]).mean(0)
        for b in sorted({(start + i) // size for i in range(len(x))})
    }


def pooled(q, k, size):
    """Scores of one head by (query block, key block)."""
    n, m = len(q), len(k)
    qm, km = mean_blocks(q, m - n, size), mean_blocks(k, 0, size)
    root = math.sqrt(q.shape[1])
    return {(a, b): float(qm[a] @ km[b]) / root for a in qm for b in km if b <= a}


def bounds(q, k, size):
    n, m = len(q), len(k)
    qm, root = mean_blocks(q, m - n, size), math.sqrt(q.shape[1])
    found = {}
    for a, mean in qm.items():
        for b in range(a + 1):
            own = k[b * size : (b + 1) * size]
            low, high = own.amin(0), own.amax(0)
            found[a, b] = float(torch.maximum(mean * low, mean * high).sum()) / root
    return found


def block_topk(score, count):
    """The best ``count(a + 1)`` blocks of each row, the first, own and previous always."""
    chosen = set()
    for a in {a for a, _ in score}:
        row = {b: score[a, b] for b in range(a + 1)}
        for b in {0, a, a - 1} & set(row):
            row[b] = math.inf
        kept = sorted(row, key=lambda b: -row[b])
        most = max(count(a + 1), sum(x == math.inf for x in row.values()))
        chosen |= {(a, b) for b in kept[:most]}
    return chosen


def flex_prefill(q, k, gamma, tau, least, size):
    """One head: (mask [N, M], whether pooling was trusted)."""
    n, m = len(q), len(k)
    columns, offsets = probe(q, k, size)
    count = -(-m // size)
    rows = min(size, n)
    km = mean_blocks(k, 0, size)
    logits = torch.stack([q[-rows:].mean(0) @ km[b] for b in range(count)]) / math.sqrt(q.shape[1])
    guess = logits.softmax(0)
    true = torch.stack([columns[b * size : (b + 1) * size].sum() for b in range(count)])
    true = true / true.sum()
    mean = (true + guess) / 2
    kl = lambda p: sum(float(a * (a / b).log()) for a, b in zip(p, mean, strict=True) if a > 0)  # noqa: E731
    trusted = math.sqrt(max(0.0, (kl(true) + kl(guess)) / 2)) < tau

    def need(x):
        ranked = x.sort(descending=True).values / x.sum()
        return 1 + int((ranked.cumsum(0) <= gamma).sum())

    sizes = (least, least) if trusted else (max(least, need(columns)), max(least, need(offsets)))
    own = top(columns, min(m, max(1, sizes[0])))
    chosen = {(a, j // size) for a in range(count) for j in own}
    chosen |= along(top(offsets, min(m, max(1, sizes[1]))), m, size) | diagonal(m, size)
    chosen |= {(a, 0) for a in range(count)}
    if trusted:
        score = pooled(q, k, size)
        mass = {}
        for a in {a for a, _ in score}:
            row = torch.tensor([score[a, b] for b in range(a + 1)], dtype=F64).softmax(0)
            mass |= {(a, b): float(row[b]) for b in range(a + 1)}
        goal, held = gamma * sum(mass.values()), 0.0
        for pair in sorted(mass, key=lambda pair: -mass[pair]):
            if held >= goal:
                break
            chosen.add(pair)
            held += mass[pair]
    return blocks_to_mask(chosen, n, m, size), trusted


def antidiagonal(q, k, stride, size, tokens):
    """Block masses of one head, by the direct sum over antidiagonals; whole blocks.

    Cells that begin behind the last token have no say.
    """
    n = len(q)
    cells = n // stride
    raw = torch.full((cells, cells), -torch.inf, dtype=F64)
    for a in range(cells):
        for b in range(a + 1):
            raw[a, b] = sum(
                q[a * stride + stride - 1 - t] @ k[b * stride + t] for t in range(stride)
            ) / (math.sqrt(q.shape[1]) * stride)
    weight = raw.softmax(-1)
    weight[-(-tokens // stride) :] = 0.0
    per = size // stride
    return weight.unflatten(0, (-1, per)).unflatten(2, (-1, per)).sum((1, 3))


def xattention(mass, threshold):
    """Chosen blocks from block masses [Q, T]."""
    chosen = set()
    for a in range(len(mass)):
        forced = [0, a] if a else [0]
        rest = sorted(set(range(a + 1)) - set(forced), key=lambda b: -float(mass[a, b]))
        held = 0.0
        for b in forced + rest:
            if b in forced or held < threshold * float(mass[a].sum()):
                chosen.add((a, b))
            held += float(mass[a, b])
    return chosen
