"""What ``longspan compare`` compares: patterns and mechanisms, each as a layer beside a model.

An entry is a text: a pattern ("window(60) | sink(4)") or a class of ``longspan.mechanism`` with
plain options ("TopK(keep=32)"). Where an option is left out that starts a mechanism near dense
attention, it is filled in, as ``longspan.hf.convert`` does.

Axes: B batch, H query heads, K key heads, N rows, D head width.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from longspan import mechanism as mechanisms
from longspan.bench import dense
from longspan.errors import InputError
from longspan.mechanism.layer import MechanismLayer, options_of
from longspan.ops import attend
from longspan.pattern import Pattern, parse
from longspan.viz.cards import CARDS

# Of about 64 keys a row where a method lets that be chosen, so that one budget is compared.
PATTERNS = (
    "causal()",
    "window(64)",
    "window(60) | sink(4)",
    "chunk(64)",
    "shifted_chunk(64)",
    "scca.fixed(64)",
    "scca.flow(64)",
    "strided(8)",
    "diagonals(16) | window(32)",
    "dilated(64, [1, 2, 4, 8])",
    "ssa(32, 16)",
    "sda(256, 4)",
    "longnet([64, 128, 256], [1, 2, 4])",
    "chunk(16) | random_blocks(16, 3, apart=1)",
    "longformer(60, [0, 1, 2, 3], causal=true)",
    "bigbird(16, 1, causal=true)",
    "sparse_transformer(32)",
    "chunk(32) | summaries(32, 4)",
    "longmixed(64, 4)",
    "etc(28, 8)",
    "swin(64)",
)
MECHANISMS = (
    "AdaptiveSpan(max_span=64, ramp=8)",
    "BigBirdAttention(block=16, random=1)",
    "BlockGate(block=16, top=4)",
    "DualChunkAttention(chunk=384, local=64)",
    "HierarchicalAttention(chunk=32)",
    "LSHAttention(buckets=16, rounds=2, chunk=32)",
    "LinearAttention()",
    "Linformer(rank=64)",
    "LongformerAttention(window=64, global_tokens=(0,))",
    "MoBA(block=16, top=4)",
    "NSA(block=16, stride=8, select_block=16, select=3, window=16)",
    "Nystromformer(landmarks=64)",
    "Performer(features=64)",
    "PooledChunkAttention(chunk=32)",
    "RoutingAttention(clusters=8, window=64)",
    "Synthesizer()",
    "TopK(keep=64)",
)
GROUPS = {"patterns": PATTERNS, "mechanisms": MECHANISMS}


class PatternLayer(MechanismLayer):
    """Attention over a pattern, built like a mechanism.

    Args:
        d_model: width of the tokens.
        heads: query heads.
        pattern: where each query may look.
        layer: number of the layer, for patterns that differ between layers.
        kwargs: of ``MechanismLayer``.
    """

    def __init__(
        self, d_model: int, heads: int, *, pattern: Pattern, layer: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(d_model, heads, **kwargs)
        self.pattern, self.layer = pattern, layer

    def mix(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        return attend(q, k, v, self.pattern, layer=self.layer)


class DenseLayer(MechanismLayer):
    """Dense causal attention of PyTorch: what every entry is measured against."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        half = q.is_cuda and q.element_size() == 2
        offered = dense.on_gpu() if half else dense.on_cpu()
        return next(iter(offered.values()))(q, k, v)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of the tables.

    Attributes:
        text: as it was given.
        kind: class of its layers.
        options: their keyword arguments beside sizes and projections.
        pattern: where rows may look; None for a mechanism.
    """

    text: str
    kind: type[MechanismLayer]
    options: Mapping[str, Any] = field(default_factory=dict)
    pattern: Pattern | None = None

    @property
    def group(self) -> str:
        """A key of ``GROUPS``."""
        return "mechanisms" if self.pattern is None else "patterns"

    @property
    def causal(self) -> bool:
        """Whether rows see no later token."""
        if self.pattern is not None:
            return self.pattern.is_causal
        return not self.kind.no_causal_form and bool(self.options.get("causal", True))

    @property
    def formula(self) -> str:
        """Time for N tokens: as the module of a mechanism, or the card of a pattern, says it."""
        if self.pattern is None:
            return _first_order(sys.modules[self.kind.__module__].__doc__ or "")
        costs = {card.name: card.cost for card in CARDS}
        names = re.findall(r"[a-z_.]+(?=\()", str(self.pattern))
        # A preset prints as its parts, and wrappers cost what is in them.
        parts = [costs[name] for name in names if "its parts" not in costs.get(name, "its parts")]
        return " + ".join(dict.fromkeys(_first_order(part) for part in parts)) or "-"

    def at(self, n: int) -> dict[str, Any]:
        """Options of its layers, for sequences of at most ``n`` tokens."""
        # Weights for each position: no longer than what is measured.
        long = {"max_length": n} if "max_length" in options_of(self.kind) else {}
        return {**long, **self.options}


def choose(given: Sequence[str]) -> tuple[Entry, ...]:
    """Entries by their texts; "patterns" and "mechanisms" stand for all of a group.

    Raises:
        LongspanError: if a text is neither a pattern nor a mechanism, or an option is wrong.
    """
    texts = [one for text in given or GROUPS for one in GROUPS.get(text, (text,))]
    return tuple(entry(text) for text in dict.fromkeys(texts))


def entry(text: str) -> Entry:
    """One entry from its text."""
    name = text.split("(", 1)[0].strip()
    known = {one.split("(", 1)[0] for one in MECHANISMS}
    if name not in known:
        if name[:1].isupper():
            raise InputError(
                f"{name} is no layer of longspan.mechanism; there are {', '.join(sorted(known))}"
            )
        pattern = parse(text)
        return Entry(text=text, kind=PatternLayer, options={"pattern": pattern}, pattern=pattern)
    kind = getattr(mechanisms, name)
    allowed = options_of(kind)
    given = _arguments(text, name)
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        raise InputError(
            f"{name} has no option {', '.join(unknown)}; it has {', '.join(sorted(allowed))}"
        )
    given = {key: value for key, value in kind.near_dense.items() if key in allowed} | given
    missing = [k for k, one in allowed.items() if one.default is one.empty and k not in given]
    if missing:
        raise InputError(f"{name} needs {', '.join(missing)}, as in {_example(name)}")
    return Entry(text=text, kind=kind, options=given)


def _arguments(text: str, name: str) -> dict[str, Any]:
    """Keyword arguments of a call whose values are literals."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if isinstance(call, ast.Name):
            return {}
        if isinstance(call, ast.Call) and not call.args and all(a.arg for a in call.keywords):
            return {str(a.arg): ast.literal_eval(a.value) for a in call.keywords}
    except (SyntaxError, ValueError):
        pass
    raise InputError(
        f"expected a mechanism with plain options by name, as in {_example(name)}; got {text!r}"
    )


def _example(name: str) -> str:
    return next(one for one in MECHANISMS if one.split("(", 1)[0] == name)


def _first_order(text: str) -> str:
    """The first "O(...)" of a text, without the O and its parentheses."""
    start = text.find("O(") + 2
    if start < 2:
        return "-"
    depth = 1
    for end in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        if not depth:
            return text[start:end]
    return "-"
