"""Perplexity of long texts: by length, by position, and under the two published protocols.

Three protocols, which are not comparable with each other:

``blocks``
    Windows of L tokens side by side over the joined text; every token is scored once per length,
    so different lengths score the same text (except each window's first token). Cost T.
``sliding``
    LongLoRA (arXiv 2309.12307, its eval.py): windows of L tokens moved by 256 over the joined
    text, *all* tokens of each window scored; exp of the mean of the window means. Cost T L / 256.
``new-tokens``
    YaRN (arXiv 2309.00071, its eval/perplexity.py): windows of L tokens moved by 256 inside each
    document, BOS in front, only the tokens that no window before has scored; exp of the mean of
    the window means, so a document's first window counts as much as a later one. Cost T L / 256.

Axes: B windows of a batch, N tokens of a window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from longspan.errors import DataError, InputError
from longspan.eval.losses import TokenLoss
from longspan.eval.plain import mean
from longspan.eval.progress import Progress, silent
from longspan.eval.records import Records

# Short windows go through the model together, up to so many tokens.
_BATCH_TOKENS = 8192

T = TypeVar("T")

PROTOCOLS = ("blocks", "sliding", "new-tokens")


@dataclass(frozen=True, kw_only=True)
class Window:
    """Tokens ``start .. end`` of text number ``text``, of which the last ``scored`` count."""

    text: int
    start: int
    end: int
    scored: int


def check_protocol(protocol: str, stride: int) -> None:
    """Raise InputError for an unknown protocol, or windows that do not move."""
    if protocol not in PROTOCOLS:
        raise InputError(f"Unknown protocol {protocol!r}: choose one of {', '.join(PROTOCOLS)}.")
    if stride < 1:
        raise InputError(f"Windows must move by at least one token, got a stride of {stride}.")


def windows(
    protocol: str, sizes: Sequence[int], length: int, *, stride: int = 256, bos: bool = False
) -> list[Window]:
    """The windows that a protocol scores.

    Args:
        protocol: one of ``PROTOCOLS``.
        sizes: tokens of each text (``blocks`` and ``sliding`` get the joined text as one).
        length: tokens of a window, with the BOS token if there is one.
        stride: tokens by which the window moves, for ``sliding`` and ``new-tokens``.
        bos: ``new-tokens`` puts a BOS token in front, which takes one place of each window.

    Raises:
        InputError: unknown protocol or stride.
    """
    check_protocol(protocol, stride)
    make = {"blocks": _blocks, "sliding": _sliding, "new-tokens": _new_tokens}[protocol]
    room = length - 1 if bos and protocol == "new-tokens" else length
    return [w for text, size in enumerate(sizes) for w in make(text, size, room, stride, bos)]


def _blocks(text: int, size: int, length: int, stride: int, bos: bool) -> Iterator[Window]:
    for start in range(0, size - length + 1, length):
        yield Window(text=text, start=start, end=start + length, scored=length - 1)


def _sliding(text: int, size: int, length: int, stride: int, bos: bool) -> Iterator[Window]:
    # The published loop leaves out the last start, and asks for one token more than the window.
    for start in range(0, size - length, stride)[:-1]:
        yield Window(text=text, start=start, end=start + length, scored=length - 1)


def _new_tokens(text: int, size: int, length: int, stride: int, bos: bool) -> Iterator[Window]:
    scored_up_to = 0 if bos else 1
    for start in range(0, size, stride):
        end = min(start + length, size)
        if end > scored_up_to:
            yield Window(text=text, start=start, end=end, scored=end - scored_up_to)
        scored_up_to = end
        if end == size:
            return


def perplexity(
    loss: TokenLoss,
    documents: Sequence[Tensor],
    lengths: Sequence[int],
    *,
    protocol: str = "blocks",
    stride: int = 256,
    bos: int | None = None,
    limit: int | None = None,
    bins: int = 32,
    records: Records | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure the perplexity of texts at several context lengths.

    Args:
        loss: the model, ready to score tokens.
        documents: int64 [n] token ids of each text; ``blocks`` and ``sliding`` read them as one
            text.
        lengths: context lengths in tokens.
        protocol: one of ``PROTOCOLS``.
        stride: tokens by which windows move (256 in both publications).
        bos: BOS id, used by ``new-tokens`` as published.
        limit: at most so many windows per length, spread evenly.
        bins: parts of the longest window for the curve by position.
        records: measurements that are already done; new ones are added.
        progress: called with (what, windows done, windows in all).

    Returns:
        ``{"protocol", "stride", "lengths": [{"length", "perplexity", "nll", "windows", "tokens"}],
        "positions": {"length", "edges", "nll"}}``; nll in nats per token; positions belong to the
        longest length.

    Raises:
        InputError: unknown protocol, a length below two tokens, or a limit below 1.
        DataError: a length for which the texts hold no whole window.
    """
    check_limit(limit)
    texts = list(documents) if protocol == "new-tokens" else [torch.cat(list(documents))]
    records = Records(None, {}) if records is None else records
    by_length = {}
    for length in sorted(set(lengths)):
        if length < 2:
            raise InputError(f"A context of {length} tokens predicts nothing: give 2 or more.")
        found = windows(
            protocol, [len(t) for t in texts], length, stride=stride, bos=bos is not None
        )
        if not found:
            raise DataError(
                f"The text holds {sum(len(t) for t in texts)} tokens, too few for one window of "
                f"{length} tokens "
                f"with protocol {protocol!r}: give more text or a shorter length."
            )
        by_length[length] = evenly(found, limit)

    total, done = sum(map(len, by_length.values())), 0
    front = bos if protocol == "new-tokens" else None
    for length, found in by_length.items():
        missing = [w for w in found if _key(length, w) not in records]
        done += len(found) - len(missing)
        for batch in _batches(missing, tokens=max(*by_length, _BATCH_TOKENS)):
            for window, result in zip(
                batch, _score(loss, texts, batch, front, length, bins), strict=True
            ):
                records.add(_key(length, window), result)
            done += len(batch)
            progress("perplexity", done, total)

    rows = []
    for length, found in by_length.items():
        results = [records[_key(length, w)] for w in found]
        nll = mean(r["nll"] for r in results)
        rows.append(
            {
                "length": length,
                "perplexity": exp(nll),
                "nll": nll,
                "windows": len(results),
                "tokens": sum(w.scored for w in found),
            }
        )
    longest = max(by_length)
    curves = [records[_key(longest, w)]["bins"] for w in by_length[longest]]
    columns = [[x for x in column if x is not None] for column in zip(*curves, strict=True)]
    positions = {
        "length": longest,
        "edges": _edges(longest, bins),
        "nll": [sum(column) / len(column) if column else None for column in columns],
    }
    return {"protocol": protocol, "stride": stride, "lengths": rows, "positions": positions}


