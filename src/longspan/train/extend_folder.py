"""The output folder of an extension: what lies in it, and what of it still holds.

settings.json                     what was asked; compared on resume
eval/NAME.*.jsonl                 measurements: base, scaled (positions), trained, dense
NAME.train.jsonl, NAME/           losses and checkpoints of each training
adapter/                          a PEFT adapter; README.md: what to set before loading it
merged/                           on request, a model folder that transformers loads
report.json, report.html          everything above on one page
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longspan.errors import DataError
from longspan.eval.output import check_output_folder
from longspan.train.checkpoint import write_json, write_text
from longspan.train.settings import ExtendSettings

SETTINGS_NAME, REPORT_NAME = "settings.json", "report.json"
ADAPTER, MERGED, EVAL = "adapter", "merged", "eval"
# What is trained, by the name of its files.
ARMS = ("trained", "dense")
# The number of steps in the settings.
STEPS = "loop.steps"


def check_output(out: Path, *, resume: bool) -> None:
    """Raise DataError unless ``out`` can be written and is new, empty, or a run to resume."""
    check_output_folder(out)
    # A run that was killed while it wrote its settings leaves no more than a piece of them.
    if not out.exists() or not {path.name for path in out.iterdir()} - {f"{SETTINGS_NAME}.tmp"}:
        return
    if not resume:
        raise DataError(
            f"The output folder {out} is not empty. Give a new folder, or --resume to continue "
            "the run in it."
        )
    if not (out / SETTINGS_NAME).exists():
        raise DataError(
            f"{out} holds no run of longspan extend ({SETTINGS_NAME} is missing), so there is "
            "nothing to resume. "
            "Give the folder of the run, or a new one."
        )


def started_with(out: Path) -> dict[str, Any] | None:
    """Fingerprint of the run in a folder; None if there is none."""
    path = out / SETTINGS_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def finished_report(out: Path, settings: ExtendSettings, *, merge: bool) -> dict[str, Any] | None:
    """The report in ``out`` if nothing is left to do there; whether it is of the same settings
    besides the steps is not asked.
    """
    try:
        report = json.loads((out / REPORT_NAME).read_text(encoding="utf-8"))
        done = (
            report["settings"]["loop"]["steps"] == settings.loop.steps
            and (report["dense"] is not None or not settings.compare_dense)
            and (report["merged"] or not merge)
            and (out / ADAPTER).is_dir()
        )
    # It is written anew from what was measured.
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return report if done else None


def forget_end(out: Path) -> None:
    """Remove what was measured of weights that are going to be trained further."""
    for arm in ARMS:
        for records in (out / EVAL).glob(f"{arm}.*.jsonl"):
            records.unlink()


def write_report(report: dict[str, Any], out: Path) -> None:
    """Write report.html, then report.json: once there, it says what is finished."""
    from longspan.viz.report import render

    write_text(out / "report.html", render(report))
    write_json(out / REPORT_NAME, report)
