"""What surrounds a kernel on a GPU, each in one Triton kernel: gathering rows, merging parts.

    out[b, h, p] = sum_c x[b, h, row[c, b, g, p]]
    lse = log sum_p exp(lse_p)            out = sum_p exp(lse_p - lse) out_p

Every number is read and written once, at the speed of memory, from whatever layout it has: the
parts of a merge may lie in orders of their own. Written as PyTorch operations these cost as much
as the attention over a small window itself.

Axes: B batch, H heads, G heads that differ in their rows, N rows, P places, c rows of a place, D
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from longspan.ops.launch import launch
from longspan.ops.libraries import has_triton
from longspan.ops.once import once

# Numbers that one program holds.
_NUMBERS = 2048


def can_fuse(*tensors: Tensor) -> bool:
    """Whether these tensors are on a GPU, Triton is there, and no compiler is tracing."""
    if torch.compiler.is_compiling():
        # A compiler fuses the plain operations itself.
        return False
    return all(x.is_cuda and x.dtype != torch.float64 for x in tensors) and has_triton()


def gather(x_BHND: Tensor, row_cBGP: Tensor) -> Tensor:
    """Sums of rows of ``x`` [B, H, P, D], in float32 where c > 1; without gradient.

    Args:
        x_BHND: of any layout.
        row_cBGP: int32 [c, B or 1, G, P]; G divides H, neighbouring heads share; -1 for no row.
    """
    x_BHND, row_cBGP = rows_dense(x_BHND), row_cBGP.contiguous()
    batch, heads, _, width = x_BHND.shape
    count, row_batch, groups, places = row_cBGP.shape
    out_BHPD = x_BHND.new_empty(batch, heads, places, width)
    wide, tall = tile_of(width)
    launch(
        _kernels().gather_rows,
        (-(-places // tall), batch * heads, 1),
        (
            x_BHND,
            row_cBGP,
            out_BHPD,
            places,
            heads,
            *x_BHND.stride()[:3],
            row_batch * groups * places,
            groups * places if row_batch > 1 else 0,
            heads // groups,
            count,
            width,
            wide,
            tall,
        ),
        device=x_BHND.device,
    )
    return out_BHPD


def add_rows(parts: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """The sum of several tensors whose rows lie in orders of their own; without gradient.

    Args:
        parts: [B, H, P, D] of any layout, with the places of each row, int32 [c, B or 1, G, N]
            with -1 for none; None where places and rows agree.
    """
    flat = [
        (rows_dense(x), None if table is None else (one, True))
        for x, table in parts
        for one in ([None] if table is None else table)
    ]
    tensors, tables = (tuple(column) for column in zip(*flat, strict=True))
    first, table = parts[0]
    batch, heads, rows, width = first.shape
    rows = rows if table is None else table.shape[-1]
    out = first.new_empty(batch, heads, rows, width)
    wide, tall = tile_of(width)
    launch(
        _kernels().add_rows,
        (-(-rows // tall), batch * heads, 1),
        (tensors, *_where(tables, tensors), out, rows, heads, width, wide, tall),
        device=out.device,
    )
    return out


def add_into(total_BHND: Tensor, part_BHPD: Tensor, row_BGP: Tensor) -> None:
    """Add rows to some of those of ``total``, which are overwritten; without gradient.

    Only these rows are read and written.

    Args:
        total_BHND: of any layout in which the numbers of a row lie side by side.
        part_BHPD: of any layout.
        row_BGP: the row of each place, int32 [B or 1, G, P], each once at most, -1 for none; G
            divides H, and neighbouring heads share.
    """
    part_BHPD, row_BGP = rows_dense(part_BHPD), row_BGP.contiguous()
    batch, heads, places, width = part_BHPD.shape
    wide, tall = tile_of(width)
    launch(
        _kernels().add_into,
        (-(-places // tall), batch * heads, 1),
        (
            total_BHND,
            part_BHPD,
            row_BGP,
            places,
            heads,
            *total_BHND.stride()[:3],
            *part_BHPD.stride()[:3],
            row_BGP[0].numel() if len(row_BGP) > 1 else 0,
            heads // row_BGP.shape[1],
            width,
            wide,
            tall,
        ),
        device=total_BHND.device,
    )


def merge_fused(
    parts: Sequence[tuple[Tensor, Tensor]],
    tables: Sequence[tuple[Tensor, bool] | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Join (out, lse) pairs as ``merge`` does; differentiable once.

    Args:
        parts: out [B, H, P, D] of any layout and lse [B, H, P].
        tables: for each part None if its places are the rows, or the place of each row, int32 [B
            or 1, G, N] with -1 for none, and whether every place holds a row.
    """
    if tables is None:
        tables = [None] * len(parts)
    flat = (x for out, lse in parts for x in (rows_dense(out), lse.contiguous()))
    return _Merge.apply(tuple(tables), *flat)


