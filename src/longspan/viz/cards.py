"""What the gallery says of each pattern: words, equation, paper, examples; the rest is computed.

A pattern without a card is a failing test. Equations use i for the query's position, j for the
key's, h for the head (of H), all from 0.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Where a pattern comes from.

    Attributes:
        text: authors and year.
        arxiv: its number there; empty if it is not there.
    """

    text: str
    arxiv: str = ""


@dataclass(frozen=True, kw_only=True)
class Card:
    """One entry of the gallery.

    Attributes:
        name: of the pattern in its text form.
        title: heading.
        family: for the filter.
        says: what it does, in a sentence or two.
        equation: which pairs it allows; lines.
        paper: origin, if it has one.
        cost: time for N tokens.
        example: text form that is drawn over ``tokens`` tokens and ``heads`` heads.
        full: text form of the same idea at N = 32,768.
        small: text form that is small enough to be checked by hand, over ``small_tokens`` tokens
            and ``small_heads`` heads.
        tokens: of the picture.
        heads: of the picture.
        layers: of the picture of reach.
        also: names of other patterns that this entry speaks of.
        python: the call that makes ``example``, for published compositions.
        small_tokens: of the small example.
        small_heads: of the small example.
    """

    name: str
    title: str
    family: str
    says: str
    equation: str
    cost: str
    example: str
    full: str
    small: str
    paper: Paper | None = None
    tokens: int = 64
    heads: int = 4
    layers: int = 3
    also: tuple[str, ...] = ()
    python: str = ""
    small_tokens: int = 8
    small_heads: int = 1


LONGFORMER = Paper(text="Longformer, Beltagy et al. 2020", arxiv="2004.05150")
LONGLORA = Paper(text="LongLoRA, Chen et al. 2023", arxiv="2309.12307")
SCCA = Paper(text="SCCA, Guo 2023", arxiv="2312.07305")
BIGBIRD = Paper(text="BigBird, Zaheer et al. 2020", arxiv="2007.14062")
LONGNET = Paper(text="LongNet, Ding et al. 2023", arxiv="2307.02486")
NEIGHBORHOOD = Paper(text="NAT and DiNAT, Hassani et al. 2022", arxiv="2209.15001")
SPARSE = Paper(text="Sparse Transformer, Child et al. 2019", arxiv="1904.10509")
SSA = Paper(text="Shifted Sparse Attention")
TRANSFORMER = Paper(text="Attention Is All You Need, Vaswani et al. 2017", arxiv="1706.03762")

ETC = Paper(text="ETC, Ainslie et al. 2020", arxiv="2004.08483")
MINFERENCE = Paper(text="MInference, Jiang et al. 2024", arxiv="2407.02490")

