"""Pictures of a pattern in a terminal: two cells in a character, upper and lower half block.

Without colours (a pipe, NO_COLOR) heads are drawn by the same blocks, shares by shades and reach
by the number of the layer. Where the output cannot hold blocks (another encoding than UTF-8) all
is drawn by such signs, a cell in a character.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.text import Text

from longspan.viz.matrices import steps, subtitle
from longspan.viz.palette import NEVER, SEEN, blend, reach_color
from longspan.viz.views import Cells, Views

# Neither light nor dark: what is not seen shows the terminal's own ground, shares fade towards
# this.
_GROUND = "#7a8088"
_SHADES = " ░▒▓█"
_ASCII_SHADES = " .:*#"

Colors = list[list[str | None]]


def picture(found: Views, console: Console, most: int = 8) -> RenderableType:
    """All pictures side by side, as many as fit.

    Args:
        found: what to show; its cells decide the size.
        console: where it will be printed; decides about colours.
        most: kinds of heads to show.
    """
    plain, ascii_only = is_plain(console), console.options.ascii_only
    shades = _ASCII_SHADES if ascii_only else _SHADES
    panels = []
    for view in found.each[:most]:
        body = _shades(view.seen, shades) if plain else _blocks(_shares(view.seen))
        if plain and not ascii_only and set(np.unique(view.seen)) <= {0.0, 1.0}:
            body = _blocks(_shares(view.seen))
        panels.append(_panel(body, view.title))
    if len(found.each) > 1:
        body = _shades(found.together, shades) if plain else _blocks(_shares(found.together))
        panels.append(_panel(body, "all heads"))
    panels.append(_panel(_numbers(found) if plain else _blocks(_layers(found)), "reach"))
    return Columns(panels, padding=(0, 1))


def is_plain(console: Console) -> bool:
    """Whether it shows no colours, or could not show the blocks that carry them."""
    return console.color_system is None or console.options.ascii_only


def legend(found: Views, plain: bool) -> Text:
    """What is shown, and what the colours of reach mean."""
    text = Text(subtitle(found))
    if not found.exact:
        text.append(", from sampled queries")
    text.append("\nreached after layer ")
    for layer in steps(found):
        text.append(
            f"{layer} " if plain else f"█ {layer}  ", None if plain else reach_color(layer)
        )
    if (found.legal() & (found.reach < 0)).any():
        text.append("x never" if plain else "█ never", None if plain else NEVER)
    return text


def _panel(body: Text, title: str) -> Panel:
    # Measured by rich, a title wider than the body is cut short.
    inside = max(len(line) for line in body.plain.split("\n"))
    width = max(inside, len(title) + 4) + 2
    return Panel(body, title=title, title_align="left", padding=0, border_style="dim", width=width)


def _shares(seen: Cells) -> Colors:
    return [
        [None if share == 0 else blend(SEEN, 0.25 + 0.75 * float(share), _GROUND) for share in row]
        for row in seen
    ]


def _layers(found: Views) -> Colors:
    never = found.legal() & (found.reach < 0)
    return [
        [
            NEVER if gone else reach_color(int(layer)) if layer > 0 else None
            for layer, gone in zip(row, flags, strict=True)
        ]
        for row, flags in zip(found.reach, never, strict=True)
    ]


def _blocks(colors: Colors) -> Text:
    lines = []
    for top, bottom in zip(colors[::2], [*colors[1::2], [None] * len(colors[0])], strict=False):
        line = Text()
        for above, below in zip(top, bottom, strict=True):
            if above is None and below is None:
                line.append(" ")
            elif above is None:
                line.append("▄", below)
            elif below is None:
                line.append("▀", above)
            else:
                line.append("█" if above == below else "▀", f"{above} on {below}")
        lines.append(line)
    return Text("\n").join(lines)


def _shades(seen: Cells, shades: str) -> Text:
    level = np.ceil(seen * (len(shades) - 1)).astype(int)
    return Text("\n".join("".join(shades[at] for at in row) for row in level))


def _numbers(found: Views) -> Text:
    return Text(
        "\n".join(_line(row, flags) for row, flags in zip(found.reach, found.legal(), strict=True))
    )


def _line(row: NDArray[np.int64], legal: NDArray[np.bool_]) -> str:
    signs = []
    for layer, possible in zip(row, legal, strict=True):
        if not possible:
            signs.append(" ")
        elif layer > 0:
            signs.append(str(layer) if layer < 10 else "+")
        else:
            signs.append("." if layer == 0 else "x")
    return "".join(signs)
