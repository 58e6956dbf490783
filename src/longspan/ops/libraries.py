"""What several kernels ask of the CUDA libraries below them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor


def aligned(x: Tensor, step: int = 0) -> Tensor:
    """The tensor as the kernels load it: 16 bytes at a time, 128 where rows are widest."""
    return x if _fits(x, step) else x.clone(memory_format=torch.contiguous_format)


def room_for(x: Tensor) -> Tensor:
    """A new tensor like another one, in its layout if that is as the kernels write it."""
    found = torch.empty_like(x)
    if _fits(found):
        return found
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fits(x: Tensor, step: int = 0) -> bool:
    step = step or (128 if x.shape[-1] == 256 else 16)
    units = step // x.element_size()
    return (
        x.stride(-1) == 1
        and x.data_ptr() % step == 0
        and all(stride and stride % units == 0 for stride in x.stride()[:-1])
    )


# What FlashAttention-4 computes; widths whose gradients are checked on a GPU.
FLASH_DTYPES = (torch.bfloat16, torch.float16)
FLASH_WIDTHS = (64, 96, 128)


def why_no_flash_attention(kernel: str, q_BHND: Tensor, v_BKMD: Tensor) -> list[str]:
    """Why FlashAttention-4 cannot take queries and values, one sentence each; empty where it can.

    Args:
        kernel: who asks, for the sentences.
        q_BHND: queries.
        v_BKMD: values.
    """
    device = q_BHND.device
    if device.type != "cuda":
        return [f"{kernel} needs CUDA tensors, got {device}"]
    found = []
    capability = torch.cuda.get_device_capability(device)
    if capability[0] not in (9, 10):
        found.append(
            f"{kernel} needs compute capability 9 (Hopper) or 10 (Blackwell), this GPU has "
            f"{capability[0]}.{capability[1]}"
        )
    if q_BHND.dtype not in FLASH_DTYPES:
        found.append(f"{kernel} computes bfloat16 and float16, got {q_BHND.dtype}")
    widths = (q_BHND.shape[-1], v_BKMD.shape[-1])
    if widths[0] != widths[1] or widths[0] not in FLASH_WIDTHS:
        found.append(
            f"the head width must be one of {', '.join(map(str, FLASH_WIDTHS))} and that of the "
            f"values the same, got {widths[0]} and {widths[1]}"
        )
    return found


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def why_missing(package: str, load: Callable[[], object], absent: str, broken: str) -> str | None:
    """Why a library cannot be had, None if it can.

    Args:
        package: its first name in an import.
        load: imports what is needed of it.
        absent: what to say where it is not installed.
        broken: what to say, before the error, where it does not load.
    """
    if importlib.util.find_spec(package) is None:
        return absent
    try:
        load()
    # Whatever the stack of compilers and drivers below raises, the sentence for people is this.
    except Exception as error:
        return f"{broken} ({error})"
    return None


@functools.cache
def missing_flash_attention() -> str | None:
    """What has to be installed for ``flash_attn.cute``, None if nothing."""
    command = "pip install --pre flash-attn-4"
    return why_missing(
        "flash_attn",
        lambda: importlib.import_module("flash_attn.cute.interface"),
        f"the package flash-attn-4 is not installed: {command}",
        f"flash_attn.cute does not load: {command}",
    )


# What cuDNN's kernels need.
NO_CUDNN = "the package nvidia-cudnn-frontend is not installed: pip install 'longspan[cuda]'"
