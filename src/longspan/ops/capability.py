"""What each kernel can do, as data: one record drives dispatch, error texts and ``explain``.

Kernels in the order in which ``impl="auto"`` prefers them, but for GPUs whose kernels were
measured: there the fastest comes first (``measured``). A kernel module is imported when it is
first considered.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from longspan.errors import Refusal
from longspan.ops.measured import Rates, rates, rates_together
from longspan.ops.ranges import KeyRanges

Kernel = Callable[[Tensor, Tensor, Tensor, KeyRanges, float], tuple[Tensor, Tensor]]


class Halves(Protocol):
    """Forward and backward of a kernel over given ranges, each without autograd.

    Axes as in ``Kernel``: q [B, H, N, D], k [B, K, M, D], v and out with the width of the values,
    lse [B, H, N]. Rows without a key give 0 and -inf.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output, in memory of its own, and log-sum-exp."""
        ...

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dout: Tensor | None,
        dlse: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v, where out and lse may be those of more keys.

        Every number is finite where all gradients are, also in rows without a key here.
        """
        ...


# Output [B, H, N, Dv] and log-sum-exp [B, H, N] of all passes, where gradients alone are wanted.
Known = tuple[Tensor, Tensor]


class PlacedHalves(Halves, Protocol):
    """``Halves`` that write into given tensors, of any layout in which rows are dense.

    Rows begin at a multiple of 16 bytes.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output, in memory of its own for want of a place, and log-sum-exp."""
        ...

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
        """Gradients of q, k and v, those with a place in it.

        With an event, those of keys and values are added to what is in their places behind it.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Capability:
    """One kernel.

    Attributes:
        name: as in ``impl=``, and the name of its module and function.
        devices: device types it runs on; empty means any.
        note: one line for people.
        lse_gradient: whether gradients flow through its log-sum-exp.
        adds_key_tiles: where in its backward one program adds up the gradients of a key tile, so
            that keys which most queries see are worth copies: for which heads it does.
        shares_keys: where it takes keys with one batch row for queries with many: in calls
            without gradients alone, or in all.
        takes_keys_in_turn: whether keys may be counted through several batch rows.
        takes_more_keys: whether ranges may count further keys behind those that are given.
        reads_in_place: whether it reads and writes rows where they lie, given their order.
        most_rows: query rows that it takes; None for any number.
        forward_only: whether it has no backward.
        has_halves: whether its backward can be given the output and log-sum-exp of several passes
            together, as ``Halves``.
        places: whether these halves are ``PlacedHalves``.
        takes_long_rows: whether a few queries that see far more keys than their neighbours may
            stay among them, at the cost of their own tiles.
        plain: whether it is made of torch's own operations alone, so that ``torch.func`` and
            derivatives of any order go through it.
    """

    name: str
    devices: tuple[str, ...]
    note: str
    lse_gradient: bool = True
    adds_key_tiles: Literal["of a key head", "of a query head"] | None = None
    shares_keys: Literal["without gradients", "always"] | None = None
    takes_keys_in_turn: bool = False
    takes_more_keys: bool = False
    reads_in_place: bool = False
    most_rows: int | None = None
    forward_only: bool = False
    has_halves: bool = False
    places: bool = False
    takes_long_rows: bool = False
    plain: bool = False

    def reasons(
        self, q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges, *, use_lse: bool = True
    ) -> list[str]:
        """Why the kernel cannot take these inputs; empty if it can.

        Args:
            q: queries.
            k: keys.
            v: values.
            ranges: what would be computed.
            use_lse: whether the result will depend on the log-sum-exp.
        """
        if not self.runs_on(q.device):
            return [f"runs on {' or '.join(self.devices)}, the tensors are on {q.device.type}"]
        if use_lse and not self.lse_gradient and needs_grad(q, k, v):
            return [
                "no gradient flows through its log-sum-exp, which joining passes and return_lse "
                "need"
            ]
        if ranges.more is not None and not self.takes_more_keys:
            return ["takes the keys that are given, and no further ones behind them"]
        if ranges.key_rows > 1:
            if not self.takes_keys_in_turn:
                return ["takes the keys of one batch row at a time, not of several in turn"]
        elif q.shape[0] != k.shape[0] and not self.takes_shared_keys(q, k, v):
            return [
                "takes keys and values of as many batch rows as queries; got "
                f"{k.shape[0]} for {q.shape[0]}"
            ]
        if self.most_rows is not None and q.shape[2] > self.most_rows:
            return [f"takes up to {self.most_rows} query rows, got {q.shape[2]:,}"]
        if self.forward_only and needs_grad(q, k, v):
            return ["has no backward, and gradients are asked for"]
        if not self.plain and transforming():
            return [
                "has a backward of its own, through which torch.func does not go, nor do "
                "forward-mode derivatives"
            ]
        more = getattr(self._module(), "reasons", None)
        return [] if more is None else more(q, k, v, ranges)

    def takes_shared_keys(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether it takes keys with one batch row for queries like these with many."""
        if self.shares_keys == "without gradients":
            return not needs_grad(q, k, v)
        return self.shares_keys == "always"

    def worth(
        self, q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges, *, moved: bool = False
    ) -> bool:
        """Whether ``auto`` should take it for inputs that it can take.

        Args:
            q: queries.
            k: keys.
            v: values.
            ranges: what would be computed.
            moved: whether rows would be gathered for a kernel that does not read them in place.
        """
        own = getattr(self._module(), "worth", None)
        return own is None or own(q, k, v, ranges, moved=moved)

    def load(self) -> Kernel:
        """The kernel function."""
        return getattr(self._module(), self.name)

    def load_passes(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """Of one that reads rows where they lie, the function over several passes."""
        return getattr(self._module(), f"{self.name}_passes")

    def load_halves(self) -> Callable[[Tensor, Tensor, Tensor, KeyRanges, float], Halves]:
        """Of one that has them, what makes its halves for given tensors, ranges and scale."""
        return getattr(self._module(), f"{self.name}_halves")

    def load_placed(self) -> Callable[[Tensor, Tensor, Tensor, KeyRanges, float], PlacedHalves]:
        """The same of one whose halves write into given tensors."""
        found: Any = self.load_halves()
        return found

    def runs_on(self, device: torch.device) -> bool:
        """Whether it is for such devices."""
        return not self.devices or device.type in self.devices

    def _module(self) -> Any:
        return importlib.import_module(f"longspan.ops.kernels.{self.name}")


# Passes without halves are joined by a merge with gradients of its own, a fifteenth of LongNet's
# time: a kernel with halves is preferred from this share of the best rate on.
_AS_GOOD = 0.9

# Queries without gradients, as new tokens are, for which no order of rows is worth making.
FEW_ROWS = 8
# Queries that fill a vector of any CPU.
_NEW_TOKENS = 16

KERNELS = (
    Capability(
        name="decode",
        devices=("cuda",),
        note="a few queries by parts of their keys, without gradients",
        reads_in_place=True,
        most_rows=FEW_ROWS,
        forward_only=True,
    ),
    Capability(
        name="flex",
        devices=("cuda",),
        note="FlexAttention over captured ranges",
        adds_key_tiles="of a key head",
        # Those of keys would be computed for each batch row, and added up in its dtype.
        shares_keys="without gradients",
    ),
    Capability(
        name="cudnn",
        devices=("cuda",),
        note="cuDNN's interval attention, for Hopper",
        adds_key_tiles="of a query head",
        has_halves=True,
    ),
    Capability(
        name="hopper",
        devices=("cuda",),
        note="our own kernel for Hopper",
        shares_keys="always",
        takes_keys_in_turn=True,
        takes_more_keys=True,
        has_halves=True,
        places=True,
        takes_long_rows=True,
    ),
    Capability(
        name="flash",
        devices=("cuda",),
        note="FlashAttention-4's own windows and segments",
    ),
    Capability(
        name="flex_flash",
        devices=("cuda",),
        note="FlexAttention with the kernels of FlashAttention-4",
        lse_gradient=False,
    ),
    Capability(
        name="cudnn_blocks",
        devices=("cuda",),
        note="cuDNN's block-sparse attention over whole blocks of 64, for Hopper",
        lse_gradient=False,
    ),
    Capability(
        name="native",
        devices=("cpu",),
        note="compiled tiles that read rows where they lie",
        reads_in_place=True,
    ),
    Capability(name="tiled", devices=(), note="batched tiles in plain PyTorch"),
    Capability(name="reference", devices=(), note="dense masked softmax, the oracle", plain=True),
)


_chosen: WeakKeyDictionary[KeyRanges, dict[tuple[Hashable, ...], Capability]] = WeakKeyDictionary()
_chosen_together: WeakKeyDictionary[KeyRanges, dict[tuple[Hashable, ...], Any]] = (
    WeakKeyDictionary()
)


def transforming() -> bool:
    """Whether this runs inside ``torch.func`` (vmap, grad, jvp and their kin) or a dual level."""
    return in_dual_level() or torch._C._are_functorch_transforms_active()


def in_dual_level() -> bool:
    """Whether forward-mode derivatives are taken, by ``forward_ad`` or ``torch.func.jvp``."""
    return torch.autograd.forward_ad._current_level >= 0


def needs_grad(*tensors: Tensor) -> bool:
    """Whether autograd will ask for gradients of any of these."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def in_order(
    q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges
) -> tuple[tuple[Capability, ...], Rates | None]:
    """All kernels, the ones that ``auto`` prefers first, and the measurement that says so."""
    found = rates(q, ranges, needs_grad(q, k, v), k.shape[1])
    if found is None:
        return KERNELS, None
    # Sorting is stable: what was not measured follows in the order of the table above.
    return tuple(sorted(KERNELS, key=lambda c: -found.rate(c.name))), found


def may_read_in_place(impl: str, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether some kernel for such tensors that may be chosen reads rows where they lie."""
    return any(
        kernel.reads_in_place
        and impl in ("auto", kernel.name)
        and kernel.runs_on(q.device)
        and (kernel.most_rows is None or q.shape[2] <= kernel.most_rows)
        and not (kernel.forward_only and needs_grad(q, k, v))
        for kernel in KERNELS
    )


def with_long_rows(impl: str, device: torch.device) -> list[Capability]:
    """Kernels for a device that take long rows, as far as they may be chosen."""
    return [
        kernel
        for kernel in KERNELS
        if kernel.takes_long_rows and impl in ("auto", kernel.name) and kernel.runs_on(device)
    ]


def choose(
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: KeyRanges,
    *,
    use_lse: bool = True,
    moved: bool = False,
) -> Capability:
    """Pick a kernel; kept for tensors that look the same, as long as ``ranges`` lives.

    Args:
        impl: ``"auto"``, or a kernel's name, which never falls back to another one.
        q: queries.
        k: keys.
        v: values.
        ranges: what would be computed.
        use_lse: whether the result will depend on the log-sum-exp.
        moved: whether rows would be gathered for a kernel that does not read them in place.

    Raises:
        Refusal: if the named kernel cannot take the inputs, with each reason.
    """
    if not isinstance(impl, str):
        raise _unknown(impl)
    kept = _chosen.setdefault(ranges, {})
    # Only kernels for CPUs ask, for a few new tokens, whether a cache has room to grow.
    few = q.device.type == "cpu" and q.shape[2] < _NEW_TOKENS
    apart = few and lie_apart(k, v)
    name = (impl, use_lse, moved, apart, *looks(q, k, v))
    if name not in kept:
        kept[name] = _choose(impl, q, k, v, ranges, use_lse=use_lse, moved=moved)
    return kept[name]


def lie_apart(*tensors: Tensor) -> bool:
    """Whether some do not lie in one piece, rows side by side."""
    return not all(x.is_contiguous() for x in tensors)


def looks(*tensors: Tensor) -> tuple[Hashable, ...]:
    """What the choice of a kernel, and its plan, depend on besides the ranges."""
    return (
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        transforming(),
        *((x.shape, x.dtype, x.device, x.requires_grad) for x in tensors),
    )


def _choose(
    impl: str, q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges, *, use_lse: bool, moved: bool
) -> Capability:
    def refused(kernel: Capability) -> list[str]:
        return kernel.reasons(q, k, v, ranges, use_lse=use_lse)

    if impl == "auto":
        able = (c for c in in_order(q, k, v, ranges)[0] if not refused(c))
        return next(c for c in able if c.worth(q, k, v, ranges, moved=moved))
    known = {kernel.name: kernel for kernel in KERNELS}
    if impl not in known:
        raise _unknown(impl)
    if why := refused(known[impl]):
        others = [c.name for c in KERNELS if c.name != impl and not refused(c)]
        raise Refusal(
            f"kernel {impl!r} cannot take these inputs: {'; '.join(why)}. "
            f'These can: {", ".join(others)}; impl="auto" picks one'
        )
    return known[impl]


def _unknown(impl: object) -> Refusal:
    names = ", ".join(kernel.name for kernel in KERNELS)
    return Refusal(f'impl must be "auto" or one of {names}; got {impl!r}')


def choose_together(
    impl: str, passes: Sequence[tuple[Tensor, Tensor, Tensor, KeyRanges]]
) -> tuple[list[Capability], Rates | None]:
    """Pick a kernel for each of several passes that are joined, and have gradients.

    The one for all that was fastest on the nearest measured case of several passes, if it has
    halves. For want of one, all with halves where some of them would be picked anyway and the
    others are about as fast.

    Args:
        impl: as in ``choose``.
        passes: queries, keys, values and what would be computed.

    Returns:
        The kernels, and the measurement of several passes that says so, None if none does.

    Raises:
        Refusal: as in ``choose``.
    """
    if not isinstance(impl, str):
        raise _unknown(impl)
    first, *rest = (ranges for _, _, _, ranges in passes)
    kept = _chosen_together.setdefault(first, {})
    name = (impl, *map(id, rest), *looks(*(x for own in passes for x in own[:3])))
    if name not in kept:
        # With what the name speaks of, which has to live as long.
        kept[name] = _choose_together(impl, passes), rest
    return kept[name][0]


def _choose_together(
    impl: str, passes: Sequence[tuple[Tensor, Tensor, Tensor, KeyRanges]]
) -> tuple[list[Capability], Rates | None]:
    if impl == "auto" and (fastest := _fastest_together(passes)) is not None:
        return [fastest[0]] * len(passes), fastest[1]
    best = [choose(impl, *own) for own in passes]
    if impl != "auto" or not any(kernel.has_halves for kernel in best):
        return best, None
    halves = [
        kernel if kernel.has_halves else _with_halves(kernel, *own)
        for kernel, own in zip(best, passes, strict=True)
    ]
    found = [kernel for kernel in halves if kernel is not None]
    return (found if len(found) == len(best) else best), None


def _fastest_together(
    passes: Sequence[tuple[Tensor, Tensor, Tensor, KeyRanges]],
) -> tuple[Capability, Rates] | None:
    """A kernel with halves for all passes and the measurement that says so; None if none does."""
    measured = rates_together([(q, ranges) for q, _, _, ranges in passes])
    if measured is None:
        return None
    able = [
        kernel
        for kernel in KERNELS
        if kernel.name in measured.tflops and not any(kernel.reasons(*own) for own in passes)
    ]
    best = max(able, key=lambda kernel: measured.rate(kernel.name), default=None)
    return (best, measured) if best is not None and best.has_halves else None


def _with_halves(
    best: Capability, q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges
) -> Capability | None:
    """One with halves in place of the best; None if there is none, or it is slower."""
    kernels, measured = in_order(q, k, v, ranges)
    for kernel in kernels:
        fast = measured is None or measured.rate(kernel.name) >= _AS_GOOD * measured.rate(
            best.name
        )
        if kernel.has_halves and fast and not kernel.reasons(q, k, v, ranges):
            return kernel
    return None
