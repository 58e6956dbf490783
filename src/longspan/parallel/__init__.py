"""Context parallel: the rows of one sequence lie on several ranks, attention is over all of them.

``shards`` says which rows lie where, ``needs`` which keys a pattern makes each rank ask for,
``exchange`` moves those and their gradients, ``attention`` is the operation, and ``traffic`` says
beforehand what it moves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longspan._lazy import lazy

_HOME = {
    "Shards": "shards",
    "Traffic": "traffic",
    "attend": "attention",
    "explain": "traffic",
}

__all__ = ["Shards", "Traffic", "attend", "explain"]

if TYPE_CHECKING:
    from longspan.parallel.attention import attend
    from longspan.parallel.shards import Shards
    from longspan.parallel.traffic import Traffic, explain
else:
    __getattr__, __dir__ = lazy(__name__, _HOME)
