"""What context parallel attention moves for each pattern: the table of docs/context-parallel.md.

    python benchmarks/context_parallel.py

Counted, not measured: no processes, no tensors.
"""

from __future__ import annotations

import longspan as ls

N, RANKS, HEADS, KEY_HEADS = 16384, 8, 32, 8
PATTERNS = (
    "causal()",
    "window(1024)",
    "window(1024) | sink(4)",
    "dilated(1024, 4)",
    "strided(8)",
    "ssa(512, 8)",
    "scca.flow(1024)",
    "shifted_chunk(2048)",
    "longnet([2048, 16384], [1, 8])",
    "bigbird(64, 3, causal=true)",
    "longformer(512, [0, 1])",
    "neighborhood(511)",
)


def table() -> list[str]:
    """The lines of a Markdown table."""
    lines = [
        "| pattern | most rows that a rank gets | moved | zig-zag | busiest / mean | zig-zag |",
        "|---|---|---|---|---|---|",
    ]
    for text in PATTERNS:
        even, zigzag = (
            ls.parallel.explain(text, N, RANKS, heads=HEADS, key_heads=KEY_HEADS, shards=shards)
            for shards in ("even", "zigzag")
        )
        busiest = int(even.received.argmax())
        rows, peers = even.received[busiest], even.peers[busiest]
        written = text.replace("|", "\\|")
        lines.append(
            f"| `{written}` | {rows:,} from {peers} | {even.share:.1%} | {zigzag.share:.1%} "
            f"| {even.balance:.2f} | {zigzag.balance:.2f} |"
        )
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
