"""Perplexity of a model beyond its trained length, with and without Dual Chunk Attention.

    python benchmarks/dual_chunk_perplexity.py [--windows 16]

The embedded model (trained on 512 tokens) reads modules of the standard library that it has never
seen: every fourth piece of 4,096 tokens, cut into windows of each length side by side, all tokens
scored, so that all lengths score the same text. About ten minutes on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import longspan as ls
from longspan.eval.losses import TokenLoss
from longspan.eval.perplexity import perplexity
from longspan.train.data import python_sources, tokenize_documents

PIECE = 4096
TRAINED = 512


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=16, help="pieces of 4,096 tokens to read")
    wanted = parser.parse_args().windows
    model, tokenizer = ls.hf.load_model(Path(ls.__file__).parent / "assets" / "demo_model")
    joined = torch.cat(tokenize_documents(tokenizer, python_sources("heldout")))
    starts = range(0, len(joined) - PIECE + 1, 4 * PIECE)[:wanted]
    text = torch.cat([joined[start : start + PIECE] for start in starts])
    lengths = [TRAINED * 2**i for i in range(4)]
    print(f"| {len(text):,} tokens | {' | '.join(f'{length:,}' for length in lengths)} |")
    print("|---|" + "---|" * len(lengths))
    kinds = ("none", "chunkllama", "vllm")
    configs = [ls.DualChunk.for_length(TRAINED, temperature=kind) for kind in kinds]
    for config in (None, *configs):
        applied = ls.hf.apply(model, config) if config else None
        with torch.no_grad():
            found = perplexity(TokenLoss(model), [text], lengths)
        if applied:
            applied.remove()
        row = " | ".join(f"{one['perplexity']:.2f}" for one in found["lengths"])
        print(f"| {config or 'plain RoPE'} | {row} |", flush=True)


if __name__ == "__main__":
    main()
