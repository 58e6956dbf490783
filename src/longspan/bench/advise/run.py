"""Advice: candidates are made, counted, measured and ranked, for each length."""

from __future__ import annotations

import math
from typing import Any

import torch

from longspan.bench.advise.asked import GENERATED, Advise, Budget
from longspan.bench.advise.candidates import Candidate, Family, Sizes, fitted, given, layers_of
from longspan.bench.advise.facts import Facts, facts
from longspan.bench.advise.families import FAMILIES
from longspan.bench.advise.measure import Progress, measure
from longspan.bench.advise.rank import Standing, ranked
from longspan.bench.advise.resize import Sought
from longspan.bench.advise.words import DENSE, cannot, lines, note, over, unmet, why
from longspan.eval.records import Records

# How often a candidate is given another size and measured again.
_TRIES = 3


def advise(
    asked: Advise,
    records: Records,
    progress: Progress = lambda *_: None,
    *,
    dry_run: bool = False,
) -> list[dict[str, Any]]:
    """Advice for each length.

    Args:
        asked: sizes, budget and needs.
        records: what was measured before; what is measured now is added.
        progress: called with what is done, how much of it, of how much, and a note.
        dry_run: count and do not measure: candidates are ranked by keys in place of time.

    Returns:
        For each length ``n``, ``budget``, ``train``, ``timed``, ``dense`` (the entry of dense
        attention), ``ranked`` (entries, best first), ``left_out`` (what was not ranked, with
        ``why``), ``recommended`` (the first entry and ``use``, lines that use it; None where
        nothing fits) and ``note`` (a sentence where that is no gain, or None).

    Raises:
        Refusal: if no dense attention runs here.
    """
    return [_Advice(asked, n, records, progress, dry_run).result() for n in asked.lengths]


