"""The loop: what a step does, and that an interrupted run repeats an uninterrupted one exactly."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longspan.errors import InputError, RunError
from longspan.train.checkpoint import Checkpoints
from longspan.train.loop import LoopConfig, train


class Model(nn.Module):
    """Predicts the next token from the last one, with dropout, so that random state matters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Linear(8, 20)
        self.dropout = nn.Dropout(0.3)


class Loss:
    """The interface of TokenLoss."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.device = torch.device("cpu")

    def __call__(self, ids: Tensor) -> Tensor:
        m = self.model
        logits = m.head(m.dropout(m.frozen(m.table(ids[:, :-1]))))
        return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def batch_at(number: int) -> Tensor:
    return torch.randint(0, 20, (2, 9), generator=torch.Generator().manual_seed(number))


def run(folder: Path, config: LoopConfig, stop_at: int | None = None) -> tuple[list[Any], Model]:
    model = Model()

    def stopping(number: int) -> Tensor:
        if stop_at is not None and number >= stop_at * config.accumulate:
            raise KeyboardInterrupt
        return batch_at(number)

    records = train(
        Loss(model),  # type: ignore[arg-type]
        stopping,
        config,
        checkpoints=Checkpoints(folder / "c"),
        log=folder / "log.jsonl",
    )
    return records, model


def losses(records: list[Any]) -> list[tuple[float, float, float]]:
    return [(r["loss"], r["lr"], r["grad_norm"]) for r in records]


CONFIG = LoopConfig(steps=9, lr=0.05, warmup=3, accumulate=2, save_every=4, schedule="cosine")


def test_resumed_run_repeats_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, reference = run(tmp_path / "whole", CONFIG)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", CONFIG, stop_at=6)
    log = tmp_path / "cut" / "log.jsonl"
    assert len(log.read_text().splitlines()) == 6, "steps after the checkpoint were logged"
    torch.manual_seed(99)
    again, model = run(tmp_path / "cut", CONFIG)
    assert losses(again) == losses(whole)
    assert [json.loads(line) for line in log.read_text().splitlines()] == again
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("at", [3, 9])
def test_an_interrupt_keeps_the_step_that_it_came_in(tmp_path: Path, at: int) -> None:
    whole, _ = run(tmp_path / "whole", CONFIG)

    def batch(number: int) -> Tensor:
        if number == 2 * at - 1:
            signal.raise_signal(signal.SIGINT)
        return batch_at(number)

    checkpoints = Checkpoints(tmp_path / "cut" / "c")
    log = tmp_path / "cut" / "log.jsonl"
    with pytest.raises(KeyboardInterrupt):
        train(Loss(Model()), batch, CONFIG, checkpoints=checkpoints, log=log)  # type: ignore[arg-type]
    assert checkpoints.steps()[-1] == at
    again, _ = run(tmp_path / "cut", CONFIG)
    assert losses(again) == losses(whole)


def test_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first, _ = run(tmp_path, CONFIG)

    def never(number: int) -> Tensor:
        raise AssertionError

    again = train(
        Loss(Model()),  # type: ignore[arg-type]
        never,
        CONFIG,
        checkpoints=Checkpoints(tmp_path / "c"),
        log=tmp_path / "log.jsonl",
    )
    assert again == first


def test_a_log_that_lacks_steps_is_said(tmp_path: Path) -> None:
    run(tmp_path, CONFIG)
    log = tmp_path / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    for kept in (lines[:5], lines[1:], [*lines[:3], "{", *lines[4:]], []):
        log.write_text("".join(kept))
        with pytest.raises(RunError, match=r"log.jsonl lacks some of the 9 steps"):
            run(tmp_path, CONFIG)
        assert log.read_text() == "".join(kept)
    log.unlink()
    with pytest.raises(RunError, match=r"log.jsonl lacks some of the 9 steps"):
        run(tmp_path, CONFIG)


def test_a_checkpoint_is_not_on_the_disk_before_the_log_of_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resuming refuses a log that lacks steps: a power failure must not leave one."""
    log, there, missed = tmp_path / "log.jsonl", [0], []
    sync, save = os.fsync, Checkpoints.save

    def synced(file: int) -> None:
        if log.exists() and os.fstat(file).st_ino == log.stat().st_ino:
            there.append(len(log.read_text().splitlines()))
        sync(file)

    def saved(self: Checkpoints, step: int, *state: Any) -> None:
        missed.append(step - there[-1])
        save(self, step, *state)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Checkpoints, "save", saved)
    run(tmp_path, CONFIG)
    assert len(missed) > 1
    assert not any(missed)


def test_a_kill_while_the_log_is_written_again_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run(tmp_path, CONFIG)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, CONFIG)
    assert run(tmp_path, CONFIG)[0] == whole


