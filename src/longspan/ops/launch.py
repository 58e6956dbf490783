"""Launch Triton's kernels again without a look at every argument.

Triton finds out in each call, in Python, what was compiled for such arguments: their types, which
integers are 1 or divisible by 16, how tensors are aligned. That takes tens of microseconds, as
long as attention over a few thousand tokens, and a pass with gradients has four kernels. What
follows from a call's shapes is remembered here, and the compiled kernel called at once.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

_compiled: dict[tuple[Hashable, ...], Any] = {}
# Lengths that come once should not fill the memory.
_MOST = 4096
# What 32 bits count.
REACH = (1 << 31) - 1


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    args: Sequence[Any],
    *,
    device: torch.device,
    alike: Hashable = None,
    **options: int,
) -> None:
    """Launch a kernel of Triton, with its options as they are.

    Args:
        kernel: what ``triton.jit`` or ``gluon.jit`` made.
        grid: programs.
        args: all arguments in their order; tuples of tensors and numbers too.
        device: where it runs.
        alike: what alone decides, with the options, which compilation fits, where the kernel
            specializes on nothing else; None for all that Triton looks at.
        options: of the compilation.
    """
    here = torch.cuda.current_device() == device.index
    looks = _signs(args) if alike is None else alike
    name = (id(kernel), device, looks, *options.items())
    known = _compiled.get(name)
    with nullcontext() if here else torch.cuda.device(device):
        if known is not None:
            known[grid](*args)
            return
        found = kernel[grid](*args, **options)
    # Nothing is compiled where kernels are interpreted.
    if found is not None:
        if len(_compiled) >= _MOST:
            _compiled.clear()
        _compiled[name] = found


def _signs(args: Sequence[Any]) -> Hashable:
    """What a compilation depends on, or more."""
    found = []
    for x in args:
        kind = type(x)
        if kind is int:
            # Whether it is 1, or divisible by 16, or needs 64 bits; of a constant, all of it.
            found.append(x)
        elif kind is float:
            found.append(float)
        elif kind is tuple:
            found.append(_signs(x))
        elif isinstance(x, Tensor):
            found.append((x.dtype, x.data_ptr() % 16 == 0, is_far(x)))
        else:
            # True is equal to 1.
            found.append((kind, x))
    return tuple(found)


def is_far(x: Tensor) -> bool:
    """Whether AMD's offsets of 32 bits do not reach all of its memory."""
    return torch.version.hip is not None and x.untyped_storage().size() > REACH
