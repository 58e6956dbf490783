"""What the records of a benchmark say: curves against the length, break-even, who was left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longspan.errors import DataError
from longspan.eval.records import read_records
from longspan.viz.svg import label

FILE = "records.jsonl"
# Quarters further apart than this share of the median: other work ran beside.
WIDE = 0.2
_NEEDED = {"pattern", "n", "way", "rows"}

Row = dict[str, Any]


def read(folder: Path) -> dict[str, Any]:
    """Settings and records of a benchmark.

    Raises:
        DataError: if the folder holds none, none that is finished, or lines of another kind.
    """
    path = folder / FILE
    found = read_records(path) if path.exists() else None
    # Other commands keep records too, under the same name.
    if found is None or not found[0]["settings"].keys() >= {"heads", "key_heads", "width"}:
        raise DataError(
            f"{folder} holds no benchmark: expected {FILE}, as longspan bench --out writes it"
        )
    header, records = found
    strange = [record["key"] for record in records if not record.keys() >= _NEEDED]
    if strange:
        raise DataError(
            f"{path} holds lines that no benchmark wrote, first the one with the key "
            f"{strange[0]!r}: take them out, or measure again with longspan bench --out."
        )
    if not records:
        raise DataError(
            f"{path} holds no finished measurement: run the same longspan bench again, which goes "
            "on in this folder."
        )
    return {"settings": header["settings"], "records": records}


def points(found: dict[str, Any], pattern: str, way: str, name: str, what: str) -> list[Any]:
    """(length, value) of one competitor, sorted by length; of dense attention the best."""
    best = max if what == "of_dense" else min
    pairs = []
    for record in found["records"]:
        if (record["pattern"], record["way"]) != (pattern, way):
            continue
        values = [row[what] for row in record["rows"] if _is(row, name) and what in row]
        values = [value for value in values if value is not None]
        if values:
            pairs.append((record["n"], best(values)))
    return sorted(pairs)


def break_even(ours: Sequence[Any], dense: Sequence[Any]) -> str:
    """From which length on ours takes less time, in words."""
    other = dict(dense)
    met = [(n, seconds < other[n]) for n, seconds in ours if n in other]
    if not met:
        return "not measured"
    if not met[-1][1]:
        return f"beyond {label(met[-1][0])}"
    at = crossing(ours, dense)
    return f"below {label(met[0][0])}" if at is None else f"about {label(round(at, -2))}"


def crossing(ours: Sequence[Any], dense: Sequence[Any]) -> float | None:
    """The length from which on ours takes less time, if it lies between measured ones.

    Between two lengths time goes by their logarithms.
    """
    other = dict(dense)
    gains = [(n, math.log(other[n] / seconds)) for n, seconds in ours if n in other]
    lost = [at for at, (_, gain) in enumerate(gains) if gain <= 0]
    if not lost or lost[-1] == len(gains) - 1:
        return None
    (n, less), (m, more) = gains[lost[-1]], gains[lost[-1] + 1]
    share = -less / (more - less)
    return math.exp(math.log(n) + share * math.log(m / n))


def left_out(records: Sequence[Row]) -> list[tuple[str, str]]:
    """Who was not timed and why, with the cases unless it is all of them."""
    reasons: dict[tuple[str, str], list[Row]] = {}
    for record in records:
        for row in record["rows"]:
            for kind in ("absent", "refused", "failed"):
                if kind in row:
                    reasons.setdefault((row["name"], row[kind]), []).append(record)
            if row.get("wrong"):
                errors = ", ".join(f"{name} {error:.2g}" for name, error in row["wrong"].items())
                why = f"wrong, so not timed: relative error of {errors}"
                reasons.setdefault((row["name"], why), []).append(record)
    found = []
    for (name, why), some in reasons.items():
        about = ""
        for what in ("pattern", "way"):
            own = list(dict.fromkeys(record[what] for record in some))
            if len(own) < len({record[what] for record in records}):
                about += f"; {', '.join(own)}"
        found.append((name, why + (f" ({about[2:]})" if about else "")))
    return found


def named(row: Row) -> str:
    """A competitor, and the kernels that computed its passes."""
    kernels = "+".join(dict.fromkeys(row.get("kernels", ())))
    return f"{row['name']} ({kernels})" if kernels else row["name"]


def unrest(records: Sequence[Row]) -> str:
    """A sentence where times vary so much that small differences mean nothing; else empty."""
    spreads = [row["spread"] for r in records for row in r["rows"] if "spread" in row]
    wide = sum(spread > WIDE for spread in spreads)
    if 4 * wide < len(spreads) or not wide:
        return ""
    return (
        f"Times vary: in {wide} of {len(spreads)} measurements the quarters lie more than "
        f"{WIDE:.0%} of the median apart, at most {max(spreads):.0%}. Other work ran beside."
    )


def _is(row: Row, name: str) -> bool:
    return row["name"].startswith("dense ") if name == "dense" else row["name"] == name


def ours(records: Sequence[Row]) -> str:
    """The name of our first kernel."""
    return next(
        row["name"] for r in records for row in r["rows"] if row["name"].startswith("longspan ")
    )
