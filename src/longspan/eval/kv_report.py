"""Quality against budget as figures, Markdown tables and a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longspan.eval.kv_sweep import DENSE, Sweep, source_of
from longspan.eval.perplexity import exp
from longspan.eval.plain import mean
from longspan.eval.records import Records

FILE = "kv.jsonl"
# Lost perplexity and kept answers up to which a policy counts as good as dense.
LOSS, FOUND = 0.05, 0.9
NO_FIGURE = " A policy that needs more tokens than a budget gives has no figure there (-)."
_TITLES = {
    "once": "perplexity of the next tokens, read at once",
    "steps": "perplexity of the next tokens, one by one",
}

Figures = dict[str, dict[str, dict[str, dict[str, float]]]]


def summary(sweep: Sweep, records: Records) -> Figures:
    """``{measure: {policy: {budget: {"value", "prompts", ...}}}}``, means over all prompts.

    The value is a perplexity for ``once`` and ``steps``, else the share of answers found. Beside
    it stand what was measured of the cache (``kept``, ``bytes``) or of the prompt (``density``,
    ``recall``). What is not in the records is absent.
    """
    found: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for cell in sweep.cells():
        if cell.key in records:
            place = cell.measure, cell.form.key, f"{cell.share:g}"
            found.setdefault(place, []).append(records[cell.key])
    figures: Figures = {}
    for (measure, form, share), rows in found.items():
        figures.setdefault(measure, {}).setdefault(form, {})[share] = _mean(rows)
    return figures


def _mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    what = "nll" if "nll" in rows[0] else "score"
    each = [value for row in rows for value in row[what]]
    middle = mean(each)
    extra = {
        name: mean(row[name] for row in rows)
        for name in ("kept", "bytes", "density", "recall")
        if name in rows[0]
    }
    return {"value": exp(middle) if what == "nll" else middle, "prompts": len(each), **extra}


def markdown(sweep: Sweep, figures: Figures, title: str, limit: int | None = None) -> str:
    """All tables; ``limit`` is that of the measurement."""
    budgets = [f"{share:g}" for share in sweep.budgets]
    columns = [f"{float(share):.0%}" for share in budgets]
    policies = [form for form in sweep.forms if not form.prefill]
    methods = [form for form in sweep.forms if form.prefill]
    lines = [f"# {title}", "", *_about(sweep, limit), ""]
    for measure, rows in figures.items():
        lines += [f"## {heading(measure)}", ""]
        write = _writer(measure)
        dense = _value(rows, DENSE.key, "1")
        named = [form for form in policies if form.key in rows]
        if named:
            body = [("dense", *[write(dense)] * len(columns))]
            body += [
                (form.name, *(write(_value(rows, form.key, share)) for share in budgets))
                for form in named
            ]
            lines += [*_table(("policy", *columns), body), ""]
        named = [form for form in methods if form.key in rows]
        if named:
            body = [
                (form.name, *(_with_density(rows, form.key, share, write) for share in budgets))
                for form in named
            ]
            lines += [
                f"Sparse prefill, whole cache (dense: {write(dense)}); beside each value the "
                "share of pairs computed:",
                "",
                *_table(("method", *columns), body),
                "",
            ]
    if policies:
        lines += [*_enough(policies, budgets, figures), *_memory(policies, budgets, figures)]
    return "\n".join(lines).rstrip() + "\n"


def heading(measure: str) -> str:
    """A measure in words."""
    if measure in _TITLES:
        return _TITLES[measure].capitalize()
    asked = " asked after the policy decided" if measure.endswith(" later") else ""
    return f"{source_of(measure)}{asked}: share of answers"


def _about(sweep: Sweep, limit: int | None) -> list[str]:
    parts = []
    if sweep.new:
        parts.append(f"{sweep.new - 1} tokens scored at once")
    if sweep.steps:
        parts.append(f"{sweep.steps - 1} one by one")
    scored = f", {' and '.join(parts)} behind each" if parts else ""
    least = "" if all(f.fits(min(sweep.budgets), sweep.length) for f in sweep.forms) else NO_FIGURE
    each, cells = f"{sweep.samples} for every figure", len(sweep.cells())
    if limit is not None and limit < cells:
        each = f"up to {each}, as only the first {limit:,} of {cells:,} were measured (--limit)"
    return [
        f"Prompts of {sweep.length:,} tokens, {each}{scored}. A budget "
        "is the share of the prompt that a key head keeps, sinks, recent tokens and windows "
        f"counted; for sparse prefill it is the parameter of the method.{least}"
    ]


def _enough(policies: Sequence[Any], budgets: Sequence[str], figures: Figures) -> list[str]:
    """The smallest budgets from which on a policy is nearly as good as dense."""
    columns = ["policy", *figures]
    body = []
    for form in policies:
        row = [form.name]
        for measure, rows in figures.items():
            values = [_value(rows, form.key, share) for share in budgets]
            row.append(_from(budgets, values, _value(rows, DENSE.key, "1"), measure))
        body.append(tuple(row))
    return [
        "## Enough",
        "",
        f"The smallest budget from which on perplexity is within {LOSS:.0%} of dense, and at "
        f"least {FOUND:.0%} of dense's answers are found:",
        "",
        *_table(tuple(columns), body),
        "",
    ]


def _from(
    budgets: Sequence[str], values: Sequence[float | None], dense: float | None, measure: str
) -> str:
    if dense is None or all(value is None for value in values):
        return "-"
    enough: str | None = None
    for share, value in reversed(list(zip(budgets, values, strict=True))):
        if value is None:
            continue
        good = value <= dense * (1 + LOSS) if measure in _TITLES else value >= dense * FOUND
        # NaN is not good either.
        if not good:
            break
        enough = share
    return "not here" if enough is None else f"{float(enough):.0%}"


def _memory(policies: Sequence[Any], budgets: Sequence[str], figures: Figures) -> list[str]:
    """What the caches take in bytes, of what all keys and values would take."""
    rows = next((figures[m] for m in ("steps", *figures) if m in figures), {})
    body = [
        (
            form.name,
            *(_share(_value(rows, form.key, share, "bytes")) for share in budgets),
        )
        for form in policies
    ]
    return [
        "## Memory",
        "",
        "Bytes just after the prompt, of those of all keys and values; positions, scores, watched "
        "queries and 16 places of room for every head are counted, and weigh more the shorter the "
        "prompt is:",
        "",
        *_table(("policy", *(f"{float(share):.0%}" for share in budgets)), body),
    ]


def _value(
    rows: Mapping[str, Mapping[str, Mapping[str, float]]],
    form: str,
    share: str,
    what: str = "value",
) -> float | None:
    return rows.get(form, {}).get(share, {}).get(what)


def _with_density(rows: Any, form: str, share: str, write: Callable[[float | None], str]) -> str:
    density = _value(rows, form, share, "density")
    value = write(_value(rows, form, share))
    return value if density is None else f"{value} ({density:.0%})"


def _writer(measure: str) -> Callable[[float | None], str]:
    return _figure if measure in _TITLES else _share


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)]


def picture(sweep: Sweep, figures: Figures, title: str, path: Path) -> None:
    """Every measure against the budget, by matplotlib; the suffix says the format.

    Sparse prefill methods stand at the share of pairs that they computed, dotted.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(3, len(figures))
    down = math.ceil(len(figures) / across)
    figure = Figure(figsize=(4.6 * across + 1.8, 3.7 * down + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, across, squeeze=False).flatten()
    color = {form.key: colormaps["tab20"](at % 20) for at, form in enumerate(sweep.forms)}
    drawn: dict[str, Any] = {}
    for axis, (measure, rows) in zip(axes, figures.items(), strict=False):
        dense = _value(rows, DENSE.key, "1")
        if dense is not None:
            drawn["dense"] = axis.axhline(dense, color="black", linestyle="--", linewidth=1)
        for at, form in enumerate(sweep.forms):
            points = sorted(
                (100 * found.get("density", float(share)), found["value"])
                for share, found in rows.get(form.key, {}).items()
            )
            if points:
                (drawn[form.key],) = axis.plot(
                    *zip(*points, strict=True),
                    linestyle=":" if form.prefill else "-",
                    color=color[form.key],
                    marker="osv^D<>PX*"[at % 10],
                    markersize=4,
                    linewidth=1.3,
                )
        if measure in _TITLES:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
            axis.tick_params(axis="y", which="both", labelsize=7)
        else:
            axis.set_ylim(-0.03, 1.03)
        axis.set_title(heading(measure), fontsize=9, loc="left")
        axis.set_xlabel("kept of the prompt, % (dotted: pairs computed)", fontsize=8)
        axis.grid(alpha=0.3)
    for axis in axes[len(figures) :]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.legend(
        drawn.values(), drawn.keys(), loc="outside right upper", fontsize=8, frameon=False
    )
    figure.savefig(path, dpi=130)