def merge_into(
    out_BHND: Tensor,
    lse_BHN: Tensor,
    part_BGPD: Tensor,
    part_lse_BGP: Tensor,
    row_BGP: Tensor | None = None,
    heads_G: Tensor | None = None,
) -> None:
    """Join one more part to (out, lse), which are overwritten; without gradient.

    Only rows of the part are read and written: a few rows or heads cost what they are.

    Args:
        out_BHND: of any layout in which the numbers of a row lie side by side.
        lse_BHN: contiguous.
        part_BGPD: of any layout, for the heads that take part.
        part_lse_BGP: -inf where nothing is joined.
        row_BGP: the row of each place, int32 [B or 1, groups, P], each once at most, -1 for none;
            the groups divide the heads that take part, and neighbours share. None: as they are.
        heads_G: int64, which heads take part; None: all.
    """
    part_BGPD, part_lse_BGP = rows_dense(part_BGPD), part_lse_BGP.contiguous()
    row = part_lse_BGP if row_BGP is None else row_BGP.contiguous()
    batch, heads, places, width = part_BGPD.shape
    wide, tall = tile_of(width)
    launch(
        _kernels().merge_into,
        (-(-places // tall), batch * heads, 1),
        (
            out_BHND,
            lse_BHN,
            part_BGPD,
            part_lse_BGP,
            row,
            part_lse_BGP if heads_G is None else heads_G,
            places,
            heads,
            *lse_BHN.shape[1:],
            *out_BHND.stride()[:3],
            *part_BGPD.stride()[:3],
            row[0].numel() if len(row) > 1 else 0,
            heads // row.shape[1],
            row_BGP is not None,
            heads_G is not None,
            width,
            wide,
            tall,
        ),
        device=out_BHND.device,
    )


def merge_stacked(outs_SBHND: Tensor, lses: Tensor, out_BHND: Tensor) -> Tensor:
    """Join parts that lie one behind another; without gradient.

    All parts of a row are read at once, and what is compiled serves any number of them up to the
    next power of two.

    Args:
        outs_SBHND: contiguous.
        lses: float32 with as many rows [S, B, H, N], contiguous; -inf where nothing is joined.
        out_BHND: where the joined output goes; of any layout in which the numbers of a row lie
            side by side.

    Returns:
        The joined log-sum-exp [B, H, N].
    """
    parts, batch, heads, rows, width = outs_SBHND.shape
    lse_BHN = lses.new_empty(batch, heads, rows)
    deep, _ = tile_of(parts)
    wide, tall = tile_of(width, numbers=2 * _NUMBERS // deep)
    launch(
        _kernels().merge_stacked,
        (-(-lse_BHN.numel() // tall), 1, 1),
        (
            outs_SBHND,
            lses,
            out_BHND,
            lse_BHN,
            parts,
            lse_BHN.numel(),
            rows,
            heads,
            *out_BHND.stride()[:3],
            width,
            deep,
            wide,
            tall,
        ),
        device=out_BHND.device,
    )
    return lse_BHN


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tables: tuple[tuple[Tensor, bool] | None, ...], *given: Tensor
    ) -> tuple[Tensor, Tensor]:
        outs, lses = given[::2], given[1::2]
        named = next((table[0] for table in tables if table is not None), None)
        rows = next(
            (x.shape[2] for x, t in zip(outs, tables, strict=True) if t is None),
            0 if named is None else named.shape[-1],
        )
        batch, heads, _, width = outs[0].shape
        out = outs[0].new_empty(batch, heads, rows, width)
        lse = lses[0].new_empty(batch, heads, rows)
        wide, tall = tile_of(width)
        launch(
            _kernels().merge_rows,
            (-(-rows // tall), batch * heads, 1),
            (outs, lses, *_where(tables, outs), out, lse, rows, heads, width, wide, tall),
            device=out.device,
        )
        ctx.tables = tables
        ctx.save_for_backward(*given, lse)
        return out, lse

    @staticmethod
    @once
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        *given, lse = ctx.saved_tensors
        outs, lses = tuple(given[::2]), tuple(given[1::2])
        # Places without a row are not visited.
        whole = [table is None or table[1] for table in ctx.tables]
        d_outs, d_lses = (
            tuple(
                torch.empty_like(x) if every else torch.zeros_like(x)
                for x, every in zip(xs, whole, strict=True)
            )
            for xs in (outs, lses)
        )
        batch, heads, rows = lse.shape
        width = outs[0].shape[-1]
        wide, tall = tile_of(width)
        d_out, d_lse = (x.contiguous() for x in grads)
        launch(
            _kernels().merge_gradients,
            (-(-rows // tall), batch * heads, 1),
            (
                outs,
                lses,
                *_where(ctx.tables, outs),
                lse,
                d_out,
                d_lse,
                d_outs,
                _strides(d_outs),
                d_lses,
                rows,
                heads,
                width,
                wide,
                tall,
            ),
            device=lse.device,
        )
        return None, *(x for pair in zip(d_outs, d_lses, strict=True) for x in pair)


def _where(
    tables: Sequence[tuple[Tensor, bool] | None], outs: Sequence[Tensor]
) -> tuple[tuple[Any, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """Tables, their steps from batch to batch and heads to a group, layouts, and which count."""
    heads = outs[0].shape[1]
    at, step, share, used = [], [], [], 0
    for i, (table, out) in enumerate(zip(tables, outs, strict=True)):
        if table is None:
            at.append(out)
            step.append(0)
            share.append(1)
            continue
        place = table[0].contiguous()
        at.append(place)
        step.append(place[0].numel() if len(place) > 1 else 0)
        share.append(heads // place.shape[1])
        used |= 1 << i
    return tuple(at), tuple(step), tuple(share), _strides(outs), used


def _strides(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Steps of batch, head and row of each tensor, one after another, and the places of each."""
    return tuple(n for x in tensors for n in (*x.stride()[:3], x.shape[2]))


def rows_dense(x: Tensor) -> Tensor:
    """Rows whose numbers lie side by side, as kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def tile_of(width: int, numbers: int = _NUMBERS) -> tuple[int, int]:
    """Columns and rows of a program, both powers of two.

    Args:
        width: columns there are.
        numbers: how many it holds at most.
    """
    wide = 1 << (width - 1).bit_length()
    return wide, max(1, numbers // wide)


@cache
def _kernels() -> ModuleType:
    from longspan.ops import _fused_triton

    return _fused_triton
