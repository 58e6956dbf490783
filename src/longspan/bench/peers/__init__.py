"""Other libraries on patterns that they can compute too.

A peer that is not installed is named as absent. What it returns goes through the same oracle as
ours; where its own pattern differs at the borders, those rows are left out of the comparison.
"""

from __future__ import annotations

from collections.abc import Callable

from longspan.bench.peers import block_sparse, flex, layers, longlora, windows
from longspan.bench.peers.block_maps import BlockMap, block_map
from longspan.bench.peers.peer import Peer
from longspan.bench.setting import Call, Setting
from longspan.pattern import Pattern
from longspan.planning import plan

__all__ = ["PEERS", "Peer"]


def _blocks(
    over: Callable[[BlockMap, float], Call], *sizes: int
) -> Callable[[Pattern, Setting], Call]:
    """A kernel over maps of blocks, for patterns that are one."""

    def make(pattern: Pattern, setting: Setting) -> Call:
        found = block_map(plan(pattern, setting.n, setting.heads), sizes)
        return over(found.to(setting.device), setting.scale)

    return make


PEERS = (
    Peer(
        name="FlexAttention, mask by hand",
        make=flex.flex,
        trains=("cuda",),
    ),
    Peer(
        name="FlexAttention, map of blocks",
        make=_blocks(block_sparse.flex, 128, 64),
        devices=("cuda",),
    ),
    Peer(
        name="LongLoRA's roll and reshape",
        make=longlora.over_pattern,
        # It lets the first and the last half group see each other.
        border=longlora.border,
    ),
    Peer(
        name="local-attention",
        package="local-attention",
        module="local_attention",
        make=windows.local_attention,
    ),
    Peer(
        name="transformers Longformer layer",
        package="transformers",
        module="transformers",
        make=layers.longformer,
    ),
    Peer(
        name="transformers BigBird layer",
        package="transformers",
        module="transformers",
        make=layers.big_bird,
    ),
    Peer(
        name="xformers",
        package="xformers",
        module="xformers",
        make=windows.xformers,
        devices=("cuda",),
    ),
    Peer(
        name="flash-attn 2",
        package="flash-attn",
        module="flash_attn.flash_attn_interface",
        make=windows.flash_2,
        devices=("cuda",),
    ),
    Peer(
        name="FlashAttention-4",
        package="flash-attn-4",
        module="flash_attn.cute",
        make=windows.flash_4,
        devices=("cuda",),
    ),
    Peer(
        name="FlashAttention-4, lists of blocks",
        package="flash-attn-4",
        module="flash_attn.cute",
        make=_blocks(block_sparse.flash_4, 128, 64),
        devices=("cuda",),
    ),
    Peer(
        name="cuDNN block-sparse",
        package="nvidia-cudnn-frontend",
        module="cudnn.block_sparse_attention",
        make=_blocks(block_sparse.cudnn, 128, 64),
        devices=("cuda",),
    ),
    Peer(
        name="Block-Sparse-Attention",
        package="block-sparse-attn",
        module="block_sparse_attn",
        make=_blocks(block_sparse.mit, 128),
        devices=("cuda",),
        how="from its sources, github.com/mit-han-lab/Block-Sparse-Attention",
    ),
    Peer(
        name="FlashInfer",
        package="flashinfer-python",
        module="flashinfer",
        make=_blocks(block_sparse.flashinfer, 128, 64),
        devices=("cuda",),
        trains=(),
    ),
    Peer(name="NATTEN", package="natten", module="natten", make=windows.natten, devices=("cuda",)),
)
