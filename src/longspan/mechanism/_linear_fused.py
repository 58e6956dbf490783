"""Causal linear attention on a GPU in Triton kernels, with its gradients.

    S_t = sum phi(k)^T v,  z_t = sum phi(k)   over the chunks before t           (two kernels)
    o = (phi(q) S_t + A v) / (phi(q) z_t + A 1),   A = phi(q) phi(k)^T inside the chunk

The backward sums phi(q)^T slope over the chunks after t in the same way, and makes S and z again.
Nothing is written for each pair or feature of a row: simple maps are applied to tiles as they are
read, others come as features. Sums and states are float32. Products of 16-bit inputs are of tf32,
to which features, states and weights are rounded; one of float32 is three of tf32.

Axes: B batch, H query heads, K key heads, G = H / K, N rows, D width of q and k, R features, V
values, E = V + 1, T chunks of C rows.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from longspan.mechanism._linear_chunks import lowest
from longspan.mechanism.feature_maps import Elu, FeatureMap, Mega, Relu
from longspan.ops.fused import can_fuse, rows_dense
from longspan.ops.once import once

# Fewer rows, such as those of decoding, are a few small products.
_LEAST_ROWS = 16
# Of batch rows and heads: what a grid of programs has room for.
_MOST_PLANES = 65535
# Rows of a chunk: more of them are less states and more work inside a chunk.
_CHUNK = 128
# Rows of a tile, which divide the chunk, and most features or values of it: for 16-bit inputs, and
# for float32, whose products need twice the space. Wider heads are cut into tiles of _CUT.
_TALL = {"tf32": 64, "tf32x3": 32}
_WIDE = {"tf32": 128, "tf32x3": 64}
_CUT = 64
# Warps of a program that holds one tile of at most 64 columns and no log factors, and of others:
# fewer would have too few registers.
_WARPS = (4, 8)
# A program of the running sums holds as many numbers of as many chunks.
_SCAN = (64, 32)
# Maps without a log factor that a kernel applies itself.
_KINDS: dict[type[FeatureMap], str] = {Elu: "elu", Relu: "relu", Mega: "mega"}


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels take these."""
    if not can_fuse(q, k, v) or q.shape[2] < _LEAST_ROWS:
        return False
    if not 0 < q.shape[0] * q.shape[1] <= _MOST_PLANES or 0 in (k.numel(), v.numel()):
        return False
    # Products of tf32 need tensor cores that know them.
    return q.dtype == k.dtype == v.dtype and _has_tf32(q.device)


