"""What several kernels ask of the CUDA libraries below them."""

from __future__ import annotations

import functools
import importlib
import importlib.util

import torch
from torch import Tensor


def aligned(x: Tensor, step: int = 0) -> Tensor:
    """The tensor as the kernels load it: 16 bytes at a time, 128 where rows are widest."""
    step = step or (128 if x.shape[-1] == 256 else 16)
    units = step // x.element_size()
    fits = x.stride(-1) == 1 and x.data_ptr() % step == 0
    if fits and all(stride and stride % units == 0 for stride in x.stride()[:-1]):
        return x
    return x.clone(memory_format=torch.contiguous_format)


@functools.cache
def missing_flash_attention() -> str | None:
    """What has to be installed for ``flash_attn.cute``, None if nothing."""
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn-4 is not installed: pip install --pre flash-attn-4"
    try:
        importlib.import_module("flash_attn.cute.interface")
    # Whatever the stack of compilers and drivers below raises, the sentence for people is this.
    except Exception as error:
        return f"flash_attn.cute does not load: pip install --pre flash-attn-4 ({error})"
    return None
