"""Hugging Face models over sequences that are longer than one GPU holds.

Every rank has the whole model and some rows of the sequence. All layers but attention work on rows
alone; attention goes across ranks, see ``longspan.parallel``.

    loss = sum over ranks of the loss that a rank returns     gradients: their sum likewise
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longspan.errors import InputError, PatternError, Refusal
from longspan.hf.ranks import ROUTERS, Batch, Parallel
from longspan.hf.routes import routed
from longspan.hf.switch import Applied, put
from longspan.hf.unwrap import base_model
from longspan.parallel.agreement import group_of
from longspan.parallel.shards import Shards, shards_of
from longspan.pattern import Pattern, parse

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class AcrossRanks(Applied):
    """A pattern across ranks at work in a model; a context manager that takes it out at the end.

    Attributes:
        shards: which rows lie where, as it was given.
    """

    shards: Shards | str

    def shard(
        self, input_ids: Tensor, labels: Tensor | None = None, segments: Any = None
    ) -> dict[str, Any]:
        """This rank's part of a batch, for ``model(**handle.shard(ids, labels=ids))``.

        Forward passes until the next call are of this batch. The loss that the model returns is
        the sum over this rank's tokens divided by the number of all tokens with a label, so that
        the sum over the ranks is the loss of the whole batch.

        Args:
            input_ids: tokens of the whole sequence [B, N], the same on all ranks.
            labels: likewise, -100 where there is none; a row's label is the next row's, inside a
                segment.
            segments: [N] or [B, N], packed documents, negative for padding; the same on all ranks.

        Returns:
            Arguments of the model.

        Raises:
            InputError: if shapes or shards do not fit, or the model adds a loss of its routers.
            PlanError: if the segments do not fit.
        """
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.numel() == 0:
            given = list(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids)
            raise InputError(f"expected input_ids [batch, tokens] of all ranks, got {given}")
        if labels is not None and labels.shape != input_ids.shape:
            raise InputError(
                f"labels must have the shape of input_ids {list(input_ids.shape)}, got "
                f"{list(labels.shape)}"
            )
        config = self.model.config.get_text_config()
        if labels is not None and getattr(config, "output_router_logits", False):
            raise InputError(ROUTERS)
        what = self._what
        _, rank, ranks = group_of(what.group)
        lie = shards_of(self.shards, input_ids.shape[1], ranks)
        if not all(lie.sizes):
            raise InputError(
                f"every rank needs a row of a model's batch; {input_ids.shape[1]} tokens lie as "
                f"{list(lie.sizes)} on the {ranks} ranks"
            )
        if isinstance(segments, Tensor):
            segments = segments.detach().cpu().numpy()
        batch = Batch.of(lie, rank, segments, labels is not None)
        if len(batch.positions) not in (1, len(input_ids)):
            raise InputError(
                f"segments have {len(batch.positions)} batch rows, input_ids {len(input_ids)}"
            )
        device = input_ids.device
        positions = torch.from_numpy(batch.positions).to(device)
        found: dict[str, Any] = {
            "input_ids": lie.take(input_ids, rank),
            "position_ids": positions.expand(len(input_ids), -1),
            "use_cache": False,
        }
        if labels is not None:
            next_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            if segments is not None:
                segment = torch.as_tensor(segments, device=device).expand(len(labels), -1)
                ends = torch.nn.functional.pad(segment.diff(dim=1) != 0, (0, 1), value=True)
                next_labels = next_labels.masked_fill(ends | (segment < 0), -100)
            found["labels"] = lie.take(labels, rank)
            found["shift_labels"] = lie.take(next_labels, rank)
            found["num_items_in_batch"] = (next_labels != -100).sum().clamp(min=1)
        what.batch = batch
        return found

    @property
    def _what(self) -> Parallel:
        return self.entry.what


def parallel(
    model: Any,
    pattern: Pattern | str,
    *,
    group: Any = None,
    shards: Shards | str = "even",
    impl: str = "auto",
) -> AcrossRanks:
    """Let a model's attention go across ranks, each of which holds some rows of the sequence.

    Layers keep their own bounds, as under ``longspan.hf.apply``. There is no cache: it is for
    training and for reading, not for ``generate``. Weights and their gradients are the caller's:
    add up gradients over the ranks (``all_reduce`` with a sum; DDP and FSDP take means, so
    multiply the loss by the number of ranks).

    Args:
        model: a Hugging Face model, or a PEFT model around one; the same on all ranks.
        pattern: a pattern or its text form.
        group: process group, device mesh of one dimension, or None for all processes.
        shards: ``"even"``, ``"zigzag"`` (equal work under a causal pattern), or ``Shards``.
        impl: kernel name or ``"auto"``.

    Returns:
        A handle, whose ``shard`` cuts a batch; ``with parallel(...)`` restores the model.

    Raises:
        InputError: if there is no process group, or the shards do not fit it.
        PatternError: if the pattern does not parse or does not fit the heads.
        Refusal: as in ``longspan.hf.apply``, or if layers count the rows of a forward pass by
            themselves; the model is then unchanged.
    """
    group, _, ranks = group_of(group)
    if isinstance(pattern, str):
        pattern = parse(pattern)
    if not isinstance(pattern, Pattern):
        raise PatternError(f"expected a pattern or its text, got {type(pattern).__name__}")
    if isinstance(shards, Shards):
        shards_of(shards, shards.n, ranks)
    else:
        shards_of(shards, ranks, ranks)
    base = base_model(model)
    _check_counts(base)
    applied = put(base, Parallel(pattern, group), impl)
    return AcrossRanks(applied.model, applied.entry, shards)


def _check_counts(base: PreTrainedModel) -> None:
    """Refuse models that count the rows of a forward pass, on each rank from 0.

    Those that take no positions (Bart), and Llama 4's layers without rotation, whose temperature
    follows the row's number.
    """
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise Refusal(
            f"{type(base).__name__} takes no position_ids and counts the rows that it is given: "
            "each rank would begin at 0. The model was not changed."
        )
    for path, module in routed(base):
        tuned = getattr(module, "attn_temperature_tuning", False)
        if tuned and not getattr(module, "use_rope", True):
            raise Refusal(
                f"{type(base).__name__} scales queries by their place in the sequence, for which "
                f"it counts the rows that it is given ({path}): each rank would begin at 0. Up to "
                "floor_scale tokens the scale is 1: there build the model with "
                "attn_temperature_tuning=False. The model was not changed."
            )
