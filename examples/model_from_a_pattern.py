"""Put a pattern into a Hugging Face model, train a step, and generate from it.

The model is the small one that comes with longspan; any folder with a Llama, Qwen, Mistral or
Gemma works the same way.

    python examples/model_from_a_pattern.py
"""

from __future__ import annotations

import torch

import longspan as ls
from longspan.train.recipe import demo_model


def main() -> None:
    """Compare perplexity inside and beyond the trained length, then generate."""
    torch.manual_seed(0)
    model, tokenizer = ls.hf.load_model(demo_model())
    source = "".join(
        f"def add_{i}(left, right):\n    return left + right + {i}\n\n" for i in range(99)
    )
    ids = torch.tensor([tokenizer(source)["input_ids"][:2048]])

    with torch.no_grad():
        plain = model(ids, labels=ids).loss.exp()
    ls.hf.extend(model, length=2048, pattern="window(512) | sink(4)", rope="yarn")
    with torch.no_grad():
        extended = model(ids, labels=ids).loss.exp()
    print(f"perplexity of 2048 tokens: {plain:.1f} as trained on 512, {extended:.1f} extended")

    start = ids[:, :700]
    text = model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=24)
    print(tokenizer.decode(text[0, 690:]))


if __name__ == "__main__":
    main()
