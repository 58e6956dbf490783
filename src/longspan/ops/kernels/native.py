"""Attention on a CPU by compiled code: the tiles that the ranges touch, rows where they lie.

FlashAttention's recurrence (Dao, arXiv 2307.08691, Algorithms 1 and 2) for tiles of 24, 48 or 64
query rows against blocks of 64 keys,

    S = K Q^T,   O^T = V^T P,   dP = V dO^T,   dQ^T = K^T dS,   dK = dS Q,   dV = P dO

with scores turned so that the columns of a vector are queries: each key and value is read one
number at a time from wherever its row lies. So rows need no order in memory: a pass in residue
order gathers nothing and puts nothing back, and keys that lie apart make one block. Time
O(visible pairs * D), memory O(tile * D) a thread, and a copy of the keys' gradients for each part.

The code is C (longspan/ops/native) and is compiled when longspan is installed, if there is a
compiler; ``tiled`` does the same without. float32 with AVX2 or AVX-512. bfloat16 takes AMX or the
vectors of AVX512-BF16 where there are some: products of bfloat16, summed in float32 and with
softmax in float32, to 1e-4; what is below 1.2e-38 is 0 there. All else in half precision is
computed in float32; keys in bfloat16 that few queries see stay as they are in memory.

Axes: B batch, H query heads, K key heads, N query rows, M key rows, P places, D head width,
G range groups, m ranges per query.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from math import gcd
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from longspan.ops.capability import Known, lie_apart
from longspan.ops.native.build import LIBRARY, fingerprint
from longspan.ops.once import once
from longspan.ops.places import Places
from longspan.ops.ranges import KeyRanges
from longspan.ops.workers import can_share_threads, run_compiled

# Widths are multiples of these: a vector of float32, or of bfloat16.
_LANES, _HALF_LANES = 16, 32
# Levels that multiply float32 alone end here, and bfloat16 in tile registers begins there.
_SINGLE, _AMX = 2, 4
_FEW_KEYS, _FEW_HALF_KEYS, _FEW_SEEN = 256, 4096, 2048
# Keys in bfloat16 that so many queries see are turned to float32 as they are read; with more, each
# is read so often that dense attention takes 5 % longer than with all of them turned at first.
_FEW_ROWS = 128
# Tensors of so many bytes are mapped anew each time: the most that malloc keeps.
_MAPPED = 32 << 20
# Calls with fewer multiplications than this are over before other threads have started.
_WORTH_THREADS = 1 << 22

# What ranges cost, of which each call would else ask anew.
_pairs: WeakKeyDictionary[KeyRanges, dict[int, int]] = WeakKeyDictionary()
_costs: WeakKeyDictionary[KeyRanges, dict[tuple[int, ...], Tensor]] = WeakKeyDictionary()


class _Steps(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "head", "row")]


def _fields(names: str, kind: Any) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class _Task(ctypes.Structure):
    """``Task`` of native.h."""

    _fields_ = [
        *_fields("batch heads key_heads rows keys width value_width ranges", ctypes.c_int64),
        *_fields("share level add half narrow", ctypes.c_int64),
        ("scale", ctypes.c_float),
        *_fields("q k v", ctypes.c_void_p),
        *_fields("q_steps k_steps v_steps", _Steps),
        *_fields("q_heads k_heads q_rows k_rows", ctypes.c_void_p),
        *_fields("q_row_batches q_row_groups k_row_batches k_row_groups", ctypes.c_int64),
        *_fields("lo hi group out lse", ctypes.c_void_p),
        *_fields("out_steps lse_steps", _Steps),
        *_fields("d_out d_lse", ctypes.c_void_p),
        *_fields("d_out_steps d_lse_steps", _Steps),
        *_fields("dq dk dv", ctypes.c_void_p),
        *_fields("dq_steps dk_steps dv_steps", _Steps),
        *_fields("dk_part dv_part parts", ctypes.c_int64),
        ("first", ctypes.c_void_p),
        *_fields("next failed", ctypes.c_int64),
    ]


@cache
def library() -> Any:
    """The compiled code, or None where there is none that fits this file."""
    try:
        found = ctypes.CDLL(str(LIBRARY))
        for name in ("sources", "level", "tile"):
            getattr(found, f"longspan_{name}").restype = ctypes.c_int64
        for name in ("forward", "backward", "large_pages"):
            getattr(found, f"longspan_{name}").restype = None
    except (OSError, AttributeError):
        # Not there, half written, for another machine, or of another version.
        return None
    # Sources may have changed since, in a folder that is installed as it lies.
    if found.longspan_sources() != fingerprint():
        return None
    found.longspan_tile.argtypes = [ctypes.c_int64]
    found.longspan_large_pages.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    return found


def level() -> int:
    """What this machine can do: 0 nothing of ours, 1 AVX2, 2 AVX-512, 3 its bfloat16, 4 AMX."""
    return 0 if library() is None else library().longspan_level()


def instructions() -> str | None:
    """Name of what this machine can do; None where there is no compiled code for it."""
    return (None, "AVX2", "AVX-512", "AVX-512 with bfloat16", "AVX-512 and AMX")[level()]


def reasons(q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges) -> list[str]:
    """Why these inputs cannot be taken."""
    del k, v, ranges
    if library() is None:
        return [
            "was not compiled for this version: there was no C compiler, or no x86-64 machine, "
            "when longspan was installed (python -m longspan.ops.native.build compiles it)"
        ]
    if not level():
        return ["this processor has no AVX2 with FMA"]
    if q.dtype == torch.float64:
        return ["computes in float32, the tensors are float64"]
    return []


def worth(q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges, *, moved: bool) -> bool:
    """Whether ``auto`` should take it: not for so few queries that vectors stay nearly empty.

    Decoding where many keys are seen is up to twice as fast in ``tiled``, where few are slower.
    Where that would gather all keys first, or copy them, as those of a cache with room to grow, it
    takes two to 300 times as long, but for many keys in float16, which are all turned to float32
    here (and with AMX, where it was not measured).
    """
    rows = ranges.queries * q.shape[1] // k.shape[1]
    amx = q.dtype == torch.bfloat16 and level() == _AMX
    if rows >= (4 if amx else _LANES):
        return True
    if amx or q.dtype == torch.float16:
        return ranges.keys <= (_FEW_HALF_KEYS if moved else _FEW_KEYS)
    if moved or lie_apart(k, v):
        return True
    seen_GN = (ranges.hi_GNm - ranges.lo_GNm).clamp(min=0).sum(-1)
    return not seen_GN.numel() or int(seen_GN.amax()) <= _FEW_SEEN


def native(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKMD: Tensor,
    ranges: KeyRanges,
    scale: float,
    places: Places | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend over the given key ranges.

    Args:
        q_BHND: queries [B, H, N, D].
        k_BKMD: keys [B, K, M, D]; K divides H, query head h reads key head ``h // (H // K)``.
        v_BKMD: values [B, K, M, Dv].
        ranges: visible keys, in places.
        scale: factor on the logits.
        places: where rows and heads of ``ranges`` lie in the tensors; None: as they are.

    Returns:
        out [B, H, N, Dv] in the dtype of ``q``, and lse [B, H, N] in float32, as the tensors lie:
        0 and -inf for rows without a place. Both are differentiable, once.
    """
    return native_passes(q_BHND, k_BKMD, v_BKMD, [(ranges, places or Places())], scale)


