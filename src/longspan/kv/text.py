"""Text form of cache policies, for command lines and records: ``parse(str(p)) == p``.

    policy    part + part + ...          | means the same
    part      name(argument, key=value, ...)
    timing    after_prefill(policy), each_step(policy), every(64, policy)

Arguments are those of the classes in ``longspan.kv``; a budget is a number of tokens, a share with
a decimal point, or ``coverage(0.95)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from longspan.errors import PolicyError
from longspan.kv.adakv import AdaKV
from longspan.kv.expected import ExpectedAttention
from longspan.kv.heavy import Heavy
from longspan.kv.keys import KeyDiff, KeyNorm
from longspan.kv.policy import Part, Policy, after_prefill, each_step, every, everything, policy
from longspan.kv.protect import Duo, Recent, Sinks
from longspan.kv.quest import Quest
from longspan.kv.snapkv import PyramidKV, SnapKV
from longspan.kv.tova import TOVA
from longspan.pattern.text import Parser
from longspan.select.budgets import Coverage

PARTS: tuple[type[Part], ...] = (
    AdaKV,
    Duo,
    ExpectedAttention,
    Heavy,
    KeyDiff,
    KeyNorm,
    PyramidKV,
    Quest,
    Recent,
    Sinks,
    SnapKV,
    TOVA,
)
_WRAPPERS: dict[str, Callable[..., Any]] = {
    "after_prefill": after_prefill,
    "coverage": Coverage,
    "each_step": each_step,
    "every": every,
    "everything": everything,
}


def parse(text: str) -> Policy:
    """Read a policy from its text form.

    Args:
        text: for example ``"sinks(4) + recent(256) + heavy(256)"``.

    Raises:
        PolicyError: if the text does not parse; shows the place and the nearest name.
    """
    if not isinstance(text, str):
        raise PolicyError(f"expected a policy as text, got {text!r} ({type(text).__name__})")
    found = _PolicyParser(text).whole()
    if isinstance(found, Coverage):
        raise PolicyError(f"{text!r} is a budget, not a policy; write for example heavy({text})")
    return policy(found)


class _PolicyParser(Parser):
    noun = "cache policy"
    example = "sinks(4) + recent(256) + heavy(256)"
    raises = PolicyError

    def known(self) -> Mapping[str, Callable[..., Any]]:
        return {**{part.name: part for part in PARTS}, **_WRAPPERS}

    def union(self) -> Any:
        value = self.atom()
        while self.take("+") or self.take("|"):
            start = self.tokens[self.at][2]
            right = self.atom()
            if not all(isinstance(side, Part | Policy) for side in (value, right)):
                raise self.error("only parts of a policy can be added", start)
            try:
                value = policy(value) + right
            except PolicyError as error:
                raise self.error(str(error), start) from None
        return value
