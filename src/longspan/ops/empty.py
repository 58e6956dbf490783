"""Query rows that see no key: 0 and -inf on the way out, nothing on the way back.

What a library writes there is undefined, and a NaN in the gradient of such a row, as any loss of
-inf has, must not reach the keys beside it. Rows are few, so they are overwritten by index.

Axes: B batch, H heads, N query rows, D value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Index = tuple[Any, ...]


def index_of(empty_BHN: Tensor | None) -> Index | None:
    """The marked rows [B, 1 or H, N] as an index, over all heads where they are alike.

    None where no row is marked, or nothing was.
    """
    if empty_BHN is None or not bool(empty_BHN.any()):
        return None
    if bool((empty_BHN == empty_BHN[:, :1]).all()):
        empty_BHN = empty_BHN[:, :1]
    batch, head, row = empty_BHN.nonzero(as_tuple=True)
    return batch, slice(None) if empty_BHN.shape[1] == 1 else head, row


def clear(out_BHND: Tensor, lse_BHN: Tensor, empty: Index | None) -> None:
    """Overwrite what a kernel gave in these rows."""
    if empty is not None:
        _fill(out_BHND, empty, 0.0)
        _fill(lse_BHN, empty, -torch.inf)


def harmless(
    empty: Index | None, lse_BHN: Tensor, dout_BHND: Tensor | None, dlse_BHN: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-sum-exp and gradients with 0 in these rows, as copies if there are any.

    A kernel hides every key of such a row, whatever the log-sum-exp, but -inf would make it NaN.
    """
    if empty is None:
        return lse_BHN, dout_BHND, dlse_BHN
    dout, dlse = (
        None if x is None else _fill(x.clone(), empty, 0.0) for x in (dout_BHND, dlse_BHN)
    )
    return _fill(lse_BHN.clone(), empty, 0.0), dout, dlse


def _fill(x_BHN: Tensor, index: Index, value: float) -> Tensor:
    """Overwrite some rows."""
    # A number from the host would be waited for.
    x_BHN[index] = x_BHN.new_full((), value)
    return x_BHN
