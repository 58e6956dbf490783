"""What should I use? Candidates that fit a budget, measured here, ranked by a rule that is told.

    found = advise(Advise(lengths=(8192,), setting=Setting(n=8192, heads=8)), Records(None, {}))
    found[0]["recommended"]["pattern"]

Candidates are patterns whose parameters follow from the budget. What they see is computed from
their plans; what they take is measured, in turns with each other and with dense attention, and
only if output and gradients equal the oracle. Nothing here knows how good a pattern is on text.
"""

from longspan.bench.advise.asked import Advise, Budget
from longspan.bench.advise.run import advise
from longspan.bench.advise.words import RULE

__all__ = ["RULE", "Advise", "Budget", "advise"]
