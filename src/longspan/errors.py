"""Errors that longspan raises.

Everything a user can cause is a ``LongspanError`` (a ``ValueError``): the text shows what was
passed, what was expected and what to do next. ``assert`` is kept for our own invariants. The
command line turns each class into its exit code: 1 failed, 2 wrong usage, 3 refused.
"""

from __future__ import annotations


class LongspanError(ValueError):
    """Base of every error that is about what the caller passed."""

    exit_code = 2


class PatternError(LongspanError):
    """A pattern that does not parse, or whose parameters make no sense."""


class PlanError(LongspanError):
    """A pattern that cannot be laid out for the given lengths, heads, positions or segments."""


class PolicyError(LongspanError):
    """A cache policy that does not parse, or whose parameters make no sense."""


class InputError(LongspanError):
    """Tensors of the wrong shape, dtype or device."""


class DataError(LongspanError):
    """Text or model files that are missing, unreadable or too short."""


class Refusal(LongspanError):
    """A kernel or a model that cannot do what was asked, with each reason."""

    exit_code = 3


class RunError(LongspanError):
    """Work that started and could not finish; what was finished is kept."""

    exit_code = 1
