"""Published mixes."""

from __future__ import annotations

from longspan.viz.cards.card import BIGBIRD, ETC, LONGFORMER, PRESETS, SCCA, SPARSE, Card

CARDS = (
    Card(
        name="longformer",
        title="Longformer",
        family=PRESETS,
        says="A two-sided window and a few global tokens; a dilation of the window may differ "
        "between heads.",
        equation="|i - j| <= w / 2 or i in G or j in G",
        paper=LONGFORMER,
        cost="O(N w)",
        python="ls.longformer(10, [0, 32])",
        example="window(10, causal=false) | global(0, 32)",
        full="window(512, causal=false) | global(0)",
        small="window(2, causal=false) | global(3)",
        small_tokens=6,
    ),
    Card(
        name="bigbird",
        title="BigBird",
        family=PRESETS,
        says="Three neighbouring blocks, the first and the last block global, and a few random "
        "blocks apart from those.",
        equation="band or edge or random block",
        paper=BIGBIRD,
        cost="O(N b)",
        python="ls.bigbird(4, 2)",
        example="band_blocks(4) | edge_blocks(4) | "
        "random_blocks(4, 2, apart=2, skip=1, causal=false)",
        full="band_blocks(64) | edge_blocks(64) | "
        "random_blocks(64, 3, apart=2, skip=1, causal=false)",
        small="band_blocks(2) | edge_blocks(2) | "
        "random_blocks(2, 1, apart=2, skip=1, causal=false)",
        small_tokens=12,
    ),
    Card(
        name="etc",
        title="ETC",
        family=PRESETS,
        says="Global tokens in front that see all and are seen by all, and a long input behind "
        "them with a window.",
        equation="|i - j| <= r or i < g or j < g",
        paper=ETC,
        cost="O(N r)",
        python="ls.etc(4, 3)",
        example="window(9, causal=false) | global(0, 1, 2)",
        full="window(169, causal=false) | global(0, 1, 2, 3, 4, 5, 6, 7)",
        small="window(3, causal=false) | global(0, 1)",
        small_tokens=6,
    ),
    Card(
        name="sparse_transformer.strided",
        title="Sparse Transformer, strided",
        family=PRESETS,
        says="The last l tokens, and every l-th one back from the query: two steps reach every "
        "past token. Made for images.",
        equation="i - j < l or j = i (mod l)\nand j <= i",
        paper=SPARSE,
        cost="O(N l + N^2 / l)",
        python="ls.sparse_transformer(8)",
        example="window(8) | diagonals(8)",
        full="window(181) | diagonals(181)",
        small="window(3) | diagonals(3)",
    ),
    Card(
        name="sparse_transformer.fixed",
        title="Sparse Transformer, fixed",
        family=PRESETS,
        says="The query's own block, and the last tokens of every block. Made for text.",
        equation="i // l = j // l or j mod l >= l - c\nand j <= i",
        paper=SPARSE,
        cost="O(N l + N^2 c / l)",
        python='ls.sparse_transformer(8, kind="fixed", summary=1)',
        example="chunk(8) | summaries(8)",
        full="chunk(128) | summaries(128, 8)",
        small="chunk(3) | summaries(3)",
    ),
    Card(
        name="longmixed",
        title="LongMixed",
        family=PRESETS,
        says="SCCA in half of the heads, shifted dilated attention in the other half: near "
        "chunks one by one, far ones thinned out.",
        equation="scca.flow for h < H / 2, else sda",
        paper=SCCA,
        cost="O(N g)",
        python="ls.longmixed(8, 4)",
        example="heads(scca.flow(8), sda(32, 4))",
        full="heads(scca.flow(1024), sda(8192, 8))",
        small="heads(scca.flow(2), sda(4, 2))",
        small_heads=4,
    ),
)
