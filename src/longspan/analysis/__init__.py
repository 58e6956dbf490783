"""What a pattern covers: density, heads together, and who reaches whom over the layers."""

from longspan.analysis.coverage import Coverage, Reach, coverage
from longspan.analysis.state import kept_tokens

__all__ = ["Coverage", "Reach", "coverage", "kept_tokens"]
