"""The gallery: every pattern on one page, with pictures and figures computed here and now.

Nothing external is in the page: inline SVG, one style sheet, a few lines of script for the search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from importlib import resources

from longspan.analysis import Coverage, coverage
from longspan.pattern import Pattern, parse
from longspan.planning import Plan, plan
from longspan.viz.cards import CARDS, Card
from longspan.viz.matrices import matrices, matrix, seen_paths, steps
from longspan.viz.palette import REACH
from longspan.viz.views import Views, views

FULL_TOKENS = 32768
FULL_HEADS = 32
FULL_LAYERS = 3
HEAD_DIM = 128


@dataclass(frozen=True, eq=False)
class _Entry:
    """A card with what was computed for it."""

    card: Card
    pattern: Pattern
    found: Views
    laid: Plan
    covered: Coverage

    @property
    def dense_pairs(self) -> int:
        """Pairs of dense attention in the same direction."""
        n = self.laid.n
        return self.laid.heads * (n * (n + 1) // 2 if self.covered.causal else n * n)

    @cached_property
    def tiles(self) -> int:
        """Tiles of 128 x 128 that the plan touches."""
        return self.laid.tiles()

    @property
    def useful(self) -> float:
        """Share of their area that is pairs."""
        return self.laid.pairs / (self.tiles * 128 * 128)


def page(
    cards: Sequence[Card] = CARDS,
    *,
    tokens: int = FULL_TOKENS,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[str, int]:
    """The page and the number of its entries.

    Args:
        cards: what to show.
        tokens: length for which costs are computed.
        progress: called with a title, what is done and what there is.
    """
    entries = []
    for done, card in enumerate(cards, start=1):
        entries.append(_entry(card, tokens))
        if progress is not None:
            progress("patterns", done, len(cards))
    folder = resources.files("longspan.viz")
    style = folder.joinpath("gallery.css").read_text(encoding="utf-8")
    script = folder.joinpath("gallery.js").read_text(encoding="utf-8")
    families = "".join(
        f'<button type="button" data-family="{escape(name)}">{escape(name)}</button>'
        for name in dict.fromkeys(card.family for card in cards)
    )
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Where may a token look?</title><style>{style}</style></head><body><main>"
        f"{_header(tokens)}"
        '<nav><input type="search" placeholder="Search: name, paper, what it does" '
        f'aria-label="Search"><div class="chips">{families}</div>'
        f'<output>{len(cards)} of {len(cards)}</output></nav><div id="cards">'
        f"{''.join(_section(entry) for entry in entries)}</div>{_table(entries, tokens)}"
        f"</main><script>{script}</script></body></html>\n"
    )
    return text, len(entries)


def _entry(card: Card, tokens: int) -> _Entry:
    pattern, full = parse(card.example), parse(card.full)
    return _Entry(
        card,
        pattern,
        views(pattern, card.tokens, heads=card.heads, layers=card.layers),
        plan(full, tokens, FULL_HEADS),
        coverage(full, tokens, heads=FULL_HEADS, layers=FULL_LAYERS, samples=64),
    )


def _header(tokens: int) -> str:
    key = "".join(f'<i class="r{at}"></i>{at}' for at in range(1, len(REACH)))
    return (
        '<header><p class="kicker">longspan</p><h1>Where may a token look?</h1>'
        "<p>Patterns are values: they combine with <code>|</code>, <code>&amp;</code> and "
        "<code>-</code>, and every picture here is drawn from the same definition that the "
        "kernels run. Rows are queries, columns are keys, the first token is at the top left.</p>"
        f'<p class="key"><span><i class="on"></i>seen</span>'
        '<span><i class="legal"></i>allowed by causality, not seen</span>'
        f"<span>first reached after layer {key}</span>"
        '<span><i class="never"></i>never reached</span></p>'
        f"<p>Costs are for {tokens:,} tokens and {FULL_HEADS} heads of width {HEAD_DIM}, counted "
        "from the plan that would run.</p></header>"
    )


def _section(entry: _Entry) -> str:
    card = entry.card
    words = " ".join([card.name, *card.also, card.title, card.says, card.family, card.example])
    if card.paper:
        words += f" {card.paper.text} {card.paper.arxiv}"
    equation = "<br>".join(_math(line) for line in card.equation.split("\n"))
    return (
        f'<section id="{escape(card.name)}" data-family="{escape(card.family)}" '
        f'data-words="{escape(words.lower(), quote=True)}"><div class="about">'
        f'<p class="kicker">{escape(card.family)}</p><h2><a href="#{escape(card.name)}">'
        f"{escape(card.title)}</a></h2><p>{escape(card.says)}</p>"
        f'<p class="equation">{equation}</p>'
        f"<dl><dt>Cost</dt><dd>{_math(card.cost)}</dd>{_paper(card)}"
        f"<dt>Write</dt><dd><code>{escape(card.example)}</code></dd>{_python(card)}</dl>{_small(card)}</div>"
        f'<div class="looks">{_pictures(entry)}'
        f"{_figures(entry)}</div></section>"
    )


def _paper(card: Card) -> str:
    if card.paper is None:
        return ""
    text = escape(card.paper.text)
    if card.paper.arxiv:
        text = f'<a href="https://arxiv.org/abs/{card.paper.arxiv}">{text}</a>'
    return f"<dt>Paper</dt><dd>{text}</dd>"


def _python(card: Card) -> str:
    return f"<dt>Call</dt><dd><code>{escape(card.python)}</code></dd>" if card.python else ""


def _figures(entry: _Entry) -> str:
    laid, covered = entry.laid, entry.covered
    saving = entry.dense_pairs / laid.pairs
    kind = "causal pairs" if covered.causal else "pairs"
    layers = [str(one.layers) for one in covered.reach]
    reach = " &rarr; ".join(f"{100 * one.share:.0f}" for one in covered.reach)
    boxes = [
        (f"{1 / saving:.1%}", f"of {kind}" + (f", {saving:.1f}x fewer" if saving > 1.05 else "")),
        (f"{covered.keys_mean:,.0f}", f"keys per query, at most {covered.keys_max:,}"),
        (f"{laid.flops(HEAD_DIM) / 1e12:.2f}", "TFLOP forward"),
        (f"{entry.useful:.0%}", f"of {entry.tiles:,} tiles useful"),
        (f"{reach}%", f"of {kind} reached after {', '.join(layers)} layers"),
    ]
    body = "".join(f"<div><b>{value}</b><small>{note}</small></div>" for value, note in boxes)
    full = escape(entry.card.full)
    return (
        f'<div class="figures"><p>At {laid.n:,} tokens, <code>{full}</code></p>'
        f"<div>{body}</div></div>"
    )


def _pictures(entry: _Entry) -> str:
    found = entry.found
    shown = matrices(found, most=4)
    parts = []
    for title, note, body in shown:
        if title == "reach":
            last = [str(layer) for layer in steps(found)]
            note = f"after layer {', '.join(last)}" if last else ""
        label = f"{found.pattern}, {title}"
        parts.append(
            f"<figure>{matrix(body, found.legal(), label)}"
            f"<figcaption>{escape(title)}<small>{escape(note)}</small></figcaption></figure>"
        )
    style = "pictures few" if len(parts) <= 3 else "pictures"
    return f'<div class="{style}">{"".join(parts)}</div>'


def _small(card: Card) -> str:
    found = views(parse(card.small), card.small_tokens, heads=card.small_heads, layers=2)
    cells = found.cells
    lines = "".join(f"M{at} 0v{cells}M0 {at}h{cells}" for at in range(1, cells))
    parts = []
    for view in found.each:
        body = seen_paths(view.seen) + f'<path class="lines" d="{lines}"/>'
        title = view.title if len(found.each) > 1 else ""
        parts.append(
            f"<figure>{matrix(body, found.legal(), f'{card.small}, {view.title}')}"
            f"<figcaption><small>{escape(title)}</small></figcaption></figure>"
        )
    return (
        f'<div class="small"><p>{cells} tokens, checked by hand: '
        f"<code>{escape(card.small)}</code></p><div>{''.join(parts)}</div></div>"
    )


def _table(entries: Sequence[_Entry], tokens: int) -> str:
    head = "".join(
        f'<th scope="col"><button type="button">{name}</button></th>'
        for name in (
            "pattern",
            "pairs",
            "keys per query",
            "TFLOP",
            "useful area of tiles",
            *(f"reach {at}" for at in range(1, FULL_LAYERS + 1)),
            "predecessor unseen",
        )
    )
    rows = []
    for entry in entries:
        laid, covered = entry.laid, entry.covered
        cells = [
            (laid.pairs / entry.dense_pairs, f"{laid.pairs / entry.dense_pairs:.2%}"),
            (covered.keys_mean, f"{covered.keys_mean:,.0f}"),
            (laid.flops(HEAD_DIM), f"{laid.flops(HEAD_DIM) / 1e12:.2f}"),
            (entry.useful, f"{entry.useful:.0%}"),
            *((one.share, f"{one.share:.1%}") for one in covered.reach),
            (covered.blind_rows, f"{covered.blind_rows:,}"),
        ]
        body = "".join(f'<td data-value="{value:.9g}">{text}</td>' for value, text in cells)
        name = escape(entry.card.full)
        link = f'<a href="#{escape(entry.card.name)}"><code>{name}</code></a>'
        rows.append(f'<tr><th scope="row">{link}</th>{body}</tr>')
    return (
        f'<section class="compare"><h2>Side by side</h2><p>{tokens:,} tokens, {FULL_HEADS} heads. '
        "Pairs: share of dense attention in the same direction. Reach: share of those pairs "
        "connected after so many layers, from 64 sampled queries where it is not exact. "
        "Predecessor unseen: tokens whose left neighbour no head sees.</p>"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
        "</table></div></section>"
    )


def _math(text: str) -> str:
    """ASCII to the signs of mathematics."""
    shown = escape(text)
    for ascii_, sign in (("&lt;=", "&le;"), ("&gt;=", "&ge;"), ("^2", "<sup>2</sup>")):
        shown = shown.replace(ascii_, sign)
    return shown.replace(" - ", " &minus; ")
