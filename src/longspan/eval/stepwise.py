"""Perplexity through a cache, token by token, as StreamingLLM measures it.

One teacher-forced pass over a text never reads a cache, so a policy that forgets would look
perfect. Here tokens go in as they do in generation, one or a few at a time, and each is predicted
from what the cache still holds:

    nll_t = -log p(x_t | cache after x_<t)

O(N) forward passes of ``chunk`` tokens. Larger chunks are faster and forget between chunks only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from longspan.errors import DataError, InputError
from longspan.eval.perplexity import check_limit, evenly, exp, windows
from longspan.eval.plain import mean
from longspan.eval.progress import Progress, silent
from longspan.eval.records import Records


@torch.inference_mode()
def stepwise(
    model: Any,
    ids: Tensor,
    make_cache: Callable[[], Any],
    *,
    chunk: int = 1,
    prompt: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Perplexity of one text under a cache.

    Args:
        model: a Hugging Face causal language model.
        ids: token ids int64 [N], N at least 2.
        make_cache: gives a fresh cache, such as ``lambda: longspan.kv.cache(model, policy)``.
        chunk: tokens that go in at a time.
        prompt: first tokens that go in at once and are not scored.
        progress: called with (what, tokens done, tokens in all).

    Returns:
        ``{"perplexity", "nll", "tokens", "losses"}``: losses in nats of every scored token.

    Raises:
        InputError: for too short a text, or a chunk or prompt that does not fit.
    """
    if ids.dim() != 1 or len(ids) < 2 or chunk < 1 or not 0 <= prompt < len(ids) - 1:
        raise InputError(
            "stepwise needs at least 2 tokens in one row, a chunk from 1 and a prompt shorter "
            f"than the text; got shape {list(ids.shape)}, chunk {chunk} and prompt {prompt}."
        )
    ids = ids.to(next(model.parameters()).device)
    cache, losses, total = make_cache(), [], len(ids) - 1
    start = 0
    while start < total:
        stop = min(total, prompt if start < prompt else start + chunk)
        logits = model(ids[None, start:stop], past_key_values=cache, use_cache=True).logits[0]
        if start >= prompt:
            target = ids[start + 1 : stop + 1]
            loss = torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")
            losses.append(loss)
        start = stop
        progress("stepwise", start, total)
    each = torch.cat(losses)
    nll = float(each.double().mean())
    return {
        "perplexity": exp(nll),
        "nll": nll,
        "tokens": len(each),
        "losses": each.tolist(),
    }


def by_length(
    model: Any,
    documents: Sequence[Tensor],
    lengths: Sequence[int],
    make_cache: Callable[[], Any],
    *,
    chunk: int = 1,
    prompt: int = 0,
    limit: int | None = None,
    records: Records | None = None,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """``stepwise`` over windows side by side of the joined text, for several lengths.

    Args:
        model: a Hugging Face causal language model.
        documents: int64 token ids [N] of each.
        lengths: tokens of a window.
        make_cache: gives a fresh cache for every window.
        chunk: as for ``stepwise``.
        prompt: as for ``stepwise``.
        limit: at most so many windows per length, spread evenly.
        records: measurements that are already done; new ones are added.
        progress: called with (what, windows done, windows in all).

    Returns:
        ``{"length", "perplexity", "nll", "windows", "tokens"}`` for each length.

    Raises:
        InputError: for a length, chunk, prompt or limit that makes no sense.
        DataError: a length for which the text holds no whole window.
    """
    check_limit(limit)
    records = Records(None, {}) if records is None else records
    text = torch.cat(list(documents))
    found = {
        length: evenly(windows("blocks", [len(text)], length), limit)
        for length in sorted(set(lengths))
    }
    for length, some in found.items():
        if not some:
            raise DataError(
                f"The text holds {len(text)} tokens, too few for one window of {length}: give "
                "more text or a shorter length."
            )
    done, total, rows = 0, sum(map(len, found.values())), []
    for length, some in found.items():
        losses = []
        for window in some:
            key = f"{length}/{window.start}"
            if key not in records:
                ids = text[window.start : window.end]
                result = stepwise(model, ids, make_cache, chunk=chunk, prompt=prompt)
                records.add(key, {"nll": result["nll"], "tokens": result["tokens"]})
            losses.append(records[key])
            done += 1
            progress("stepwise", done, total)
        nll = mean(one["nll"] for one in losses)
        rows.append(
            {
                "length": length,
                "perplexity": exp(nll),
                "nll": nll,
                "windows": len(losses),
                "tokens": sum(one["tokens"] for one in losses),
            }
        )
    return rows
