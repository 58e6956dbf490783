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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longspan.errors import InputError, Refusal
from longspan.hf.rows import Rows, within
from longspan.ops.inputs import without_data
from longspan.pattern import Causal, Chunk, Dense, Pattern, Window

CROSSES = (
    "rows of one text that look at those of another, or of an image (cross-attention), are not "
    "supported, nor is a cache of a two-sided model: patterns speak of one sequence. Leave "
    "encoder_hidden_states, images and the cache out, or use the model's own attention: "
    "longspan.hf.remove(model)."
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
