"""Cache policies and prefill methods at a budget: names for the usual ones, templates for others.

A budget is a share of the prompt that a key head keeps, everything counted: sinks, recent tokens
and windows too. A template says where it goes:

    {n}       tokens kept in all
    {w}       what is left of them beside 4 sinks
    {c}       what is left of them beside 4 sinks and 32 recent tokens
    {half}    half of {w}
    {share}   the budget itself, a number up to 1
    {block}   tokens of a block: about a 32nd of the prompt, 16 to 128
    {duo}     gates, and the share of streaming heads at which heads keep n on average

as in ``"snapkv({c}, kernel=7)"`` or ``"xattention({share}, block={block})"``. A prefill method
keeps the whole cache, so its budget is what it is given; what it computes of it is measured.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longspan import kv, select
from longspan.errors import InputError, PolicyError
from longspan.kv.policy import RECENT, SINKS

POLICIES: Mapping[str, str] = {
    "recent": "recent({n}) + sinks(0)",
    "streaming": "sinks(4) + recent({w})",
    "heavy": "heavy({c})",
    "heavy.half": "recent({half}) + heavy({half})",
    "heavy.age": "heavy({c}, age=true)",
    "heavy.prompt": "heavy({c}, streaming=false)",
    "tova": "tova({c})",
    "tova.bare": "tova({n}) + sinks(0) + recent(0)",
    "snapkv": "snapkv({c})",
    "pyramidkv": "pyramidkv({c})",
    "adakv": "adakv({c})",
    "keydiff": "keydiff({c})",
    "keynorm": "keynorm({c})",
    "embeddingnorm": "embeddingnorm({c})",
    "expected": "expected_attention({c})",
    "quest": "quest({n})",
    "duo": "duo({duo}, 4, 32)",
}
METHODS: Mapping[str, str] = {
    "a_shape": "sinks(4) + recent({w})",
    "tri_shape": "sinks(4) + recent({w}) + tail(64)",
    "keynorm": "sinks(4) + recent(32) + keynorm({c})",
    "embeddingnorm": "sinks(4) + recent(32) + embeddingnorm({c})",
    "vertical_slash": "vertical_slash({share}, {share}, first=4, last={block}, block={block})",
    "block_topk": "block_topk({share}, block={block})",
    "flex_prefill": "flex_prefill({share}, least={block}, block={block})",
    "xattention": "xattention({share}, block={block})",
}
_PLACES = ("n", "w", "c", "half", "share", "block", "duo")
Gates = Sequence[Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Form:
    """A policy or a method, at any budget.

    Attributes:
        name: for tables.
        template: its text, with places for the budget.
        prefill: whether it is a method for the prompt, not a policy of the cache.
    """

    name: str
    template: str
    prefill: bool = False

    @property
    def needs_gates(self) -> bool:
        """Whether heads must be told apart first."""
        return "duo" in _places(self.template)

    @property
    def key(self) -> str:
        """Unlike that of any other form."""
        return f"prefill {self.name}" if self.prefill else self.name

    def at(self, share: float, tokens: int, gates: Gates = ()) -> Any:
        """The policy or method for a prompt.

        Args:
            share: of its tokens, above 0 and up to 1.
            tokens: of the prompt; at a share of 1 all of these stay.
            gates: for each layer, a number for each key head; needed where ``needs_gates``.

        Raises:
            PolicyError: if the text does not parse.
        """
        n = int(share * tokens + 1e-9)
        # Questions are a little shorter than asked for; ``check`` says what is too short.
        left = max(1, n - SINKS - RECENT)
        block = 1 << max(4, min(7, (tokens // 32).bit_length() - 1))
        streaming = (tokens - n) / max(1, tokens - SINKS - RECENT)
        written = ", ".join(f"[{', '.join(f'{gate:.4f}' for gate in row)}]" for row in gates)
        text = self.template.format(
            n=n,
            w=n - SINKS,
            c=left,
            half=(n - SINKS) // 2,
            share=float(share),
            block=block,
            duo=f"[{written or '[0.0]'}], {streaming:.6f}",
        )
        return select.parse(text) if self.prefill else kv.parse(text)

    def fits(self, share: float, tokens: int) -> bool:
        """Whether the budget is enough; gates do not matter."""
        try:
            self.at(share, tokens)
        except PolicyError:
            return False
        return True


def check_budget(share: float, tokens: int) -> None:
    """Raise InputError if a budget is smaller than what is protected anyway."""
    least = SINKS + RECENT + 1
    if int(share * tokens + 1e-9) < least:
        raise InputError(
            f"{share:.0%} of {tokens} tokens is {int(share * tokens + 1e-9)}: {SINKS} sinks and "
            f"{RECENT} recent tokens leave nothing to choose. Give budgets from "
            f"{-(-100 * least // tokens)}%, or longer prompts."
        )


def forms(texts: Sequence[str], *, prefill: bool = False) -> tuple[Form, ...]:
    """Forms from names with commas, ``all``, and templates.

    Raises:
        InputError: for an unknown name, or a template without a place for the budget.
        PolicyError: for a template that does not parse.
    """
    known, noun = (METHODS, "method") if prefill else (POLICIES, "policy")
    found: dict[str, Form] = {}
    for text in texts:
        template = "(" in text
        for name in (text,) if template else map(str.strip, text.split(",")):
            names = tuple(known) if name == "all" else (name,)
            for each in names:
                if not template and each not in known:
                    raise InputError(
                        f"Unknown {noun} {each!r}: choose from {', '.join(known)}, all, or give a "
                        f'template such as "{known["keynorm"]}".'
                    )
                made = Form(name=each, template=each if template else known[each], prefill=prefill)
                _check(made)
                found[each] = made
    return tuple(found.values())


def _check(form: Form) -> None:
    places = _places(form.template)
    if not places or not places <= set(_PLACES):
        raise InputError(
            f"{form.template!r} should say where the budget goes, with "
            f"{', '.join(f'{{{place}}}' for place in _PLACES)}; found "
            f"{', '.join(f'{{{place}}}' for place in sorted(places)) or 'none'}."
        )
    form.at(0.5, 4096)


def _places(template: str) -> set[str]:
    try:
        return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise PolicyError(f"{template!r}: {error}") from None
