"""Sparse attention over a prompt: a method selects, a kernel attends to what was selected.

    selected = union over the method's terms of what their scores and budgets keep
    out_i    = softmax over the selected j <= i of (scale q_i . k_j) v_j

Exact attention over an estimated set. Grouped queries, padding anywhere, prompts in chunks: with
fewer queries than keys the queries are the last rows. Axes: B batch, H query heads, K key heads, N
query rows, M key rows, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspan.errors import InputError, Refusal
from longspan.mechanism._past import places, tokens_first
from longspan.ops.inputs import check_tensors, factor_of
from longspan.select import cudnn_blocks, ranges, tiles
from longspan.select.method import Method, Term, method
from longspan.select.prompt import Layout, lay, whole
from longspan.select.selection import Selection

# What can attend to a selection, best first; the last one always can.
ROUTES = {
    "cudnn_blocks": (cudnn_blocks.reasons, cudnn_blocks.cudnn_blocks),
    "tiles": (tiles.reasons, tiles.tiles),
    "ranges": (ranges.reasons, ranges.ranges),
}


@dataclass(frozen=True, eq=False, kw_only=True)
class Selected:
    """What a method chose for a prompt.

    Attributes:
        layout: queries and keys in blocks.
        v: values in blocks [B, K, T S, Dv].
        selection: what each row sees.
    """

    layout: Layout
    v: Tensor
    selection: Selection

    def attend(self, impl: str = "auto") -> tuple[Tensor, Tensor]:
        """Attention over the selection: out [B, H, N, Dv] and lse [B, H, N].

        Raises:
            Refusal: if a named kernel cannot do it.
        """
        if impl not in ("auto", *ROUTES):
            raise Refusal(f"impl must be one of {', '.join(('auto', *ROUTES))}; got {impl!r}")
        out, lse = self._route(impl)(self.layout.prompt, self.v, self.selection)
        back = self.layout.take_back
        return back(out, 0.0), back(lse[..., None], -torch.inf)[..., 0]

    def _route(self, impl: str) -> Callable[..., tuple[Tensor, Tensor]]:
        why: list[str] = []
        for name in ROUTES if impl == "auto" else (impl,):
            reasons, run = ROUTES[name]
            why = reasons(self.layout.prompt, self.v)
            if not why:
                return run
        raise Refusal(f"{impl} cannot take this prompt: {'; '.join(why)}; impl='auto' can")

    def density(self) -> Tensor:
        """Share of the causal pairs that is computed, float64 [B, H]."""
        return self.selection.density(self.layout.prompt)


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    method: Method | Term | str,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    norms: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Any:
    """Causal attention of a prompt over what a method selects.

    Args:
        q: queries [B, H, N, D].
        k: keys [B, K, M, D]; K divides H; with N < M the queries are the last rows.
        v: values [B, K, M, Dv].
        method: a method, a term or text such as ``"vertical_slash(1000, 6096)"``.
        mask: True at tokens, False at padding [B, M].
        scale: factor on the logits; default ``D ** -0.5``.
        norms: lengths of the embeddings of the keys [B, M], for ``embeddingnorm`` alone.
        return_lse: also return the log-sum-exp over the selected keys.
        impl: ``cudnn_blocks`` (Hopper, forward only), ``tiles`` (CUDA, forward only), ``ranges``
            (any device, with gradients) or ``auto``. No gradient passes through the selection.

    Returns:
        out [B, H, N, Dv] in the dtype of ``q``, 0 at padding; with ``return_lse`` also lse
        [B, H, N], -inf there.

    Raises:
        InputError: if shapes do not fit, ``scale`` is no finite number, or the method needs norms
            that were not given.
        PolicyError: if the method does not parse.
        Refusal: if a named kernel cannot do it.
    """
    check_tensors(q, k, v)
    place = None
    if norms is not None and norms.shape != (k.shape[0], k.shape[2]):
        raise InputError(
            f"norms must be [batch, keys] {[k.shape[0], k.shape[2]]}, got {list(norms.shape)}"
        )
    if mask is not None:
        if mask.shape != (k.shape[0], k.shape[2]):
            raise InputError(
                f"mask must be [batch, keys] {[k.shape[0], k.shape[2]]}, got {list(mask.shape)}"
            )
        token = mask.to(torch.bool)
        place = places(q.shape[2], token, k.shape[2], q.device)
        k, v = tokens_first(token, k, v)
        if norms is not None:
            norms = tokens_first(token, norms[:, None, :, None])[0][:, 0, :, 0]
    out, lse = select(q, k, v, method, place=place, scale=scale, norms=norms).attend(impl)
    return (out, lse) if return_lse else out


@torch.no_grad()
def _selection(chosen: Method, layout: Layout) -> Selection:
    return chosen.select(layout.prompt)


def select(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Method | Term | str,
    *,
    place: Tensor | None = None,
    scale: float | None = None,
    norms: Tensor | None = None,
    **layer: int,
) -> Selected:
    """Let a method choose for a prompt; see ``prefill``.

    Args:
        q: [B, H, N, D].
        k: [B, K, M, D], tokens first.
        v: [B, K, M, Dv], tokens first.
        chosen: the method.
        place: position of each query among the keys, int64 [B, N], -1 at padding; None: the
            queries are the last rows.
        scale: factor on the logits; default ``D ** -0.5``.
        norms: lengths of the embeddings of the keys [B, M], tokens first.
        layer: ``layer`` and ``layers``, for budgets that differ between layers.

    Raises:
        InputError: if ``scale`` is no finite number.
        PolicyError: if the method does not parse.
    """
    wanted = method(chosen)
    factor = factor_of(scale, q.shape[-1])
    layout = lay(q, k, place, wanted.block, factor, norms, **layer)
    return Selected(layout=layout, v=whole(v, wanted.block), selection=_selection(wanted, layout))
