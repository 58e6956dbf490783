"""Matrices of cells as SVG, a few rectangles for each colour instead of one for each cell.

Equal neighbours in a row are one rectangle, and equal rectangles below each other too, so a
picture grows with the pattern's outline and not with its area. Colours are CSS classes: a page
that shows these defines ``.legal .on .never .r1 .. .r6``, ``document`` brings its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from longspan.viz.palette import NEVER, REACH, SEEN
from longspan.viz.views import Cells, Views

LEVELS = 6

STYLE = (
    f".bg{{fill:#fff}}.legal{{fill:#eceef1}}.on{{fill:{SEEN}}}.never{{fill:{NEVER};opacity:.55}}"
    + "".join(f".r{at}{{fill:{color}}}" for at, color in enumerate(REACH, start=1))
    + "text{font:13px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;fill:#1c1d1f}"
    + ".note{fill:#6a6d73;font-size:11.5px}"
    + "@media(prefers-color-scheme:dark){.bg{fill:#16171a}.legal{fill:#2a2d33}"
    + "text{fill:#e9e9e7}.note{fill:#9a9da4}}"
)


def rectangles(flags: NDArray[np.bool_]) -> list[tuple[int, int, int, int]]:
    """Cover the set cells by disjoint rectangles ``(x, y, width, height)``."""
    found: list[tuple[int, int, int, int]] = []
    open_runs: dict[tuple[int, int], int] = {}
    for y in range(len(flags) + 1):
        runs: set[tuple[int, int]] = set()
        if y < len(flags):
            edges = np.flatnonzero(np.diff(flags[y].astype(np.int8), prepend=0, append=0))
            runs = {(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)}
        for run in [run for run in open_runs if run not in runs]:
            top = open_runs.pop(run)
            found.append((run[0], top, run[1] - run[0], y - top))
        for run in sorted(runs - open_runs.keys()):
            open_runs[run] = y
    return found


def path(flags: NDArray[np.bool_], style: str) -> str:
    """A ``<path>`` over the set cells, one unit per cell; nothing if there are none."""
    commands = "".join(f"M{x} {y}h{w}v{h}h-{w}z" for x, y, w, h in rectangles(flags))
    return f'<path {style} d="{commands}"/>' if commands else ""


def seen_paths(seen: Cells) -> str:
    """Shares between 0 and 1 as opacities in a few steps."""
    level = np.ceil(seen * LEVELS).astype(np.int64)
    parts = [
        path(level == at, 'class="on"' + (f' opacity="{at / LEVELS:.2f}"' if at < LEVELS else ""))
        for at in range(1, LEVELS + 1)
    ]
    return "".join(parts)


def reach_paths(reach: NDArray[np.int64]) -> str:
    """First layers as colours; what no layer ever reaches in its own."""
    shown = np.minimum(reach, len(REACH))
    parts = [path(shown == at, f'class="r{at}"') for at in range(1, len(REACH) + 1)]
    return "".join(parts)


def matrix(body: str, legal: NDArray[np.bool_], label: str, place: str = "") -> str:
    """An ``<svg>`` of cells over the ground of legal cells, with a title for readers."""
    cells = len(legal)
    ground = path(legal, 'class="legal"')
    return (
        f'<svg {place} viewBox="0 0 {cells} {cells}" shape-rendering="crispEdges" role="img" '
        f'aria-label="{escape(label, quote=True)}">{ground}{body}</svg>'
    )


def matrices(found: Views, most: int = 8) -> list[tuple[str, str, str]]:
    """All pictures as ``(title, note, svg body)``: kinds of heads, all heads, layers."""
    shown = [(view.title, "", seen_paths(view.seen)) for view in found.each[:most]]
    if len(found.each) > most:
        title, _, body = shown[-1]
        shown[-1] = (title, f"and {len(found.each) - most} more kinds", body)
    if len(found.each) > 1:
        shown.append(("all heads", "shade: how many", seen_paths(found.together)))
    never = found.legal() & (found.reach < 0)
    body = reach_paths(found.reach) + path(never, 'class="never"')
    shown.append(("reach", "colour: after which layer", body))
    return shown


def document(found: Views, *, size: int = 240, columns: int = 4) -> str:
    """A standalone SVG of all pictures of a pattern, for light and dark ground.

    Args:
        found: what to show.
        size: pixels of a picture.
        columns: pictures in a row.
    """
    shown = matrices(found)
    gap, head, foot = 24, 56, 44
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    width = gap + columns * (size + gap)
    height = head + rows * (size + foot)
    parts = [
        f'<text x="{gap}" y="26" font-weight="600">{escape(str(found.pattern))}</text>',
        f'<text x="{gap}" y="43" class="note">{escape(subtitle(found))}</text>',
    ]
    for index, (title, note, body) in enumerate(shown):
        x, y = gap + index % columns * (size + gap), head + index // columns * (size + foot)
        place = f'x="{x}" y="{y}" width="{size}" height="{size}"'
        parts.append(matrix(body, found.legal(), title, place))
        parts.append(f'<text x="{x}" y="{y + size + 17}">{escape(title)}</text>')
        if title == "reach":
            parts.append(_key(found, x + 44, y + size + 8))
        elif note:
            parts.append(f'<text x="{x}" y="{y + size + 32}" class="note">{escape(note)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}"><style>{STYLE}</style>'
        f'<rect class="bg" width="{width}" height="{height}" rx="8"/>{"".join(parts)}</svg>\n'
    )


def subtitle(found: Views) -> str:
    """Size and kind of what is shown, in words."""
    heads = f"{found.heads} head" + "s" * (found.heads > 1)
    kind = "causal" if found.causal else "both directions"
    words = [f"{found.n:,} tokens", heads, kind, "rows: queries, columns: keys"]
    if found.cells < found.n:
        wide = found.n / found.cells
        words.append(f"a cell is {f'{wide:,.0f}' if wide >= 100 else f'{wide:.3g}'} tokens wide")
    return ", ".join(words)


def steps(found: Views) -> Sequence[int]:
    """Layers that occur in the picture of reach."""
    return sorted({int(layer) for layer in np.unique(found.reach[found.legal()]) if layer > 0})


def _key(found: Views, x: int, y: int) -> str:
    parts = []
    for layer in steps(found)[: len(REACH)]:
        parts.append(f'<rect class="r{layer}" x="{x}" y="{y}" width="10" height="10" rx="2"/>')
        parts.append(f'<text class="note" x="{x + 14}" y="{y + 9}">{layer}</text>')
        x += 32
    if (found.legal() & (found.reach < 0)).any():
        parts.append(f'<rect class="never" x="{x}" y="{y}" width="10" height="10" rx="2"/>')
        parts.append(f'<text class="note" x="{x + 14}" y="{y + 9}">never</text>')
    return "".join(parts)
