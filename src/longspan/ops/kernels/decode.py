"""A few queries over many keys on a GPU, as in decoding, without gradients and without a plan.

    out_i = sum_s exp(lse_is - lse_i) out_is      lse_i = log sum_s exp(lse_is)

over parts s of the keys that query i sees ("flash-decoding", Dao et al. 2023,
https://pytorch.org/blog/flash-decoding): one program for each query row, key head and part, with
the query heads of a key head as the rows of a tile. A new token is a new row of ranges, so that
nothing may be made of them before the kernel runs: programs read the ranges themselves, and find
rows through the order of a pass, so that no list of tiles is built and no key is gathered. Keys
that no query sees are not read: they may hold anything.

Time O(pairs D), memory O(S B H N D) for S parts, 64 at most.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, D head width, G range groups,
P places, m ranges of a query.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from longspan.ops.fused import merge_stacked, rows_dense, tile_of
from longspan.ops.launch import REACH, is_far, launch
from longspan.ops.libraries import has_triton, processors
from longspan.ops.places import Places
from longspan.ops.ranges import KeyRanges

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_WIDTH = 256
# Keys of a step, and parts of a row at most: of all passes, which are joined at once.
_STEP, _MOST_PARTS = 64, 64
# Programs that run at the same time on a processor, as shared memory has it.
_AT_ONCE = 3
# Of the keys of a step: what registers hold.
_STEP_BYTES = 1 << 14
_LOG2_E = 1.4426950408889634
# The second axis of a grid.
_MOST_PROGRAMS = (1 << 16) - 1
# Query heads of a key head whose tiles fit into the shared memory of any GPU, and bytes of it that
# do for any number.
_FEW_HEADS, _LARGE = 16, 200 << 10


def reasons(q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, ranges: KeyRanges) -> list[str]:
    """Why this kernel cannot take the given tensors, one sentence each; empty where it can."""
    batch, heads, rows, width = q_BHND.shape
    found = []
    if q_BHND.device.type != "cuda":
        found.append(f"decode needs CUDA tensors, got {q_BHND.device}")
    elif not has_triton():
        found.append("the package triton is not installed")
    key_heads = k_BKMD.shape[1]
    if batch * key_heads * rows > _MOST_PROGRAMS:
        found.append(
            f"query rows of all batch rows and key heads, here {batch * key_heads * rows:,}, are "
            f"more than {_MOST_PROGRAMS:,}"
        )
    share = heads // max(1, key_heads)
    if not found and share > _FEW_HEADS and _shared_memory(q_BHND.device) < _LARGE:
        found.append(
            f"decode takes up to {_FEW_HEADS} query heads of a key head on this GPU, got {share}"
        )
    if q_BHND.dtype not in DTYPES:
        found.append(f"decode computes float32, bfloat16 and float16, got {q_BHND.dtype}")
    widths = width, v_BKMD.shape[-1]
    if max(widths) > MOST_WIDTH:
        found.append(
            f"decode takes head widths up to {MOST_WIDTH}; got {width} with values of {widths[1]}"
        )
    if 0 in (batch, heads, rows, *widths, k_BKMD.shape[2], ranges.lo_GNm.shape[2]):
        found.append("there is no query, no key, no range or no width")
    return found


def decode(
    q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, ranges: KeyRanges, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend over the given key ranges, without gradients.

    Args:
        q_BHND: queries [B, H, N, D], up to 8 rows of width 256; float32, bfloat16 or float16 on a
            GPU.
        k_BKMD: keys [B, K, M, D]; K divides H, query head h reads key head ``h // (H // K)``.
        v_BKMD: values [B, K, M, Dv].
        ranges: visible keys, on the device of ``q``.
        scale: factor on the logits.

    Returns:
        out [B, H, N, Dv] in the dtype of ``q``, and natural-log lse [B, H, N] in float32; 0 and
        -inf for queries without keys.
    """
    return decode_passes(q_BHND, k_BKMD, v_BKMD, [(ranges, Places())], scale)


