"""Neighbourhood attention against NATTEN's definition, written out as loops; Swin in 1-D."""

from __future__ import annotations

import numpy as np
import pytest

import longspan as ls
from longspan.errors import PatternError


def na1d(n, k, d=1, stride=1, causal=False):
    """NATTEN's rule for one dimension; needs k d <= n."""
    mask = np.zeros((n, n), bool)
    for i in range(n):
        t, q = i % d, i // d
        length = n // d + (t < n % d)
        if causal:
            leader = min(q // stride * stride + stride - 1, length - 1)
            lo, hi = max(leader - k + 1, 0), q + 1
        else:
            leader = min(q // stride * stride + stride // 2, length - 1)
            lo = min(max(leader - k // 2, 0), length - k)
            hi = lo + k
        for u in range(lo, hi):
            mask[i, t + d * u] = True
    return mask


def both(pattern, n):
    mask = pattern.mask(n)[0]
    np.testing.assert_array_equal(ls.plan(pattern, n).mask()[0, 0], mask)
    return mask


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize(("k", "stride"), [(2, 1), (3, 1), (4, 1), (5, 2), (4, 4), (6, 3)])
def test_two_sided(k, stride, d):
    for n in (k * d, k * d + 1, 25, 32):
        mask = both(ls.Neighborhood(k, d, stride), n)
        np.testing.assert_array_equal(mask, na1d(n, k, d, stride))
        assert (mask.sum(-1) == k).all()


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize(("k", "stride"), [(2, 1), (5, 1), (4, 4), (6, 3)])
def test_causal(k, stride, d):
    # Whole blocks of queries in every group; cut-off ones differ on purpose (see the module).
    for n in (12 * d, 24 * d):
        mask = both(ls.Neighborhood(k, d, stride, causal=True), n)
        np.testing.assert_array_equal(mask, na1d(n, k, d, stride, causal=True))
    for n in range(1, 30):
        mask = both(ls.Neighborhood(k, d, stride, causal=True), n)
        longer = ls.Neighborhood(k, d, stride, causal=True).mask(n + 1)[0]
        np.testing.assert_array_equal(mask, longer[:n, :n])


def test_edges_differ_from_a_band_and_blocks_appear():
    k, n = 5, 16
    band = ls.Window(k, causal=False).mask(n)[0]
    mask = ls.Neighborhood(k).mask(n)[0]
    assert (mask[2:-2] == band[2:-2]).all()
    assert not (mask == band).all()
    assert not (mask == mask.T).all()
    blocks = ls.Neighborhood(4, stride=4).mask(n)[0]
    np.testing.assert_array_equal(blocks, ls.Chunk(4, causal=False).mask(n)[0])
    rows = ls.Neighborhood(4, stride=4, causal=True).mask(8)[0].sum(-1)
    assert rows.tolist() == [1, 2, 3, 4, 1, 2, 3, 4]
    assert ls.Neighborhood(n).mask(n)[0].all()


def test_short_groups_are_seen_whole():
    assert both(ls.Neighborhood(7), 4).all()
    np.testing.assert_array_equal(
        both(ls.Neighborhood(4, 3), 7), ls.Diagonals(3, causal=False).mask(7)[0]
    )


def test_growth_over_layers():
    n = 600
    plain, dilated = np.eye(n, dtype=bool)[n // 2], np.eye(n, dtype=bool)[n // 2]
    grown, spread = [], []
    for layer in range(5):
        plain = plain @ ls.Neighborhood(3).mask(n)[0]
        dilated = dilated @ ls.Neighborhood(3, 3**layer).mask(n)[0]
        grown.append(int(plain.sum()))
        spread.append(int(dilated.sum()))
    assert grown == [3, 5, 7, 9, 11]
    assert spread == [3, 9, 27, 81, 243]


def swin1d(n, w, s):
    """Roll by -s, cut in windows of w, and keep pairs of equal label; roll back."""
    mask = np.zeros((n, n), bool)
    label = [0 if p < n - w else 1 if p < n - s else 2 for p in range(n)]
    for a in range(n):
        for b in range(n):
            if a // w == b // w and (s == 0 or label[a] == label[b]):
                mask[(a + s) % n, (b + s) % n] = True
    return mask


@pytest.mark.parametrize(("n", "w"), [(16, 4), (32, 8), (8, 4)])
def test_swin_by_layer(n, w):
    swin = ls.swin(w)
    np.testing.assert_array_equal(swin.mask(n, layer=0)[0], swin1d(n, w, 0))
    np.testing.assert_array_equal(swin.mask(n, layer=1)[0], swin1d(n, w, w // 2))
    np.testing.assert_array_equal(swin.mask(n, layer=2), swin.mask(n, layer=0))


def test_errors():
    with pytest.raises(PatternError, match="size must be from 2"):
        ls.Neighborhood(1)
    with pytest.raises(PatternError, match="stride must not exceed size"):
        ls.Neighborhood(3, stride=4)
    with pytest.raises(PatternError, match="dilation"):
        ls.Neighborhood(3, 0)


@pytest.mark.parametrize(
    "text",
    [
        "causal() & neighborhood(3)",
        "causal() - edge_blocks(4)",
        "window(3) & (dense() - random(2, causal=false))",
        "heads(window(3), scca.flow(4, causal=false) & causal())",
    ],
)
def test_what_looks_at_the_length_cannot_be_cut_to_causal(text):
    for call in (lambda p: p.mask(8, 2), lambda p: ls.plan(p, 8, 2)):
        with pytest.raises(PatternError, match="length of the sequence"):
            call(ls.parse(text))
    assert ls.parse("causal() & neighborhood(3, causal=true)").mask(8, 2).any()
