"""What cache policies cost and what they lose, on a trained model: quality, memory and speed.

    PYTHONPATH=src python benchmarks/kv_cache.py MODEL TEXT --out FOLDER [--length 4096]
        [--budget 256] [--new 128] [--needles 5] [--device cuda] [--dtype bfloat16]

For every policy, at about the same number of kept tokens:

- perplexity of the tokens that follow a prompt, fed one by one through the cache, since scoring a
  text in one pass never evicts anything;
- passkeys found, generated greedily, at depths from 0.1 to 0.9 of the prompt;
- bytes allocated against those of keeping everything, seconds for the prompt (scores included),
  tokens decoded a second.

MODEL is a folder, TEXT a long plain text that the prompt and the filler are taken from. Every
finished policy is a line of FOLDER/kv-cache.jsonl, not measured again; FOLDER/kv-cache.md is for
people.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import longspan as ls
from longspan.eval.environment import environment
from longspan.eval.records import Records

RECENT = 32


def policies(budget: int) -> list[str]:
    """Policies that keep about ``budget`` tokens of a prompt, sinks and recent among them."""
    chosen = budget - 4 - RECENT
    return [
        "everything()",
        f"recent({budget}) + sinks(0)",
        f"recent({budget - 4})",
        *(f"{name}({chosen})" for name in ("heavy", "tova", "keydiff", "keynorm")),
        f"heavy({chosen}, age=true)",
        f"every(16, heavy({chosen}))",
        *(f"{name}({chosen})" for name in ("snapkv", "pyramidkv", "adakv", "expected_attention")),
        f"after_prefill(heavy({chosen}))",
        f"after_prefill(keydiff({chosen}))",
        f"quest({budget})",
    ]


def wait(device: str) -> float:
    """Seconds, once the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def perplexity(model: Any, ids: torch.Tensor, length: int, text: str) -> dict[str, Any]:
    """Read ``length`` tokens, then the rest one by one."""
    cache = ls.kv.cache(model, text)
    device, losses = ids.device.type, []
    begin = wait(device)
    logits = model(ids[:, :length], past_key_values=cache, logits_to_keep=1).logits[:, -1]
    read = wait(device)
    for place in range(length, ids.shape[1]):
        losses.append(F.cross_entropy(logits.float(), ids[:, place]))
        logits = model(ids[:, place : place + 1], past_key_values=cache).logits[:, -1]
    end = wait(device)
    report = cache.report()
    return {
        "perplexity": math.exp(float(torch.stack(losses).mean())),
        "prompt_seconds": read - begin,
        "tokens_per_second": len(losses) / (end - read),
        "bytes": report.bytes,
        "dense_bytes": report.dense_bytes,
        "kept": [min(row.least for row in report.layers), max(row.most for row in report.layers)],
    }


def found(
    model: Any, tokenizer: Any, filler: list[int], length: int, count: int, text: str
) -> float:
    """Share of passkeys that greedy generation gives back."""
    hits = 0
    for number in range(count):
        depth = 0.1 + 0.8 * number / max(1, count - 1)
        key = str(10007 + 7919 * (number + 1) % 89989)
        needle = tokenizer.encode(
            f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
        )
        question = tokenizer.encode("\n\nWhat is the pass key? The pass key is")
        rest = length - len(needle) - len(question)
        cut = int(depth * rest)
        prompt = torch.tensor([filler[:cut] + needle + filler[cut:rest] + question])
        prompt = prompt.to(model.device)
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=ls.kv.cache(model, text),
            max_new_tokens=10,
            do_sample=False,
        )
        hits += key in tokenizer.decode(out[0, prompt.shape[1] :])
    return hits / max(1, count)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--needles", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    model, tokenizer = ls.hf.load_model(given.model, dtype=given.dtype, device=given.device)
    whole = tokenizer.encode(given.text.read_text(encoding="utf-8"))
    if len(whole) < 2 * given.length + given.new:
        raise SystemExit(f"{given.text} has {len(whole)} tokens; twice the length is needed")
    ids = torch.tensor([whole[: given.length + given.new]]).to(given.device)
    filler = whole[-given.length :]
    settings = {**vars(given), "text": given.text.name, "model": Path(given.model).name}
    del settings["out"]
    records = Records(given.out / "kv-cache.jsonl", {**settings, **environment()})
    rows = []
    with torch.inference_mode():
        # Kernels are compiled and memory is found before anything is timed.
        perplexity(model, ids[:, : given.length + 2], given.length, "heavy(16)")
        for text in policies(given.budget):
            if text not in records:
                row = perplexity(model, ids, given.length, text)
                row["passkey"] = found(model, tokenizer, filler, given.length, given.needles, text)
                records.add(text, row)
            rows.append(line(text, records[text]))
            print(rows[-1], flush=True)
    (given.out / "kv-cache.md").write_text("\n".join([*HEAD, *rows, ""]))


HEAD = [
    "| policy | kept a head | memory | perplexity | passkeys | prompt s | tokens/s |",
    "|---|---|---|---|---|---|---|",
]


def line(policy: str, row: dict[str, Any]) -> str:
    """A row of the table."""
    least, most = row["kept"]
    kept = f"{least}" if least == most else f"{least} to {most}"
    return (
        f"| `{policy}` | {kept} | {row['bytes'] / row['dense_bytes']:.1%} "
        f"| {row['perplexity']:.2f} | {row['passkey']:.0%} | {row['prompt_seconds']:.2f} "
        f"| {row['tokens_per_second']:.1f} |"
    )


if __name__ == "__main__":
    main()
