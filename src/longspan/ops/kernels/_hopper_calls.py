"""Both kernels of ``hopper`` over given ranges, and what each launch is handed.

See ``_hopper_forward`` and ``_hopper_backward`` for what they compute and what their plans are.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, D head width, X tiles of sums.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from longspan.ops.empty import Index
from longspan.ops.fused import merge_stacked
from longspan.ops.kernels._hopper_back_plan import HopperBackPlan
from longspan.ops.kernels._hopper_ends import begun, ended
from longspan.ops.kernels._hopper_plan import HopperPlan
from longspan.ops.launch import launch
from longspan.ops.libraries import aligned, processors
from longspan.ops.more_keys import MoreKeys

# Keys of a batch row where those of another one never follow: no range counts further.
_ENDLESS = (1 << 31) - 1
# What is compiled, and the tiles of keys and values that then fit into shared memory; and into
# half of it, where one head is computed alone and a processor has two programs.
_PLACES = {64: 8, 128: 5}
_HALF_PLACES = {64: 6, 128: 2}
# Registers of a thread that leave room for two programs.
_HALF_REGISTERS = 128
_LOG2_E = 1.4426950408889634


@functools.cache
def forward_kernels() -> Any:
    """The module of the forward, which needs Triton."""
    return importlib.import_module("longspan.ops.kernels._hopper_forward")


@functools.cache
def _tiles() -> Any:
    return importlib.import_module("longspan.ops.kernels._hopper_tiles")


@functools.cache
def backward_kernels() -> Any:
    """The module of the backward, which needs Triton."""
    return importlib.import_module("longspan.ops.kernels._hopper_backward")


@dataclass(frozen=True, eq=False)
class Ready:
    """Both kernels over given ranges.

    Attributes:
        plan: of the forward.
        back: of the backward, if there will be one.
        scale: factor on the logits.
        length: keys in one of several batch rows that all queries share; None if there are none.
        more: keys that ranges count behind those that are given.
    """

    plan: HopperPlan
    back: HopperBackPlan | None
    scale: float
    length: int | None = None
    more: MoreKeys | None = None

    @property
    def empty(self) -> Index | None:
        """The rows that see no key, where there is a backward."""
        assert self.back is not None
        return self.back.empty

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp. What belongs to a view, as the rows of a remainder, is one."""
        q_BHND, k_BKMD, v_BKMD = self._queries(q), aligned(k), aligned(v)
        batch, heads, rows, width = q_BHND.shape
        if out is not None:
            out_BHND = out
        elif v.shape[3] == width:
            out_BHND = torch.empty_like(q_BHND)
        else:
            out_BHND = q_BHND.new_empty(batch, heads, rows, v.shape[3])
        compiled = _compiled(width, v.shape[3])
        tasks, parts, halves = len(self.plan.tasks), self.plan.parts, self.plan.halves
        tile = (64, 64) if halves else (128, compiled)
        alone = halves == 1
        programs = processors(q.device) * (2 if alone else 1)
        border, length = (self.more.border, self.more.length) if self.more else (0, self.length)
        lse = q_BHND.new_empty(parts * batch, heads, rows, dtype=torch.float32)
        to = out_BHND if parts == 1 else out_BHND.new_empty(*lse.shape, v.shape[3])
        described = _tiles().described
        launch(
            forward_kernels().forward,
            (min(programs, tasks), 1, 1),
            (
                described(q_BHND, 64, compiled),
                *(described(x, *tile) for x in (k_BKMD, v_BKMD, *self._more(k_BKMD, v_BKMD))),
                described(to, 64, compiled),
                lse,
                lse.new_zeros(1, dtype=torch.int32),
                self.plan.tasks,
                self.plan.entries,
                self.plan.lo_PN,
                self.plan.hi_PN,
                tasks,
                rows,
                heads,
                heads // k.shape[1],
                int(self.length is None and len(k) > 1),
                length or _ENDLESS,
                border,
                abs(self.scale or 1.0) * _LOG2_E,
                (_HALF_PLACES if alone else _PLACES)[compiled],
                compiled,
                halves,
            ),
            device=q.device,
            # Nothing else makes a difference to what is compiled.
            alike=(q.dtype, compiled, halves, self.more is None),
            **({"maxnreg": _HALF_REGISTERS} if alone else {}),
        )
        if parts > 1:
            lse = merge_stacked(to.unflatten(0, (parts, -1)), lse, out_BHND)
        return out_BHND, lse

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dout: Tensor | None,
        dlse: Tensor | None,
        into: Sequence[Tensor | None] = (),
        after: torch.cuda.Event | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v, laid out in memory as these are where there is no place.

        Those of keys that ``more`` gathers may be contiguous. All numbers are finite; with
        ``out``, ``lse`` may be that of more keys.
        """
        if self.more is None or self.more.order is None:
            return self._backward((q, k, v, out, lse, dout, dlse), into, after)
        dq, *grads = self._backward((q, k, v, out, lse, dout, dlse), into[:1], None)
        if after is not None:
            torch.cuda.current_stream(q.device).wait_event(after)
        for place, whole in zip(into[1:], grads, strict=False):
            if place is not None and whole is not None:
                place.copy_(whole) if after is None else place.add_(whole)
        return dq, *grads

    def _backward(
        self,
        given: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
        into: Sequence[Tensor | None],
        after: torch.cuda.Event | None,
    ) -> tuple[Tensor | None, ...]:
        """The same but for places of keys and values where ``more`` gathers some."""
        assert self.back is not None
        q, k, v, out, lse, dout, dlse = given
        q_BHND, k_BKMD, v_BKMD, out_BHND = self._queries(q), *map(aligned, (k, v, out))
        dout_BHND = torch.zeros_like(out_BHND) if dout is None else aligned(dout)
        batch, heads, rows, width = q_BHND.shape
        scale = abs(self.scale or 1.0)
        dq_BHND, dk_BKMD, dv_BKMD = (
            torch.empty_like(x) if place is None else place
            for x, place in zip_longest((q_BHND, k_BKMD, v_BKMD), into)
        )
        compiled, tasks = _compiled(width, v.shape[3]), len(self.back.tasks_T7)
        # Sums of dq by tiles of 64 rows, of dk and dv by tiles of 128 keys, and the number of
        # tasks that have been fetched.
        cut = len(self.back.cut_C4)
        sizes = (
            batch * heads * -(-rows // 64) * 64 * compiled,
            2 * max(cut, 1) * 128 * compiled,
            1,
        )
        first_BH2N, zeros = begun(out_BHND, dout_BHND, lse, dlse, sum(sizes))
        sums, cut_sums, fetched = zeros.split(sizes)
        sums_BHX, cut_sums = sums.view(batch, heads, -1, 128), cut_sums.view(2, -1, compiled, 128)
        more = self._more(k_BKMD, v_BKMD)
        # Further keys that are the first ones by remainder have the same gradients.
        again = self.more is not None and self.more.order is None
        if again:
            more_grads = self._more(dk_BKMD, dv_BKMD)
        else:
            more_grads = [None if x is None else torch.empty_like(x) for x in more]
        adds = again or after is not None
        if after is not None:
            torch.cuda.current_stream(q.device).wait_event(after)
        elif again:
            dk_BKMD.zero_()
            dv_BKMD.zero_()
        described = _tiles().described
        launch(
            backward_kernels().backward,
            (min(processors(q.device), tasks), 1, 1),
            (
                *(described(x, 64, compiled) for x in (q_BHND, k_BKMD, v_BKMD, *more, dout_BHND)),
                described(first_BH2N, 2, 64, swizzle=0),
                described(sums_BHX, 32, 128, swizzle=0),
                *(described(x, 64, compiled) for x in (dk_BKMD, dv_BKMD, *more_grads)),
                described(cut_sums, compiled // 4, 128, swizzle=0),
                fetched.view(torch.int32),
                self.back.tasks_T7,
                self.back.parts_P5,
                self.back.entries_E2,
                self.plan.lo_PN,
                self.plan.hi_PN,
                tasks,
                rows,
                scale,
                scale * _LOG2_E,
                compiled,
                adds,
            ),
            device=q.device,
            alike=(q.dtype, compiled, self.more is None, adds),
        )
        ended(
            (sums, dq_BHND, self.scale),
            (cut_sums, self.back.cut_C4),
            (dk_BKMD, dv_BKMD, *more_grads),
            compiled,
            adds=adds,
        )
        if self.more is not None and not again:
            dk_more, dv_more = more_grads
            assert dk_more is not None
            assert dv_more is not None
            dk_BKMD, dv_BKMD = self.more.add(dk_BKMD, dk_more), self.more.add(dv_BKMD, dv_more)
        # The log-sum-exp does not depend on the values.
        return dq_BHND, dk_BKMD, None if dout is None else dv_BKMD

    def _more(self, *tensors: Tensor) -> list[Any]:
        """Further keys, and values, behind those that are given; None where there are none."""
        return [None if self.more is None else aligned(self.more.of(x)) for x in tensors]

    def _queries(self, q_BHND: Tensor) -> Tensor:
        """As the kernels take them, with a scale above 0.

        The greatest logit is found before the logits are scaled.
        """
        if self.scale > 0:
            return aligned(q_BHND)
        return -aligned(q_BHND) if self.scale else torch.zeros_like(aligned(q_BHND))


def _compiled(*widths: int) -> int:
    """The width that a kernel is compiled for."""
    return next(wide for wide in _PLACES if wide >= max(widths))
