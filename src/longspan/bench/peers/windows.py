"""Windows, chunks and neighbourhoods of other libraries."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from longspan.bench.setting import Call, Setting, by_rows, ungrouped
from longspan.errors import Refusal
from longspan.pattern import Chunk, Neighborhood, Pattern, Window


def flash_2(pattern: Pattern, setting: Setting) -> Call:
    """FlashAttention-2's causal window."""
    return _flash("flash_attn", pattern, setting)


def flash_4(pattern: Pattern, setting: Setting) -> Call:
    """FlashAttention-4's causal window."""
    return _flash("flash_attn.cute", pattern, setting)


def _flash(module: str, pattern: Pattern, setting: Setting) -> Call:
    # It counts the keys besides the query's own.
    sides = (_causal_window(pattern) - 1, 0)
    function = importlib.import_module(module).flash_attn_func
    return by_rows(
        lambda *x: function(*x, causal=True, window_size=sides, softmax_scale=setting.scale)
    )


def local_attention(pattern: Pattern, setting: Setting) -> Call:
    """local-attention: buckets that look back one bucket, cut to the window."""
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
    return ungrouped(layer)


def natten(pattern: Pattern, setting: Setting) -> Call:
    """NATTEN's one-dimensional neighbourhood."""
    if not isinstance(pattern, Neighborhood):
        raise Refusal("neighbourhoods only")
    function = importlib.import_module("natten").na1d
    about = {
        "kernel_size": pattern.size,
        "stride": pattern.stride,
        "dilation": pattern.dilation,
        "is_causal": pattern.causal,
        "scale": setting.scale,
    }
    return ungrouped(by_rows(lambda *x: function(*x, **about)))


def xformers(pattern: Pattern, setting: Setting) -> Call:
    """xformers with a bias that its kernels know: windows and chunks."""
    bias = _bias(pattern, setting)
    function = importlib.import_module("xformers.ops").memory_efficient_attention

    def attend(*tensors: Tensor) -> Tensor:
        return function(*tensors, attn_bias=bias, scale=setting.scale)

    return ungrouped(by_rows(attend))


def _bias(pattern: Pattern, setting: Setting) -> Any:
    if not isinstance(pattern, Window | Chunk):
        raise Refusal("windows and chunks only")
    kinds = importlib.import_module("xformers.ops.fmha.attn_bias")
    if isinstance(pattern, Chunk):
        whole, rest = divmod(setting.n, pattern.size)
        kind = kinds.BlockDiagonalCausalMask if pattern.causal else kinds.BlockDiagonalMask
        return kind.from_seqlens([pattern.size] * whole + [rest] * (rest > 0))
    if pattern.causal:
        return kinds.LowerTriangularFromBottomRightLocalAttentionMask(pattern.size)
    if pattern.size % 2 == 0:
        raise Refusal("two-sided windows of an odd number of keys only")
    side = pattern.size // 2
    return kinds.LocalAttentionFromBottomRightMask(window_left=side, window_right=side)


def _causal_window(pattern: Pattern) -> int:
    if not isinstance(pattern, Window) or not pattern.causal:
        raise Refusal("causal windows only")
    return pattern.size
