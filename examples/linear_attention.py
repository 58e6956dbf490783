"""Swap a trained model's attention for linear attention, and let it copy what it replaces.

Every layer's feature maps learn the output of the dense attention that stood there; the model
itself is not trained. Perplexity on modules of the standard library that nobody trained on.

    python examples/linear_attention.py FOLDER      half a minute; goes on after a stop
    python examples/linear_attention.py FOLDER 200  more steps
"""

from __future__ import annotations

import sys
from typing import Any

import torch

import longspan as ls
from longspan.eval.losses import TokenLoss
from longspan.train.data import Sampler, python_sources, tokenize_documents, windows
from longspan.train.distill import distill
from longspan.train.loop import LoopConfig
from longspan.train.recipe import demo_model

LENGTH, BATCH = 512, 4


@torch.no_grad()
def perplexity(model: Any, ids: torch.Tensor) -> float:
    """Of all tokens together."""
    loss = TokenLoss(model)
    return torch.cat([loss(part) for part in ids.split(8)]).mean().exp().item()


def main(folder: str, steps: int = 40) -> None:
    """Convert, distil, and print perplexity at each stage."""
    # Tensors this small only lose time to more threads.
    torch.set_num_threads(1)
    model, tokenizer = ls.hf.load_model(demo_model())
    text = tokenize_documents(tokenizer, python_sources("train")[:150])
    unseen = windows(tokenize_documents(tokenizer, python_sources("heldout")), LENGTH, seed=0)[:24]
    sampler = Sampler(text, LENGTH, seed=0)
    print(f"dense attention                 {perplexity(model, unseen):6.2f}")
    ls.hf.convert(model, ls.mechanism.LinearAttention)
    print(f"linear attention, as it starts  {perplexity(model, unseen):6.2f}")
    config = LoopConfig(steps=steps, lr=0.1, warmup=10, schedule="cosine", save_every=20)
    distill(model, lambda number: sampler.batch(number * BATCH, BATCH), config, folder)
    print(f"after {steps} steps{perplexity(model, unseen):27.2f}")


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "distilled", *map(int, sys.argv[2:3]))
