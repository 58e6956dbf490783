"""Plans that a kernel derives from ranges: kept with them, and the latest ones by content as well.

A plan takes milliseconds. A training loop asks for the same ranges in every layer, and packed
documents make new ranges in every layer, with the same numbers in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longspan.ops.ranges import KeyRanges

# How many plans are kept for their content alone, and bytes of both.
_MOST = 8
_MOST_BYTES = 256 << 20

Plan = TypeVar("Plan")


@dataclass(frozen=True, eq=False)
class _Made(Generic[Plan]):
    kind: tuple[object, ...]
    content: tuple[Tensor, ...]
    plan: Plan
    nbytes: int


class Kept(Generic[Plan]):
    """Plans of one kernel.

    Args:
        tensors: what a plan holds, so far as it is known.
    """

    def __init__(self, tensors: Callable[[Plan], Iterable[Tensor]] = lambda _: ()) -> None:
        self.tensors = tensors
        self.by_ranges: WeakKeyDictionary[KeyRanges, dict[tuple[object, ...], Plan]] = (
            WeakKeyDictionary()
        )
        self.latest: list[_Made[Plan]] = []

    def plan_of(
        self,
        ranges: KeyRanges,
        kind: tuple[object, ...],
        content: Callable[[], tuple[Tensor, ...]],
        make: Callable[..., Plan],
    ) -> Plan:
        """The plan of the given ranges, made once.

        Args:
            ranges: visible keys.
            kind: all else that a plan depends on.
            content: makes the numbers that the plan is made of.
            make: makes a plan from them.
        """
        own = self.by_ranges.setdefault(ranges, {})
        if kind not in own:
            own[kind] = self._by_content(kind, content(), make)
        return own[kind]

    def _by_content(
        self, kind: tuple[object, ...], content: tuple[Tensor, ...], make: Callable[..., Plan]
    ) -> Plan:
        # Lists are replaced, not changed: other threads may be looking through them.
        for old in self.latest:
            if old.kind == kind and _equal(old.content, content):
                self.latest = [*(x for x in self.latest if x is not old), old]
                return old.plan
        plan = make(*content)
        # A plan may hold its content as it is.
        each = {x.data_ptr(): x.nbytes for x in (*content, *self.tensors(plan))}
        latest = [*self.latest, _Made(kind, content, plan, sum(each.values()))]
        while len(latest) > _MOST or sum(x.nbytes for x in latest) > _MOST_BYTES:
            latest.pop(0)
        self.latest = latest
        return plan


def _equal(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, other, strict=True))
