"""FlexPrefill: each head is vertical-slash or chooses blocks, and covers a share of the mass.

Paper: Lai et al. 2025, arXiv 2502.20766. The last block of queries is probed. Its attention,
pooled to blocks of keys, is p; softmax(mean(q_last) . mean(k_b)), p', is what pooling would say.

    sqrt(JS(p, p')) < tau:   pooling can be trusted: of all blocks of the matrix softmax_b(mean q_a
                             . mean k_b) those of most mass, until they hold gamma of its sum, with
                             the ``least`` best columns and offsets
    else:                    the columns and the offsets of the probe that hold gamma of its mass

    columns and offsets take whole blocks; the first block and the own one always stay

O(S N D + (N / S)^2 D) to estimate. With tau 0 every head is vertical-slash. The published code
rounds counts to 128; here they are the fewest that reach gamma, at least ``least``.

Axes: B batch, H query heads, M keys, Q blocks of queries, T blocks of keys, S tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from longspan.errors import PolicyError
from longspan.select.choose import cover
from longspan.select.estimate import last_rows, probe
from longspan.select.method import BLOCK, Term, read_mass
from longspan.select.pooled import block_means, means
from longspan.select.prompt import Prompt
from longspan.select.selection import Selection
from longspan.select.sums import check_whole
from longspan.select.vertical_slash import along


@dataclass(frozen=True)
class FlexPrefill(Term):
    """Head by head, vertical-slash or blocks.

    Args:
        gamma: share of the mass to cover.
        tau: distance below which a head chooses blocks.
        least: fewest columns, and fewest offsets.
        block: tokens of a block, also probed at the end.
    """

    gamma: Any = 0.9
    tau: float = 0.1
    least: int = 512
    block: int = BLOCK
    name: ClassVar[str] = "flex_prefill"
    depends: ClassVar[str] = "the last queries of the prompt; queries of all blocks"

    def __post_init__(self) -> None:
        object.__setattr__(self, "gamma", read_mass(self.name, self.gamma).mass)
        check_whole(self.name, 0, least=self.least)
        check_whole(self.name, 1, block=self.block)
        if isinstance(self.tau, bool) or not isinstance(self.tau, int | float) or self.tau < 0:
            raise PolicyError(f"{self.name}: tau must be a distance from 0, got {self.tau!r}")

    def select(self, prompt: Prompt) -> Selection:
        found = probe(prompt, prompt.size)
        aware = trusts_pooling(prompt, found.columns, self.tau)
        whole = found.columns.new_tensor(self.gamma).expand(aware.shape)
        blocks = self._touched(prompt, found.columns, found.offsets, whole.masked_fill(aware, 0.0))
        number = torch.arange(prompt.blocks, device=blocks.device)
        forced = (prompt.back >= 0) & (number == 0) | (prompt.back == 0)
        blocks = blocks | forced[:, None]
        if bool(aware.any()):
            blocks = blocks | (self._pooled(prompt) & aware[..., None, None])
        return Selection(blocks=blocks)

    def _touched(self, prompt: Prompt, columns: Tensor, offsets: Tensor, share: Tensor) -> Tensor:
        """Blocks of the columns and offsets that hold a share [B, H] of their mass."""
        column, kept = self._best(columns, share, prompt.length)
        offset, used = self._best(offsets, share, prompt.length)
        block = column.div(prompt.size, rounding_mode="floor").masked_fill(~kept, prompt.blocks)
        seen = kept.new_zeros(*kept.shape[:2], prompt.blocks + 1).scatter(-1, block, True)
        vertical = seen[:, :, None, :-1] & (prompt.back >= 0)[:, None]
        return vertical | along(prompt, offset, used)

    def _best(self, mass: Tensor, share: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """All places from the heaviest on [B, H, M], and which of them count.

        One more than what holds the share at most: the paper's number.
        """
        ranked, place = mass.sort(dim=-1, descending=True)
        held = ranked.double().cumsum(-1)
        count = 1 + (held <= share[..., None] * held[..., -1:]).sum(-1)
        count = torch.minimum(count.clamp(min=self.least), length[:, None])
        rank = torch.arange(mass.shape[-1], device=mass.device)
        return place, rank < count[..., None]

    def _pooled(self, prompt: Prompt) -> Tensor:
        """The blocks of most mass of the whole pooled matrix, bool [B, H, Q, T]."""
        stands = (prompt.at >= 0).unflatten(1, (-1, prompt.size)).any(2)
        mass = means(prompt).softmax(-1) * stands[:, None, :, None]
        mass = torch.where((prompt.back >= 0)[:, None], mass, 0.0)
        flat = mass.flatten(2)
        return cover(flat, self.gamma, torch.zeros_like(flat, dtype=torch.bool)).view(mass.shape)


def trusts_pooling(prompt: Prompt, columns: Tensor, tau: float) -> Tensor:
    """FlexPrefill's switch: which heads choose blocks, bool [B, H].

    Args:
        prompt: the prompt.
        columns: mass of each key in the attention of the last queries [B, H, M].
        tau: distance below which pooling is trusted.
    """
    return distance_to_pooled(prompt, columns) < tau


def distance_to_pooled(prompt: Prompt, columns: Tensor) -> Tensor:
    """sqrt(JS) between probed and pooled attention, 0 to sqrt(ln 2): [B, H]."""
    q, at = last_rows(prompt, prompt.size)
    rows = (at >= 0)[:, None, :, None]
    query = (q * rows).sum(2, dtype=prompt.work) / rows.sum(2).clamp(min=1)
    key = prompt.per_head(block_means(prompt.k, prompt.real, prompt.size))
    logits = (key @ query[..., None])[..., 0] * prompt.scale
    begins = torch.arange(prompt.blocks, device=q.device) * prompt.size
    beyond = begins >= prompt.length[:, None]
    pooled = logits.masked_fill(beyond[:, None], -torch.inf).softmax(-1)
    true = columns.unflatten(-1, (-1, prompt.size)).sum(-1)
    true = true / true.sum(-1, keepdim=True).clamp(min=torch.finfo(true.dtype).tiny)
    return jensen_shannon(true, pooled).clamp(min=0).sqrt()


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of distributions along the last axis, in nats: 0 to ln 2."""
    mean = (p + q) / 2
    return (_entropy(mean) - (_entropy(p) + _entropy(q)) / 2).clamp(min=0)


def _entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(-1)
