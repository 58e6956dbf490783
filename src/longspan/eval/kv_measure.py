"""What policies lose at a budget: perplexity after forgetting, and what can still be looked up.

Every prompt is read once, by a cache that waits; each policy at each budget gets a copy of it
(``longspan.hf.fork``), forgets, and goes on with the text or the question behind the prompt. So a
batch costs one prompt, and each policy and budget a copy and some tokens. Sparse prefill methods
change the computation of the prompt itself: each reads it anew, and keeps the whole cache.

Axes: B prompts of a batch, N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan import hf, kv
from longspan.errors import DataError
from longspan.eval.kv_forms import Gates
from longspan.eval.kv_gates import WATCHED, streaming_gates
from longspan.eval.kv_sweep import DENSE, Cell, Sweep, source_of
from longspan.eval.perplexity import check_limit
from longspan.eval.progress import Progress, silent
from longspan.eval.records import Records
from longspan.eval.ruler import TASKS, score
from longspan.eval.ruler_run import check_rooms, fitting
from longspan.eval.suite import spread
from longspan.hf.fork import fork, waiting
from longspan.kv.policy import Policy
from longspan.kv.snapkv import SnapKV
from longspan.kv.timing import everything


def run(
    model: Any,
    tokenizer: Any,
    text: Sequence[Tensor],
    sweep: Sweep,
    *,
    limit: int | None = None,
    records: Records | None = None,
    progress: Progress = silent,
) -> Records:
    """Measure what the records do not hold yet.

    Args:
        model: a Hugging Face causal language model; patterns applied to it stay.
        tokenizer: its tokenizer.
        text: int64 token ids of documents; unused if no perplexity is asked for.
        sweep: what to measure.
        limit: at most so many figures, for a quick look.
        records: measurements that are already done; new ones are added.
        progress: called with (what, figures done, figures in all, policy).

    Raises:
        InputError: for a limit below 1.
        DataError: too little text, or a length that cannot hold a question.
    """
    check_limit(limit)
    records = Records(None, {}) if records is None else records
    check_prompts(tokenizer, text, sweep, limit)
    cells = sweep.cells()[:limit]
    run_ = _Run(model, tokenizer, sweep, records)
    for done, (cell, result) in enumerate(run_.measured(cells, text), start=1):
        if result is not None:
            records.add(cell.key, result)
        progress("kv", done, len(cells), f"{cell.measure}: {cell.form.key} {cell.share:.0%}")
    return records


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """A batch of prompts.

    Attributes:
        context: ids [B, N], what a policy sees in any case.
        question: ids [B, M], what follows: a question, or the text going on.
        mask: int64 [B, N + M], 0 for padding; None: there is none.
        answers: what each continuation should contain; none: the text is scored.
        tokens: most tokens of an answer.
    """

    context: Tensor
    question: Tensor
    mask: Tensor | None = None
    answers: tuple[tuple[str, ...], ...] = ()
    tokens: int = 0


def check_prompts(
    tokenizer: Any, text: Sequence[Tensor], sweep: Sweep, limit: int | None = None
) -> None:
    """Look for prompts that cannot be made, before anything is measured.

    Raises:
        DataError: too little text, or a length that cannot hold a question.
    """
    sources = dict.fromkeys(source_of(cell.measure) for cell in sweep.cells()[:limit])
    if "text" in sources:
        text_pieces(text, sweep)
    tasks = [source for source in sources if source != "text"]
    check_rooms(tokenizer, [(task, sweep.length, 1) for task in tasks])


def text_pieces(text: Sequence[Tensor], sweep: Sweep) -> list[Tensor]:
    """The prompts with what follows them, int64 ids each.

    Raises:
        DataError: too little text.
    """
    pieces = spread(text, sweep.length + max(sweep.new, sweep.steps), sweep.samples)
    if len(pieces) < sweep.samples:
        raise DataError(
            f"The text gives {len(pieces)} of {sweep.samples} pieces of {sweep.length} tokens "
            "and what follows: give more text, fewer --samples or a shorter --length."
        )
    return pieces


class _Run:
    """The work of ``run``."""

    def __init__(self, model: Any, tokenizer: Any, sweep: Sweep, records: Records) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.sweep, self.records = sweep, records
        self.device = next(model.parameters()).device

    @torch.inference_mode()
    def measured(
        self, cells: Sequence[Cell], text: Sequence[Tensor]
    ) -> Iterator[tuple[Cell, dict[str, Any] | None]]:
        """Every cell and its figures; None where they are known, or there are none."""
        of_batch: dict[tuple[str, int], list[Cell]] = {}
        for cell in cells:
            of_batch.setdefault((source_of(cell.measure), cell.start), []).append(cell)
        for (source, start), same in of_batch.items():
            missing = [cell for cell in same if cell.key not in self.records]
            yield from ((cell, None) for cell in same if cell.key in self.records)
            if not missing:
                continue
            prompts = self._text(text, start) if source == "text" else self._asked(source, start)
            later = [cell for cell in missing if cell.measure.endswith(" later")]
            policies = [c for c in missing if not c.form.prefill and c not in later]
            yield from self._policies(prompts, later, policies)
            for cell in missing:
                if cell.form.prefill:
                    yield cell, self._method(prompts, cell)

    def _text(self, text: Sequence[Tensor], start: int) -> Prompts:
        sweep = self.sweep
        pieces = text_pieces(text, sweep)
        ids = torch.stack(pieces[start : start + sweep.batch]).to(self.device)
        return Prompts(context=ids[:, : sweep.length], question=ids[:, sweep.length :])

    def _asked(self, task: str, start: int, seed: str = "") -> Prompts:
        sweep = self.sweep
        stop = min(start + sweep.batch, sweep.samples)
        drawn = [
            fitting(self.tokenizer, task, sweep.length, f"{sweep.seed}{seed}/{task}/{number}")
            for number in range(start, stop)
        ]
        # The pieces are tokenized apart, so that a policy can decide between them.
        context, mask = self._padded([one.context for one in drawn], first=True)
        question, more = self._padded([one.question for one in drawn], first=False)
        whole = torch.cat([mask, more], 1)
        return Prompts(
            context=context,
            question=question,
            mask=None if bool(whole.all()) else whole,
            answers=tuple(one.answers for one in drawn),
            tokens=sweep.answer or TASKS[task].tokens,
        )

    def _padded(self, texts: Sequence[str], *, first: bool) -> tuple[Tensor, Tensor]:
        """Ids and mask, both int64 [B, N], filled up on the left."""
        read = self.tokenizer(list(texts), add_special_tokens=first, verbose=False)["input_ids"]
        longest = max(map(len, read))
        ids = torch.zeros(len(read), longest, dtype=torch.int64, device="cpu")
        mask = torch.zeros_like(ids)
        for row, found in enumerate(read):
            ids[row, longest - len(found) :] = torch.tensor(found, device="cpu")
            mask[row, longest - len(found) :] = 1
        return ids.to(self.device), mask.to(self.device)

    def _policies(
        self, prompts: Prompts, later: Sequence[Cell], cells: Sequence[Cell]
    ) -> Iterator[tuple[Cell, dict[str, Any] | None]]:
        """Read the prompt once; copies of the cache do the rest.

        None where a policy is not defined at its budget.
        """
        if not (later or cells):
            return
        gates = self._gates([*later, *cells])
        context, whole = prompts.context.shape[1], sum(_widths(prompts))
        asked = whole if prompts.answers else context
        # Questions are a little shorter than a text: a budget may end up below a policy's least.
        first = {c: _policy(c, context, gates) for c in later if c.form.fits(c.share, context)}
        second = {c: _policy(c, asked, gates) for c in cells if c.form.fits(c.share, asked)}
        yield from ((c, None) for c in (*later, *cells) if c not in first and c not in second)
        reader = kv.cache(self.model, waiting([*first.values(), *second.values()]))
        self._feed(reader, prompts.context, prompts.mask)
        for cell, policy in first.items():
            cache = fork(reader, policy)
            held = _held(cache)
            logits = self._feed(cache, prompts.question, prompts.mask)
            yield cell, {**self._answered(cache, prompts, logits), **held}
        logits = torch.empty(0, device="cpu")
        if prompts.answers and second:
            logits = self._feed(reader, prompts.question, prompts.mask)
        for cell, policy in second.items():
            cache = fork(reader, policy)
            held = _held(cache)
            if prompts.answers:
                yield cell, {**self._answered(cache, prompts, logits), **held}
            else:
                yield cell, {**self._scored(cell.measure, cache, prompts), **held}

    def _method(self, prompts: Prompts, cell: Cell) -> dict[str, Any]:
        """Sparse attention for the prompt, exact attention for what follows."""
        ids = prompts.context
        if prompts.answers:
            ids = torch.cat([ids, prompts.question], 1)
        method = cell.form.at(cell.share, ids.shape[1])
        applied = hf.prefill(self.model, method, dense_below=0, report=True)
        with applied:
            out = self._call(None, ids, prompts.mask, 0, 1)
            layers = applied.report()
        figures = {
            name: sum(row[name] for row in layers) / max(1, len(layers))
            for name in ("density", "recall")
        }
        if prompts.answers:
            return {**self._answered(out.past_key_values, prompts, out.logits), **figures}
        return {**self._scored("once", out.past_key_values, prompts), **figures}

    def _scored(self, measure: str, cache: Any, prompts: Prompts) -> dict[str, Any]:
        """Nats per token behind the prompts, for each of them."""
        if measure == "once":
            ids = prompts.question[:, : self.sweep.new]
            logits = self._feed(cache, ids, None, last=self.sweep.new)[:, :-1]
        else:
            ids = prompts.question[:, : self.sweep.steps]
            steps = [self._feed(cache, ids[:, i : i + 1], None) for i in range(ids.shape[1] - 1)]
            logits = torch.cat(steps, 1)
        nll = F.cross_entropy(logits.float().mT, ids[:, 1:], reduction="none")
        return {"nll": nll.mean(1).tolist()}

    def _answered(self, cache: Any, prompts: Prompts, logits: Tensor) -> dict[str, Any]:
        """What is said greedily, until all answers were given or there is no room for more."""
        mask, said = (
            prompts.mask,
            torch.empty(len(prompts.answers), 0, dtype=torch.int64, device="cpu"),
        )
        end, scores, texts = self.tokenizer.eos_token_id, [0.0], [""]
        for _ in range(prompts.tokens):
            token = logits[:, -1].argmax(-1, keepdim=True)
            said = torch.cat([said, token.cpu()], 1)
            rows = [[*row, end] for row in said.tolist()]
            texts = [
                self.tokenizer.decode(row[: row.index(end)], skip_special_tokens=True)
                for row in rows
            ]
            scores = [score(*one) for one in zip(texts, prompts.answers, strict=True)]
            if min(scores) == 1 or said.shape[1] == prompts.tokens:
                break
            if mask is not None:
                mask = torch.cat([mask, torch.ones_like(token)], 1)
            logits = self._feed(cache, token, mask)
        return {"score": scores, "said": texts}

    def _feed(self, cache: Any, ids: Tensor, mask: Tensor | None, last: int = 1) -> Tensor:
        """Logits [B, last, V] of the next tokens."""
        return self._call(cache, ids, mask, cache.get_seq_length(), last).logits

    def _call(self, cache: Any, ids: Tensor, mask: Tensor | None, start: int, last: int) -> Any:
        stop = start + ids.shape[1]
        more: dict[str, Any] = {}
        if mask is not None:
            place = (mask.cumsum(1) - 1).clamp(min=0)
            more = {"attention_mask": mask[:, :stop], "position_ids": place[:, start:stop]}
        return self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=last, **more)

    def _gates(self, cells: Sequence[Cell]) -> Gates:
        """What tells heads apart, from prompts of their own; measured once for all records."""
        if not any(cell.form.needs_gates for cell in cells):
            return ()
        if "gates" not in self.records:
            task = next(iter(self.sweep.tasks), "passkey")
            prompts = self._asked(task, 0, " gates")
            cache = kv.cache(self.model, waiting([SnapKV(1, window=WATCHED)]))
            ids = torch.cat([prompts.context, prompts.question], 1)
            self._feed(cache, ids, prompts.mask)
            self.records.add("gates", {"task": task, "gates": streaming_gates(cache)})
        return self.records["gates"]["gates"]


def _policy(cell: Cell, tokens: int, gates: Gates) -> Policy:
    return everything() if cell.form is DENSE else cell.form.at(cell.share, tokens, gates)


def _widths(prompts: Prompts) -> tuple[int, int]:
    return prompts.context.shape[1], prompts.question.shape[1]


def _held(cache: Any) -> dict[str, float]:
    """Shares of what was seen: tokens kept, and bytes with all that is noted."""
    report = cache.report()
    rows = [row for row in report.layers if row.kind == "policy"]
    seen = sum(layer.store.length.numel() for layer in cache.layers if hasattr(layer, "store"))
    return {
        "kept": sum(row.tokens for row in rows) / max(1, seen * report.seen),
        "bytes": report.bytes / max(1, report.dense_bytes),
    }
