"""Teach a converted model's mechanisms to copy the dense attention that they took the place of.

First step of LoLCATs (Zhang et al. 2024, arXiv 2410.10254; Hedgehog, 2402.04347): the model runs
with dense attention, every layer at once sees what it would see there, and each mechanism learns

    min  |mechanism(x) - dense(x)|^2 / |dense(x)|^2        over its own weights

The model's weights stay as they are. LoRA on the next-token loss may follow. One dense forward
pass and one of the mechanisms with gradients a step; no gradient goes from layer to layer.

Axes: B batch, N tokens, L converted layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from longspan.errors import InputError
from longspan.eval.losses import TokenLoss
from longspan.eval.progress import Progress, silent
from longspan.hf import save_mechanism
from longspan.hf.mechanisms import swapped
from longspan.hf.routes import routed
from longspan.hf.unwrap import base_model
from longspan.train.checkpoint import Checkpoints
from longspan.train.loop import LoopConfig, train
from longspan.train.sole_writer import sole_writer


def distill(
    model: Any,
    batch_at: Callable[[int], Tensor],
    config: LoopConfig,
    folder: Path | str,
    *,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Train the new weights of a converted model towards dense attention, layer by layer.

    Args:
        model: after ``longspan.hf.convert``; its mechanisms are changed in place.
        batch_at: batch number -> int64 ids [B, N], as ``longspan.train.data.Sampler`` gives; it
            must depend on the number alone.
        config: how to train; a learning rate of 0.01 suits feature maps.
        folder: takes ``log.jsonl``, the checkpoints, from the newest of which a second call goes
            on, and at the end what ``longspan.hf.load_mechanism`` reads.
        progress: called after each step.

    Returns:
        A record of each step; ``loss`` is the mean over the layers of the relative squared error.

    Raises:
        InputError: if the model has no mechanism with weights of its own.
        RunError: a checkpoint could not be written, the loss is no longer finite, or another
            process trains into the folder.
    """
    base = base_model(model)
    learned = {id(p) for layer in swapped(base).values() for p in layer.parameters()}
    if not learned:
        raise InputError(
            f"{type(base).__name__} has no mechanism with weights of its own: use "
            "longspan.hf.convert first, with a mechanism that adds some."
        )
    target = Path(folder)
    with sole_writer(target), _only(base, learned):
        records = train(
            OutputErrors(model),
            batch_at,
            config,
            checkpoints=Checkpoints(target / "checkpoints"),
            log=target / "log.jsonl",
            progress=progress,
        )
    save_mechanism(model, target)
    return records


class OutputErrors(TokenLoss):
    """Relative squared error of each mechanism against dense attention [L], from ids [B, N]."""

    def _losses(self, ids_BN: Tensor) -> Tensor:
        found: list[Tensor] = []

        def compare(owner: Any) -> Callable[..., Any]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                # The class computes dense attention; the mechanism is in the object alone.
                dense = type(owner).forward(owner, hidden_states, *args, **kwargs)
                size = dense[0].float().square().mean().clamp_min(1e-30)
                with torch.enable_grad():
                    apart = owner.mechanism(hidden_states) - dense[0]
                    found.append(apart.float().square().mean() / size)
                return dense

            return forward

        wanted = swapped(self._lm)
        with ExitStack() as stack:
            for path, owner in routed(self._lm):
                if path in wanted:
                    stack.enter_context(patch.object(owner, "forward", compare(owner)))
            with torch.no_grad():
                self._hidden(ids_BN)
        return torch.stack(found)


@contextmanager
def _only(base: nn.Module, learned: set[int]) -> Iterator[None]:
    """Let these parameters alone ask for gradients, for a while."""
    before = {p: p.requires_grad for p in base.parameters()}
    try:
        for p in before:
            p.requires_grad_(id(p) in learned)
        yield
    finally:
        for p, asked in before.items():
            p.requires_grad_(asked)
