"""``attend`` under the name by which layers know it; it steps out of ``torch.compile`` itself."""

from longspan.ops import attend

__all__ = ["attend"]
