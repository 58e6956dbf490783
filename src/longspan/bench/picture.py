"""The curves of a benchmark as one PNG, by matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from longspan.bench.curves import crossing, ours, points
from longspan.bench.setting import WAYS
from longspan.viz.svg import label


def picture(found: dict[str, Any], path: Path) -> None:
    """Draw time, memory and rate against the length; a dotted line where a pattern breaks even.

    Args:
        found: settings and records.
        path: of the PNG; one row of three charts for each way.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    class AsTheyAre(LogFormatter):
        """Numbers as they are, not powers of ten, where there is room for them."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    records = found["records"]

    def even(pattern: str, way: str) -> float | None:
        own, dense = (
            points(found, pattern, way, name, "seconds") for name in (ours(records), "dense")
        )
        return crossing(own, dense)

    patterns = list(dict.fromkeys(record["pattern"] for record in records))
    ways = [way for way in WAYS if any(record["way"] == way for record in records)]
    lengths = sorted({record["n"] for record in records})
    figure = Figure(figsize=(13.5, 4.2 * len(ways) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(ways), 3, squeeze=False)
    for axes, way in zip(grid, ways, strict=True):
        kinds: tuple[tuple[str, str, Callable[[float], float]], ...] = (
            ("seconds", "milliseconds", lambda x: x * 1e3),
            ("memory_bytes", "peak memory, MiB", lambda x: x / 2**20),
            ("of_dense", "rate on useful pairs, of dense", lambda x: x),
        )
        for axis, (what, title, scale) in zip(axes, kinds, strict=True):
            names = [("dense", pattern) for pattern in patterns[:1]]
            for name, pattern in [*names, *((ours(records), p) for p in patterns)]:
                line = points(found, pattern, way, name, what)
                if line:
                    dashed = "--" if name == "dense" else "-"
                    drawn = [scale(y) for _, y in line]
                    text = "dense" if name == "dense" else pattern
                    (curve,) = axis.plot(
                        [n for n, _ in line], drawn, dashed, marker="o", ms=3, label=text
                    )
                    at = None if what != "seconds" or name == "dense" else even(pattern, way)
                    if at is not None:
                        axis.axvline(at, color=curve.get_color(), ls=":", lw=1)
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, [label(n) for n in lengths])
            axis.minorticks_off()
            if what == "of_dense":
                axis.set_ylim(bottom=0)
            elif axis.lines:
                # Memory of a short call may be 0.
                axis.set_yscale("log", nonpositive="mask")
                for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                    ticks(AsTheyAre(labelOnlyBase=False, minor_thresholds=(2, 0.8)))
            axis.set_title(f"{way}: {title}", fontsize=10, loc="left")
            axis.set_xlabel("rows", fontsize=9)
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=160)