class _Advice:
    """Of one length."""

    def __init__(
        self, asked: Advise, n: int, records: Records, progress: Progress, dry_run: bool
    ) -> None:
        self.asked, self.n, self.records, self.progress = asked, n, records, progress
        self.dry_run = dry_run
        self.sizes = Sizes(keys=1, n=n, heads=asked.setting.heads, causal=asked.setting.causal)
        self.dense = given(DENSE[asked.setting.causal], n, self.sizes.heads)
        self.entries: dict[str, dict[str, Any]] = {}
        self.facts: dict[str, Facts] = {}
        self.left_out: list[dict[str, Any]] = []

    def result(self) -> dict[str, Any]:
        budget = self.asked.budget_at(self.n)
        self._admit(self._generated(self._keys(budget)) + self._given())
        self._measure()
        if budget.kind == "time" and not self.dry_run:
            self._resize(budget.amount)
        dense = self._dense_entry()
        self.entries[self.dense.text] = dense
        for text, entry in list(self.entries.items()):
            if said := self._not_ranked(entry):
                self._leave_out(entry["family"], text, said)
                if text != self.dense.text:
                    del self.entries[text]
        order = self._ranked()
        first = order[0] if order else None
        return {
            "n": self.n,
            "budget": {**vars(budget), "text": str(budget)},
            "train": self.asked.train,
            "timed": not self.dry_run,
            "dense": dense,
            "ranked": order,
            "left_out": self.left_out,
            "recommended": first and {**first, "use": self._use(first)},
            "note": note(order),
        }

    def _keys(self, budget: Budget) -> float:
        """Keys per query that a budget stands for."""
        if budget.kind == "keys":
            return budget.amount
        if budget.kind == "time":
            return max(1.0, budget.amount * self.sizes.legal)
        if budget.kind == "cache":
            return max(1.0, budget.amount * 2**20 / self._cache_bytes(1))
        usual = Advise(lengths=(self.n,), setting=self.asked.setting).budget_at(self.n)
        return usual.amount

    def _generated(self, keys: float) -> list[Candidate]:
        if GENERATED not in self.asked.candidates:
            return []
        found = []
        able = [family for family in FAMILIES if self.sizes.causal in family.ways]
        for done, family in enumerate(able):
            self.progress(f"fit at {self.n:,}", done, len(able), family.name)
            one = self._fitted(family, keys)
            if one is not None:
                found.append(one)
        self.progress(f"fit at {self.n:,}", len(able), len(able), "")
        return found

    def _fitted(self, family: Family, keys: float) -> Candidate | None:
        one = self._sized(family, keys)
        if isinstance(one, str):
            self._leave_out(family.name, None, one)
            return None
        return one

    def _sized(self, family: Family, keys: float) -> Candidate | str:
        """A candidate of about so many keys, or why there is none."""
        one = fitted(family, Sizes(**{**vars(self.sizes), "keys": keys}))
        if isinstance(one, Candidate) and one.keys >= self.dense.keys:
            return f"{one.text} is dense attention at this length"
        return one

    def _given(self) -> list[Candidate]:
        return [given(text, self.n, self.sizes.heads) for text in self.asked.own()]

    def _admit(self, candidates: list[Candidate]) -> None:
        """Entries of candidates that meet the needs."""
        if not candidates:
            return
        what, total = f"count at {self.n:,}", len(candidates)
        for done, one in enumerate(candidates):
            self.progress(what, done, total, one.text)
            if one.text not in self.entries and one.text != self.dense.text:
                entry = self._entry(one)
                if said := unmet(self.facts[one.text], self.asked):
                    self._leave_out(one.family, one.text, "; ".join(said))
                else:
                    self.entries[one.text] = entry
        self.progress(what, total, total, "")

    def _entry(self, one: Candidate) -> dict[str, Any]:
        setting = self.asked.setting
        known = facts(
            one.pattern,
            self.n,
            setting.heads,
            setting.key_heads,
            self.asked.layers,
            one.keys,
        )
        self.facts[one.text] = known
        cache = known.cache_tokens
        return {
            "family": one.family,
            "pattern": one.text,
            "layers": [str(layer) for layer in layers_of(one.pattern)],
            "of_dense_keys": one.keys / self.dense.keys,
            **known.to_dict(),
            "cache_bytes": None if cache is None else self._cache_bytes(cache),
            **dict.fromkeys(("seconds", "spread", "dense_seconds", "of_dense_time")),
            **dict.fromkeys(("memory_bytes", "dense_memory_bytes")),
            "kernels": [],
            "good_for": one.good_for,
            "cannot_see": cannot(known, self.asked.layers, setting.causal),
        }

    def _cache_bytes(self, tokens: float) -> float:
        """Of keys and values in all layers."""
        setting = self.asked.setting
        width = getattr(torch, setting.dtype).itemsize * setting.width
        return 2 * tokens * setting.key_heads * width * self.asked.layers

    def _measure(self) -> None:
        """Time what has no time yet: of a pattern that differs between layers, each of them."""
        if self.dry_run:
            return
        waiting = [one for one in self.entries.values() if one["seconds"] is None]
        texts = [text for one in waiting for text in one["layers"]]
        # Dense attention is measured beside candidates; alone where there is none.
        found = measure(self.asked, texts, self.n, self.records, self.progress)
        for one in waiting:
            one |= _joined([found[text] for text in one["layers"]])

    def _resize(self, share: float) -> None:
        """Give generated candidates the size that takes a share of dense attention's time."""
        families = {family.name: family for family in FAMILIES}
        waiting = {
            one["family"]: one for one in self.entries.values() if one["family"] in families
        }
        sought = {name: Sought(share) for name in waiting}
        tried = set(self.entries)
        for _ in range(_TRIES):
            again: dict[str, Candidate] = {}
            for name, entry in waiting.items():
                self.entries.pop(entry["pattern"])
                keys = sought[name].wanted(entry)
                one = None if keys is None else self._sized(families[name], keys)
                if isinstance(one, Candidate) and one.text not in tried:
                    again[name] = one
            tried |= {one.text for one in again.values()}
            self._admit(list(again.values()))
            self._measure()
            waiting = {
                name: self.entries[one.text]
                for name, one in again.items()
                if one.text in self.entries
            }
        for name, entry in waiting.items():
            self.entries.pop(entry["pattern"])
            sought[name].wanted(entry)
        for one in sought.values():
            if one.best is not None:
                self.entries[one.best["pattern"]] = one.best

    def _dense_entry(self) -> dict[str, Any]:
        entry = self._entry(self.dense)
        entry |= {"family": "dense", "good_for": "Anything: it is what models are trained with."}
        if not self.dry_run:
            entry["of_dense_time"] = 1.0
        beside = [one for one in self.entries.values() if one["seconds"] is not None]
        if beside:
            seconds = sorted(one["dense_seconds"] for one in beside)[len(beside) // 2]
            entry |= {
                "seconds": seconds,
                "dense_seconds": seconds,
                "memory_bytes": beside[0]["dense_memory_bytes"],
                "dense_memory_bytes": beside[0]["dense_memory_bytes"],
                "kernels": [beside[0]["dense"]],
            }
        return entry

    def _not_ranked(self, entry: dict[str, Any]) -> str | None:
        if said := entry.get("refused"):
            return said
        if wrong := entry.get("wrong"):
            errors = ", ".join(f"{name} {error:.2g}" for name, error in wrong.items())
            return f"not equal to the oracle, so not timed: relative error of {errors}"
        return over(entry, self.asked, self.n)

    def _ranked(self) -> list[dict[str, Any]]:
        """Entries in order; dense attention takes part, and is left out if it is over budget."""
        standings = [
            Standing(text=text, facts=self.facts[text], time=entry["of_dense_time"])
            for text, entry in self.entries.items()
        ]
        hidden = {one["pattern"] for one in self.left_out}
        found: list[dict[str, Any]] = []
        for one, place in ranked(standings, self.asked.prefer):
            if one.text in hidden:
                continue
            said = why(place, not found, self.asked.prefer, not self.dry_run)
            entry = {"rank": len(found) + 1, "front": place.front, "why": said}
            found.append(entry | self.entries[one.text])
        return found

    def _use(self, entry: dict[str, Any]) -> list[dict[str, str]]:
        return lines(entry["pattern"], self.n, entry["drop_in"], self.asked)

    def _leave_out(self, family: str, text: str | None, said: str) -> None:
        self.left_out.append({"family": family, "pattern": text, "why": said})


def _joined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One record of those of the layers of a pattern: means, and the largest memory."""
    for row in rows:
        if "seconds" not in row:
            return {key: row[key] for key in ("refused", "wrong", "errors") if key in row}
    mean = {
        key: math.fsum(row[key] for row in rows) / len(rows)
        for key in ("seconds", "dense_seconds", "of_dense_time")
    }
    memory = {
        key: max((row[key] for row in rows if row.get(key) is not None), default=None)
        for key in ("memory_bytes", "dense_memory_bytes")
    }
    return {
        **mean,
        "spread": max(row["spread"] for row in rows),
        "dense": rows[0]["dense"],
        "kernels": list(dict.fromkeys(kernel for row in rows for kernel in row["kernels"])),
        "errors": [row["errors"] for row in rows],
        **memory,
    }
