"""Time against sight of candidates as one picture, by matplotlib: PNG, SVG or PDF."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def picture(advice: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a chart for each length: the upper left corner is where one wants to be.

    Numbers are ranks, colours fronts.

    Args:
        advice: what ``advise`` gave.
        path: of the picture; its ending says the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 5.2 * len(advice)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(advice), 1, squeeze=False)[:, 0]
    for axis, found in zip(grid, advice, strict=True):
        timed = found["timed"]
        what = "of_dense_time" if timed else "of_dense_keys"
        for entry in found["ranked"]:
            at = (entry[what], 100 * entry["one_layer"])
            front = min(entry["front"], 4)
            name = f"{entry['rank']}  {_short(entry['pattern'])}"
            axis.scatter(*at, s=110, color=f"C{front - 1}", alpha=0.8, label=name)
            axis.annotate(str(entry["rank"]), at, ha="center", va="center", fontsize=6)
        axis.scatter([1.0], [100.0], marker="*", s=80, color="black", label="dense")
        axis.set_xlabel(("time" if timed else "keys") + ", of dense attention", fontsize=9)
        axis.set_ylabel("tokens that some head sees in one layer, %", fontsize=9)
        axis.set_title(
            f"{found['n']:,} tokens, {found['budget']['text']}", fontsize=10, loc="left"
        )
        axis.set_xlim(left=0)
        axis.set_ylim(0, 105)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=160)


def _short(text: str, most: int = 32) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
