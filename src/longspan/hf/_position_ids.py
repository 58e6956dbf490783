"""What ``position_ids`` say that nothing else in a call does, refused where it contradicts it.

Axes: B batch, N new rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longspan.errors import InputError
from longspan.hf.rows import Rows


def check_positions(rows: Rows, position_ids: Any) -> None:
    """Refuse packed documents that transformers did not recognise as such; once per forward.

    Args:
        rows: of the call.
        position_ids: of the new rows [B or 1, N]; anything else is not looked at.

    Raises:
        InputError: if positions jump although neither padding nor documents were found, or start
            again within the real tokens of a row beside an ``attention_mask``.
    """
    packed = rows.segments is not None and not rows.masked
    if packed or rows.queries == 1 or "checked" in rows.kept:
        return
    rows.kept["checked"] = True
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2:
        return
    if rows.masked:
        if position_ids.shape[1] == rows.queries:
            _check_no_restart(rows, position_ids)
        return
    if bool((position_ids.diff(dim=-1) != 1).any()):
        raise InputError(
            "position_ids do not rise by one and there is no attention_mask, but transformers "
            "made no packed documents of them, so that they would see each other: with a "
            "cache it never does. Pass use_cache=False to keep documents apart, or an "
            "attention_mask for padding. Where it is passed already, this family of models "
            "(such as gpt-oss, AFMoE, OPT) packs no documents: give each its own row."
        )


def _check_no_restart(rows: Rows, position_ids: Tensor) -> None:
    """With a mask transformers finds no documents; gaps in the positions are allowed."""
    steps = position_ids.diff(dim=-1) <= 0
    if rows.segments is not None:
        real = torch.from_numpy(rows.segments >= 0).to(steps.device)
        steps = steps & real[:, 1:] & real[:, :-1]
    if bool(steps.any()):
        raise InputError(
            "position_ids start again within a row, which says packed documents, but beside "
            "an attention_mask transformers lets them see each other. Leave attention_mask "
            "out and pass use_cache=False to keep documents apart, or position_ids that rise."
        )


def check_goes_on(position_ids: Any, told: Tensor | None, read: int) -> None:
    """Refuse new rows whose positions lie among those that a cache has read.

    Positions may leave gaps, but they rise, so the last one is at least the number of tokens
    before it. ``generate`` gives text to a cache that holds it already, and says so here alone.

    Args:
        position_ids: of the new rows [B or 1, N]; anything else is not looked at.
        told: which rows so far are tokens, the new ones among them [B or 1, read + N]; None: all.
        read: rows that were read before.

    Raises:
        InputError: if the last position of a row of the batch that has new tokens is too small.
    """
    if not read or not isinstance(position_ids, Tensor) or position_ids.dim() != 2:
        return
    last = position_ids.amax(1).cpu()
    if told is None:
        again = last < read + position_ids.shape[1] - 1
    else:
        told = told.cpu() != 0
        # Padding has any position: generate gives it 0.
        again = told[:, read:].any(1) & (last < told.sum(1) - 1)
    if bool(again.any()):
        raise read_again(read)


def read_again(read: int) -> InputError:
    """The error for tokens that a cache holds already, of ``read`` in all."""
    return InputError(
        f"The cache has read {read} tokens, and by its position_ids or attention_mask this call "
        "gives tokens that stand among them. To go on, give generate the whole text, which must "
        "be longer, or the new tokens with an attention_mask of all, and use_cache=True. To "
        "start anew, make another cache."
    )
