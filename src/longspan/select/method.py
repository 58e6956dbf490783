"""Methods of sparse prefill, as values that add up.

    sinks(128) + recent(3968)                       positions alone (A-shape)
    vertical_slash(1000, 6096)                      MInference
    block_topk(64) + keynorm(256)                   the same with |

A method is a sum of terms; each selects blocks and columns from the queries and keys of a prompt,
and the union is attended exactly. The whole KV cache stays. Estimates look at queries later than
most rows they decide for: see ``Term.depends``. What a row *mixes* is never later than itself.

Axes: B batch, H query heads, Q blocks of queries, T blocks of keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from longspan.errors import PolicyError
from longspan.select.budgets import Coverage
from longspan.select.prompt import Prompt
from longspan.select.selection import Selection
from longspan.select.sums import Language, Summand

BLOCK = 128


@dataclass(frozen=True)
class Term(Summand):
    """One term of a method.

    Attributes:
        depends: on which later tokens of the prompt the selection of a row depends, in words;
            empty if on none.
        needs_norms: whether it goes by the lengths of the tokens' embeddings.
    """

    needs_norms: ClassVar[bool] = False
    depends: ClassVar[str] = ""

    def select(self, prompt: Prompt) -> Selection:
        """What it adds to each row's own block."""
        raise NotImplementedError

    def alone(self) -> Method:
        return Method((self,))


@dataclass(frozen=True)
class Method:
    """A sum of terms; see the module text.

    Attributes:
        terms: at least one.
    """

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise PolicyError("a prefill method has one term at least, such as block_topk(64)")
        sizes = {size for size in map(_block, self.terms) if size}
        if len(sizes) > 1:
            raise PolicyError(f"terms of one method share a block size, got {sorted(sizes)}")

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return next(filter(None, map(_block, self.terms)), BLOCK)

    @property
    def depends(self) -> str:
        """On which later tokens of the prompt the selection of a row depends, in words."""
        return "; ".join(dict.fromkeys(t.depends for t in self.terms if t.depends))

    @property
    def needs_norms(self) -> bool:
        """Whether the lengths of the tokens' embeddings must be known."""
        return any(term.needs_norms for term in self.terms)

    def select(self, prompt: Prompt) -> Selection:
        """Own blocks and what every term adds."""
        own = (prompt.back == 0)[:, None].expand(-1, prompt.q.shape[1], -1, -1)
        found = Selection(blocks=own)
        for term in self.terms:
            found = found | term.select(prompt)
        return found

    def __add__(self, other: Any) -> Method:
        return Method(self.terms + method(other).terms)

    __or__ = __add__

    def __str__(self) -> str:
        return " + ".join(str(term) for term in self.terms)


def _block(term: Term) -> int | None:
    """Tokens of the blocks that a term asks for; None if it takes any."""
    return getattr(term, "block", None)


METHODS = Language(
    noun="prefill method",
    example="vertical_slash(1000, 6096)",
    part=Term,
    whole=Method,
    home="longspan.select.text",
    budgeted="block_topk",
)


def method(value: Any) -> Method:
    """A method from a term, a method or text.

    Raises:
        PolicyError: for anything else, or text that does not parse.
    """
    return METHODS.read(value)


def read_mass(name: str, value: Any) -> Coverage:
    """A coverage, also from the share alone."""
    if isinstance(value, Coverage):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise PolicyError(f"{name}: expected a share of the mass above 0, up to 1; got {value!r}")
    return Coverage(value)


def nothing(prompt: Prompt) -> torch.Tensor:
    """No blocks, bool [B, H, Q, T]."""
    like = prompt.back
    return torch.zeros_like(like, dtype=torch.bool)[:, None].expand(-1, prompt.q.shape[1], -1, -1)
