"""Attention over a sequence whose rows lie on several ranks.

    out of a rank = attend(its q, the keys and values that its queries see)

Keys and values that the pattern shows to queries of other ranks go there in one all-to-all, and
their gradients come back in one; then each rank calls ``attend`` once, over positions of the whole
sequence. So it is exact, with any kernel: the same softmax over the same keys, rounded once. A
ring that merges partial results would hold two shards at a time, but moves every key past every
rank, and starts as many kernels as there are ranks; for a sparse pattern, what is seen is little.

Time: that of the pairs of the rank's queries. Memory: its rows and those that they see. Traffic:
``longspan.parallel.explain``.

Axes: B batch, H query heads, K key heads, P rows of this rank, N rows of all ranks, D head width.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longspan.errors import InputError, PatternError, PlanError, Refusal
from longspan.ops.attend import attend as attend_here
from longspan.ops.capability import KERNELS, needs_grad
from longspan.ops.inputs import autocast, check_batch, check_tensors, factor_of, on_cpu
from longspan.parallel.agreement import agree, group_of
from longspan.parallel.exchange import exchange
from longspan.parallel.needs import Places, route_of
from longspan.parallel.shards import Shards, shards_of
from longspan.pattern import Pattern, parse


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | str,
    *,
    group: Any = None,
    shards: Shards | str = "even",
    positions: Any = None,
    segments: Any = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
    layer: int = 0,
    agreed: bool = False,
) -> Any:
    """Attention of this rank's queries over the keys of all ranks that a pattern allows them.

    All ranks of the group call it with their own rows, and all or none of them run its backward.
    It equals ``longspan.attend`` on the whole sequence, gradients included, whatever the pattern.
    A compiler steps out here.

    Args:
        q: queries of this rank [B, H, P, D]; a rank may have no rows.
        k: keys of this rank [B, K, P, D].
        v: values of this rank [B, K, P, Dv].
        pattern: a pattern or its text form; it speaks of positions in the whole sequence.
        group: process group, device mesh of one dimension, or None for all processes. With NCCL
            tensors are on GPUs, with Gloo on the CPU.
        shards: which rows lie where: ``"even"`` (neighbours together; the ranks may have any
            numbers of rows), ``"zigzag"`` (an early and a late piece each: equal work under a
            causal pattern), or ``Shards``.
        positions: place of each row of the whole sequence in its segment, [N] or [B, N], the same
            on all ranks; default: counted inside each segment.
        segments: segments of the whole sequence, [N] or [B, N], the same on all ranks: packed
            documents, negative for padding.
        scale: factor on the logits; default ``D ** -0.5``.
        return_lse: also return the log-sum-exp of the logits.
        impl: kernel name, or ``"auto"``.
        layer: for patterns that differ between layers.
        agreed: skip the few numbers by which ranks make sure, before each call, that all can do
            it and ask for the same: no waiting for a GPU. ``"even"`` then means equal numbers of
            rows, and a rank that fails leaves the others waiting.

    Returns:
        out [B, H, P, Dv] of this rank's rows in the dtype of ``q``; with ``return_lse`` also lse
        [B, H, P]. Both are differentiable; gradients of keys and values go to the ranks that hold
        them.

    Raises:
        InputError: if there is no process group, tensors or shards do not fit, or the ranks ask
            for different things. All ranks raise, and no keys were sent.
        PatternError: if the pattern does not parse or does not fit the heads.
        PlanError: if positions or segments do not fit.
        Refusal: if a named kernel cannot do it; on the other ranks an InputError that says so.
    """
    run: Any = attend_unless
    if torch.compiler.is_compiling():
        # Plans are made by numpy, and kernels that are compiled do that themselves.
        run = torch.compiler.disable(run)
    return run(
        None,
        q,
        k,
        v,
        pattern,
        group=group,
        shards=shards,
        positions=positions,
        segments=segments,
        scale=scale,
        return_lse=return_lse,
        impl=impl,
        layer=layer,
        agreed=agreed,
    )


def attend_unless(
    complaint: Exception | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern | str,
    *,
    group: Any,
    shards: Shards | str,
    positions: Any,
    segments: Any,
    scale: float | None,
    return_lse: bool,
    impl: str,
    layer: int,
    agreed: bool,
) -> Any:
    """``attend``, unless the caller of some rank has found something wrong before.

    Args:
        complaint: what this rank's caller found wrong; then all ranks raise.
        q: this and all others as for ``attend``.
    """
    group, rank, ranks = group_of(group)
    facts: dict[str, Any] = {}
    told = _Told()
    try:
        if complaint is not None:
            raise complaint
        q, k, v = autocast(q, k, v)
        _check_own(q, k, v, shards, rank, ranks)
        pattern = _pattern(pattern, impl).at_layer(layer)
        pattern.require(q.shape[1])
        told = _Told.of(on_cpu("positions", positions), on_cpu("segments", segments), q)
        facts = _facts(q, k, v, pattern, shards, scale, return_lse, impl, told)
    except Exception as error:
        # Whatever it is, the other ranks are told.
        if agreed:
            raise
        complaint = error
    if agreed:
        sizes = [q.shape[2]] * ranks if isinstance(shards, str) else list(shards.sizes)
    else:
        rows = q.shape[2] if complaint is None else 0
        sizes = agree(rows, facts, complaint, group, getattr(q, "device", None))
    lie = Shards.of_sizes(sizes) if shards == "even" else shards_of(shards, sum(sizes), ranks)
    if list(lie.sizes) != sizes:
        raise InputError(
            f'shards="{shards}" puts {list(lie.sizes)} rows on the ranks, they hold {sizes}'
        )
    places = _places(lie.n, told)
    route = route_of(pattern, lie, rank, q.shape[1], k.shape[1], places)
    k, v = exchange(k, v, route, group)
    if route.plan is None:
        attend_own = partial(_nothing, q, k, v)
    else:
        attend_own = partial(attend_here, q, k, v, route.plan, scale=scale, impl=impl)
    if agreed or impl == "auto":
        return attend_own(return_lse=return_lse)
    # A named kernel may refuse what one rank has, and a rank without rows asks none.
    found, refusal = None, None
    try:
        found = attend_own(return_lse=return_lse)
    except Refusal as error:
        refusal = error
    agree(q.shape[2], {}, refusal, group, q.device)
    return found


def _pattern(pattern: Any, impl: str) -> Pattern:
    names = ("auto", *(kernel.name for kernel in KERNELS))
    if impl not in names:
        raise Refusal(f"unknown impl {impl!r}; choose one of {', '.join(names)}")
    if isinstance(pattern, str):
        return parse(pattern)
    if not isinstance(pattern, Pattern):
        raise PatternError(
            f"expected a pattern or its text form, got {type(pattern).__name__}; the plans of all "
            "ranks are made from it and kept"
        )
    return pattern


def _check_own(
    q: Tensor, k: Tensor, v: Tensor, shards: Shards | str, rank: int, ranks: int
) -> None:
    """Refuse tensors that cannot be this rank's rows."""
    given = (q, k, v)
    if all(isinstance(t, Tensor) and t.dim() == 4 for t in given) and q.shape[2] == 0:
        # A rank without rows is fine; nothing else may be empty.
        given = tuple(
            t.new_empty(*t.shape[:2], 1, t.shape[3]) if t.shape[2] == 0 else t for t in given
        )
    check_tensors(*given)
    if q.shape[2] != k.shape[2]:
        raise InputError(
            f"a rank holds queries, keys and values of the same rows; got {q.shape[2]} queries "
            f"and {k.shape[2]} keys"
        )
    if isinstance(shards, Shards):
        if shards.ranks != ranks:
            raise InputError(f"the shards are for {shards.ranks} ranks, the group has {ranks}")
        if shards.sizes[rank] != q.shape[2]:
            raise InputError(
                f"rank {rank} holds {q.shape[2]} rows, its shard has {shards.sizes[rank]}"
            )
    else:
        shards_of(shards, ranks, ranks)


