"""Everything, everything near, the first tokens."""

from __future__ import annotations

from longspan.viz.cards.card import (
    CHUNKS,
    DENSE,
    GLOBAL,
    LOCAL,
    LONGFORMER,
    LONGLORA,
    TRANSFORMER,
    Card,
    Paper,
)

CARDS = (
    Card(
        name="causal",
        title="Causal",
        family=DENSE,
        says="Every token sees itself and everything before it: what language models are trained "
        "with, and what all other patterns save work against.",
        equation="j <= i",
        paper=TRANSFORMER,
        cost="O(N^2)",
        example="causal()",
        full="causal()",
        small="causal()",
        small_tokens=6,
    ),
    Card(
        name="dense",
        title="Dense",
        family=DENSE,
        says="Every token sees every token, before and after it: attention of encoders. Its "
        "opposite is nothing().",
        also=("nothing",),
        equation="all i, j",
        paper=TRANSFORMER,
        cost="O(N^2)",
        example="dense()",
        full="dense()",
        small="dense()",
        small_tokens=6,
    ),
    Card(
        name="window",
        title="Sliding window",
        family=LOCAL,
        says="Each token sees the w tokens that end with itself; not causal, half a window to "
        "each side. Information travels one window per layer.",
        equation="causal: 0 <= i - j < w\nboth sides: |i - j| <= w // 2",
        paper=LONGFORMER,
        cost="O(N w)",
        example="window(12)",
        full="window(4096)",
        small="window(3)",
    ),
    Card(
        name="sink",
        title="Attention sink",
        family=GLOBAL,
        says="The first few tokens stay visible to all later ones. Next to a window they keep a "
        "model stable far beyond its trained length.",
        equation="j < n and j <= i",
        paper=Paper(text="StreamingLLM, Xiao et al. 2023", arxiv="2309.17453"),
        cost="O(N n)",
        example="window(10) | sink(3)",
        full="window(4096) | sink(4)",
        small="window(2) | sink(1)",
    ),
    Card(
        name="prefix",
        title="Prefix",
        family=GLOBAL,
        says="The first n tokens are visible to all, to each other in both directions: with "
        "Causal, the mask of prefix language models.",
        equation="j < n",
        paper=Paper(text="T5, Raffel et al. 2020", arxiv="1910.10683"),
        cost="O(N n)",
        example="causal() | prefix(16)",
        full="causal() | prefix(4096)",
        small="causal() | prefix(3)",
        small_tokens=6,
    ),
    Card(
        name="chunk",
        title="Chunks",
        family=CHUNKS,
        says="The sequence is cut into chunks that do not see each other. Cheap, and blind across "
        "borders: no number of layers connects two chunks.",
        equation="(i - o) // g = (j - o) // g\nand j <= i",
        paper=LONGLORA,
        cost="O(N g)",
        example="chunk(16)",
        full="chunk(4096)",
        small="chunk(4)",
    ),
)
