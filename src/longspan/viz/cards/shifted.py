"""Chunks that differ from head to head, and neighbourhoods."""

from __future__ import annotations

from longspan.viz.cards.card import LOCAL, LONGLORA, NEIGHBORHOOD, SCCA, SHIFTED, Card

CARDS = (
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
)
