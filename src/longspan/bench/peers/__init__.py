"""Other libraries on patterns that they can compute too.

A peer that is not installed is named as absent. What it returns goes through the same oracle as
ours; where its own pattern differs at the borders, those rows are left out of the comparison.

Axes: B batch, H query heads, K key heads, N rows, D head width, C tiles of keys, Q of queries.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from longspan.bench import dense
from longspan.bench.peers.longlora import longlora
from longspan.bench.setting import Call, Setting
from longspan.errors import Refusal
from longspan.hf.peers import longformer_layer
from longspan.ops.ranges import KeyRanges
from longspan.ops.run import load
from longspan.pattern import Causal, Neighborhood, Pattern, ShiftedChunk, Window
from longspan.planning import plan

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another implementation.

    Attributes:
        name: for people.
        package: what must be installed; empty if torch is enough.
        module: what is imported.
        make: the call for a pattern; raises Refusal where it cannot compute that.
        devices: where it runs.
        trains: whether it has gradients, by device.
        border: rows at either end that it computes differently.
    """

    name: str
    package: str
    module: str
    make: Callable[[Pattern, Setting], Call]
    devices: tuple[str, ...] = ("cpu", "cuda")
    trains: tuple[str, ...] = ("cpu", "cuda")
    border: Callable[[Pattern], int] = lambda pattern: 0

    def absent(self) -> bool:
        """Whether it is not installed."""
        try:
            return importlib.util.find_spec(self.module) is None
        except ModuleNotFoundError:
            return True


def flex_over(ranges: KeyRanges, n: int, scale: float, tile: int = 128) -> Call:
    """FlexAttention as it wants to be used: compiled, visiting only the tiles it must.

    For one range per query and lengths of whole tiles; without grouped queries.

    Raises:
        Refusal: for more ranges, or other lengths.
    """
    if ranges.lo_GNm.shape[2] != 1 or n % tile:
        raise Refusal(f"takes one range per query and multiples of {tile} rows")
    lo_HN, hi_HN = (x[ranges.group_BH[0], :, 0] for x in (ranges.lo_GNm, ranges.hi_GNm))
    lo_HQ, hi_HQ = lo_HN.unflatten(1, (-1, tile)), hi_HN.unflatten(1, (-1, tile))
    start_C = torch.arange(0, n, tile, device=lo_HN.device)
    any_HQC = ((lo_HQ[..., None] < start_C + tile) & (start_C < hi_HQ[..., None])).any(2)
    all_HQC = ((lo_HQ[..., None] <= start_C) & (start_C + tile <= hi_HQ[..., None])).all(2)
    lists: list[Tensor] = []
    for tiles_HQC in (any_HQC & ~all_HQC, all_HQC):
        lists.append(tiles_HQC.sum(-1, dtype=torch.int32)[None])
        lists.append(tiles_HQC.int().argsort(stable=True, dim=-1, descending=True).int()[None])

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (lo_HN[head, i] <= j) & (j < hi_HN[head, i])

    mask = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=tile, mask_mod=visible, seq_lengths=(n, n))
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, scale=scale)


def _flex(pattern: Pattern, setting: Setting) -> Call:
    if setting.device == "cuda":
        return _flex_by_hand(pattern, setting)
    one, *more = plan(pattern, setting.n, setting.heads).passes
    if more or one.key_order is not None:
        raise Refusal("no mask of one range per query")
    if setting.heads != setting.key_heads:
        raise Refusal("compared without grouped queries on a CPU")
    q, k, _ = setting.tensors()
    return flex_over(load(one, q, k).ranges, setting.n, setting.scale)


def _flex_by_hand(pattern: Pattern, setting: Setting) -> Call:
    mask, per_head = _mask(pattern, setting.heads)
    compiled = torch.compile(create_block_mask, dynamic=False)
    heads = setting.heads if per_head else None
    blocks = compiled(mask, None, heads, setting.n, setting.n, device=setting.device)
    fused = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: fused(q, k, v, block_mask=blocks, scale=setting.scale, enable_gqa=True)