def decode_passes(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKMD: Tensor,
    passes: Sequence[tuple[KeyRanges, Places]],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend over several passes; a key that several of them see counts in each."""
    q, k, v = (rows_dense(x) for x in (q_BHND, k_BKMD, v_BKMD))
    parts = [_parts(q, k, ranges, places, len(passes)) for ranges, places in passes]
    out_BHND = q.new_empty(*q.shape[:3], v.shape[3])
    covered = all(places.covers for _, places in passes)
    if sum(parts) == 1 and covered:
        lse_BHN = q.new_empty(q.shape[:3], dtype=torch.float32)
        _attend(q, k, v, *passes[0], scale, out_BHND[None], lse_BHN, 0, 1)
        return out_BHND, lse_BHN
    shape = (sum(parts), *out_BHND.shape)
    if covered:
        outs, lses = (q.new_empty(size, dtype=torch.float32) for size in (shape, shape[:-1]))
    else:
        outs = q.new_zeros(shape, dtype=torch.float32)
        lses = q.new_full(shape[:-1], -torch.inf, dtype=torch.float32)
    first = 0
    for (ranges, places), own in zip(passes, parts, strict=True):
        _attend(q, k, v, ranges, places, scale, outs, lses, first, own)
        first += own
    return out_BHND, merge_stacked(outs, lses, out_BHND)


def _parts(q: Tensor, k: Tensor, ranges: KeyRanges, places: Places, passes: int) -> int:
    """Parts of the keys of each row: for no more programs than run at the same time, each with two
    steps at least."""
    heads = k.shape[1] if places.key_heads is None else len(places.key_heads)
    programs = q.shape[0] * heads * ranges.queries
    wanted = _AT_ONCE * processors(q.device) // programs
    most = min(_MOST_PARTS // passes, -(-ranges.keys // (2 * _STEP)))
    return max(1, min(wanted, most))


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: KeyRanges,
    places: Places,
    scale: float,
    outs: Tensor,
    lses: Tensor,
    first: int,
    parts: int,
) -> None:
    """Results of one pass into its own parts of ``outs`` [S, B, H, N, Dv] and ``lses``."""
    batch, heads, rows, width = q.shape
    own_heads = ranges.group_BH.shape[1]
    key_heads = k.shape[1] if places.key_heads is None else len(places.key_heads)
    share = own_heads // key_heads
    count = ranges.lo_GNm.shape[2]
    # The kernel counts rows of tables that lie one after another.
    lo_GNm, hi_GNm, group_BH = (
        x.contiguous() for x in (ranges.lo_GNm, ranges.hi_GNm, ranges.group_BH)
    )
    q_moved, q_row_step, q_row_share = _table(places.query_rows, own_heads)
    k_moved, k_row_step, k_row_share = _table(places.key_rows, key_heads)
    (wide, _), (v_wide, _) = tile_of(max(width, 16)), tile_of(max(v.shape[3], 16))
    steps = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *outs.stride()[:4])
    constants = (
        q_moved is not None,
        k_moved is not None,
        places.query_heads is not None,
        places.key_heads is not None,
        share,
        max(16, tile_of(share)[0]),
        width,
        wide,
        v.shape[3],
        v_wide,
        max(16, min(_STEP, _STEP_BYTES // (max(wide, v_wide) * q.element_size()))),
    )
    launch(
        _kernels().decode,
        (parts, batch * key_heads * ranges.queries, 1),
        (
            q,
            k,
            v,
            lo_GNm,
            hi_GNm,
            group_BH,
            lo_GNm if q_moved is None else q_moved,
            lo_GNm if k_moved is None else k_moved,
            group_BH if places.query_heads is None else places.query_heads,
            group_BH if places.key_heads is None else places.key_heads,
            outs,
            lses,
            *steps,
            ranges.queries,
            count,
            ranges.keys,
            0 if len(group_BH) == 1 else own_heads,
            q_row_step,
            q_row_share,
            k_row_step,
            k_row_share,
            first,
            parts,
            rows,
            batch,
            key_heads,
            heads,
            scale * _LOG2_E,
            *constants,
        ),
        device=q.device,
        alike=(*constants, outs.dtype, *map(_look, (q, k, v)), *map(_kind, steps)),
    )


def _table(row_BGP: Tensor | None, heads: int) -> tuple[Tensor | None, int, int]:
    """An order, its step from batch row to batch row, and how many heads share a row of it."""
    if row_BGP is None:
        return None, 0, 1
    batch, groups, _ = row_BGP.shape
    step = row_BGP[0].numel() if batch > 1 else 0
    return row_BGP.int().contiguous(), step, heads // groups


def _look(x: Tensor) -> Hashable:
    return x.dtype, x.data_ptr() % 16 == 0, is_far(x)


def _kind(step: int) -> int:
    """What is compiled for a step: a constant 1, whether 16 divides it, whether it is long."""
    return 1 if step == 1 else 2 + 2 * (step % 16 == 0) + 4 * (step > REACH)


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("longspan.ops.kernels._decode_triton")


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of it that a program may have, 0 if torch does not say."""
    found = torch.cuda.get_device_properties(device)
    return getattr(found, "shared_memory_per_block_optin", 0)
