"""Teach block gates where a trained model really attends, and see how much of it they keep.

Each layer's gate learns from the attention that the model's own projections pay on the standard
library's source; the model itself is not trained. Recall is the share of dense attention inside
the chosen blocks, on files that the gates have not seen; "best" chooses by the attention itself.

    python examples/block_gate.py          a few seconds
    python examples/block_gate.py 200      more steps
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import torch

import longspan as ls
from longspan.hf.beside import attention_inputs
from longspan.train.recipe import demo_model

LENGTH, BLOCK, TOP = 512, 16, 3


def main(steps: int = 24) -> None:
    """Train the gate of each layer, and print recall before and after."""
    torch.manual_seed(0)
    # Tensors this small only lose time to more threads.
    torch.set_num_threads(1)
    model, tokenizer = ls.hf.load_model(demo_model())
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    texts = [file.read_text(encoding="utf-8", errors="ignore")[: 8 * LENGTH] for file in files]
    rows = tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"]
    ids = torch.tensor([row for row in rows if len(row) == LENGTH])
    train, unseen = attention_inputs(model, ids[:24]), attention_inputs(model, ids[-4:])

    gates = ls.hf.convert(model, "BlockGate", block=BLOCK, top=TOP).mechanisms.values()
    print(f"Each row sees {TOP} of up to {LENGTH // BLOCK} blocks. Recall of attention mass:")
    print("layer    random   pooled  trained     best")
    for number, (gate, seen, test) in enumerate(zip(gates, train, unseen, strict=True)):
        assert isinstance(gate, ls.mechanism.BlockGate)
        learned = [gate.gate_query, gate.gate_key]
        for weight in learned:
            torch.nn.init.normal_(weight)
        recall = [gate.recall(test)]
        gate.reset_gate()
        recall.append(gate.recall(test))
        optimizer = torch.optim.Adam(learned, lr=5e-3)
        for step in range(steps):
            optimizer.zero_grad()
            gate.distill(seen[step % len(seen)][None]).backward()
            optimizer.step()
        recall += [gate.recall(test), gate.recall(test, best=True)]
        print(f"{number:5}    ", "    ".join(f"{share.mean():.3f}" for share in recall))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