def _mask(pattern: Pattern, heads: int) -> tuple[MaskMod, bool]:
    """The mask as its documentation would write it, and whether heads differ."""
    if isinstance(pattern, Causal):
        return lambda b, h, i, j: j <= i, False
    if isinstance(pattern, Window) and pattern.causal:
        return lambda b, h, i, j: (j <= i) & (i - j < pattern.size), False
    if isinstance(pattern, ShiftedChunk) and pattern.causal:
        size = pattern.size

        def shifted(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            shift = torch.where(h >= heads // 2, size // 2, 0)
            return (j <= i) & ((i + size - shift) // size == (j + size - shift) // size)

        return shifted, True
    raise Refusal("no mask is written for this pattern")


def _flash_2(pattern: Pattern, setting: Setting) -> Call:
    return _flash("flash_attn", pattern, setting)


def _flash_4(pattern: Pattern, setting: Setting) -> Call:
    return _flash("flash_attn.cute", pattern, setting)


def _flash(module: str, pattern: Pattern, setting: Setting) -> Call:
    attend = importlib.import_module(module).flash_attn_func
    left = _causal_window(pattern) - 1

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turned = (x.transpose(1, 2) for x in (q, k, v))
        found = attend(*turned, causal=True, window_size=(left, 0), softmax_scale=setting.scale)
        return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)

    return call


def _local_attention(pattern: Pattern, setting: Setting) -> Call:
    # It counts the keys besides the query's own.
    size = _causal_window(pattern) - 1
    if size < 1:
        raise Refusal("takes windows of at least 2")
    layer = importlib.import_module("local_attention").LocalAttention(
        window_size=size,
        causal=True,
        look_backward=1,
        look_forward=0,
        autopad=True,
        exact_windowsize=True,
        scale=setting.scale,
        use_rotary_pos_emb=False,
    )
    group = setting.heads // setting.key_heads

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return layer(q, *(x.repeat_interleave(group, 1) for x in (k, v)))

    return call


def _natten(pattern: Pattern, setting: Setting) -> Call:
    if not isinstance(pattern, Neighborhood):
        raise Refusal("neighbourhoods only")
    attend = importlib.import_module("natten").na1d
    group = setting.heads // setting.key_heads

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turned = [x.transpose(1, 2) for x in (q, k, v)]
        turned[1:] = [x.repeat_interleave(group, 2) for x in turned[1:]]
        sizes = {"kernel_size": pattern.size, "dilation": pattern.dilation}
        return attend(
            *turned, **sizes, stride=pattern.stride, is_causal=pattern.causal, scale=setting.scale
        ).transpose(1, 2)

    return call


def _longlora(pattern: Pattern, setting: Setting) -> Call:
    if not isinstance(pattern, ShiftedChunk) or not pattern.causal or setting.n % pattern.size:
        raise Refusal("causal shifted chunks of a whole number of groups only")
    if setting.heads % 2 or setting.key_heads % 2:
        raise Refusal("an even number of heads only")
    return longlora(pattern.size, dense.sdpa)


def _longformer(pattern: Pattern, setting: Setting) -> Call:
    if not isinstance(pattern, Window) or pattern.causal or pattern.size % 2 == 0:
        raise Refusal("two-sided windows of an odd number of keys only")
    return longformer_layer(pattern.size // 2, setting.n, setting.heads, setting.key_heads)


def _causal_window(pattern: Pattern) -> int:
    if not isinstance(pattern, Window) or not pattern.causal:
        raise Refusal("causal windows only")
    return pattern.size


def _half_a_chunk(pattern: Pattern) -> int:
    return pattern.size // 2 if isinstance(pattern, ShiftedChunk) else 0


PEERS = (
    Peer(
        name="FlexAttention, mask by hand",
        package="",
        module="torch",
        make=_flex,
        trains=("cuda",),
    ),
    Peer(
        name="LongLoRA's roll and reshape",
        package="",
        module="torch",
        make=_longlora,
        # It lets the first and the last half group see each other.
        border=_half_a_chunk,
    ),
    Peer(
        name="local-attention",
        package="local-attention",
        module="local_attention",
        make=_local_attention,
    ),
    Peer(
        name="transformers Longformer layer",
        package="transformers",
        module="transformers",
        make=_longformer,
    ),
    Peer(
        name="flash-attn 2",
        package="flash-attn",
        module="flash_attn.flash_attn_interface",
        make=_flash_2,
        devices=("cuda",),
    ),
    Peer(
        name="FlashAttention-4",
        package="flash-attn-4",
        module="flash_attn.cute",
        make=_flash_4,
        devices=("cuda",),
    ),
    Peer(name="NATTEN", package="natten", module="natten", make=_natten, devices=("cuda",)),
)
