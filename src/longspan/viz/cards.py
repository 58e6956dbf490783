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
    small_tokens: int = 8
    small_heads: int = 1


LONGFORMER = Paper(text="Longformer, Beltagy et al. 2020", arxiv="2004.05150")
LONGLORA = Paper(text="LongLoRA, Chen et al. 2023", arxiv="2309.12307")
SCCA = Paper(text="SCCA, Guo 2023", arxiv="2312.07305")
TRANSFORMER = Paper(text="Attention Is All You Need, Vaswani et al. 2017", arxiv="1706.03762")

DENSE, LOCAL, CHUNKS, SHIFTED = "Dense", "Local", "Chunks", "Shifted over heads"
GLOBAL, MADE = "Global tokens", "Made of others"

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
        says="Every token sees every token, before and after it: attention of encoders.",
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
        example="layers(chunk(16, causal=false), chunk(16, offset=8, causal=false))",
        full="layers(chunk(4096, causal=false), chunk(4096, offset=2048, causal=false))",
        small="layers(chunk(4, causal=false), chunk(4, offset=2, causal=false))",
    ),
)