def _facts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    shards: Shards | str,
    scale: float | None,
    return_lse: bool,
    impl: str,
    told: _Told,
) -> dict[str, Any]:
    """What must be the same on all ranks, by name."""
    return {
        "batch, heads and widths": [[*t.shape[:2], t.shape[3]] for t in (q, k, v)],
        "dtype": q.dtype,
        "device": q.device.type,
        "pattern": pattern,
        "shards": shards,
        "scale": factor_of(scale, q.shape[3]),
        "return_lse": return_lse,
        "impl": impl,
        "gradients of keys or values": needs_grad(k, v),
        "positions": told.digests[0],
        "segments": told.digests[1],
    }


@dataclass(frozen=True)
class _Told:
    """Positions and segments as they were given, known by their digests."""

    digests: tuple[str, str] = ("none", "none")
    positions: Any = field(default=None, compare=False)
    segments: Any = field(default=None, compare=False)

    @classmethod
    def of(cls, positions: Any, segments: Any, q: Tensor) -> _Told:
        digests = _digest("positions", positions, q), _digest("segments", segments, q)
        return cls(digests, positions, segments)


# Checking a million rows takes longer than looking up what they came to.
@lru_cache(maxsize=16)
def _places(n: int, told: _Told) -> Places:
    return Places(n, told.positions, told.segments)


def _digest(name: str, row: Any, q: Tensor) -> str:
    if row is None:
        return "none"
    try:
        array = np.ascontiguousarray(row)
    except ValueError as error:
        raise PlanError(f"{name} must have shape [rows] or [batch, rows]: {error}") from None
    if array.ndim == 2:
        check_batch(len(array), q)
    digest = hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()
    return f"{array.dtype} {list(array.shape)} {digest}"


def _nothing(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool) -> Any:
    """What a rank without rows gets: nothing, but with a backward that serves the other ranks."""
    share = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(share, dim=1) for x in (k, v))
    logits = q @ k.mT
    out = logits @ v
    lse = logits.logsumexp(dim=3).to(torch.promote_types(q.dtype, torch.float32))
    return (out, lse) if return_lse else out