def native_passes(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKMD: Tensor,
    passes: Sequence[tuple[KeyRanges, Places]],
    scale: float,
    known: Known | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend over several passes; a key that several of them see counts in each.

    Each pass joins what those before it gave, in place, and in the backward pass the weights of
    all are taken from the log-sum-exp of all, so that no pass needs an output of its own. With
    ``known``, what all give together, gradients alone are wanted, and no forward is computed.
    """
    return _Native.apply(q_BHND, k_BKMD, v_BKMD, tuple(passes), scale, known)


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BHND: Tensor,
        k_BKMD: Tensor,
        v_BKMD: Tensor,
        passes: tuple[tuple[KeyRanges, Places], ...],
        scale: float,
        known: Known | None,
    ) -> tuple[Tensor, Tensor]:
        out_BHND, lse_BHN = known or _forward(q_BHND, k_BKMD, v_BKMD, passes, scale)
        ctx.save_for_backward(q_BHND, k_BKMD, v_BKMD, out_BHND, lse_BHN)
        ctx.passes, ctx.scale = passes, scale
        return out_BHND, lse_BHN

    @staticmethod
    @once
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        *inputs, out_BHND, lse_BHN = ctx.saved_tensors
        if not lse_BHN.numel():
            return *(torch.zeros_like(x) for x in inputs), None, None, None
        q, k, v, out, d_out = _rows(*inputs, out_BHND, grad_outputs[0])
        covers = ctx.passes[0][1].covers
        calls = [
            _Call(q, k, v, ranges, ctx.scale, places, add=index > 0 or not covers)
            for index, (ranges, places) in enumerate(ctx.passes)
        ]
        parts = max(call.parts() for call in calls)
        dq = _like(inputs[0], q.shape[-1], torch.float32, zeros=not covers)
        dk, dv = (
            _fresh(x.new_empty(parts, *x.shape, dtype=torch.float32)).zero_() for x in (k, v)
        )
        for call in calls:
            call.set("out", out)
            call.set("lse", lse_BHN)
            call.set("d_out", d_out)
            call.set("d_lse", grad_outputs[1].float())
            call.set("dq", dq)
            call.set("dk", dk[0])
            call.set("dv", dv[0])
            call.task.dk_part, call.task.dv_part = dk.stride(0), dv.stride(0)
            call.split(parts)
            call.run("backward")
        grads = (dq, *(x[0] if parts == 1 else x.sum(0) for x in (dk, dv)))
        dq, dk, dv = (
            _narrow(grad, x.shape[-1], x.dtype) for grad, x in zip(grads, inputs, strict=True)
        )
        return dq, dk, dv, None, None, None


def _forward(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKMD: Tensor,
    passes: Sequence[tuple[KeyRanges, Places]],
    scale: float,
) -> tuple[Tensor, Tensor]:
    turned = _turned_as_read(q_BHND, k_BKMD)
    q, k, v = _rows(q_BHND, k_BKMD, v_BKMD, narrow=(1, 2) if turned else ())
    covers = passes[0][1].covers
    # What several passes give is rounded once, at the end.
    half = q.dtype == torch.bfloat16 and covers and len(passes) == 1
    dtype = torch.bfloat16 if half else torch.float32
    out_BHND = _like(q_BHND, v.shape[-1], dtype, zeros=not covers)
    lse_BHN = out_BHND.new_empty(out_BHND.shape[:3], dtype=torch.float32)
    if not covers:
        lse_BHN.fill_(-torch.inf)
    for index, (ranges, places) in enumerate(passes):
        call = _Call(q, k, v, ranges, scale, places, add=index > 0 or not covers)
        call.task.half = half
        call.set("out", out_BHND)
        call.set("lse", lse_BHN)
        call.run("forward")
    return _narrow(out_BHND, v_BKMD.shape[-1], q_BHND.dtype), lse_BHN


class _Call:
    """A task, and the tensors that it points to."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ranges: KeyRanges,
        scale: float,
        places: Places,
        *,
        add: bool,
    ) -> None:
        # The compiled code would read past the end.
        assert places.key_rows is not None or ranges.keys <= k.shape[2]
        assert places.query_rows is not None or ranges.queries <= q.shape[2]
        self.ranges = ranges
        self.task = task = _Task()
        self._kept: list[Tensor] = []
        query_heads, key_heads = (
            _all_heads(x.shape[1]) if own is None else own
            for x, own in ((q, places.query_heads), (k, places.key_heads))
        )
        task.batch, task.heads, task.key_heads = len(q), len(query_heads), len(key_heads)
        _, task.rows, task.ranges = ranges.lo_GNm.shape
        task.keys, task.scale = ranges.keys, scale
        task.level = level() if q.dtype == torch.bfloat16 else min(level(), _SINGLE)
        task.width, task.value_width, task.add = q.shape[-1], v.shape[-1], add
        task.narrow = k.dtype != q.dtype
        for name, x in (("q", q), ("k", k), ("v", v)):
            self.set(name, x)
        self.group_BH = ranges.group_BH.expand(len(q), -1).contiguous()
        self.keep(q_heads=query_heads, k_heads=key_heads, group=self.group_BH)
        self.keep(lo=ranges.lo_GNm, hi=ranges.hi_GNm)
        for name, rows in (("q_row", places.query_rows), ("k_row", places.key_rows)):
            if rows is not None:
                self.keep(**{f"{name}s": rows})
                setattr(task, f"{name}_batches", rows.shape[0])
                setattr(task, f"{name}_groups", rows.shape[1])
        self.tile = library().longspan_tile(task.level)
        task.share = self._share()

    def keep(self, **tensors: Tensor) -> None:
        """Point to contiguous tensors."""
        for name, x in tensors.items():
            own = x.contiguous()
            self._kept.append(own)
            setattr(self.task, name, own.data_ptr())

    def set(self, name: str, x: Tensor) -> None:
        """Point to a tensor that lies in steps."""
        self._kept.append(x)
        setattr(self.task, name, x.data_ptr())
        setattr(self.task, f"{name}_steps", _Steps(*x.stride()[:3]))

    def run(self, what: str) -> None:
        """Do the work, with all threads if it is worth them."""
        work = self._pairs() * self.task.width
        threads = torch.get_num_threads() if can_share_threads() else 1
        run_compiled(
            getattr(library(), f"longspan_{what}"),
            ctypes.addressof(self.task),
            threads if work >= _WORTH_THREADS else 1,
        )
        if self.task.failed:
            raise MemoryError(f"no memory for the {what} pass over {self.task.rows} rows")

    def parts(self) -> int:
        """How many parts of a head's rows have gradients of keys of their own.

        No more than it takes to give every thread its share.
        """
        units = self.task.batch * self.task.key_heads
        threads = torch.get_num_threads()
        even = units % threads == 0 or units >= 4 * threads
        return -(-threads // units) if units < threads or even else 2

    def split(self, parts: int) -> None:
        """Cut the rows of each head into parts that take equally long."""
        before_t = (self._cost(self.tile // self.task.share).sum(0) + 1).cumsum(0)
        goal = before_t[-1] * torch.arange(1, parts, device="cpu") // parts
        inner = torch.searchsorted(before_t, goal) + 1
        ends = (inner.new_tensor([0]), inner, inner.new_tensor([len(before_t)]))
        self.keep(first=torch.cat(ends).clamp(max=len(before_t)))
        self.task.parts = parts

    def _pairs(self) -> int:
        """Visible pairs of all heads."""
        kept = _pairs.setdefault(self.ranges, {})
        if self.task.batch not in kept:
            kept[self.task.batch] = int(self._cost(1).sum())
        return kept[self.task.batch]

    def _cost(self, height: int) -> Tensor:
        """Visible pairs of each group of ranges, weighed by its heads, in tiles [G, tiles]."""
        kept = _costs.setdefault(self.ranges, {})
        name = (self.task.batch, height)
        if name not in kept:
            pairs_GN = (self.ranges.hi_GNm - self.ranges.lo_GNm).sum(2, dtype=torch.int64)
            tiles = -(-pairs_GN.shape[1] // height)
            cost_Gt = pad(pairs_GN, (0, tiles * height - pairs_GN.shape[1])).unflatten(
                1, (tiles, height)
            )
            times_G = torch.bincount(self.group_BH.flatten(), minlength=len(pairs_GN))
            kept[name] = cost_Gt.sum(2) * times_G[:, None]
        return kept[name]

    def _share(self) -> int:
        """How many query heads a tile holds side by side: what needs the fewest tiles."""
        task, each = self.task, self.task.heads // self.task.key_heads
        if each == 1:
            return 1
        group_BKe = self.group_BH.unflatten(1, (-1, each))
        if not (group_BKe == group_BKe[..., :1]).all():
            return 1
        if task.q_row_groups:
            each = gcd(each, task.heads // task.q_row_groups)

        def tiles(share: int) -> int:
            return -(-task.rows // (self.tile // share)) * (task.heads // share)

        fit = [d for d in range(1, min(each, self.tile) + 1) if each % d == 0]
        return min(reversed(fit), key=tiles)


def _turned_as_read(q: Tensor, k: Tensor) -> bool:
    """Whether few queries see these keys, so that these are turned to float32 as they are read.

    Products of bfloat16 do without, but fill whole strips of queries: for those that a vector of
    float32 holds they take up to 1.6 times as long (with AMX it was not measured).
    """
    if level() <= _SINGLE:
        return q.shape[2] <= _FEW_ROWS
    return level() < _AMX and q.shape[2] * q.shape[1] // k.shape[1] <= _LANES


def _rows(*tensors: Tensor, narrow: tuple[int, ...] = ()) -> list[Tensor]:
    """As the compiled code takes them: columns side by side, a multiple of its lanes of them.

    Args:
        tensors: all of one dtype.
        narrow: which of them stay in bfloat16 where others become float32.
    """
    half = all(x.dtype == torch.bfloat16 for x in tensors)
    own_products = level() > _SINGLE and half and not narrow
    lanes = _HALF_LANES if own_products else _LANES
    found = []
    for i, x in enumerate(tensors):
        dtype = torch.bfloat16 if own_products or (half and i in narrow) else torch.float32
        own, rest = x.to(dtype).resolve_neg(), -x.shape[-1] % lanes
        if rest:
            own = pad(own, (0, rest))
        found.append(own if own.stride(-1) == 1 else own.contiguous())
    return found


@cache
def _all_heads(count: int) -> Tensor:
    return torch.arange(count, device="cpu")


def _narrow(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The first columns, in another dtype."""
    return x if x.shape[-1] == width and x.dtype == dtype else x[..., :width].to(dtype)


def _like(x: Tensor, width: int, dtype: torch.dtype, *, zeros: bool) -> Tensor:
    """A tensor [..., width] that lies as ``x`` does."""
    found = None
    if width == x.shape[-1] and x.stride(-1) == 1:
        found = torch.empty_like(x, dtype=dtype)
    # Where rows of ``x`` overlap torch may choose any order of the axes.
    if found is None or found.stride(-1) != 1:
        found = x.new_empty(*x.shape[:-1], width, dtype=dtype)
    return _fresh(found).zero_() if zeros else _fresh(found)


def _fresh(x: Tensor) -> Tensor:
    """The same tensor, whose memory nobody touched yet.

    From 32 MiB on the system hands out memory anew for every tensor, page by page as it is
    touched, in large pages a few times as fast.
    """
    if x.nbytes >= _MAPPED:
        library().longspan_large_pages(x.data_ptr(), x.nbytes)
    return x