def check_limit(limit: int | None) -> None:
    """Raise InputError for a limit that leaves nothing to measure."""
    if limit is not None and limit < 1:
        raise InputError(
            f"A limit is at least 1, got {limit}; leave it out to measure everything."
        )


def evenly(items: Sequence[T], count: int | None) -> list[T]:
    """``count`` of the items spread over all of them, always the same; None or too many: all."""
    count = len(items) if count is None else min(count, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def exp(nll: float) -> float:
    """Perplexity of a loss in nats; infinite where it overflows."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def _key(length: int, window: Window) -> str:
    return f"{length}/{window.text}/{window.start}"


def _edges(length: int, bins: int) -> list[int]:
    return [round(i * length / bins) for i in range(bins + 1)]


def _batches(found: Sequence[Window], tokens: int) -> Iterator[list[Window]]:
    for size, group in groupby(found, key=lambda w: w.end - w.start):
        same, rows = list(group), max(1, tokens // size)
        yield from (same[i : i + rows] for i in range(0, len(same), rows))


@torch.no_grad()
def _score(
    loss: TokenLoss,
    texts: Sequence[Tensor],
    batch: Sequence[Window],
    bos: int | None,
    length: int,
    bins: int,
) -> Iterator[dict[str, Any]]:
    ids_BN = torch.stack([texts[w.text][w.start : w.end] for w in batch]).to(loss.device)
    if bos is not None:
        ids_BN = torch.cat([torch.full_like(ids_BN[:, :1], bos), ids_BN], dim=1)
    losses_BN = loss(ids_BN).double().cpu()
    edges = _edges(length, bins)
    for window, losses in zip(batch, losses_BN, strict=True):
        first = len(losses) - window.scored
        spans = [(max(first, lo - 1), hi - 1) for lo, hi in pairwise(edges)]
        yield {
            "nll": losses[first:].mean().item(),
            "bins": [
                losses[lo:hi].mean().item() if len(losses[lo:hi]) else None for lo, hi in spans
            ],
        }
