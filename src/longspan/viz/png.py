"""Pictures of a pattern as PNG, by matplotlib (the ``viz`` extra)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from longspan.errors import Refusal
from longspan.viz.matrices import steps, subtitle
from longspan.viz.palette import NEVER, REACH, SEEN, reach_color
from longspan.viz.views import Views


def write(found: Views, path: Path, most: int = 8) -> None:
    """Draw all pictures side by side.

    Args:
        found: what to show.
        path: file to write.
        most: kinds of heads to show.

    Raises:
        Refusal: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise Refusal(
            "a PNG needs matplotlib: pip install 'longspan[viz]'; --svg needs nothing more"
        ) from None
    tables: list[tuple[str, Any]] = [
        (view.title, _seen(found, view.seen)) for view in found.each[:most]
    ]
    if len(found.each) > 1:
        tables.append(("all heads", _seen(found, found.together)))
    tables.append(("reach", _reach(found)))
    columns = min(4, len(tables))
    rows = -(-len(tables) // columns)
    figure = Figure(figsize=(3.1 * columns, 3.4 * rows + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (title, table) in zip(axes, tables, strict=False):
        axis.imshow(table, interpolation="nearest", extent=(0, found.n, found.n, 0))
        axis.set_title(title, fontsize=10, loc="left")
        axis.tick_params(labelsize=8, length=2)
    for axis in axes[len(tables) :]:
        axis.axis("off")
    handles = [Patch(color=reach_color(layer), label=f"layer {layer}") for layer in steps(found)]
    if (found.legal() & (found.reach < 0)).any():
        handles.append(Patch(color=NEVER, label="never"))
    figure.legend(
        handles=handles,
        fontsize=8,
        loc="outside lower right",
        ncols=8,
        frameon=False,
        title="first reached after",
        title_fontsize=8,
    )
    figure.suptitle(f"{found.pattern}\n{subtitle(found)}", fontsize=10)
    # Otherwise the name's ending would decide.
    figure.savefig(path, dpi=160, format="png")


def _seen(found: Views, seen: Any) -> Any:
    return _mix(found, seen[..., None], np.broadcast_to(_rgb(SEEN), (*seen.shape, 3)))


def _reach(found: Views) -> Any:
    colors = np.array([_rgb(NEVER), [0.0] * 3, *(_rgb(color) for color in REACH)])
    shown = np.minimum(found.reach, len(REACH))
    never = found.legal() & (found.reach < 0)
    return _mix(found, ((shown > 0) | never)[..., None], colors[shown + 1])


def _mix(found: Views, share: Any, color: Any) -> Any:
    ground = np.where(found.legal()[..., None], _rgb("#eceef1"), 1.0)
    return share * color + (1 - share) * ground


def _rgb(color: str) -> Any:
    return np.array([int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)])
