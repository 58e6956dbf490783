"""A pattern in words: a labelled table with a check mark for each pair of tokens that is seen.

A union is shown twice, its first part alone and then the whole, so that one sees what the other
parts (a global token, say) add. A pattern that differs between layers is shown layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.cells import cell_len
from rich.text import Text

from longspan.analysis import coverage
from longspan.analysis.reach import period
from longspan.errors import InputError
from longspan.pattern import Or, Pattern

MOST_TOKENS = 40


@dataclass(frozen=True, eq=False, kw_only=True)
class Scene:
    """One table.

    Attributes:
        title: what it shows.
        seen: pairs [tokens, tokens].
        new: pairs that the scene before did not have.
        note: a sentence on what the table means.
    """

    title: str
    seen: NDArray[np.bool_]
    new: NDArray[np.bool_]
    note: str


def scenes(pattern: Pattern, tokens: Sequence[str], heads: int) -> list[Scene]:
    """Tables of a pattern over some tokens, one for each kind of head and part, or layer.

    Args:
        pattern: where each query may look.
        tokens: words.
        heads: query heads.

    Raises:
        InputError: without tokens, or with too many for a table.
    """
    if not 1 <= len(tokens) <= MOST_TOKENS:
        raise InputError(f"a table takes 1 to {MOST_TOKENS} tokens, got {len(tokens)}")
    count = period(pattern)
    first = pattern.at_layer(0)
    # What is seen, what goes on through the layers, and what stands before it in the title.
    stages = [(first, first, "")]
    if count > 1:
        each = [pattern.at_layer(layer) for layer in range(count)]
        stages = [(one, pattern, f"layer {layer}: ") for layer, one in enumerate(each)]
    elif isinstance(first, Or):
        stages = [(one, one, "") for one in (first.parts[0], first)]
    found: list[Scene] = []
    before = None
    for stage, whole, word in stages:
        mask = stage.mask(len(tokens), heads)
        old = mask if before is None else before
        for group in _alike(np.concatenate([mask, old], axis=1)):
            title = word + (str(stage) if len(group) == heads else f"{stage}, head {_list(group)}")
            seen, earlier = mask[group[0]], old[group[0]]
            note = _note(whole, seen, tokens, heads)
            found.append(Scene(title=title, seen=seen, new=seen & ~earlier, note=note))
        before = mask if count == 1 else None
    return found


def table(scene: Scene, tokens: Sequence[str], *, ascii_only: bool = False) -> Text:
    """The labelled table; pairs that are new are marked by a colour.

    Args:
        scene: what it shows.
        tokens: words; those of wide letters take two columns for each.
        ascii_only: write ``x`` and ``.`` where the output cannot hold other signs.
    """
    widths = [cell_len(token) for token in tokens]
    width = max(widths)
    yes, no = ("x", ".") if ascii_only else ("✓", "·")
    text = Text(scene.title + "\n", style="bold")
    text.stylize("not dim")
    text.append(" " * width + "  " + "  ".join(tokens).rstrip() + "\n", "dim not bold")
    for row, token in enumerate(tokens):
        text.append(f"{' ' * (width - widths[row])}{token}  ", "dim not bold")
        for column, wide in enumerate(widths):
            sign = yes if scene.seen[row, column] else no
            style = "green" if scene.new[row, column] else ""
            style = style if scene.seen[row, column] else "dim not bold"
            text.append(f"{sign:^{wide}}", style)
            text.append("  ")
        text.append("\n")
    text.append(scene.note + "\n", "not bold")
    return text


def _note(whole: Pattern, seen: NDArray[np.bool_], tokens: Sequence[str], heads: int) -> str:
    counts = seen.sum(axis=1)
    fewest, most = int(counts.min()), int(counts.max())
    sees = f"Each token sees {fewest}" + (f" to {most}" if most > fewest else "")
    found = coverage(whole, len(tokens), heads=heads, layers=1)
    kind = "earlier one" if found.causal else "other one"
    if found.never:
        query, key = found.never_examples[0]
        after = (
            f"{tokens[query]!r} never learns of {tokens[key]!r}, whatever the number of layers."
        )
    else:
        layers = f"{found.depth} layer" + "s" * (found.depth != 1)
        after = f"After {layers} each token has heard of every {kind}."
    return f"{sees} of {len(tokens)} tokens. {after}"


def _alike(masks: NDArray[np.bool_]) -> list[list[int]]:
    groups: dict[bytes, list[int]] = {}
    for head, mask in enumerate(masks):
        groups.setdefault(mask.tobytes(), []).append(head)
    return list(groups.values())


def _list(group: Sequence[int]) -> str:
    return ", ".join(map(str, group))
