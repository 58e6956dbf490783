"""Text form of cache policies, for command lines and records: ``parse(str(p)) == p``.

    policy    part + part + ...          | means the same
    part      name(argument, key=value, ...)
    timing    after_prefill(policy), each_step(policy), every(64, policy)

Arguments are those of the classes in ``longspan.kv``; a budget is a number of tokens, a share with
a decimal point, or ``coverage(0.95)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from longspan.kv.adakv import AdaKV
from longspan.kv.expected import ExpectedAttention
from longspan.kv.heavy import Heavy
from longspan.kv.keys import EmbeddingNorm, KeyDiff, KeyNorm
from longspan.kv.policy import POLICIES, Part, Policy
from longspan.kv.protect import Duo, Recent, Sinks
from longspan.kv.quest import Quest
from longspan.kv.snapkv import PyramidKV, SnapKV
from longspan.kv.timing import after_prefill, each_step, every, everything
from longspan.kv.tova import TOVA

PARTS: tuple[type[Part], ...] = (
    AdaKV,
    Duo,
    EmbeddingNorm,
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
    return POLICIES.parse(text, {**{part.name: part for part in PARTS}, **_WRAPPERS})
