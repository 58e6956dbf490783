"""From transformers' mask to positions and segments: a small record per forward, never a mask.

transformers composes what a layer may see as nested functions of (query index, key index) and
hands them, with the padding mask and the offsets of the cache, to the mask function registered
beside an attention function. Here that composition is read back by name (causal, sliding window,
chunk, packed documents) and anything not understood is refused: an unread part would be a silent
leak.

What becomes of each:

- *padding* (a 2-D ``attention_mask``): padded rows get segment -1 and positions count real tokens,
  so that a row equals the same text alone, with padding on the left, the right or in the middle.
- *packed documents*: transformers takes ``position_ids`` that do not rise by one as the start of
  another document, but only without ``attention_mask`` and without cache (``use_cache=False``).
  Each document is a segment and patterns count from its start. With a cache transformers would let
  documents see each other; here that is an error.
- *window and chunk* of the model's own layers (Mistral, Gemma, Llama 4) are intersected with the
  pattern.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longspan.errors import InputError, Refusal
from longspan.ops.inputs import without_data
from longspan.pattern import Causal, Chunk, Dense, Pattern, Window
from longspan.planning import Plan, plan

Table = NDArray[np.int64]

CROSSES = (
    "rows of one text that look at those of another, or of an image (cross-attention), are not "
    "supported, nor is a cache of a two-sided model: patterns speak of one sequence. Leave "
    "encoder_hidden_states, images and the cache out, or use the model's own attention: "
    "longspan.hf.remove(model)."
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Rows:
    """Where the query and key rows of one forward pass stand, for all layers of one type.

    transformers carries it where a mask would be, through checkpointing and static caches.

    Attributes:
        attention: the attention implementation it was made for.
        queries: query rows N.
        keys: key rows M.
        query_start: row of the first query in the whole sequence, padding counted.
        key_start: row of the first key, above 0 where a sliding cache has dropped keys.
        own: what the model's own mask allows.
        positions: query positions [B, N]; None if rows count as they lie.
        segments: query segments [B, N], negative for padding; None if there is only one.
        key_positions: key positions [B, M]; None as for queries.
        key_segments: key segments [B, M]; None as for queries.
        masked: whether padding was stated, by an ``attention_mask``.
        real: which rows so far are tokens, the queries among them, bool [B, rows]; None: all.
        kept: what layers of this forward pass share: plans, and whether positions were checked.
    """

    attention: str
    queries: int
    keys: int
    query_start: int
    key_start: int
    own: Pattern
    positions: Table | None = None
    segments: Table | None = None
    key_positions: Table | None = None
    key_segments: Table | None = None
    masked: bool = False
    real: NDArray[np.bool_] | None = None
    kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    # `generate` with a static cache makes masks ahead and treats them as 4-D tensors.
    ndim: ClassVar[int] = 4

    def contiguous(self) -> Rows:
        """Itself; see ``ndim``."""
        return self

    def __getitem__(self, index: Any) -> Rows:
        """The record of the last query rows, as of a 4-D mask: ``rows[:, :, -1:, :]``.

        Gemma 4 computes layers that share keys for the rows alone whose logits are wanted.

        Raises:
            Refusal: for anything else.
        """
        whole = slice(None)
        taken = index[2] if isinstance(index, tuple) and len(index) == 4 else None
        if isinstance(taken, slice) and (whole, whole, taken, whole) == index:
            first, end, step = taken.indices(self.queries)
            if (first, end, step) == (0, self.queries, 1):
                return self
            if first < end == self.queries and step == 1:
                return replace(
                    self,
                    queries=end - first,
                    query_start=self.query_start + first,
                    # Packed documents have none: the planner takes queries for the last keys.
                    positions=None if self.positions is None else self.positions[:, first:],
                    segments=None if self.segments is None else self.segments[:, first:],
                    kept={},
                )
        raise Refusal(
            f"This model takes {index!r} of its attention mask, which longspan does not read; use "
            "its own attention: longspan.hf.remove(model)."
        )

    def __getattr__(self, name: str) -> Any:
        # Reached only for what the record does not have.
        raise AttributeError(
            f"{name!r}: this model computes with its attention mask instead of handing it on, "
            "which longspan does not support; use its own attention: longspan.hf.remove(model)."
        )

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any) -> Any:
        """Take the place of a mask only with longspan's attention.

        Raises:
            Refusal: when another attention function receives the record.
        """
        raise Refusal(
            "Another attention received the mask record of longspan: a backward pass with "
            "gradient checkpointing after the pattern was removed, or masks made ahead for "
            "another attention. Keep the pattern applied until the backward pass is done."
        )

    def plan(self, pattern: Pattern, layer: int, heads: int) -> Plan:
        """The plan of a layer's pattern within the model's own mask; one per kind of layer."""
        seen = within(pattern.at_layer(layer), self.own)
        if (seen, heads) not in self.kept:
            if self.segments is None:
                found = _plain_plan(
                    seen, self.queries, self.keys, self.query_start, self.key_start, heads
                )
            else:
                found = plan(
                    seen,
                    self.queries,
                    heads,
                    keys=self.keys,
                    positions=self.positions,
                    segments=self.segments,
                    key_positions=self.key_positions,
                    key_segments=self.key_segments,
                )
            self.kept[seen, heads] = found
        return self.kept[seen, heads]

    def newest(self) -> Rows:
        """The same queries over their own rows alone, without what a cache held before."""
        if self.keys == self.queries:
            return self
        if "newest" not in self.kept:
            self.kept["newest"] = replace(
                self,
                keys=self.queries,
                key_start=self.query_start,
                key_positions=self.positions,
                key_segments=self.segments,
                kept={},
            )
        return self.kept["newest"]

    def _check_no_restart(self, position_ids: Tensor) -> None:
        """With a mask transformers finds no documents; gaps in the positions are allowed."""
        steps = position_ids.diff(dim=-1) <= 0
        if self.segments is not None:
            real = torch.from_numpy(self.segments >= 0).to(steps.device)
            steps = steps & real[:, 1:] & real[:, :-1]
        if bool(steps.any()):
            raise InputError(
                "position_ids start again within a row, which says packed documents, but beside "
                "an attention_mask transformers lets them see each other. Leave attention_mask "
                "out and pass use_cache=False to keep documents apart, or position_ids that rise."
            )

    def check_positions(self, position_ids: Any) -> None:
        """Refuse packed documents that transformers did not recognise as such; once per forward.

        Raises:
            InputError: if positions jump although neither padding nor documents were found, or
                start again within the real tokens of a row beside an ``attention_mask``.
        """
        packed = self.segments is not None and not self.masked
        if packed or self.queries == 1 or "checked" in self.kept:
            return
        self.kept["checked"] = True
        if not isinstance(position_ids, Tensor) or position_ids.dim() != 2:
            return
        if self.masked:
            if position_ids.shape[1] == self.queries:
                self._check_no_restart(position_ids)
            return
        if bool((position_ids.diff(dim=-1) != 1).any()):
            raise InputError(
                "position_ids do not rise by one and there is no attention_mask, but transformers "
                "made no packed documents of them, so that they would see each other: with a "
                "cache it never does. Pass use_cache=False to keep documents apart, or an "
                "attention_mask for padding. Where it is passed already, this family of models "
                "(such as gpt-oss, AFMoE, OPT) packs no documents: give each its own row."
            )


def check_run(*tensors: Tensor | None) -> None:
    """Refuse calls that compute nothing: records and plans are made of what a call holds."""
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if tracing or torch.compiler.is_exporting():
        raise Refusal(
            "Plans are made of the lengths and masks of each call, which torch.export, torch.onnx "
            "and torch.jit.trace would write down as constants. Export the model with its own "
            "attention, longspan.hf.remove(model); torch.compile works with patterns."
        )
    if any(x is not None and without_data(x) for x in tensors):
        raise InputError(
            "expected tensors with data, got some of device meta, or fake ones: longspan.hf.apply "
            "takes a model there, but it runs only after its weights were loaded."
        )


def rows_mask(
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
    """The mask function that is registered with every longspan attention; see the module text.

    Args:
        attention: the implementation it is registered with.
        batch_size: batch rows.
        q_length: query rows.
        kv_length: key rows that the cache will return.
        q_offset: rows before the first query.
        kv_offset: rows before the first key.
        mask_function: what transformers composed; None means causal.
        attention_mask: [B or 1, rows so far], true for real tokens; or a record made ahead.

    Raises:
        InputError: if ``attention_mask`` has another shape, or no data.
        Refusal: if the mask is composed of something that is not understood, or the model is
            being exported.
    """
    if isinstance(attention_mask, Rows):
        return attention_mask
    own, documents = read_mask(mask_function)
    check_run(attention_mask, documents)
    query_start, key_start = int(q_offset), int(kv_offset)
    if not own.is_causal and q_length != kv_length:
        raise Refusal(f"{q_length} rows and {kv_length} keys: {CROSSES}")
    common = {
        "attention": attention,
        "queries": q_length,
        "keys": kv_length,
        "query_start": query_start,
        "key_start": key_start,
        "own": own,
        "masked": attention_mask is not None,
    }
    if documents is not None:
        segments = documents.expand(batch_size, -1).cpu().numpy().astype(np.int64)
        return Rows(**common, segments=segments, key_segments=segments)
    if attention_mask is None:
        return Rows(**common)
    _check_mask(attention_mask, batch_size, query_start + q_length)
    end = key_start + kv_length
    real = np.zeros((attention_mask.shape[0], end), bool)
    given = attention_mask[:, :end].to(torch.bool).cpu().numpy()
    real[:, : given.shape[1]] = given
    query_rows = slice(query_start, query_start + q_length)
    written = max(query_start + q_length, end if not own.is_causal else 0)
    if real[:, :written].all():
        return Rows(**common)
    # Rows before the first real token would count from -1; they are padding and never asked.
    position = np.maximum(real.cumsum(axis=1, dtype=np.int64) - 1, 0)
    segment = np.where(real, 0, -1)
    return Rows(
        **common,
        positions=position[:, query_rows],
        segments=segment[:, query_rows],
        key_positions=position[:, key_start:],
        key_segments=segment[:, key_start:],
        real=real[:, : query_start + q_length],
    )


def _check_mask(mask: Tensor, batch: int, tokens: int) -> None:
    """Refuse a mask that would make padding of tokens it does not speak of."""
    if mask.dim() != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] < tokens:
        raise InputError(
            "attention_mask must say of each token that the model has read whether it is real: "
            f"expected [{batch}, {tokens}], got {list(mask.shape)}"
        )


def read_mask(function: Callable[..., Any] | None) -> tuple[Pattern, Tensor | None]:
    """Take apart a mask function that transformers composed.

    Returns:
        The pattern it stands for, and the document of each token [B, N] if sequences are packed.

    Raises:
        Refusal: if a part is not understood.
    """
    if function is None:
        return Causal(), None
    found: list[Pattern] = []
    documents = None
    waiting = [function]
    while waiting:
        part = waiting.pop()
        # `sliding_window_overlay.<locals>.inner_mask` is named after the function that made it.
        kind = getattr(part, "__qualname__", repr(part)).partition(".<locals>")[0]
        held = inspect.getclosurevars(part).nonlocals if inspect.isfunction(part) else {}
        match kind:
            case "causal_mask_function":
                found.append(Causal())
            case "bidirectional_mask_function":
                found.append(Dense())
            case "and_masks":
                waiting.extend(held["mask_functions"])
            case "remap_positions_for_packed_sequence":
                waiting.append(held["mask_function"])
            case "packed_sequence_mask_function":
                documents = held["packed_sequence_mask"]
            case "sliding_window_overlay":
                # It bounds the past only; transformers never uses it without the causal part.
                # Qwen2-MoE makes one of size 0 that no layer uses; a row keeps itself at least.
                found.append(Window(max(1, held["sliding_window"])))
            case "sliding_window_bidirectional_overlay":
                found.append(Window(2 * held["sliding_window"] + 1, causal=False))
            case "chunked_overlay":
                found.append(Chunk(held["chunk_size"], causal=False))
            case _:
                raise Refusal(
                    f"The model composes its mask with {kind!r}, which longspan does not read "
                    "(custom masks, image blocks and prefixes are not supported); use its own "
                    "attention for such inputs: longspan.hf.remove(model)."
                )
    own = found[0]
    for part in found[1:]:
        own = within(own, part)
    return own, documents


def within(pattern: Pattern, own: Pattern) -> Pattern:
    """Intersection, written without the parts that add nothing."""
    if pattern == own or own == Dense() or (own == Causal() and pattern.is_causal):
        return pattern
    if pattern == Dense() or (pattern == Causal() and own.is_causal):
        return own
    return pattern & own


@lru_cache(maxsize=16)
def _plain_plan(
    pattern: Pattern, queries: int, keys: int, query_start: int, key_start: int, heads: int
) -> Plan:
    """A plan without padding or documents: kept, because every training step asks for the same."""
    if key_start == 0 and query_start + queries == keys:
        return plan(pattern, queries, heads, keys=keys)
    return plan(
        pattern,
        queries,
        heads,
        keys=keys,
        positions=query_start + np.arange(queries),
        key_positions=key_start + np.arange(keys),
    )
