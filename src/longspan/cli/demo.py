"""``longspan demo``: a model that falls apart beyond 512 tokens becomes usable at 4096."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the results; a demo in it is continued.")
    ] = Path("longspan-demo"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and count, do nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Extend the embedded model from 512 to 4096 tokens on Python's own source files.

    Trains twice, with a sparse pattern and with dense attention, and says what came of it.
    """
    from longspan.cli.extend import run_with_bars, show_plan, show_report
    from longspan.train.extend import extend
    from longspan.train.prepare import prepare
    from longspan.train.recipe import demo_settings

    settings = demo_settings(seed=seed, device=device)
    if dry_run:
        show_plan(prepare(settings, out, resume=True).summary(), as_json)
        return
    begin = time.perf_counter()
    report = run_with_bars(extend, settings, out, resume=True)
    seconds = time.perf_counter() - begin
    if as_json:
        typer.echo((out / "report.json").read_text(encoding="utf-8"), nl=False)
        return
    show_report(report, out)
    for sentence in findings(report):
        typer.echo(f"- {sentence}")
    typer.echo(f"The whole demo took {seconds:.0f} s.")


def findings(report: dict[str, Any]) -> list[str]:
    """What the numbers say, in sentences; what did not come true is said as such."""
    near, far = (report["job"][name] for name in ("trained_length", "length"))

    def at(state: str, length: int) -> float:
        rows = report[state]["perplexity"]["lengths"]
        return next(row["perplexity"] for row in rows if row["length"] == length)

    base_near, base_far = at("base", near), at("base", far)
    near_after, far_after = at("trained", near), at("trained", far)
    pattern = report["trained"]["pattern"]
    name = pattern if len(pattern) <= 24 else "the pattern"
    said = [
        f"Before: perplexity {base_near:.2f} at {near:,} tokens, {base_far:,.0f} at {far:,}.",
        f"After training with {name}: {near_after:.2f} at {near:,}, {far_after:.2f} at "
        f"{far:,}: "
        + (
            "the longer context helps."
            if far_after < near_after
            else "the longer context does NOT help in this run."
        ),
    ]
    if report["dense"]:
        dense = at("dense", far)
        ratio = report["trained"]["seconds"] / report["dense"]["seconds"]
        said.append(
            f"The same recipe with dense attention: {dense:.2f} at {far:,} "
            f"({far_after / dense - 1:+.1%} "
            f"for {name}), in {report['dense']['seconds']:.0f} s against "
            f"{report['trained']['seconds']:.0f} s ({ratio:.2f} of the time)."
        )
    return said + _keys_found(report, name, far)


def _keys_found(report: dict[str, Any], name: str, length: int) -> list[str]:
    """Passkey retrieval at the longest length, if it was measured."""
    from longspan.cli.extend import mean

    measured = {
        state: report[state]["passkey"]
        for state in ("base", "trained", "dense")
        if report[state] and report[state].get("passkey")
    }
    if "trained" not in measured or length not in measured["trained"]["lengths"]:
        return []
    share = {
        state: mean(found["accuracy"][found["lengths"].index(length)])
        for state, found in measured.items()
    }
    probes = measured["trained"]["trials"] * len(measured["trained"]["depths"])
    sparse = share["trained"]
    said = (
        f"Passkeys at {length:,} tokens, {probes} probes: {sparse:.0%} found after training with "
        f"{name}, {share['base']:.0%} before"
    )
    if "dense" in share:
        dense = share["dense"]
        verdict = "as many" if sparse == dense else "MORE" if sparse > dense else "FEWER"
        said += f"; {dense:.0%} after dense training: {verdict} with {name}"
    elif sparse <= share["base"]:
        said += ": training did NOT help retrieval in this run"
    return [f"{said}."]
