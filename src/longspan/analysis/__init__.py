"""What a pattern covers: density, heads together, and who reaches whom over the layers."""

from longspan.analysis.coverage import Coverage, Reach, coverage

__all__ = ["Coverage", "Reach", "coverage"]
