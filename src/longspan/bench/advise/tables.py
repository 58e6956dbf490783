"""The table of an advice: one definition of what stands in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from longspan.bench.advise.facts import NEAR

Entry = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A column: its title, and the text of an entry's cell."""

    title: str
    cell: Callable[[Entry], str]
    left: bool = False


def columns(found: dict[str, Any]) -> Sequence[Column]:
    """The columns of an advice; those of what was not measured are left out."""
    whole = [
        Column("#", lambda e: str(e["rank"]) if "rank" in e else ""),
        Column("pattern", lambda e: e["pattern"], left=True),
        Column("keys", lambda e: f"{e['keys']:,.0f}"),
        Column("1\nlayer", lambda e: _share(e["one_layer"])),
        Column("near", lambda e: _share(e["near"])),
        Column("all\nafter", _layers),
        Column("as\nis", lambda e: "maybe" if e["drop_in"] else "tune", left=True),
    ]
    shown = [found["dense"], *found["ranked"]]
    if found["timed"]:
        took = [
            Column("ms", lambda e: _number(e["seconds"], 1e-3)),
            Column("of\ndense", lambda e: _ratio(e["of_dense_time"])),
        ]
        whole[2:2] = took
        if len(_kernels(found)) > 1:
            whole.append(Column("kernel", lambda e: "+".join(e["kernels"]) or "-", left=True))
    for title, key in (("peak\nMiB", "memory_bytes"), ("cache\nMiB", "cache_bytes")):
        decoding = key == "cache_bytes"
        if any(e[key] is not None for e in shown) and not (decoding and found["train"]):
            at = next(i for i, c in enumerate(whole) if c.title == "as\nis")
            whole.insert(at, Column(title, lambda e, key=key: _number(e[key], 2**20)))
    return whole


def legend(found: dict[str, Any], layers: int, causal: bool) -> str:
    """What the columns say."""
    legal = "earlier tokens" if causal else "tokens"
    parts = [
        "keys: per query, mean over queries and heads.",
        f"1 layer: {legal} that some head sees.",
        f"near: of the {NEAR} nearest keys, those that a head sees.",
        f"all after: layers until every token has reached all {legal}; a share is what all "
        f"{layers} layers reach.",
        "as is: maybe, if every head sees each token's predecessor and the first token, as "
        "pretrained models need; else tune.",
    ]
    if found["timed"]:
        parts.insert(0, "of dense: time, over that of dense attention in the same rounds.")
        if len(kernels := _kernels(found)) == 1:
            dense = "+".join(found["dense"]["kernels"])
            parts.append(f"kernel: {kernels[0]} for all candidates, PyTorch's {dense} for dense.")
    if causal and not found["train"]:
        parts.append(f"cache: keys and values that decoding keeps, {layers} layers.")
    if samples := max(e["samples"] for e in [found["dense"], *found["ranked"]]):
        parts.append(f"Shares are estimated from {samples} queries.")
    return " ".join(parts)


def _layers(entry: Entry) -> str:
    return str(entry["complete"]) if entry["complete"] else _share(entry["reached"])


def _kernels(found: dict[str, Any]) -> list[str]:
    """Kernels of candidates; dense attention runs another library's."""
    own = [e for e in found["ranked"] if e["family"] != "dense"]
    return list(dict.fromkeys("+".join(e["kernels"]) for e in own))


def _share(share: float) -> str:
    return ">99%" if 0.995 <= share < 1 else "<1%" if 0 < share < 0.005 else f"{share:.0%}"


def _number(value: float | None, unit: float) -> str:
    if value is None:
        return "-"
    return f"{value / unit:,.{0 if value >= 100 * unit else 1}f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
