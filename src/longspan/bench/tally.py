"""What a call computes and holds, counted operation by operation: the same on every machine.

Products are floating-point operations of matrix products and convolutions, fused attention
included; sorting and elementwise work are not counted. Peak bytes are those of tensors that live
between operations; what one operation needs inside is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

# Children of a layer that map tokens to heads or back, which dense attention has as well.
_PROJECTIONS = ("query", "key", "value", "output")


@torch.no_grad()
def products(layer: nn.Module, x: Tensor) -> int:
    """Operations of one forward pass beside the projections of the tokens."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={fused: _fused}) as counter:
        layer(x)
    counts = counter.get_flop_counts()
    own = type(layer).__name__
    spent = [
        sum(counts.get(f"{own}.{name}", {}).values())
        for name, _ in layer.named_children()
        if name.startswith(_PROJECTIONS)
    ]
    return int(sum(counts["Global"].values()) - sum(spent))


def _fused(q: Sequence[int], k: Sequence[int], v: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Shapes of q, k and v, then dropout and whether it is causal."""
    causal = args[1] if len(args) > 1 else kwargs.get("is_causal", False)
    b, h, n, d = q
    m = k[2]
    pairs = sum(min(i + 1, m) for i in range(n)) if causal else n * m
    return 2 * b * h * pairs * (d + v[-1])


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes that tensors made by a call hold at a time."""
    with _Live() as live:
        call()
    return live.most


class _Live(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not _writes_or_views(func):
            own: set[int] | None = None
            for made in _tensors(out if isinstance(out, tuple | list) else (out,)):
                storage = made.untyped_storage()
                if storage._cdata in self._known:
                    continue
                if own is None:
                    given = _tensors((*args, *kwargs.values()))
                    own = {one.untyped_storage()._cdata for one in given}
                # What was there before the call does not count.
                if storage._cdata not in own:
                    self._meet(storage)
            self.most = max(self.most, self.now)
        return out

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.now += size

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)


@cache
def _writes_or_views(func: Any) -> bool:
    """Whether all that an operation returns is memory of its arguments."""
    returns = func._schema.returns
    return bool(returns) and all(one.alias_info is not None for one in returns)


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    """Tensors among values and in lists among them, which is how operations take several."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from (one for one in value if isinstance(one, Tensor))