def _has_tf32(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def kind_of(phi: FeatureMap) -> str:
    """The map's name if a kernel applies it, else ``given``: features come as tensors."""
    return _KINDS.get(type(phi), "given")


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_k: Tensor | None,
    valid: Tensor | None,
    before: tuple[Tensor, Tensor] | None,
    kind: str,
    floor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal linear attention where ``fits`` holds; differentiable once.

    Args:
        q: queries [B, H, N, D] of any layout, or their features [B, H, N, R] for ``given``.
        k: the same of the keys [B, K, N, D or R], divided by exp(log_k).
        v: values [B, K, N, V].
        log_k: float32 [B, K, N], without gradient, or None for 0.
        valid: True at keys that count [B, N].
        before: sums [B, K, R, E] over earlier rows, divided by exp of their log [B, K].
        kind: of ``kind_of``.
        floor: least denominator; where 0, rows without weight give 0.

    Returns:
        out [B, H, N, V] in the dtype of ``v``, and what ``before`` is for the rows that follow.
    """
    batch, heads, _, features = k.shape
    if before is None:
        least = 0.0 if log_k is None else lowest(torch.float32)
        log, sums = k.new_full((batch, heads), least, dtype=torch.float32), None
    else:
        sums, log = before[0], before[1].float()
    own = edge = None
    if log_k is not None:
        own = log_k.contiguous()
        # Row i is in units of exp(its running maximum), which only earlier rows decide.
        edge = torch.cat([log[..., None], own], dim=-1).cummax(dim=-1).values
        log = edge[..., -1]
    valid = None if valid is None else valid.contiguous().view(torch.uint8)
    run = _Run.of(q, k, v, kind, floor)
    out, flat = _Attention.apply(q, k, v, _joined(sums), own, edge, valid, run)
    found = flat.view(batch, heads, -1)
    cut = features * v.shape[3]
    sums = torch.cat(
        [found[..., :cut].unflatten(-1, (features, -1)), found[..., cut:, None]], dim=-1
    )
    return out, sums, log


def _joined(sums_BKRE: Tensor | None) -> Tensor | None:
    """S, then z, of each head in one row."""
    if sums_BKRE is None:
        return None
    return torch.cat([sums_BKRE[..., :-1].flatten(2), sums_BKRE[..., -1]], dim=-1).flatten(0, 1)


@dataclass(frozen=True)
class _Run:
    """Sizes of a call and of its tiles."""

    kind: str
    floor: float
    precision: str
    batch: int
    heads: int
    kv_heads: int
    rows: int
    features: int
    width: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, kind: str, floor: float) -> _Run:
        precision = "tf32" if v.element_size() == 2 else "tf32x3"
        sizes = (k.shape[1], k.shape[2], k.shape[3], v.shape[3])
        return cls(kind, floor, precision, q.shape[0], q.shape[1], *sizes)

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def planes(self) -> int:
        return self.batch * self.kv_heads

    @property
    def slots(self) -> int:
        return -(-self.rows // _CHUNK) + 1

    @property
    def size(self) -> int:
        return self.features * (self.width + 1)

    @property
    def tall(self) -> int:
        return _TALL[self.precision]

    @property
    def tiles(self) -> int:
        return -(-self.rows // self.tall)

    def cut(self, count: int) -> tuple[int, int]:
        """Columns of a tile, a power of two, and the number of tiles."""
        wide = max(16, 1 << (count - 1).bit_length())
        if wide > _WIDE[self.precision]:
            wide = _CUT
        return wide, -(-count // wide)

    def shape(self, with_valid: bool, with_log: bool) -> dict[str, Any]:
        """What every kernel over rows is compiled for."""
        wide_r, many_r = self.cut(self.features)
        wide_d, many_d = self.cut(self.width)
        return {
            "group": self.group,
            "features": self.features,
            "width": self.width,
            "kind": self.kind,
            "has_valid": with_valid,
            "has_log": with_log,
            "precision": self.precision,
            "chunk": _CHUNK,
            "tall": self.tall,
            "wide_r": wide_r,
            "many_r": many_r,
            "wide_d": wide_d,
            "many_d": many_d,
            "num_warps": _WARPS[with_log or max(self.features, self.width) > 64],
            "num_stages": 1,
        }


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        before: Tensor | None,
        own: Tensor | None,
        edge: Tensor | None,
        valid: Tensor | None,
        run: _Run,
    ) -> tuple[Tensor, Tensor]:
        ctx.run = run
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, before, own, edge, valid)
        q, k, v = (rows_dense(x) for x in (q, k, v))
        out = _like(q, run.width, v.dtype)
        logs = _Logs.of(own, edge)
        with torch.cuda.device(q.device):
            states = _past_states(run, k, v, before, logs, valid)
            _kernels().outputs[(run.tiles, run.batch * run.heads, run.cut(run.width)[1])](
                q,
                k,
                v,
                states,
                valid,
                own,
                logs.run,
                logs.before,
                out,
                run.rows,
                run.heads,
                run.slots,
                run.floor,
                *_steps(q, k, v, out),
                **run.shape(valid is not None, own is not None),
            )
        return out, states[:, -1].clone()

    @staticmethod
    @once
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, d_out: Tensor | None, d_sums: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        q, k, v, before, own, edge, valid = ctx.saved_tensors
        q, k, v = (rows_dense(x) for x in (q, k, v))
        if d_out is None:
            d_out = v.new_zeros(run.batch, run.heads, run.rows, run.width)
        d_out = rows_dense(d_out)
        logs = _Logs.of(own, edge)
        kernels, shape = _kernels(), run.shape(valid is not None, own is not None)
        planes = run.batch * run.heads
        share, debt = (v.new_empty(planes, run.rows, dtype=torch.float32) for _ in range(2))
        dq, dk, dv = _like(q), _like(k), _like(v)
        with torch.cuda.device(q.device):
            states = _past_states(run, k, v, before, logs, valid)
            kernels.query_slopes[(run.tiles, planes)](
                q,
                k,
                v,
                d_out,
                states,
                valid,
                own,
                logs.run,
                logs.before,
                dq,
                share,
                debt,
                run.rows,
                run.heads,
                run.slots,
                run.floor,
                *_steps(q, k, v, d_out, dq),
                **shape,
            )
            weights = tuple(logs.faded(x, run.group) for x in (share, debt))
            last = 0.0 if d_sums is None else d_sums
            _sums(run, states, q, d_out, last, logs, None, weights)
            kernels.value_slopes[(run.tiles, run.planes, run.cut(run.width)[1])](
                q,
                k,
                d_out,
                states,
                valid,
                own,
                logs.run,
                logs.after,
                share,
                dv,
                run.rows,
                run.kv_heads,
                run.slots,
                *_steps(q, k, d_out, dv),
                **shape,
            )
            kernels.key_slopes[(run.tiles, run.planes, run.cut(run.features)[1])](
                q,
                k,
                v,
                d_out,
                states,
                valid,
                own,
                logs.run,
                logs.after,
                share,
                debt,
                dk,
                run.rows,
                run.kv_heads,
                run.slots,
                *_steps(q, k, v, d_out, dk),
                **shape,
            )
        d_before = None if before is None else states[:, 0].clone()
        return dq, dk, dv, d_before, None, None, None, None


@dataclass(frozen=True)
class _Logs:
    """Log factors of rows [B, K, N] and at the edges of chunks [B, K, T + 1], if there are any.

    ``before`` is the factor from the edge before a row's chunk to the row, ``after`` that from a
    key to the edge after its chunk.
    """

    run: Tensor | None = None
    edge: Tensor | None = None
    before: Tensor | None = None
    after: Tensor | None = None

    @classmethod
    def of(cls, own: Tensor | None, top: Tensor | None) -> _Logs:
        if own is None or top is None:
            return cls()
        rows = own.shape[-1]
        extra = -rows % _CHUNK
        run = top[..., 1:].contiguous()
        # The edge after the last chunk is the last row's.
        edge = torch.cat([top[..., :-1:_CHUNK], top[..., -1:]], dim=-1)
        cut = (pad(x, (0, extra)).unflatten(-1, (-1, _CHUNK)) for x in (run, own))
        chunk_run, chunk_own = cut
        before = (edge[..., :-1, None] - chunk_run).exp().flatten(-2)[..., :rows].contiguous()
        after = (chunk_own - edge[..., 1:, None]).exp().flatten(-2)[..., :rows].contiguous()
        return cls(run, edge, before, after)

    def faded(self, x: Tensor, group: int) -> Tensor:
        """Numbers of query rows [B H, N], in units of the edge before their chunk."""
        if self.before is None:
            return x
        return (x.unflatten(0, (-1, group)) * self.before.flatten(0, 1)[:, None]).flatten(0, 1)


def _past_states(
    run: _Run,
    k: Tensor,
    v: Tensor,
    before: Tensor | None,
    logs: _Logs,
    valid: Tensor | None,
) -> Tensor:
    """S and z before each chunk, and after all [B K, T + 1, R V + R]."""
    states = v.new_empty(run.planes, run.slots, run.size, dtype=torch.float32)
    weights = None if logs.after is None else (logs.after, logs.after)
    _sums(run, states, k, v, 0.0 if before is None else before, logs, valid, weights, past=True)
    return states


def _sums(
    run: _Run,
    states: Tensor,
    x: Tensor,
    y: Tensor,
    first: Tensor | float,
    logs: _Logs,
    valid: Tensor | None,
    weights: tuple[Tensor, ...] | None,
    past: bool = False,
) -> None:
    """Fill ``states`` with sums over earlier chunks of keys, or over later chunks of queries."""
    states[:, 0 if past else -1] = first
    shape = run.shape(valid is not None, logs.edge is not None)
    del shape["has_log"]
    shape |= {"has_weight": weights is not None, "group": 1 if past else run.group}
    grid = (run.slots - 1, run.planes, shape["many_r"] * shape["many_d"])
    _kernels().chunk_sums[grid](
        x,
        y,
        states,
        valid,
        *((None, None) if weights is None else weights),
        run.rows,
        run.kv_heads,
        run.slots,
        int(past),
        *_steps(x, y),
        **shape,
    )
    wide, span = _SCAN
    _kernels().running_sums[(-(-run.size // wide), run.planes)](
        states,
        logs.edge,
        run.slots,
        run.size,
        not past,
        logs.edge is not None,
        wide,
        span,
    )


def _like(x: Tensor, width: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """New rows with rows and heads in the order that ``x`` has in memory."""
    batch, heads, rows, own = x.shape
    width, dtype = own if width is None else width, dtype or x.dtype
    if x.stride(1) < x.stride(2):
        return x.new_empty(batch, rows, heads, width, dtype=dtype).transpose(1, 2)
    return x.new_empty(batch, heads, rows, width, dtype=dtype)


def _steps(*tensors: Tensor) -> tuple[int, ...]:
    """Steps of batch, head and row of each."""
    return tuple(step for x in tensors for step in x.stride()[:3])


def _kernels() -> ModuleType:
    return importlib.import_module("longspan.mechanism._linear_triton")
