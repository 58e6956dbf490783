"""Strided and dilated keys."""

from __future__ import annotations

from longspan.viz.cards.card import DILATED, LONGFORMER, LONGNET, SCCA, SPARSE, SSA, Card

CARDS = (
    Card(
        name="strided",
        title="Strided, one remainder per head",
        family=DILATED,
        says="Head h sees every r-th token, starting from its own remainder: r heads together see "
        "the whole past.",
        equation="j = h (mod r) and j <= i",
        paper=SSA,
        cost="O(N^2 / r)",
        example="strided(4)",
        full="strided(8)",
        small="strided(3)",
        small_heads=3,
    ),
    Card(
        name="ssa",
        title="Shifted Sparse Attention (SSA)",
        family=DILATED,
        says="A local window, a few anchors, and every r-th token with a remainder that differs "
        "from head to head. With r heads or more, some head sees every past token.",
        equation="i - j < w or j in anchors or j = h (mod r)\nand j <= i",
        paper=SSA,
        cost="O(N (w + N / r))",
        example="ssa(6, 8)",
        full="ssa(1024, 16)",
        small="ssa(2, 4)",
        small_heads=2,
        heads=8,
    ),
    Card(
        name="diagonals",
        title="Diagonals",
        family=DILATED,
        says="Every r-th token, counted from the query: the strided part of the Sparse "
        "Transformer.",
        equation="j = i (mod r) and j <= i",
        paper=SPARSE,
        cost="O(N^2 / r)",
        example="diagonals(8) | window(8)",
        full="diagonals(128) | window(128)",
        small="diagonals(3)",
    ),
    Card(
        name="dilated",
        title="Dilated window",
        family=DILATED,
        says="A sliding window with gaps; the gap may differ between heads.",
        equation="causal: j = i - r t, 0 <= t < w\nboth sides: j = i + r t, |t| <= w // 2",
        paper=LONGFORMER,
        cost="O(N w)",
        example="dilated(8, [1, 4])",
        full="dilated(1024, [1, 4, 16, 32])",
        small="dilated(3, 2)",
    ),
    Card(
        name="sda",
        title="SDA, shifted dilated attention",
        family=DILATED,
        says="Within a segment each head keeps every r-th key, and all queries use them: r heads "
        "together see the whole segment.",
        equation="(j mod S) mod r = h mod r\ni // S = j // S and j <= i",
        paper=SCCA,
        cost="O(N S / r)",
        example="sda(32, 4)",
        full="sda(16384, 8)",
        small="sda(4, 2)",
        small_heads=2,
    ),
    Card(
        name="sda.neighborhood",
        title="SDA, neighbourhood form",
        family=DILATED,
        says="A dilated window that starts one token further back in each head: r heads together "
        "see a window of r k tokens.",
        equation="j = i - (h mod r) - r t, 0 <= t < k",
        paper=SCCA,
        cost="O(N k)",
        example="sda.neighborhood(5, 4)",
        full="sda.neighborhood(1024, 8)",
        small="sda.neighborhood(2, 3)",
        small_heads=2,
    ),
    Card(
        name="longnet",
        title="LongNet",
        family=DILATED,
        says="Several branches, from short and dense to long and dilated, mixed by their softmax "
        "denominators: a key that two branches share counts twice. As a set of pairs, each "
        "counting once, it is longnet_set.",
        equation="branch: i // w = j // w and\n(i mod w) mod r = (j mod w) mod r = h mod r",
        paper=LONGNET,
        cost="O(sum of N w / r^2)",
        example="longnet([8, 32, 64], [1, 2, 4])",
        full="longnet([2048, 4096, 8192, 16384, 32768], [1, 2, 4, 6, 12])",
        small="longnet([4, 8], [1, 2])",
        small_heads=2,
        also=("longnet.branch", "longnet_set"),
    ),
)
