"""report.html: the result of an extension on one page, with nothing external in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any

from longspan.viz.svg import Series, heat_map, label, line_chart


@dataclass(frozen=True)
class _State:
    """A state of the model that was measured."""

    title: str
    color: int
    measured: dict[str, Any]
    dashed: bool = False

    def perplexity(self, row: int) -> float | None:
        return self.measured["perplexity"]["lengths"][row]["perplexity"]


def render(report: dict[str, Any]) -> str:
    """The page for a report of ``longspan.train.extend``, as returned or read from report.json."""
    job, settings = report["job"], report["settings"]
    states = _states(report)
    style = resources.files("longspan.viz").joinpath("report.css").read_text(encoding="utf-8")
    title = f"{label(job['trained_length'])} to {label(job['length'])} tokens"
    model = settings["model"].rstrip("/").rsplit("/", 1)[-1]
    sections = [
        _cards(report, states),
        _figure(
            "Perplexity by position",
            f"Held-out text in windows of {label(job['length'])} tokens; lower is better, "
            "logarithmic.",
            _positions(states, job["trained_length"]),
            _legend(states),
        ),
        _figure(
            "Perplexity by context length",
            "The same text, cut into windows of each length.",
            _by_length(states),
            _legend(states),
        ),
        _figure(
            "After training, by position",
            "The same measurements on a linear axis: a curve that falls uses the longer context.",
            _positions(states[2:], job["trained_length"], log_y=False),
            _legend(states[2:]),
        ),
        _figure("Training loss", "Nats per token; thin: each step.", *_losses(report)),
        _passkeys(states),
        _numbers(states),
        _facts("Settings", _flatten(settings)),
        _facts("Model and data", _flatten(_found(job, settings))),
        _facts("Measured on", _flatten(_machine(report["environment"]))),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(model)}: {title}</title><style>{style}</style></head><body><main>"
        f'<header><p class="kicker">longspan extend</p><h1>{escape(model)}: {title}</h1>'
        f"<p>{escape(_subtitle(report))}</p></header>"
        f"{''.join(sections)}"
        f"<section><h2>Command</h2><pre>{escape(report['command'] or '(called from Python)')}"
        "</pre></section>"
        f"</main></body></html>\n"
    )


def _states(report: dict[str, Any]) -> list[_State]:
    trained = _brief(report["trained"]["pattern"])
    found = [
        _State("before", 1, report["base"], dashed=True),
        _State(
            f"positions scaled ({report['settings']['rope']})", 2, report["scaled"], dashed=True
        ),
        _State(f"trained with {trained}", 3, report["trained"]),
    ]
    if report.get("dense"):
        found.append(_State("trained with dense attention", 4, report["dense"]))
    return found


def _brief(pattern: str | None) -> str:
    # Legends have no room for long ones; the head of the page names them in full.
    if pattern is None:
        return "dense attention"
    return pattern if len(pattern) <= 32 else "the pattern"


def _subtitle(report: dict[str, Any]) -> str:
    settings, loop = report["settings"], report["settings"]["loop"]
    share = report["job"]["pattern_share_of_causal"]
    pattern = settings["eval_attention"] == "pattern"
    measured = "the same attention" if pattern else "dense attention"
    pairs = f" ({share:.0%} of the causal pairs)" if share else ""
    return (
        f"LoRA training with {report['trained']['pattern'] or 'dense attention'}{pairs}, "
        f"{settings['rope']} positions, {loop['steps']:,} steps of "
        f"{settings['batch'] * loop['accumulate'] * settings['length']:,} tokens; "
        f"after that, measured with {measured}."
    )


def _cards(report: dict[str, Any], states: Sequence[_State]) -> str:
    lengths = report["base"]["perplexity"]["lengths"]
    before, trained = states[0], states[2]
    far, near = len(lengths) - 1, 0
    cards = [
        (
            f"perplexity at {label(lengths[far]['length'])}",
            _show(trained.perplexity(far)),
            f"before: {_show(before.perplexity(far))}",
        ),
        (
            f"perplexity at {label(lengths[near]['length'])}",
            _show(trained.perplexity(near)),
            f"before: {_show(before.perplexity(near))}",
        ),
    ]
    if report.get("dense"):
        sparse, dense = trained.perplexity(far), states[3].perplexity(far)
        if sparse and dense:
            cards.append(
                ("against dense training", f"{sparse / dense - 1:+.1%}", f"dense: {_show(dense)}")
            )
    if report["trained"]["passkey"]:
        tables = [state.measured["passkey"]["accuracy"] for state in (before, trained)]
        old, new = (_mean(row[-1]) for row in tables)
        cards.append(
            (f"passkey at {label(lengths[far]['length'])}", f"{new:.0%}", f"before: {old:.0%}")
        )
    seconds = report["trained"]["seconds"]
    against = f"dense: {_duration(report['dense']['seconds'])}" if report.get("dense") else ""
    speed = f"{report['trained']['tokens_per_second']:,.0f} tokens/s"
    cards.append(("training time", _duration(seconds), against or speed))
    boxes = (
        f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span>'
        f"<small>{escape(note)}</small></div>"
        for name, value, note in cards
    )
    return f'<div class="cards">{"".join(boxes)}</div>'


def _positions(states: Sequence[_State], trained_length: int, log_y: bool = True) -> str:
    lines = []
    # The comparison is drawn first: where both lie together, the pattern's line stays visible.
    for state in reversed(states):
        curve = state.measured["perplexity"]["positions"]
        middles = [(a + b) / 2 for a, b in zip(curve["edges"], curve["edges"][1:], strict=False)]
        points = [(x, _exp(nll)) for x, nll in zip(middles, curve["nll"], strict=True)]
        lines.append(
            Series(name=state.title, color=state.color, points=points, dashed=state.dashed)
        )
    return line_chart(
        lines,
        x_label="position in the context, tokens",
        y_label="perplexity",
        log_y=log_y,
        marks=[(trained_length, f"trained context {label(trained_length)}")],
        dots=False,
    )


def _by_length(states: Sequence[_State]) -> str:
    lines = [
        Series(
            name=state.title,
            color=state.color,
            points=[
                (r["length"], r["perplexity"]) for r in state.measured["perplexity"]["lengths"]
            ],
            dashed=state.dashed,
        )
        for state in reversed(states)
    ]
    return line_chart(
        lines,
        x_label="context length, tokens",
        y_label="perplexity",
        log_x=True,
        log_y=True,
        x_ticks=[x for x, _ in lines[0].points],
    )


def _losses(report: dict[str, Any]) -> tuple[str, str]:
    arms = [("trained", 3, _brief(report["trained"]["pattern"]))]
    if report.get("dense"):
        arms.append(("dense", 4, "dense attention"))
    faint, smooth = [], []
    for name, color, title in reversed(arms):
        losses = report[name]["losses"]
        points = [(float(step), loss) for step, loss in enumerate(losses, start=1)]
        faint.append(Series(name=title, color=color, points=points, faint=True))
        smooth.append(Series(name=title, color=color, points=_smoothed(points)))
    steps = len(report["trained"]["losses"])
    chart = line_chart(
        faint + smooth,
        x_label="step",
        y_label="loss",
        dots=False,
        x_ticks=list(range(1, steps + 1)) if steps <= 8 else None,
    )
    return chart, _keys((color, title, False) for _, color, title in arms)


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float | None]]:
    window = max(1, len(points) // 20)
    smooth: list[tuple[float, float | None]] = []
    for i, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, i - window) : i + window + 1]]
        smooth.append((x, sum(near) / len(near)))
    return smooth


def _passkeys(states: Sequence[_State]) -> str:
    if not states[0].measured["passkey"]:
        return ""
    maps = []
    for state in states:
        found = state.measured["passkey"]
        chart = heat_map(
            found["accuracy"],
            rows=[label(length) for length in found["lengths"]],
            columns=[f"{depth:g}" for depth in found["depths"]],
            row_label="context, tokens",
            column_label="depth of the key (0 start, 1 end)",
        )
        maps.append(f"<div><h3>{escape(state.title)}</h3>{chart}</div>")
    found = states[0].measured["passkey"]
    return (
        f"<section><h2>Passkey retrieval</h2><p>Share of exact answers, {found['trials']} "
        "probes per cell, "
        f'worded as {found["style"]}.</p><div class="maps">{"".join(maps)}</div></section>'
    )


def _numbers(states: Sequence[_State]) -> str:
    head = "".join(f"<th>{escape(state.title)}</th>" for state in states)
    rows = []
    for row, measured in enumerate(states[0].measured["perplexity"]["lengths"]):
        cells = "".join(f"<td>{_show(state.perplexity(row))}</td>" for state in states)
        rows.append(
            f"<tr><th>{label(measured['length'])}</th>{cells}<td>{measured['tokens']:,}</td></tr>"
        )
    return (
        '<section><h2>Perplexity in numbers</h2><div class="wide"><table class="numbers"><thead>'
        "<tr>"
        f"<th>context</th>{head}<th>tokens scored</th></tr></thead><tbody>{''.join(rows)}"
        "</tbody></table></div></section>"
    )


def _figure(title: str, note: str, chart: str, legend: str) -> str:
    head = f"<h2>{escape(title)}</h2><p>{escape(note)}</p>"
    return f"<section>{head}{legend}<figure>{chart}</figure></section>"


def _legend(states: Sequence[_State]) -> str:
    return _keys((state.color, state.title, state.dashed) for state in states)


def _keys(entries: Iterable[tuple[int, str, bool]]) -> str:
    keys = (
        f'<span><i style="--c:var(--s{color})"{" class=dashed" if dashed else ""}>'
        f"</i>{escape(title)}</span>"
        for color, title, dashed in entries
    )
    return f'<div class="legend">{"".join(keys)}</div>'


def _facts(title: str, facts: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(_fact(value))}</td></tr>"
        for name, value in facts.items()
    )
    return f"<section><h2>{escape(title)}</h2><table>{rows}</table></section>"


def _flatten(values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(_flatten(value))
        else:
            flat[name.replace("_", " ")] = value
    return flat


def _found(job: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    known = {name: value for name, value in job.items() if name not in settings}
    rope = ", ".join(f"{name} {value}" for name, value in job["rope"].items())
    return {**known, "rope parameters": rope}


def _machine(environment: dict[str, Any]) -> dict[str, Any]:
    return {
        "cpu": f"{environment['cpu']}, {environment['cores']} cores",
        "memory": f"{environment['memory_gib']} GiB",
        "gpu": ", ".join(f"{g['name']} ({g['memory_gib']} GiB)" for g in environment["cuda"]),
        "platform": environment["platform"],
        "python": environment["python"],
        **{name: found for name, found in environment["packages"].items() if found},
    }


def _fact(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value in ("", [], ()):
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_fact, value))
    return str(value)


def _show(perplexity: float | None) -> str:
    if perplexity is None or not math.isfinite(perplexity):
        return "overflow"
    return f"{perplexity:,.2f}" if perplexity < 1000 else f"{perplexity:,.0f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _exp(nll: float | None) -> float | None:
    return None if nll is None or nll > 700 else math.exp(nll)


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0
