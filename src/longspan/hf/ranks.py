"""A pattern over rows that lie on several ranks, as an attention of transformers.

The model sees the rows of its own rank and believes that they are all; what it composes as a mask
from them is asked for nothing but the bounds of its layers (windows, chunks). Where the rows stand
in the whole sequence is said before each forward pass, and carried in the mask record, so that a
backward pass with gradient checkpointing finds it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from longspan.errors import InputError
from longspan.hf.collected import collected
from longspan.hf.masks import read_mask
from longspan.hf.register import Attention, beside_sink, checked_rows, enlist, registered
from longspan.hf.rows import Rows, within
from longspan.parallel.attention import attend_unless
from longspan.parallel.needs import Places
from longspan.parallel.shards import Shards
from longspan.pattern import Pattern

_numbers = count()

ROUTERS = (
    "The model adds a loss of its routers to that of the tokens, which a rank would take for its "
    "own rows and the sum over ranks count several times. Set output_router_logits = False, in "
    "the call and in the configuration."
)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Where the rows of a batch lie and stand.

    Attributes:
        shards: which rows lie where.
        segments: [1 or B, N], or None for one segment.
        positions: of this rank's rows [1 or B, P], as the model rotates them.
        labelled: whether the model is to return a loss.
    """

    shards: Shards
    segments: Any
    positions: Any
    labelled: bool = False

    @classmethod
    def of(cls, shards: Shards, rank: int, segments: Any, labelled: bool) -> Batch:
        """Of a rank, with segments as ``longspan.parallel.attend`` takes them."""
        places = Places(shards.n, segments=segments)
        positions = places.position_BN[:, shards.rows(rank)]
        return cls(shards=shards, segments=segments, positions=positions, labelled=labelled)


@dataclass(eq=False)
class Parallel:
    """A pattern over a group of ranks.

    Attributes:
        pattern: where each query may look, within what the model's own layers allow.
        group: as for ``longspan.parallel.attend``.
        batch: the batch that the next forward pass is for; None before the first.
        number: tells it from all others of this process.
    """

    pattern: Pattern
    group: Any
    batch: Batch | None = None
    number: int = field(default_factory=lambda: next(_numbers))

    def __str__(self) -> str:
        return f"{self.pattern} across ranks ({self.number})"

    def __deepcopy__(self, memo: Any) -> Parallel:
        # A process group cannot be copied, and a copy of the model belongs to the same one.
        return self

    def __reduce__(self) -> Any:
        raise InputError(
            "a model whose attention goes across ranks cannot be pickled: the ranks are those of "
            "this process. Take the pattern out first: longspan.hf.remove(model)"
        )


def register_parallel(wanted: Parallel, impl: str) -> str:
    """Make it known to transformers; the name to use."""
    return enlist(wanted, impl, _attention, _mask)


def _attention(name: str, wanted: Parallel, impl: str) -> Attention:
    def longspan_parallel_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend as transformers asks: q [B, H, P, D], k and v [B, K, P, D] to [B, P, H, D]."""
        complaint: Exception | None = None
        rows, batch, seen = None, wanted.batch, wanted.pattern
        try:
            rows = checked_rows(name, module, query, key, attention_mask, dropout, kwargs)
            if "batch" not in rows.kept:
                # Cut from the record of all rows.
                raise InputError(
                    "across ranks all layers compute all rows: leave logits_to_keep out, by which "
                    f"{type(module).__name__} was given {rows.queries} of {rows.keys}"
                )
            batch = rows.kept["batch"]
            if rows.kept["complaint"] is not None:
                raise rows.kept["complaint"]
            if "checked" not in rows.kept:
                _check_positions(kwargs.get("position_ids"), batch, query)
                if batch is not None and batch.labelled and collected("router_logits"):
                    raise InputError(ROUTERS)
                rows.kept["checked"] = True
            seen = within(
                wanted.pattern.at_layer(getattr(module, "layer_idx", None) or 0), rows.own
            )
        except Exception as error:
            # The other ranks wait for this one's keys: they are told.
            complaint = error
        sink = kwargs.get("s_aux")
        out, lse = attend_unless(
            complaint,
            query,
            key,
            value,
            seen,
            group=wanted.group,
            shards="even" if batch is None else batch.shards,
            positions=None,
            segments=None if batch is None else batch.segments,
            scale=scaling,
            return_lse=True,
            impl=impl,
            layer=0,
            agreed=False,
        )
        if sink is not None:
            out = beside_sink(out, lse, sink)
        return out.transpose(1, 2).contiguous(), None

    return longspan_parallel_attention


def _check_positions(given: Any, batch: Batch | None, query: Tensor) -> None:
    """Refuse other rows than those of the batch: they would be rotated as if they were those."""
    how = "call the model with what shard(...) of the handle returned: model(**handle.shard(ids))"
    if batch is None:
        raise InputError(f"nobody said which rows of the sequence these are; {how}")
    if not isinstance(given, Tensor):
        return
    # Models with several kinds of positions stack them in front.
    wanted = torch.from_numpy(batch.positions).to(given.device)
    fits = len(wanted) in (1, len(query)) and given.shape[-1] == wanted.shape[1]
    if not fits or not bool((given == wanted).all()):
        raise InputError(f"position_ids are not those of this rank's rows; {how}")


def _mask(
    attention: str,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | Rows | None = None,
    **_: Any,
) -> Rows:
    """The mask function: what the layers' own mask allows, and where the rows stand."""
    if isinstance(attention_mask, Rows):
        return attention_mask
    # Jumps of positions between a rank's stretches look like documents: those are told apart.
    own, _documents = read_mask(mask_function)
    complaint = None
    if attention_mask is not None and not bool(attention_mask.to(torch.bool).all()):
        complaint = InputError(
            "across ranks padding is a negative segment: shard(ids, segments=...), no "
            "attention_mask"
        )
    elif (q_length, int(q_offset)) != (kv_length, int(kv_offset)):
        complaint = InputError(
            "across ranks there is no cache: call the model with use_cache=False"
        )
    return Rows(
        attention=attention,
        queries=q_length,
        keys=kv_length,
        query_start=0,
        key_start=0,
        own=own,
        masked=True,
        # Raised where all ranks hear of it.
        kept={"batch": registered(attention).batch, "complaint": complaint},
    )
