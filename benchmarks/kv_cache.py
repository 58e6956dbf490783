"""What cache policies cost: seconds for a prompt, tokens decoded a second, bytes.

    PYTHONPATH=src python benchmarks/kv_cache.py MODEL TEXT --out FOLDER [--length 4096]
        [--budget 25] [--new 64] [--policies all] [--device cuda] [--dtype bfloat16]

What they lose is ``longspan eval kv``. Here every policy reads a prompt of its own, scores
included, and decodes ``--new`` tokens of the text behind it, keeping ``--budget`` percent. MODEL
is a folder, TEXT a long plain text. Every finished policy is a line of FOLDER/kv-speed.jsonl, not
measured again; FOLDER/kv-speed.md is for people.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import longspan as ls
from longspan.eval.environment import environment
from longspan.eval.kv_forms import forms
from longspan.eval.kv_sweep import DENSE
from longspan.eval.records import Records

HEAD = ["| policy | kept a head | memory | prompt s | tokens/s |", "|---|---:|---:|---:|---:|"]


def wait(device: torch.device) -> float:
    """Seconds, once the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(model: Any, ids: torch.Tensor, length: int, policy: Any) -> dict[str, Any]:
    """Read ``length`` tokens at once, the rest one by one."""
    cache = ls.kv.cache(model, policy)
    begin = wait(ids.device)
    model(ids[:, :length], past_key_values=cache, logits_to_keep=1)
    read = wait(ids.device)
    for place in range(length, ids.shape[1]):
        model(ids[:, place : place + 1], past_key_values=cache)
    end = wait(ids.device)
    report = cache.report()
    return {
        "prompt_seconds": read - begin,
        "tokens_per_second": (ids.shape[1] - length) / (end - read),
        "bytes": report.bytes,
        "dense_bytes": report.dense_bytes,
        "kept": [min(row.least for row in report.layers), max(row.most for row in report.layers)],
    }


def line(policy: str, row: dict[str, Any]) -> str:
    """A row of the table."""
    least, most = row["kept"]
    kept = f"{least}" if least == most else f"{least} to {most}"
    return (
        f"| {policy} | {kept} | {row['bytes'] / row['dense_bytes']:.1%} "
        f"| {row['prompt_seconds']:.2f} | {row['tokens_per_second']:.1f} |"
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--budget", type=float, default=25)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--policies", action="append")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    model, tokenizer = ls.hf.load_model(given.model, dtype=given.dtype, device=given.device)
    whole = tokenizer.encode(given.text.read_text(encoding="utf-8"))
    if len(whole) < given.length + given.new:
        raise SystemExit(f"{given.text} has {len(whole)} tokens, too few for the prompt")
    ids = torch.tensor([whole[: given.length + given.new]]).to(given.device)
    config = model.config.get_text_config()
    # Any will do: it is what streaming heads save that is timed.
    gates = [[0.0] * config.num_key_value_heads] * config.num_hidden_layers
    settings = {**vars(given), "text": given.text.name, "model": Path(given.model).name}
    for varies in ("out", "policies"):
        del settings[varies]
    records = Records(given.out / "kv-speed.jsonl", {**settings, **environment()})
    rows = []
    with torch.inference_mode():
        # Kernels are compiled and memory is found before anything is timed.
        measure(model, ids[:, : given.length + 2], given.length, "heavy(16)")
        for form in (DENSE, *forms(given.policies or ["all"])):
            if form.key not in records:
                dense = form is DENSE
                policy = (
                    form.template if dense else form.at(given.budget / 100, given.length, gates)
                )
                records.add(form.key, measure(model, ids, given.length, policy))
            rows.append(line(form.key, records[form.key]))
            print(rows[-1], flush=True)
    (given.out / "kv-speed.md").write_text("\n".join([*HEAD, *rows, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
