"""Join attention over disjoint sets of keys by their log-sum-exp.

    lse = log sum_p exp(lse_p)            out = sum_p exp(lse_p - lse) out_p

Exact: the result is the attention over the union of the keys, gradients included (FlashAttention,
Dao et al. 2022, arXiv 2205.14135, splits its own softmax the same way). Keys that several parts
share count once in each of them.

Axes: B batch, H heads, N query rows, D value width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from longspan.errors import InputError
from longspan.ops.capability import needs_grad, transforming
from longspan.ops.fused import can_fuse, merge_fused, merge_into
from longspan.ops.rows import Order


@dataclass(frozen=True, eq=False)
class Part:
    """What a kernel gave for some keys.

    Attributes:
        out: [B, H, P, D].
        lse: [B, H, P].
        order: the query row at each place; None if place and row agree.
        heads: which of how many heads these are, int64 [H]; None if they are all.
    """

    out: Tensor
    lse: Tensor
    order: Order | None = None
    heads: tuple[Tensor, int] | None = None

    def placed(self, *, use_lse: bool = True) -> tuple[Tensor, Tensor]:
        """``(out, lse)`` for all rows in their own order; lse in any if it is of no use."""
        part = self.of_all_heads()
        if part.order is None:
            return part.out, part.lse
        return part.order.put(part.out), part.placed_lse() if use_lse else part.lse

    def placed_lse(self) -> Tensor:
        """Log-sum-exp of all rows in their own order."""
        lse = self.lse if self.order is None else self.order.put_lse(self.lse)
        if self.heads is None:
            return lse
        heads, count = self.heads
        batch, _, n = lse.shape
        return lse.new_full((batch, count, n), -torch.inf).index_copy(1, heads, lse)

    def of_all_heads(self) -> Part:
        """The same for all heads, in order where these are not all."""
        if self.heads is None:
            return self
        heads, count = self.heads
        out, _ = replace(self, heads=None).placed(use_lse=False)
        batch, _, n, width = out.shape
        room = out.new_zeros(batch, count, n, width)
        return Part(room.index_copy(1, heads, out), self.placed_lse())


def merge_parts(
    parts: Sequence[Part], *, use_lse: bool = True, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """Join the parts of a plan as ``merge`` does, whatever the order of each.

    Args:
        parts: at least one.
        use_lse: False if the log-sum-exp of a single part may be in any order.
        overwrite: whether nobody else needs what the parts hold.
    """
    if len(parts) == 1:
        return parts[0].placed(use_lse=use_lse)
    tensors = [x for part in parts for x in (part.out, part.lse)]
    if not can_fuse(*tensors):
        return _merge_plain([part.of_all_heads() for part in parts])
    if overwrite and not needs_grad(*tensors) and (whole := _whole(parts)) is not None:
        return _merge_in_place(whole, [part for part in parts if part is not whole])
    parts = [part.of_all_heads() for part in parts]
    pairs = [(part.out, part.lse) for part in parts]
    return merge_fused(pairs, [part.order and part.order.place for part in parts])


def _whole(parts: Sequence[Part]) -> Part | None:
    """A part that holds every row in its place, if joining the others to it pays.

    Joining reads a row of each side and writes one, for every place of the others; making a new
    tensor reads every part once and writes every row.
    """
    each = [part.lse[0].numel() for part in parts]
    for part, rows in zip(parts, each, strict=True):
        dense = part.out.stride(-1) == 1 and part.lse.is_contiguous()
        if part.order is None and part.heads is None and dense:
            return part if 3 * (sum(each) - rows) <= sum(each) + rows else None
    return None


def _merge_in_place(whole: Part, others: Sequence[Part]) -> tuple[Tensor, Tensor]:
    for part in others:
        row = None if part.order is None else part.order.table.row_cBGP[0]
        heads = None if part.heads is None else part.heads[0]
        merge_into(whole.out, whole.lse, part.out, part.lse, row, heads)
    return whole.out, whole.lse


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join ``(out, lse)`` pairs.

    Args:
        parts: at least one pair of out [B, H, N, D] and lse [B, H, N]; -inf where a row saw no
            key.

    Returns:
        out in the dtype of the first part and lse; rows without keys in every part give 0 and
        -inf. Differentiable in both inputs and both outputs.

    Raises:
        InputError: if there is no part, or a part is no such pair or does not fit the first one.
    """
    if not isinstance(parts, Sequence):
        raise InputError(f"merge takes a list of (out, lse) pairs, got {type(parts).__name__}")
    if not parts:
        raise InputError("merge needs at least one (out, lse) pair, got none")
    for index, part in enumerate(parts):
        _check(index, part, parts[0])
    return merge_parts([Part(out, lse) for out, lse in parts])


def _check(index: int, part: object, first: tuple[Tensor, Tensor]) -> None:
    """Refuse what would fail, or be broadcast, further down."""
    match part:
        case (Tensor() as out, Tensor() as lse):
            pass
        case _:
            raise InputError(
                f"merge takes pairs of two tensors, out and lse; part {index} is {part!r:.80}"
            )
    if out.dim() != 4 or lse.shape != out.shape[:3]:
        raise InputError(
            "merge takes out [B, H, N, D] and lse [B, H, N]; the shapes of part "
            f"{index} are {list(out.shape)} and {list(lse.shape)}"
        )
    if not (out.is_floating_point() and lse.is_floating_point()):
        raise InputError(
            f"merge takes floating point numbers; part {index} has {out.dtype} and {lse.dtype}"
        )
    here = (first[0].shape, first[0].device, first[0].device)
    if (out.shape, out.device, lse.device) != here:
        raise InputError(
            f"parts of a merge have the same shape and device; the first one is "
            f"{list(first[0].shape)} on {first[0].device}, part {index} is {list(out.shape)} on "
            f"{out.device} with lse on {lse.device}"
        )


def _merge_plain(parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """The same in PyTorch operations."""
    lse_PBHN = torch.stack([part.placed_lse() for part in parts])
    empty_BHN = torch.isneginf(lse_PBHN).all(dim=0)
    # Rows that are empty everywhere would be 0 / 0 in the gradient: they are joined with weights
    # of 1, and zeroed. On a CPU a look whether there are any costs less than a copy.
    unknown = torch.compiler.is_compiling() or empty_BHN.is_cuda or transforming()
    some = unknown or bool(empty_BHN.any())
    safe_PBHN = lse_PBHN.masked_fill(empty_BHN, 0.0) if some else lse_PBHN
    total_BHN = safe_PBHN.logsumexp(dim=0)
    weights = (safe_PBHN - total_BHN).exp()[..., None].unbind(0)
    whole = [w * p.out for w, p in zip(weights, parts, strict=True) if p.order is None]
    shape = (*total_BHN.shape, parts[0].out.shape[-1])
    out = reduce(torch.add, whole) if whole else total_BHN.new_zeros(shape)
    for weight, part in zip(weights, parts, strict=True):
        if part.order is not None:
            out = part.order.add(out, part.order.take(weight) * part.out)
    if some:
        out = out.masked_fill(empty_BHN[..., None], 0.0)
        total_BHN = total_BHN.masked_fill(empty_BHN, -torch.inf)
    return out.to(parts[0].out.dtype), total_BHN
