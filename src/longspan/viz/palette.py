"""Colours of the pictures of patterns, the same in terminal, SVG, PNG and gallery."""

from __future__ import annotations

SEEN = "#2f6fde"
NEVER = "#d1495b"
# Reached after layer 1, 2, ...: early is dark and blue, late is light and warm; later ones share
# the last colour.
REACH = ("#3b4cc0", "#2f86c6", "#2aa886", "#7cb944", "#d9b32c", "#e8833a")


def reach_color(layer: int) -> str:
    """Colour of a pair that is first reached after ``layer`` layers."""
    return REACH[min(layer, len(REACH)) - 1]


def blend(color: str, share: float, ground: str) -> str:
    """``color`` at an opacity of ``share`` on ``ground``."""
    pairs = zip(_parts(color), _parts(ground), strict=True)
    return "#" + "".join(f"{round(a * share + b * (1 - share)):02x}" for a, b in pairs)


def _parts(color: str) -> list[int]:
    return [int(color[at : at + 2], 16) for at in (1, 3, 5)]
