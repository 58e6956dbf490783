"""Quest: keep everything, read the pages that can matter for this query.

Keys lie in pages of P tokens; of each the smallest and largest value per channel is kept. No key
of page p has a larger product with q than

    u_p = sum_c max(q_c low_pc, q_c high_pc) = relu(q) . high_p - relu(-q) . low_p

The budget's best pages are read, always among them the first and the last, and attended exactly.
So two pages would leave nothing to choose, and the last may hold a single token: three are the
least, as in the paper's code.

Paper: Tang et al. 2024, arXiv 2406.10774. Single queries only: prompts are read whole, and so are
the first layers. Bounds are summed over the query heads of a group, so that a key head reads one
set of pages (the paper's evaluation chooses for every query head). Nothing is evicted: memory
grows by 2 / P of the keys, the bytes read fall. O(C D / P) a step to choose.

Axes: B batch, H query heads, G key heads, C places, P pages, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longspan.errors import PolicyError
from longspan.kv.policy import Part
from longspan.kv.view import over_group
from longspan.select.pooled import product_bounds
from longspan.select.sums import check_whole

# The first, the newest, and one that the query chooses.
LEAST_PAGES = 3


@dataclass(frozen=True)
class Quest(Part):
    """Reads the most promising pages.

    Args:
        tokens: read at a step, for each key head; at least ``LEAST_PAGES`` pages.
        page: tokens in a page.
        dense_layers: first layers that read everything.
    """

    tokens: int
    page: int = 16
    dense_layers: int = 2
    name: ClassVar[str] = "quest"

    def __post_init__(self) -> None:
        check_whole(self.name, 1, page=self.page)
        check_whole(self.name, 0, tokens=self.tokens, dense_layers=self.dense_layers)
        least = LEAST_PAGES * self.page
        if self.tokens < least:
            raise PolicyError(
                f"quest: the first and the newest page are always read, so expected at least "
                f"three pages of {self.page}, {least} tokens, got {self.tokens}; smaller pages "
                "allow fewer tokens"
            )


class PageBounds:
    """Smallest and largest key of every page, kept up to date as tokens come.

    Attributes:
        low: [B, G, P, D]; +inf in a page without tokens.
        high: [B, G, P, D]; -inf in a page without tokens.
    """

    def __init__(self, page: int, keys: Tensor, length: Tensor) -> None:
        """Of stored keys [B, G, C, D], the first ``length`` [B, G] of each head."""
        self.page = page
        empty = keys[:, :, :0]
        self.low = self.high = empty
        self.extend(keys, torch.zeros_like(length), length)

    @property
    def bytes(self) -> int:
        """Bytes allocated."""
        return sum(t.untyped_storage().nbytes() for t in (self.low, self.high))

    def extend(self, keys: Tensor, length: Tensor, count: Tensor) -> None:
        """Take in new keys.

        Args:
            keys: [B, G, N, D]; the first ``count`` of each head are real.
            length: tokens that each head had before, int64 [B, G].
            count: new ones, int64 [B, G] or [B, 1].
        """
        device, new = keys.device, keys.shape[2]
        pages = -(-int((length + count).max()) // self.page) - self.low.shape[2]
        if pages > 0:
            more = keys.new_full((*keys.shape[:2], pages, keys.shape[3]), torch.inf)
            self.low = torch.cat([self.low, more], 2)
            self.high = torch.cat([self.high, -more], 2)
        if self.low.is_inference() and not torch.is_inference_mode_enabled():
            # Made in inference mode, they could not be changed outside of it.
            self.low, self.high = self.low.clone(), self.high.clone()
        step = torch.arange(new, device="cpu")
        page = (length[..., None] + step) // self.page
        page = page.clamp(max=self.low.shape[2] - 1).to(device)[..., None].expand_as(keys)
        void = (step >= count[..., None]).to(device)[..., None]
        self.low.scatter_reduce_(2, page, keys.masked_fill(void, torch.inf), "amin")
        self.high.scatter_reduce_(2, page, keys.masked_fill(void, -torch.inf), "amax")

    def upper(self, q: Tensor, length: Tensor) -> Tensor:
        """Upper bound of q . k over each page, summed over the group: [B, G, P].

        Args:
            q: one query [B, H, D].
            length: tokens of each head [B, G]; pages beyond give -inf.
        """
        grouped = over_group(q, self.low.shape[1])
        bound = product_bounds(grouped, self.low, self.high)
        page = torch.arange(self.low.shape[2], device="cpu")
        beyond = (page >= -(-length // self.page)[..., None]).to(q.device)
        return bound.sum(2).masked_fill(beyond, -torch.inf)

    def choose(self, q: Tensor, length: Tensor, tokens: int) -> Tensor | None:
        """Places to read [B, G, S], rising; None if that would be all.

        Places at or beyond ``length`` hold no token.
        """
        wanted = tokens // self.page
        if wanted >= self.low.shape[2]:
            return None
        bound = self.upper(q, length)
        last = ((length - 1).clamp(min=0) // self.page).to(q.device)[..., None]
        bound = bound.scatter(2, last, torch.inf)
        bound[..., 0] = torch.inf
        chosen = bound.topk(wanted, dim=2).indices.sort(dim=2).values
        within = torch.arange(self.page, device=q.device)
        return (chosen[..., None] * self.page + within).flatten(2)
