"""Everything that can be wrong with an extension, found before any work: settings, folders, text,
model.

The order is by cost: text of the pattern, output folder, text files, model, tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspan import hf, pattern
from longspan.errors import DataError, InputError, Refusal
from longspan.hf.models import check_folder, contents_hash
from longspan.hf.rope import check_rope, rope_parameters, trained_length
from longspan.pattern import Pattern
from longspan.train.batches import Batches
from longspan.train.data import (
    Document,
    Split,
    python_sources,
    read_documents,
    require,
    tokenize_documents,
)
from longspan.train.extend_folder import STEPS, check_output, started_with
from longspan.train.resume import check_continues
from longspan.train.settings import ExtendSettings

OWN_ATTENTION = "none"


@dataclass(frozen=True, kw_only=True)
class Job:
    """An extension whose inputs were all found to be in order."""

    settings: ExtendSettings
    out: Path
    pattern: Pattern | None
    model: Any
    tokenizer: Any
    train_text: list[Tensor]
    heldout_text: list[Tensor]
    trained_length: int

    def fingerprint(self) -> dict[str, Any]:
        """Settings and text in the form in which a resumed run must repeat them."""
        settings = asdict(self.settings)
        # Where checkpoints fall changes no number.
        settings["loop"] = {k: v for k, v in settings["loop"].items() if k != "save_every"}
        flat = {
            f"{outer}.{k}" if outer else k: v
            for outer, part in (
                ("", settings),
                ("loop", settings["loop"]),
                ("suite", settings["suite"]),
            )
            for k, v in part.items()
            if k not in ("loop", "suite")
        }
        flat["model contents"] = contents_hash(self.settings.model)
        flat["training text"] = text_hash(self.train_text)
        flat["held-out text"] = text_hash(self.heldout_text)
        return json.loads(json.dumps(flat))

    def batches(self) -> Batches:
        """The addressable supply of training batches."""
        return Batches(self.settings, self.train_text, self.tokenizer)

    def summary(self) -> dict[str, Any]:
        """What would be done, in numbers."""
        from longspan.planning.plan import plan

        s, config = self.settings, self.model.config.get_text_config()
        tokens = sum(map(len, self.train_text))
        seen = s.loop.steps * s.loop.accumulate * s.batch * s.length
        density = None
        if self.pattern is not None:
            density = plan(self.pattern, s.length, config.num_attention_heads).density
        return {
            "model": s.model,
            "architecture": type(self.model).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "trained_length": self.trained_length,
            "length": s.length,
            "rope": rope_parameters(config, s.rope, s.length, factors=s.rope_factors),
            "pattern": s.pattern,
            # Of the pairs that dense causal attention computes.
            "pattern_share_of_causal": density and density / ((s.length + 1) / (2 * s.length)),
            "training_tokens": tokens,
            "heldout_tokens": sum(map(len, self.heldout_text)),
            "tokens_to_see": seen,
            "epochs": seen / tokens,
            "eval_lengths": list(s.suite.lengths),
            "device": s.device,
            "out": str(self.out),
        }


def prepare(settings: ExtendSettings, out: Path, *, resume: bool = False) -> Job:
    """Check everything and load the model; nothing is written.

    Raises:
        LongspanError: a child that names what is wrong and what to do.
    """
    parsed = None if settings.pattern == OWN_ATTENTION else pattern.parse(settings.pattern)
    check_output(out, resume=resume)
    check_folder(settings.model)
    documents = read_text(settings.data, settings.python_stdlib, "train")
    heldout = None
    if settings.eval_data:
        heldout = read_documents(settings.eval_data)
    elif settings.python_stdlib:
        heldout = python_sources("heldout")
    model, tokenizer = hf.load_model(settings.model, dtype=settings.dtype, device=settings.device)
    check_routes(model, settings.model)
    trained = trained_length(model.config)
    if settings.length <= trained:
        raise InputError(
            f"{settings.model} was trained for {trained} tokens; a length of {settings.length} "
            "extends nothing: "
            f"give more than {trained}."
        )
    check_rope(model, settings.rope, settings.length, factors=settings.rope_factors)
    if parsed is not None:
        rehearse(model, parsed)
    if not settings.suite.lengths:
        suite = replace(settings.suite, lengths=doubling(trained, settings.length))
        settings = replace(settings, suite=suite)
    longest = max(settings.suite.lengths)
    train_text = tokenize_documents(tokenizer, documents)
    if heldout is None:
        require("The training text", train_text, settings.length, held_out=longest)
        train_text, heldout_text = hold_out(train_text, longest)
    else:
        heldout_text = tokenize_documents(tokenizer, heldout)
    require("The training text", train_text, settings.length)
    require("The held-out text", heldout_text, longest)
    settings.suite.check_passkey(tokenizer)
    job = Job(
        settings=settings,
        out=out,
        pattern=parsed,
        model=model,
        tokenizer=tokenizer,
        train_text=train_text,
        heldout_text=heldout_text,
        trained_length=trained,
    )
    check_resume(job)
    return job


def doubling(trained: int, length: int) -> tuple[int, ...]:
    """Lengths from the trained one to the target by doubling: 512, 1024, 2048, 4096."""
    lengths = [trained]
    while 2 * lengths[-1] < length:
        lengths.append(2 * lengths[-1])
    return (*lengths, length)


def check_resume(job: Job) -> None:
    """Raise DataError if the run in the output folder was started with other settings."""
    old = started_with(job.out)
    if old is not None:
        check_continues(job.out, old, job.fingerprint(), steps=STEPS)


def check_routes(model: Any, name: str) -> None:
    """Raise Refusal if a pattern cannot be put into every attention layer of the model."""
    report = hf.inspect(model)
    if not report.routes:
        reasons = "; ".join(map(str, report.reasons))
        raise Refusal(
            f"{name} ({type(model).__name__}) does not take a pattern: {reasons}. "
            "Use a model whose layers call the attention interface of transformers."
        )


@torch.no_grad()
def rehearse(model: Any, wanted: Pattern) -> None:
    """Train a model on two tokens under a pattern, without a step: find now what would fail later.

    Raises:
        LongspanError: the pattern does not fit the model, or its layers ask for something that no
            kernel computes, such as dropout of attention weights.
    """
    # Nothing to compile for two tokens.
    with hf.apply(model, wanted, impl="reference"):
        model.train()
        try:
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device))
        finally:
            model.eval()


def hold_out(text: Sequence[Tensor], at_least: int) -> tuple[list[Tensor], list[Tensor]]:
    """(rest, held out): the last tenth of the tokens, or ``at_least`` so many, is held out."""
    missing = max(sum(map(len, text)) // 10, at_least)
    rest, held = list(text), []
    while missing > 0 and rest:
        document = rest.pop()
        cut = max(0, len(document) - missing)
        held.insert(0, document[cut:])
        if cut:
            rest.append(document[:cut])
        missing -= len(document) - cut
    return rest, held


def read_text(data: Sequence[str], python_stdlib: bool, split: Split) -> list[Document]:
    """Documents of files, folders and (``split`` of) the standard library.

    Raises:
        DataError: nothing was asked for, or it cannot be read.
    """
    if not data and not python_stdlib:
        raise DataError("There is no text: give --data with files or folders, or --python-stdlib.")
    documents = read_documents(data) if data else []
    return documents + (python_sources(split) if python_stdlib else [])


def text_hash(text: Sequence[Tensor]) -> str:
    """Short hash of token ids."""
    digest = hashlib.sha256()
    for document in text:
        digest.update(document.numpy().tobytes())
    return digest.hexdigest()[:16]
