"""Sparse prefill in a Hugging Face model: prompts attend to what a method selects.

Rows that come many at a time, as prompts and chunks of prompts do, get the method's estimate from
a length on at which it pays; shorter ones, and single tokens while decoding, attend exactly. The
KV cache is whole, so that what is generated can look anywhere, and goes with any cache policy.
Only full causal layers take part: a layer with a window of its own is sparse already, and packed
documents would be taken for one text.

Axes: B batch, H query heads, K key heads, N query rows (the last of M), D head width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from longspan.errors import InputError
from longspan.hf.embedded import embedding_norms, norms_for
from longspan.hf.register import Estimated
from longspan.hf.routes import routed
from longspan.hf.rows import Rows
from longspan.hf.switch import Applied, put
from longspan.hf.unwrap import base_model
from longspan.mechanism._past import tokens_first
from longspan.pattern import Causal
from longspan.select.attention import select
from longspan.select.measure import SHORTEST, break_even, recall
from longspan.select.method import Method, Term, method

# On the attention modules of a model that is being watched.
_LOG = "_longspan_prefill_log"
# The last break-even of each method, for reports.
_measured: dict[str, int] = {}


@dataclass(frozen=True, kw_only=True)
class LayerPrefill:
    """What one forward pass of one layer computed sparsely.

    Attributes:
        layer: its number.
        queries: rows of the prompt or chunk, padding counted.
        keys: rows they could see at most.
        density: share of the causal pairs that was computed, mean over batch and heads.
        recall: share of the dense attention mass that these pairs hold, mean over some rows.
        worst: the same of the head that keeps least.
    """

    layer: int
    queries: int
    keys: int
    density: float
    recall: float
    worst: float


@dataclass(frozen=True, repr=False, kw_only=True)
class Prefilled(Estimated):
    """What a model with sparse prefill computes.

    Attributes:
        method: what selects.
        dense_below: tokens below which a prompt attends exactly; None: measured on this machine
            when the first long prompt comes (``longspan.select.break_even``).
    """

    method: Method
    dense_below: int | None = None

    def takes(self, rows: Rows, query: Tensor, key: Tensor) -> bool:
        """Whether rows are a prompt of one text that is long enough."""
        least = SHORTEST if self.dense_below is None else self.dense_below
        tokens = rows.query_start + rows.queries
        if rows.queries < min(self.method.block, tokens) or tokens < least or rows.queries == 1:
            return False
        packed = rows.segments is not None and bool((rows.segments > 0).any())
        if rows.own != Causal() or packed:
            return False
        return self.dense_below is not None or tokens >= self.measured(query, key)

    def attend(
        self,
        module: nn.Module,
        rows: Rows,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
    ) -> tuple[Tensor, Tensor]:
        """Attention over what the method selects: out [B, H, N, Dv] and lse [B, H, N]."""
        if rows.segments is None:
            place = token = None
            # A static cache holds room for what is to come.
            stop = rows.query_start - rows.key_start + rows.queries
            key, value = key[:, :, :stop], value[:, :, :stop]
        else:
            place, token = _places(rows, query.device)
            key, value = tokens_first(token, key, value)
        norms = None
        if self.method.needs_norms:
            norms = _norms(module, rows, key)
            norms = norms if token is None else tokens_first(token, norms)[0]
        layer = getattr(module, "layer_idx", None) or 0
        layers = getattr(getattr(module, "config", None), "num_hidden_layers", layer + 1)
        found = select(
            query,
            key,
            value,
            self.method,
            place=place,
            scale=scaling,
            norms=None if norms is None else norms[:, 0, :, 0],
            layer=layer,
            layers=layers,
        )
        log = getattr(module, _LOG, None)
        if log is not None:
            held = recall(found)
            log.append(
                LayerPrefill(
                    layer=layer,
                    queries=rows.queries,
                    keys=key.shape[2],
                    density=float(found.density().mean()),
                    recall=float(held.mean()),
                    worst=float(held.mean(0).min()),
                )
            )
        return found.attend()

    def measured(self, query: Tensor, key: Tensor) -> int:
        """The length from which the method is faster here, for tensors of these shapes."""
        found = break_even(
            self.method,
            heads=query.shape[1],
            kv_heads=key.shape[1],
            width=query.shape[3],
            dtype=query.dtype,
            device=query.device,
        )
        _measured[str(self.method)] = found
        return found

    def __str__(self) -> str:
        below = "measured" if self.dense_below is None else self.dense_below
        return f"prefill({self.method}, dense_below={below})"


@dataclass(frozen=True, eq=False)
class SparsePrefill(Applied):
    """Sparse prefill at work in a model; a context manager that takes it out at the end.

    Attributes:
        log: what layers computed, if ``report`` was asked for.
    """

    log: list[LayerPrefill] | None = field(default=None, repr=False)

    @property
    def dense_below(self) -> int | None:
        """Tokens below which prompts attend exactly; None while nothing had to be measured."""
        what = self.pattern
        assert isinstance(what, Prefilled)
        given = what.dense_below
        return _measured.get(str(what.method)) if given is None else given

    def remove(self) -> None:
        """Restore what was there before, and stop watching."""
        for _, module in routed(self.model):
            if getattr(module, _LOG, None) is self.log and self.log is not None:
                delattr(module, _LOG)
        super().remove()

    def report(self) -> list[dict[str, Any]]:
        """Density and recall of every sparse layer pass so far, as plain values.

        Raises:
            InputError: if no report was asked for.
        """
        if self.log is None:
            raise InputError("Nothing was noted: longspan.hf.prefill(model, ..., report=True).")
        return [asdict(row) for row in self.log]


def prefill(
    model: Any,
    what: Method | Term | str,
    *,
    dense_below: int | None = None,
    impl: str = "auto",
    report: bool = False,
) -> SparsePrefill:
    """Let prompts attend to what a method selects; decoding stays exact.

    ``generate`` and plain forward passes alike; with padding, grouped queries, prompts in chunks
    and a cache policy (``longspan.kv.cache``, made afterwards). A pattern or method applied before
    is replaced. Most methods look at later tokens of the prompt to decide what earlier rows see
    (``method.depends``), so a loss over the prompt is not that of a causal model.

    Args:
        model: a Hugging Face model, or a PEFT model around one.
        what: a method, a term or text such as ``"vertical_slash(1000, 6096)"``.
        dense_below: tokens below which a prompt attends exactly; None: the length from which the
            method is faster on this machine, measured when the first prompt of 1024 tokens or
            more comes, in about five seconds.
        impl: kernel of exact attention, as for ``longspan.attend``.
        report: note density and recall of every pass, which costs 64 dense rows in each layer.

    Returns:
        A handle; ``with prefill(...)`` restores the model at the end of the block.

    Raises:
        PolicyError: if the method does not parse.
        InputError: for a length that is no whole number from 0.
        Refusal: if the model does not route through the attention interface. It is then unchanged.
    """
    if dense_below is not None and not (isinstance(dense_below, int) and dense_below >= 0):
        raise InputError(f"dense_below must be a number of tokens from 0, got {dense_below!r}.")
    base = base_model(model)
    wanted = Prefilled(method=method(what), dense_below=dense_below)
    put_in = put(base, wanted, impl)
    if wanted.method.needs_norms:
        embedding_norms(base)
    log: list[LayerPrefill] | None = [] if report else None
    for _, module in routed(base):
        if log is not None:
            setattr(module, _LOG, log)
        elif hasattr(module, _LOG):
            delattr(module, _LOG)
    return SparsePrefill(**{**vars(put_in), "log": log})


def _norms(module: nn.Module, rows: Rows, key: Tensor) -> Tensor:
    """Norms of the embeddings of all key rows [B, 1, M, 1], 0 in room for what is to come."""
    if "norms" not in rows.kept:
        # Gradient checkpointing asks again after later calls, and from another thread.
        tokens = rows.query_start - rows.key_start + rows.queries
        rows.kept["norms"] = norms_for(module).all(len(key), tokens)
    found, tokens = rows.kept["norms"].to(key.device), rows.kept["norms"].shape[1]
    return pad(found, (0, key.shape[2] - tokens))[:, None, :, None]


def _places(rows: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
    """Place of each query among the tokens [B, N], -1 at padding, and which keys are tokens.

    Found once for all layers of a forward pass.
    """
    if "places" not in rows.kept:
        assert rows.segments is not None
        assert rows.key_segments is not None
        assert rows.positions is not None
        assert rows.key_positions is not None
        token = torch.from_numpy(rows.key_segments >= 0)
        known = torch.from_numpy(rows.key_positions)
        # A cache may have dropped the first tokens.
        first = known.masked_fill(~token, torch.iinfo(torch.int64).max).amin(1, keepdim=True)
        place = torch.from_numpy(rows.positions) - first
        place = place.masked_fill(torch.from_numpy(rows.segments < 0), -1)
        rows.kept["places"] = place.to(device), token.to(device)
    return rows.kept["places"]
