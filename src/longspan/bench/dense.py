"""Dense attention of other libraries: what every pattern is measured against.

Axes: B batch, H query heads, K key heads, N rows, D head width.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import partial

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from longspan.bench.setting import Call, by_rows


def on_cpu(causal: bool = True) -> dict[str, Call]:
    """PyTorch's own, the only one there is."""
    return {"SDPA": partial(sdpa, causal=causal)}


def on_gpu(causal: bool = True) -> dict[str, Call]:
    """cuDNN through PyTorch, and FlashAttention-4 where it is installed."""
    found = {"cuDNN SDPA": _with_backend(SDPBackend.CUDNN_ATTENTION, causal)}
    if importlib.util.find_spec("flash_attn") is not None:
        found["FlashAttention-4"] = by_rows(partial(_flash_attention_4, causal=causal))
    return found


def sdpa(q_BHND: Tensor, k_BKND: Tensor, v_BKND: Tensor, causal: bool = True) -> Tensor:
    """PyTorch's, with the backend that it chooses."""
    grouped = q_BHND.shape[1] != k_BKND.shape[1]
    return scaled_dot_product_attention(
        q_BHND, k_BKND, v_BKND, is_causal=causal, enable_gqa=grouped
    )


def _with_backend(backend: SDPBackend, causal: bool) -> Call:
    def attend(q_BHND: Tensor, k_BKND: Tensor, v_BKND: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(q_BHND, k_BKND, v_BKND, causal)

    return attend


def _flash_attention_4(*tensors: Tensor, causal: bool) -> Tensor:
    return importlib.import_module("flash_attn.cute").flash_attn_func(*tensors, causal=causal)
