"""Operations: ``attend`` and what it is made of."""

from longspan.ops.attend import attend, explain
from longspan.ops.merge import merge

__all__ = ["attend", "explain", "merge"]
