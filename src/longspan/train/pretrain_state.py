"""The one checkpoint of a pretraining run: weights, optimizer, tokenizer and text in one file.

In one file, so that a kill at any moment leaves the checkpoint before, whole, or none.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspan.errors import DataError, RunError
from longspan.eval.output import check_output_folder
from longspan.hf.build import load_tokenizer
from longspan.hf.quiet import saving
from longspan.train.checkpoint import read_state, write_atomically
from longspan.train.pretrain_report import REPORT_NAME, History

CHECKPOINT_FOLDER = "checkpoint"
STATE_NAME = "state.pt"


def check_out(out: Path, *, resume: bool) -> None:
    """Raise DataError unless ``out`` can be written and is new, empty, or a run to resume."""
    check_output_folder(out)
    kept = out / CHECKPOINT_FOLDER / STATE_NAME
    if resume:
        if not kept.is_file() and not (out / REPORT_NAME).is_file():
            raise DataError(
                f"nothing to resume: {kept.parent} holds no checkpoint. Start without resume."
            )
    # A run that was killed before its first checkpoint leaves a folder without one.
    elif out.exists() and any(one.name != CHECKPOINT_FOLDER for one in out.iterdir()):
        raise DataError(
            f"output {out} exists and is not an empty folder. Choose another or resume."
        )
    elif kept.is_file():
        raise DataError(
            f"output {out} holds a run that was interrupted. Choose another or resume."
        )


def save_state(
    out: Path,
    *,
    settings: Mapping[str, Any],
    tokenizer: Any,
    model: Any,
    optimizer: torch.optim.Optimizer,
    step: int,
    seconds: float,
    history: History,
    goals: list[tuple[int, int]],
) -> None:
    """Keep a run after ``step`` steps; ``settings`` are what a resumed run must repeat."""
    folder = out / CHECKPOINT_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "settings": dict(settings),
        "tokenizer": _files_of(tokenizer),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": _rng_state(model.device),
        "step": step,
        "seconds": seconds,
        "history": history,
        "goals": goals,
    }
    write_atomically(folder / STATE_NAME, lambda file: torch.save(state, file))


def load_state(out: Path) -> dict[str, Any] | None:
    """What ``save_state`` kept, with tensors on the CPU; None where nothing is kept.

    Raises:
        RunError: the file is damaged.
    """
    path = out / CHECKPOINT_FOLDER / STATE_NAME
    if not path.is_file():
        return None
    state = read_state(path)
    wanted = {"settings", "tokenizer", "model", "optimizer", "rng"}
    wanted |= {"step", "seconds", "history", "goals"}
    missing = wanted - set(state) if isinstance(state, dict) else wanted
    if missing:
        raise RunError(
            f"{path} is no checkpoint of this version of longspan pretrain: there is no "
            f"{', '.join(sorted(missing))} in it. Finish it with the version that wrote it, or "
            "start in a new folder."
        )
    return state


def tokenizer_in(state: Mapping[str, Any]) -> Any:
    """The tokenizer of a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in state["tokenizer"].items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        return load_tokenizer(folder)


def restore(state: Mapping[str, Any], model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint into a model and an optimizer."""
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    _set_rng_state(model.device, state["rng"])


def _files_of(tokenizer: Any) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        with saving():
            tokenizer.save_pretrained(folder)
        return {path.name: path.read_text(encoding="utf-8") for path in Path(folder).iterdir()}


def _rng_state(device: torch.device) -> Tensor:
    # Dropout draws from the generator of the device it runs on.
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_rng_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state.cpu(), device)
    else:
        torch.set_rng_state(state)
