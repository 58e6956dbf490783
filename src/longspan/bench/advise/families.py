"""The families that advice chooses from, and what the shape of each suits.

The sentences say what follows from the shape, or what its paper made it for; none is a score.
"""

from __future__ import annotations

import math

from longspan.bench.advise.candidates import Family, Sizes, even


def _window(s: Sizes) -> str:
    return f"window({even(s.keys)}{s.tail})"


def _sink(s: Sizes) -> str | None:
    return f"window({even(s.keys)}) | sink(4)" if s.keys > 8 else None


def _chunk(s: Sizes) -> str:
    return f"chunk({s.border}{s.tail})"


def _shifted_chunk(s: Sizes) -> str | None:
    return f"shifted_chunk({s.border}{s.tail})" if s.heads > 1 else None


def _scca_fixed(s: Sizes) -> str | None:
    # Half of the heads see half a chunk on average, the others seven eighths.
    size = even(s.keys / 0.6875 if s.causal else s.keys)
    return f"scca.fixed({size}{s.tail})" if s.heads > 1 else None


def _scca_flow(s: Sizes) -> str | None:
    return f"scca.flow({even(s.keys)}{s.tail})" if s.heads > 1 else None


def _strided(s: Sizes) -> str | None:
    return f"strided({s.step}{s.tail})" if s.heads > 1 else None


def _ssa(s: Sizes) -> str | None:
    if s.heads == 1 or s.keys < 4:
        return None
    return f"ssa({even(s.keys / 2)}, {2 * s.step})"


def _sda(s: Sizes) -> str | None:
    if s.gap < 2:
        return None
    segment = min(s.n, int(s.border * s.gap))
    return f"sda({segment}, {s.gap}{s.tail})"


def _longmixed(s: Sizes) -> str | None:
    if s.heads < 4 or s.gap < 2:
        return None
    segment = min(s.n, int(s.border * s.gap))
    return f"longmixed({even(s.keys)}, {s.gap}, segment={segment})"


def _dilated(s: Sizes) -> str | None:
    size = even(s.keys)
    steps = [1]
    # Equal runs of heads, and no gaps beyond the sequence.
    while s.heads % (2 * len(steps)) == 0 and size * steps[-1] < s.n and len(steps) < 8:
        steps = [2**at for at in range(2 * len(steps))]
    while steps and size * steps[-1] > 2 * s.n:
        steps = steps[: len(steps) // 2]
    return f"dilated({size}, {steps}{s.tail})" if len(steps) > 1 else None


def _longnet(s: Sizes) -> str | None:
    # Each branch has a quarter of the pairs of the one before it.
    first = even(0.75 * s.border)
    segments, dilations = [first], [1]
    while segments[-1] * 4 <= s.n and dilations[-1] * 4 <= s.heads:
        segments.append(segments[-1] * 4)
        dilations.append(dilations[-1] * 4)
    return f"longnet({segments}, {dilations}{s.tail})" if len(segments) > 1 else None


def _longformer(s: Sizes) -> str | None:
    tokens = sorted({at * s.n // 4 for at in range(4)})
    if s.keys < 16:
        return None
    flag = "true" if s.causal else "false"
    return f"longformer({even(s.keys - 4)}, {tokens}, causal={flag})"


def _bigbird(s: Sizes) -> str | None:
    # Causal: half of its own block, the one before it and the first; else two more.
    others = 2.5 if s.causal else 5
    # Three random blocks or more, and larger blocks rather than many.
    block = 2 ** int(math.log2(max(1.0, s.keys / (others + 3))))
    random = int(s.keys / block - others)
    if block < 16 or (random + 6) * block >= s.n:
        return None
    flag = "true" if s.causal else "false"
    return f"bigbird({block}, {random}, causal={flag})"


def _sparse_strided(s: Sizes) -> str | None:
    if s.keys < 4:
        return None
    return f"window({even(s.keys / 2)}) | diagonals({2 * s.step})"


def _sparse_fixed(s: Sizes) -> str | None:
    size = even(s.keys)
    count = int(size * s.keys / s.n)
    return f"chunk({size}) | summaries({size}, {count})" if count else None


def _etc(s: Sizes) -> str | None:
    if s.keys < 64:
        return None
    return f"etc({even(s.keys / 2 - 16)}, 16)"


def _swin(s: Sizes) -> str:
    return f"swin({even(s.keys)})"


FAMILIES = (
    Family(
        name="window",
        make=_window,
        good_for="Text whose next word hangs on the last words; the cache has a fixed size.",
    ),
    Family(
        name="window | sink",
        make=_sink,
        good_for="Streaming with a pretrained model: the first tokens stay where models put "
        "attention that they do not need (StreamingLLM).",
        ways=(True,),
    ),
    Family(
        name="chunk",
        make=_chunk,
        good_for="Independent pieces of equal length; for running text its borders cut.",
    ),
    Family(
        name="shifted_chunk",
        make=_shifted_chunk,
        good_for="Fine-tuning to a longer context that then runs dense (LongLoRA).",
    ),
    Family(
        name="scca.fixed",
        make=_scca_fixed,
        good_for="Fine-tuning as with shifted chunks, with queries that stay in their chunk.",
    ),
    Family(
        name="scca.flow",
        make=_scca_flow,
        good_for="Fine-tuning to a longer context: each head reads one chunk of the past whole.",
    ),
    Family(
        name="strided",
        make=_strided,
        good_for="The far past at even density, beside layers or heads that look nearby.",
    ),
    Family(
        name="ssa",
        make=_ssa,
        good_for="The near past whole in each head and the far past shared out over the heads.",
        ways=(True,),
    ),
    Family(
        name="sda",
        make=_sda,
        good_for="Long segments shared out over the heads; once the sequence is longer than one, "
        "the cost grows with N only.",
    ),
    Family(
        name="longmixed",
        make=_longmixed,
        good_for="Chunks read whole in half of the heads, a thinned overview in the others.",
        ways=(True,),
    ),
    Family(
        name="dilated",
        make=_dilated,
        good_for="Each run of heads a scale of its own: near whole, far with gaps.",
    ),
    Family(
        name="longnet",
        make=_longnet,
        good_for="Very long sequences trained from scratch (LongNet), near dense and far thin.",
    ),
    Family(
        name="longformer",
        make=_longformer,
        good_for="Questions or marks at known places that everything must be able to read; the "
        "four global tokens here stand for yours.",
    ),
    Family(
        name="bigbird",
        make=_bigbird,
        good_for="Long documents with a trained BigBird, or as one: near, first and random "
        "blocks.",
    ),
    Family(
        name="window | diagonals",
        make=_sparse_strided,
        good_for="Data with a period, such as rows of an image: the stride is the period (Sparse "
        "Transformer, strided).",
        ways=(True,),
    ),
    Family(
        name="chunk | summaries",
        make=_sparse_fixed,
        good_for="Text trained from scratch in blocks whose last tokens sum up (Sparse "
        "Transformer, fixed).",
        ways=(True,),
    ),
    Family(
        name="etc",
        make=_etc,
        good_for="Structured inputs with global tokens in front (ETC).",
        ways=(False,),
    ),
    Family(
        name="swin",
        make=_swin,
        good_for="Layers that take turns between chunks and chunks moved by half (Swin).",
        ways=(False,),
    ),
)
