"""What each kernel can do, as data: one record drives dispatch, error texts and ``explain``.

Kernels in the order in which ``impl="auto"`` prefers them. A kernel module is imported when it is
first considered.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from longspan.errors import Refusal
from longspan.ops.ranges import KeyRanges

Kernel = Callable[[Tensor, Tensor, Tensor, KeyRanges, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Capability:
    """One kernel.

    Attributes:
        name: as in ``impl=``, and the name of its module and function.
        devices: device types it runs on; empty means any.
        note: one line for people.
    """

    name: str
    devices: tuple[str, ...]
    note: str

    def reasons(self, q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges) -> list[str]:
        """Why the kernel cannot take these inputs; empty if it can."""
        if self.devices and q.device.type not in self.devices:
            return [f"runs on {' or '.join(self.devices)}, the tensors are on {q.device.type}"]
        module = importlib.import_module(f"longspan.ops.kernels.{self.name}")
        more = getattr(module, "reasons", None)
        return [] if more is None else more(q, k, v, ranges)

    def load(self) -> Kernel:
        """The kernel function."""
        return getattr(importlib.import_module(f"longspan.ops.kernels.{self.name}"), self.name)


KERNELS = (
    Capability(name="flex", devices=("cuda",), note="FlexAttention over captured ranges"),
    Capability(name="tiled", devices=(), note="batched tiles in plain PyTorch"),
    Capability(name="reference", devices=(), note="dense masked softmax, the oracle"),
)


def choose(impl: str, q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges) -> Capability:
    """Pick a kernel.

    Args:
        impl: ``"auto"``, or a kernel's name, which never falls back to another one.
        q: queries.
        k: keys.
        v: values.
        ranges: what would be computed.

    Raises:
        Refusal: if the named kernel cannot take the inputs, with each reason.
    """
    known = {kernel.name: kernel for kernel in KERNELS}
    if impl == "auto":
        return next(kernel for kernel in KERNELS if not kernel.reasons(q, k, v, ranges))
    if impl not in known:
        raise Refusal(f'impl must be "auto" or one of {", ".join(known)}; got {impl!r}')
    if refused := known[impl].reasons(q, k, v, ranges):
        others = [c.name for c in KERNELS if c.name != impl and not c.reasons(q, k, v, ranges)]
        raise Refusal(
            f"kernel {impl!r} cannot take these inputs: {'; '.join(refused)}. "
            f'These can: {", ".join(others)}; impl="auto" picks one'
        )
    return known[impl]