def test_first_step_is_adamw_on_the_clipped_mean(tmp_path: Path) -> None:
    config = LoopConfig(steps=1, lr=0.1, warmup=0, accumulate=2, clip=0.01, weight_decay=0.5)
    model = Model()
    model.dropout.p = 0.0
    oracle = Model()
    oracle.dropout.p = 0.0
    trained = [p for p in oracle.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.5)
    mean = Loss(oracle)(torch.cat([batch_at(0), batch_at(1)])).mean()
    mean.backward()
    norm = nn.utils.clip_grad_norm_(trained, 0.01)
    optimizer.step()

    (record,) = train(
        Loss(model),  # type: ignore[arg-type]
        batch_at,
        config,
        checkpoints=Checkpoints(tmp_path),
        log=tmp_path / "log.jsonl",
    )
    assert record["loss"] == pytest.approx(mean.item(), rel=1e-5)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert record["tokens"] == 36
    for one, other in zip(model.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.equal(model.head.weight, Model().head.weight)


def test_only_what_is_trained_is_saved(tmp_path: Path) -> None:
    run(tmp_path, CONFIG)
    found = Checkpoints(tmp_path / "c").load()
    assert found is not None
    assert set(found[1]["parameters"]) == {"table.weight", "head.weight", "head.bias"}


def test_checkpoint_of_other_parameters_is_refused(tmp_path: Path) -> None:
    run(tmp_path, CONFIG)
    model = Model().requires_grad_(True)
    with pytest.raises(RunError, match="other trained parameters"):
        train(
            Loss(model),  # type: ignore[arg-type]
            batch_at,
            CONFIG,
            checkpoints=Checkpoints(tmp_path / "c"),
            log=tmp_path / "log.jsonl",
        )


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    model = Model()
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    with pytest.raises(RunError, match=r"loss is nan .* at step 1.*Lower the learning rate"):
        train(
            Loss(model),  # type: ignore[arg-type]
            batch_at,
            CONFIG,
            checkpoints=Checkpoints(tmp_path),
            log=tmp_path / "log.jsonl",
        )
    assert Checkpoints(tmp_path).load() is None


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, 0.1]),
    ],
)
def test_schedule(schedule: Any, expected: list[float]) -> None:
    config = LoopConfig(steps=104, lr=1.0, warmup=4, schedule=schedule)
    found = [config.lr_at(step) for step in (0, 1, 2, 3, 4, 103)]
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lr": 0.0}, "lr and clip must be positive"),
        ({"lr": math.inf}, "lr and clip must be positive and lr at most 1e30, got inf"),
        ({"seed": -1}, r"below 2\^63, got -1"),
        ({"weight_decay": math.nan}, "weight_decay cannot be negative, and weight_decay is fin"),
        ({"warmup": -1}, "cannot be negative"),
        ({"schedule": "linear"}, "Unknown schedule 'linear'"),
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, Any], message: str) -> None:
    make: Callable[..., LoopConfig] = LoopConfig
    with pytest.raises(InputError, match=message):
        make(**{"steps": 1, "lr": 1.0, **wrong})


def _half(dtype: torch.dtype) -> Model:
    """The model in half precision, with weights of 1 that small steps do not move there."""
    model = Model().to(dtype)
    nn.init.ones_(model.head.weight)
    return model


def _train_half(folder: Path, dtype: torch.dtype, steps: int) -> Model:
    model = _half(dtype)
    config = LoopConfig(steps=steps, lr=2e-4, warmup=0, accumulate=3, save_every=10)
    train(
        Loss(model),  # type: ignore[arg-type]
        # The same batch, so that steps go one way.
        lambda _: batch_at(0),
        config,
        checkpoints=Checkpoints(folder / "c"),
        log=folder / "log.jsonl",
    )
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_below_the_last_digit_of_half_precision_add_up(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    # A step of 2e-4 is a twentieth of the distance between 1 and the next bfloat16.
    model = _train_half(tmp_path, dtype, 40)
    moved = (model.head.weight.float() - 1).abs()
    whole = _train_half(tmp_path / "float32", torch.float32, 40)
    wanted = (whole.head.weight - 1).abs()
    assert wanted.mean() > 3e-3
    assert (moved - wanted).abs().mean() < 0.3 * wanted.mean()
    assert model.head.weight.dtype == dtype


def test_a_resumed_run_in_half_precision_keeps_what_is_below_the_last_digit(
    tmp_path: Path,
) -> None:
    whole = _train_half(tmp_path / "whole", torch.bfloat16, 40)
    _train_half(tmp_path / "cut", torch.bfloat16, 10)
    resumed = _train_half(tmp_path / "cut", torch.bfloat16, 40)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
