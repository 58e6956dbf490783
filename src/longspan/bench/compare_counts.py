"""What of a comparison is the same on every machine: sight, state, error and work of entries.

python -m longspan.bench.compare_counts '{"entries": ["window(64)"], "lengths": [256]}'

prints a record per entry as soon as it is there, as a line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longspan.analysis import kept_tokens
from longspan.analysis.reach import period
from longspan.bench import compare_reach as sight
from longspan.bench import tally
from longspan.bench.compare_asked import STATE, Bench, Compare
from longspan.bench.compare_entries import DenseLayer, Entry, PatternLayer, choose
from longspan.errors import LongspanError
from longspan.hf.beside import attention_inputs
from longspan.mechanism.layer import MechanismLayer, options_of
from longspan.pattern import Dense
from longspan.planning import plan


class Counts:
    """The model on a CPU in float32, what it reads, and what dense attention makes of that."""

    def __init__(self, asked: Compare) -> None:
        self.asked, self.bench = asked, Bench(asked)
        model, ids = self.bench.model, self.bench.ids
        self.text = attention_inputs(model, ids[:, : asked.text])
        self.short = attention_inputs(model, ids[:, : asked.tokens])
        self.exact = {
            True: self._outputs(Entry(text="", kind=DenseLayer)),
            False: self._outputs(Entry(text="", kind=PatternLayer, options={"pattern": Dense()})),
        }

    def measure(self, one: Entry) -> dict[str, Any]:
        """One record; of an entry that refuses, the reason."""
        try:
            layers = self.bench.layers(one)
            return {
                "group": one.group,
                "causal": one.causal,
                "formula": one.formula,
                **self._sight(one, layers),
                **self._state(one, layers[0]),
                **self._error(one, layers),
                **self._work(one),
            }
        except (LongspanError, torch.OutOfMemoryError) as error:
            return refused(one, error)

    @torch.no_grad()
    def _outputs(self, one: Entry) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.bench.layers(one), self.text, strict=True)]

    def _sight(self, one: Entry, layers: list[MechanismLayer]) -> dict[str, Any]:
        if one.pattern is not None:
            rows = sight.starts(self.asked.tokens, self.asked.tokens)
            pairs = sight.pattern_layers(
                one.pattern, self.asked.tokens, layers[0].heads, len(layers)
            )
            seen = sight.follow(pairs, rows)
        else:
            rows = sight.starts(self.asked.tokens, self.asked.followed)
            seen = sight.walk(layers, self.short, rows)
        found = sight.shares(seen, rows, self.asked.near, one.causal)
        leaks = None
        if one.causal:
            # A pattern looks the same whatever the weights of a layer are.
            apart = len(layers) if one.pattern is None else period(one.pattern)
            leaks = max(map(sight.leak, layers[:apart], self.short))
        return {**found, "leak": leaks}

    def _state(self, one: Entry, layer: MechanismLayer) -> dict[str, Any]:
        sizes: list[tuple[int, float]] = []
        x = self.bench.first(STATE[-1])
        for n in STATE if one.causal else ():
            if one.pattern is not None:
                size = kept_tokens(one.pattern, n, layer.heads, layer.kv_heads)
            else:
                size = sight.mechanism_state(layer, x[:, :n])
            if size is not None:
                sizes.append((n, size))
        return {
            "state": sizes[-1][1] if sizes else None,
            "state_growth": sight.growth(sizes),
        }

    @torch.no_grad()
    def _error(self, one: Entry, layers: list[MechanismLayer]) -> dict[str, Any]:
        each = [
            float((layer(x) - exact).norm() / exact.norm())
            for layer, x, exact in zip(layers, self.text, self.exact[one.causal], strict=True)
        ]
        return {"error": sum(each) / len(each), "errors": each}

    def _work(self, one: Entry) -> dict[str, Any]:
        # Compiled kernels, which some machines have, show none of their products.
        shown = {"impl": "tiled"} if "impl" in options_of(one.kind) else {}
        layer = self.bench.layers(replace(one, options={**one.options, **shown}))[0]
        rows: list[dict[str, Any]] = []
        for n in self.asked.lengths:
            dense = 2 * layer.heads * layer.head_dim * n * (n + 1)
            if one.pattern is not None:
                pairs = plan(one.pattern.at_layer(0), n, layer.heads).pairs
                work = 4 * layer.head_dim * pairs
            else:
                work = tally.products(layer, self.bench.first(n))
            rows.append({"n": n, "operations": work, "of_dense": work / dense})
        counted = [(row["n"], row["operations"]) for row in rows]
        return {"exponent": sight.growth(counted), "lengths": rows}


def refused(one: Entry, error: Exception) -> dict[str, Any]:
    """The record of an entry without figures."""
    why = str(error).split("\n", 1)[0]
    return {"group": one.group, "causal": one.causal, "refused": why}


def main(words: str) -> None:
    """Print the records of what is asked as JSON: sizes of ``Compare``, entries as texts."""
    given = json.loads(words)
    entries = choose(given.pop("entries"))
    asked = Compare(**{**given, "entries": entries, "lengths": tuple(given["lengths"])})
    torch.set_num_threads(asked.threads)
    counts = Counts(asked)
    try:
        for one in entries:
            print(json.dumps(counts.measure(one)), flush=True)
    except BrokenPipeError:
        # Who asked was killed. Python would flush once more at the end, and say so.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main(sys.argv[1])
