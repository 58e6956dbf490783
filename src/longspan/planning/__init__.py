"""Plans: how a pattern lies in memory.

See ``plan`` for the idea, ``ranges`` for interval lists and ``layout`` for rows and positions.
"""

from longspan.planning.plan import Pass, Plan, plan, position_ranges
from longspan.planning.ranges import Ranges

__all__ = ["Pass", "Plan", "Ranges", "plan", "position_ranges"]
