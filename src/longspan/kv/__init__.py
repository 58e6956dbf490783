"""What a KV cache keeps while text is generated: policies, and the cache that follows them.

``policy`` explains how parts add up; each method is one file, named after it.
"""

from __future__ import annotations

import importlib
from typing import Any

from longspan.kv.adakv import AdaKV
from longspan.kv.expected import ExpectedAttention
from longspan.kv.heavy import Heavy
from longspan.kv.keys import EmbeddingNorm, KeyDiff, KeyNorm
from longspan.kv.policy import Part, Policy, Protector, Scorer
from longspan.kv.protect import Duo, Recent, Sinks
from longspan.kv.quest import Quest
from longspan.kv.snapkv import PyramidKV, SnapKV
from longspan.kv.text import parse
from longspan.kv.timing import after_prefill, each_step, every, everything
from longspan.kv.tova import TOVA
from longspan.kv.view import View
from longspan.select.budgets import Coverage, Ratio, Tokens

__all__ = [
    "TOVA",
    "AdaKV",
    "Coverage",
    "Duo",
    "EmbeddingNorm",
    "ExpectedAttention",
    "Heavy",
    "KeyDiff",
    "KeyNorm",
    "Part",
    "Policy",
    "Protector",
    "PyramidKV",
    "Quest",
    "Ratio",
    "Recent",
    "Scorer",
    "Sinks",
    "SnapKV",
    "Tokens",
    "View",
    "after_prefill",
    "cache",
    "each_step",
    "every",
    "everything",
    "parse",
]


def cache(
    model: Any, policy: Policy | Part | str = "everything()", *, positions: str = "original"
) -> Any:
    """A cache for ``model.generate(..., past_key_values=...)`` that follows a policy.

    See ``longspan.hf.cache.KVCache`` for what it does and reports.

    Args:
        model: a Hugging Face model, or a PEFT model around one. Unless a pattern is applied to it
            already, ``longspan.hf.apply`` puts causal attention in, computed by longspan.
        policy: a policy, a part or text.
        positions: ``"original"``, or ``"packed"``: kept keys are read as if they lay side by side
            before the newest token.

    Raises:
        PolicyError: if the policy does not parse or does not fit the model.
        Refusal: if the model does not route through the attention interface, has no layer that
            keeps everything, or cannot rotate keys for ``"packed"``.
    """
    # By name: only longspan.hf knows transformers, and this package comes before it.
    return importlib.import_module("longspan.hf.cache").cache(model, policy, positions=positions)
