"""Chosen blocks on Hopper: cuDNN's block-sparse attention, which walks lists of whole blocks.

Three passes that share no pair, joined by log-sum-exp:

    earlier blocks   cudnn.block_sparse_attention over their lists: no mask, no plan, and nothing
                     is compiled for a new selection or a new length
    own block        its causal triangle, as key ranges that all heads and layers share
    columns          see ``columns``

Rows are blocks of 128, forward only. The kernel comes with nvidia-cudnn-frontend, as ``cudnn``
does; it is warp-specialised as FlashAttention-3 is (Shah et al., arXiv 2407.08608).

Axes: B batch, H query heads, K key heads, R rows in Q blocks of S, W longest list, D head width.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util

import torch
from torch import Tensor

from longspan.ops.capability import needs_grad
from longspan.ops.kernels.cudnn import DTYPES, _aligned
from longspan.ops.merge import merge
from longspan.select.columns import columns
from longspan.select.lists import listed
from longspan.select.prompt import Prompt
from longspan.select.ranges import over, own_block
from longspan.select.selection import Selection

BLOCK = 128
WIDTHS = (64, 96, 128)
_MODULE = "cudnn.block_sparse_attention"


def reasons(prompt: Prompt, v: Tensor) -> list[str]:
    """Why this cannot take the given tensors; empty where it can."""
    q = prompt.q
    if not q.is_cuda:
        return [f"needs CUDA tensors, got {q.device}"]
    found = []
    if torch.cuda.get_device_capability(q.device) != (9, 0):
        found.append("needs compute capability 9.0 (Hopper)")
    if q.dtype not in DTYPES:
        found.append(f"computes bfloat16 and float16, got {q.dtype}")
    if not {q.shape[-1], v.shape[-1]} <= set(WIDTHS):
        found.append(f"head widths must be among {WIDTHS}, got {q.shape[-1]} and {v.shape[-1]}")
    if prompt.size != BLOCK:
        found.append(f"blocks must be of {BLOCK} tokens, got {prompt.size}")
    if needs_grad(q, prompt.k, v):
        found.append("computes no gradients")
    if not found and (missing := missing_stack()):
        found.append(missing)
    return found


@functools.cache
def missing_stack() -> str | None:
    """What has to be installed, None if nothing."""
    if importlib.util.find_spec("cudnn") is None:
        return "the package nvidia-cudnn-frontend is not installed: pip install 'longspan[cuda]'"
    try:
        # The name is loaded when it is asked for, with the compiler below it.
        _ = importlib.import_module(_MODULE).block_sparse_attention_forward
        importlib.import_module(f"{_MODULE}._interface")
    # Whatever the stack of compilers and drivers below raises, the sentence for people is this.
    except Exception as error:
        return f"{_MODULE} does not load: pip install 'longspan[cuda]' ({error})"
    return None


def cudnn_blocks(prompt: Prompt, v: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """Attend; as ``ranges`` in what goes in and comes out."""
    own = over(prompt, v, own_block(prompt))
    parts = [earlier(prompt, v, earlier_lists(prompt, selection.blocks)), own]
    if selection.columns is not None:
        parts.append(columns(prompt, v, selection))
    return merge(parts)


def earlier_lists(prompt: Prompt, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [B, H, Q] and numbers [B, H, Q, W] of the chosen blocks before the own one."""
    return listed(blocks & (prompt.back > 0)[:, None])


def earlier(prompt: Prompt, v: Tensor, lists: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention to whole blocks: out [B, H, R, Dv] and lse [B, H, R]; 0 and -inf without any."""
    count, index = lists
    found = importlib.import_module(_MODULE).block_sparse_attention_forward(
        *(_aligned(x) for x in (prompt.q, prompt.k, v)),
        index,
        q2k_block_nums=count,
        sparse_block_size=BLOCK,
        allow_empty_block_nums=True,
        softmax_scale=prompt.scale,
    )
    return found["o_tensor"], found["lse_tensor"]
