"""Windows and segments by FlashAttention-4's own masks, on Hopper and newer.

``flash_attn.cute`` (Dao et al.; its Hopper kernels are of the FlashAttention-3 kind, arXiv
2407.08608) knows windows, causal or not, and rows packed from several sequences. Ranges say more,
but where they say just that (see ``_flash_masks``) there is nothing to list and nothing to load: a
tile is masked by comparing indices. Equal segments become batch rows, others go as cumulative
lengths. Heads that differ are one call for each run of neighbours that see the same.

Forward 4 D flops per visited pair, backward 10 D; memory O(N D).

Axes: B batch, H query heads, K key heads, N query rows, M = N key rows, D head width.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.errors import Refusal
from longspan.ops.kernels._flash_masks import Run, runs_of
from longspan.ops.libraries import aligned, missing_flash_attention, why_no_flash_attention
from longspan.ops.ranges import KeyRanges


def reasons(q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, ranges: KeyRanges) -> list[str]:
    """Why this kernel cannot take the given tensors, one sentence each; empty where it can."""
    if found := tensor_reasons(q_BHND, v_BKMD):
        return found
    runs = runs_of(ranges)
    if isinstance(runs, str):
        return [runs]
    share = q_BHND.shape[1] // k_BKMD.shape[1]
    if any(run.heads % share for run in runs):
        return ["query heads that share a key head must see the same keys"]
    return []


def tensor_reasons(q_BHND: Tensor, v_BKMD: Tensor) -> list[str]:
    """Why it cannot take queries and values, whatever the ranges are."""
    found = why_no_flash_attention("flash", q_BHND, v_BKMD)
    if not found and (missing := missing_flash_attention()):
        found.append(missing)
    return found


# Under an outer torch.compile this is a graph break: plans are cached by identity, outside graphs.
@torch.compiler.disable
def flash(
    q_BHND: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, ranges: KeyRanges, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend over the given key ranges.

    Args:
        q_BHND: queries [B, H, N, D], bfloat16 or float16; D one of ``FLASH_WIDTHS``.
        k_BKMD: keys [B, K, M, D], M = N; K divides H, query head h reads key head
            ``h // (H // K)``.
        v_BKMD: values [B, K, M, D].
        ranges: visible keys, on the device of ``q``.
        scale: factor on the logits.

    Returns:
        out [B, H, N, D] in the dtype of ``q``, and natural-log lse [B, H, N] in float32. Both are
        differentiable, once.

    Raises:
        Refusal: ``reasons`` has one.
    """
    if found := reasons(q_BHND, k_BKMD, v_BKMD, ranges):
        raise Refusal("flash cannot run here: " + "; ".join(found))
    runs = runs_of(ranges)
    assert not isinstance(runs, str)
    rows = tuple(x.transpose(1, 2) for x in (q_BHND, k_BKMD, v_BKMD))
    if len(runs) == 1:
        out_BNHD, lse_BHN = _attend(rows, runs[0], scale)
        return out_BNHD.transpose(1, 2), lse_BHN
    share = q_BHND.shape[1] // k_BKMD.shape[1]
    # Split, not sliced: the gradient is one tensor that is written once.
    sizes = [[run.heads // step for run in runs] for step in (1, share, share)]
    each = zip(*(x.split(size, 2) for x, size in zip(rows, sizes, strict=True)), strict=True)
    parts = [_attend(own, run, scale) for own, run in zip(each, runs, strict=True)]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 2).transpose(1, 2), torch.cat(lses, 1)


def _attend(tensors: Sequence[Tensor], run: Run, scale: float) -> tuple[Tensor, Tensor]:
    """The same of q, k and v as [B, N, H, D], for heads that are alike."""
    library = importlib.import_module("flash_attn.cute")
    batch, n, heads, _ = tensors[0].shape
    about = {
        **run.window(),
        "softmax_scale": scale,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "return_lse": True,
    }
    if run.equal:
        split = (x.unflatten(1, (-1, run.longest)) for x in tensors)
        out, lse = library.flash_attn_func(*(aligned(x.flatten(0, 1)) for x in split), **about)
        lse_BHN = lse.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2)
    else:
        starts = run.starts_on(tensors[0].device, batch * n)
        out, lse = library.flash_attn_varlen_func(
            *(aligned(x.flatten(0, 1)) for x in tensors),
            cu_seqlens_q=starts,
            cu_seqlens_k=starts,
            max_seqlen_q=run.longest,
            max_seqlen_k=run.longest,
            **about,
        )
        lse_BHN = lse.unflatten(1, (batch, n)).transpose(0, 1)
    if out.requires_grad:
        # The library compiles anew for gradients that sums broadcast.
        out.register_hook(lambda dout: None if dout is None else aligned(dout))
    return out.view(batch, n, heads, -1), lse_BHN