DENSE, LOCAL, CHUNKS, SHIFTED = "Dense", "Local", "Chunks", "Shifted over heads"
DILATED, GLOBAL = "Strided and dilated", "Global tokens"
RANDOM, MADE, PRESETS = "Random and blocks", "Made of others", "Published mixes"

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
    Card(
        name="shifted_chunk",
        title="Shifted chunks (S2-Attn)",
        family=SHIFTED,
        says="Half of the heads use chunks, the other half chunks moved by half a chunk, so that "
        "layers carry information across the borders. Nothing wraps around to the future.",
        equation="(i - s) // g = (j - s) // g and j <= i\ns = 0 for h < H / 2, else g / 2",
        paper=LONGLORA,
        cost="O(N g)",
        example="shifted_chunk(16)",
        full="shifted_chunk(8192)",
        small="shifted_chunk(4)",
        small_heads=2,
    ),
    Card(
        name="scca.fixed",
        title="SCCA, fixed",
        family=SHIFTED,
        says="Queries stay in their chunk; in half of the heads keys and values come from a chunk "
        "that lies s tokens back.",
        equation="c g - s <= j < (c + 1) g - s and j <= i\nc = i // g; s = 0 for h < H / 2",
        paper=SCCA,
        cost="O(N g)",
        example="scca.fixed(12)",
        full="scca.fixed(4096)",
        small="scca.fixed(4)",
        small_heads=2,
    ),
    Card(
        name="scca.flow",
        title="SCCA, flow",
        family=SHIFTED,
        says="Head h reads the chunk that lies h chunks back, around inside the query's own past. "
        "With as many heads as chunks a single layer sees the whole past.",
        equation="j // g = a - (h mod (a + 1)) and j <= i\na = i // g",
        paper=SCCA,
        cost="O(N g)",
        example="scca.flow(12)",
        full="scca.flow(2048)",
        small="scca.flow(2)",
        small_heads=3,
    ),
    Card(
        name="neighborhood",
        title="Neighbourhood (NA, DiNA)",
        family=LOCAL,
        says="The k nearest tokens, with dilation d every d-th of them. At the ends the window "
        "stops moving, so that every query has exactly k keys.",
        equation="k places of the group i mod d,\nfrom clamp(i // d - k // 2, 0, L - k)",
        paper=NEIGHBORHOOD,
        cost="O(N k)",
        example="heads(neighborhood(13), neighborhood(13, dilation=4))",
        full="heads(neighborhood(1025), neighborhood(1025, dilation=16))",
        small="neighborhood(3)",
    ),
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
    Card(
        name="global",
        title="Global tokens",
        family=GLOBAL,
        says="Listed tokens see everything and are seen by everything: two layers connect any "
        "two tokens.",
        equation="i in G or j in G",
        paper=LONGFORMER,
        cost="O(N |G|)",
        example="window(9, causal=false) | global(0, 40)",
        full="window(1024, causal=false) | global(0, 16384)",
        small="window(3, causal=false) | global(0)",
    ),
    Card(
        name="random_blocks",
        title="Random blocks",
        family=RANDOM,
        says="Each block of queries sees a few blocks drawn once by seed, head and block. Causal "
        "draws are made among past blocks, so that they stay when the sequence grows.",
        equation="j // b in draw(seed, h, i // b) and j <= i",
        paper=BIGBIRD,
        cost="O(N r b)",
        example="chunk(4) | random_blocks(4, 2, apart=1)",
        full="chunk(64) | random_blocks(64, 8, apart=1)",
        small="random_blocks(2, 1, apart=1)",
        small_tokens=6,
    ),
    Card(
        name="random",
        title="Random tokens",
        family=RANDOM,
        says="Each query of each head sees a few single tokens drawn by seed.",
        equation="j in draw(seed, h, i) and j <= i",
        paper=BIGBIRD,
        cost="O(N r)",
        example="window(4) | random(3)",
        full="window(512) | random(8)",
        small="random(2)",
        small_tokens=6,
    ),
    Card(
        name="mixture",
        title="Mixture",
        family=MADE,
        says="Patterns side by side, joined by their softmax denominators: pairs that two parts "
        "share count twice, where a union counts them once.",
        equation="softmax of q k + log c, c = parts that hold the pair",
        paper=LONGNET,
        cost="O(sum of its parts)",
        example="mixture(longnet([8, 32, 64], [1, 2, 4]), window(6))",
        full="mixture(longnet([2048, 8192, 32768], [1, 4, 12]), window(512))",
        small="mixture(chunk(4), window(2))",
    ),
    Card(
        name="document",
        title="Packed documents",
        family=MADE,
        says="Documents side by side in one sequence that do not see each other.",
        equation="document of i = document of j",
        cost="O(sum n^2)",
        example="document(20, 12, 24) & causal()",
        full="document(8192, 8192, 8192) & causal()",
        small="document(3, 2) & causal()",
    ),
    Card(
        name="heads",
        title="One pattern per head",
        family=MADE,
        says="The heads are cut into equal runs, each with a pattern of its own.",
        equation="pattern number h // (H / k) of k",
        cost="O(sum of its parts)",
        example="heads(window(8), chunk(24) | sink(2))",
        full="heads(window(1024), chunk(8192) | sink(4))",
        small="heads(window(2), chunk(4))",
        small_heads=2,
    ),
    Card(
        name="layers",
        title="One pattern per layer (Swin, 1-D)",
        family=MADE,
        says="Layers take turns. Swin's shifted windows in one dimension: chunks in even layers, "
        "chunks moved by half in odd ones.",
        equation="pattern number layer mod k of k",
        paper=Paper(text="Swin Transformer, Liu et al. 2021", arxiv="2103.14030"),
        cost="O(N g)",
        python="ls.swin(16)",
        example="layers(chunk(16, causal=false), chunk(16, offset=8, causal=false))",
        full="layers(chunk(4096, causal=false), chunk(4096, offset=2048, causal=false))",
        small="layers(chunk(4, causal=false), chunk(4, offset=2, causal=false))",
    ),
    Card(
        name="vertical_slash",
        title="Vertical and slash",
        family=GLOBAL,
        says="A few key columns and a few diagonals, usually chosen for each head by what it "
        "attends to. With a block, diagonals widen to full tiles: a superset.",
        equation="j in columns or i - j in offsets\nand j <= i",
        paper=MINFERENCE,
        cost="O(N (columns + offsets))",
        example="vertical_slash([0, 1, 13, 30], [0, 1, 2, 11, 27])",
        full="vertical_slash([0, 1, 2, 3, 5000], [0, 64, 1024, 4096], block=64)",
        small="vertical_slash([0], [0, 2])",
    ),
    Card(
        name="summaries",
        title="Summary tokens",
        family=GLOBAL,
        says="The last tokens of every block stay visible to all later ones: with Chunk, Sparse "
        "Transformer's fixed pattern.",
        equation="j mod l >= l - c and j <= i",
        paper=SPARSE,
        cost="O(N^2 c / l)",
        example="summaries(8, 2)",
        full="summaries(128, 8)",
        small="summaries(4)",
    ),
    Card(
        name="blocks",
        title="Block map",
        family=RANDOM,
        says="Any set of square blocks, as a list of key blocks for each block of queries.",
        equation="j // b in map[i // b]",
        paper=SPARSE,
        cost="O(pairs)",
        example="blocks([[0], [0, 1], [0, 2], [0, 2, 3], [0, 4], [0, 4, 5], [0, 4, 6], "
        "[0, 4, 6, 7]], 8, causal=true)",
        full="blocks([[0], [0, 1], [0, 2], [0, 2, 3], [0, 4], [0, 4, 5], [0, 4, 6], "
        "[0, 4, 6, 7]], 4096, causal=true)",
        small="blocks([[0], [0, 1], [1, 2]], 2)",
        small_tokens=6,
    ),
    Card(
        name="band_blocks",
        title="Band of blocks",
        family=RANDOM,
        says="The query's own block and its neighbours, whole: BigBird's local part.",
        equation="i // b - back <= j // b <= i // b + ahead",
        paper=BIGBIRD,
        cost="O(N b)",
        example="band_blocks(6)",
        full="band_blocks(512)",
        small="band_blocks(2)",
    ),
    Card(
        name="edge_blocks",
        title="Edge blocks",
        family=RANDOM,
        says="The first and the last blocks see everything and are seen by everything: BigBird's "
        "global part.",
        equation="i // b or j // b among the first or last blocks",
        paper=BIGBIRD,
        cost="O(N b)",
        example="edge_blocks(4)",
        full="edge_blocks(64)",
        small="edge_blocks(2)",
    ),
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
