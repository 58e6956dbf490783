"""Other libraries on a CPU, each on its own pattern, against ours.

    python benchmarks/cpu_peers.py [--lengths 8192] [--rounds 5] [--dtype float32] [--write NAME]

FlexAttention (forward: it has no backward on a CPU), local-attention, LongLoRA's roll and reshape,
and transformers' Longformer and BigBird layers without their projections. The wanted lead is 2.
Output and gradients of all are compared with an oracle first, then they take turns with ours. What
is not installed is named. Records carry versions, hardware and the load of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from longspan.bench.run import Bench, run
from longspan.bench.setting import Setting
from longspan.cli.values import whole_numbers
from longspan.eval.records import Records

RESULTS = Path(__file__).parent / "results"
# Each with the peers whose own pattern it is.
PATTERNS = (
    "window(512)",
    "window(513, causal=false)",
    "bigbird(64, 3)",
    "shifted_chunk(1024)",
)
LEAD = 2.0


def leads(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How much longer each peer takes than ours."""
    found = []
    for record in records:
        timed = {row["name"]: row for row in record["rows"] if "seconds" in row}
        ours = timed.get("longspan auto")
        for name, row in timed.items():
            if ours is None or row is ours or name.startswith("dense"):
                continue
            found.append(
                {
                    "peer": name,
                    "pattern": record["pattern"],
                    "n": record["n"],
                    "way": record["way"],
                    "ours_ms": ours["seconds"] * 1e3,
                    "peer_ms": row["seconds"] * 1e3,
                    "lead": row["seconds"] / ours["seconds"],
                    "spread": max(row["spread"], ours["spread"]),
                    "load": record["load"],
                }
            )
    return found


def left_out(records: list[dict[str, Any]]) -> list[str]:
    """Peers that run on a CPU but did not, and why."""
    said: dict[str, None] = {}
    for record in records:
        for row in record["rows"]:
            for kind in ("absent", "failed", "wrong"):
                if row.get(kind):
                    said[f"{row['name']}, {record['pattern']}: {kind}: {row[kind]}"] = None
    return list(said)


def as_markdown(found: list[dict[str, Any]], missing: list[str], command: str, about: str) -> str:
    lines = ["# Other libraries on a CPU", "", about, "", f"    {command}", ""]
    lines += ["| peer | pattern | N | way | ours ms | peer ms | lead | spread | load |"]
    lines += ["|" + "---|" * 9]
    for row in found:
        cells = (
            row["peer"],
            row["pattern"],
            f"{row['n']:,}",
            row["way"],
            f"{row['ours_ms']:.1f}",
            f"{row['peer_ms']:.1f}",
            f"{row['lead']:.2f}" + ("" if row["lead"] >= LEAD else " (below 2)"),
            f"{row['spread']:.0%}",
            f"{row['load']:.1f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *(["", *missing] if missing else [])]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--lengths", default="8192")
    parser.add_argument("--patterns", nargs="*", default=PATTERNS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--write", help="name of the files in benchmarks/results")
    options = parser.parse_args()
    lengths = whole_numbers(options.lengths)
    asked = Bench(
        patterns=tuple(options.patterns),
        lengths=lengths,
        setting=Setting(n=max(lengths), dtype=options.dtype),
        peers=True,
        rounds=options.rounds,
        memory=False,
    )
    begin = time.monotonic()
    records = run(asked, Records(None, {}), lambda _, done, total, what: print(what, flush=True))
    found, missing = leads(records), left_out(records)
    settings = asked.settings()
    where = settings["environment"]
    about = (
        f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads; torch "
        f"{where['packages']['torch']}, transformers {where['packages']['transformers']}; 8 heads "
        f"of width 64, {options.dtype}, medians of {options.rounds} rounds in turns. Load is that "
        "of the machine before each case; 1 is this benchmark on a thread."
    )
    command = (
        f"python benchmarks/cpu_peers.py --lengths {options.lengths} --rounds {options.rounds} "
        f"--dtype {options.dtype}"
    )
    text = as_markdown(found, missing, command, about)
    print(text)
    print(f"{time.monotonic() - begin:.0f} s, load {os.getloadavg()[0]:.1f}")
    if options.write:
        file = RESULTS / f"{options.write}.json"
        whole = {"command": command, "settings": settings, "leads": found, "records": records}
        file.write_text(json.dumps(whole, indent=1, default=str) + "\n", encoding="utf-8")
        file.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
