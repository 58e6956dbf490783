"""What ``position_ids`` say that nothing else in a call does, refused where it contradicts it.

Axes: B batch, N new rows.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from longspan.errors import InputError


def check_goes_on(position_ids: Any, tokens: int | Tensor, read: int) -> None:
    """Refuse new rows whose positions lie among those that a cache has read.

    Positions may leave gaps, but they rise, so the last one is at least the number of tokens
    before it. ``generate`` gives text to a cache that holds it already, and says so here alone.

    Args:
        position_ids: of the new rows [B or 1, N]; anything else is not looked at.
        tokens: real ones in each row of the batch, the new ones among them: [B], or one number.
        read: rows that were read before.

    Raises:
        InputError: if a last position is too small.
    """
    if not read or not isinstance(position_ids, Tensor) or position_ids.dim() != 2:
        return
    if bool((position_ids.amax(1).cpu() < tokens - 1).any()):
        raise read_again(read)


def read_again(read: int) -> InputError:
    """The error for tokens that a cache holds already, of ``read`` in all."""
    return InputError(
        f"The cache has read {read} tokens, and by its position_ids or attention_mask this call "
        "gives tokens that stand among them. To go on, give generate the whole text, which must "
        "be longer, or the new tokens with an attention_mask of all, and use_cache=True. To "
        "start anew, make another cache."
    )
