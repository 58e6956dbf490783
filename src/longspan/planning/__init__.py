"""Plans: how a pattern lies in memory.

See ``plan`` for the idea, ``ranges`` for interval lists, ``layout`` for rows and positions,
``pieces`` for sets of keys with gaps and ``orders`` for how those lie in memory.
"""

from longspan.planning.passes import Pass
from longspan.planning.plan import Plan, plan
from longspan.planning.ranges import Ranges

__all__ = ["Pass", "Plan", "Ranges", "plan"]
