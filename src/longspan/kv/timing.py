"""When a policy acts: wrappers around a whole sum of parts; see ``policy``."""

from __future__ import annotations

from typing import Any

from longspan.errors import PolicyError
from longspan.kv.policy import Policy, policy
from longspan.select.sums import check_whole


def everything() -> Policy:
    """Nothing is forgotten."""
    return Policy()


def after_prefill(what: Any) -> Policy:
    """Act once, between a prompt and the first token after it."""
    return _timed(what, 0)


def each_step(what: Any) -> Policy:
    """Act after every forward pass."""
    return _timed(what, 1)


def every(tokens: int, what: Any) -> Policy:
    """Act once at least ``tokens`` tokens have come since the last time.

    The cache outgrows its budget by that much in between, and scoring costs that much less.
    """
    check_whole("every", 1, tokens=tokens)
    return _timed(what, tokens)


def _timed(what: Any, interval: int) -> Policy:
    inner = policy(what)
    if inner.interval is not None:
        raise PolicyError(f"{inner} says already when it acts")
    return Policy(inner.parts, interval)
