"""Key heads one after the other give what all at once give."""

from __future__ import annotations

import pytest
import torch

import longspan as ls
from longspan.ops import key_heads, run
from longspan.ops.workers import can_share_threads

pytestmark = pytest.mark.skipif(not can_share_threads(), reason="torch without OpenMP")

PATTERNS = [
    "sda.neighborhood(32, 4)",
    "ssa(16, 4)",
    "strided(4)",
    "dilated(16, 4) | sink(3)",
    "longnet([32, 64, 128], [1, 2, 4])",
    "random_blocks(16, 2) | strided(4)",
]


@pytest.fixture
def used(monkeypatch) -> list[int]:
    """The number of key heads of each pass that is computed by them."""
    found: list[int] = []

    def spy(*given):
        alone = key_heads.by_key_heads(*given)
        found.append(len(alone or ()))
        return alone

    monkeypatch.setattr(key_heads, "_WORTH", 0)
    monkeypatch.setattr(run, "by_key_heads", spy)
    return found


@pytest.mark.parametrize("n", [256, 203])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 4), (12, 4)])
@pytest.mark.parametrize("text", PATTERNS)
def test_the_same_attention(text, heads, kv_heads, n, used, monkeypatch):
    plan = ls.plan(ls.parse(text), n, heads)
    make = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, h, n, d, generator=make, dtype=torch.float64)
        for h, d in ((heads, 16), (kv_heads, 16), (kv_heads, 8))
    )
    found = ls.attend(q, k, v, plan, impl="tiled", return_lse=True)
    assert kv_heads in used
    monkeypatch.setattr(run, "by_key_heads", lambda *_: None)
    wanted = ls.attend(q, k, v, plan, impl="tiled", return_lse=True)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("text", PATTERNS)
def test_padding_and_packed_documents(text, used, monkeypatch):
    n = 128
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 16, generator=make, dtype=torch.float64) for _ in range(3))
    segments = torch.zeros(2, n, dtype=torch.int64)
    segments[0, :9] = -1
    segments[1, 50:] = 1
    plan = ls.plan(ls.parse(text), n, 4, segments=segments)
    found = ls.attend(q, k, v, plan, impl="tiled")
    monkeypatch.setattr(run, "by_key_heads", lambda *_: None)
    torch.testing.assert_close(found, ls.attend(q, k, v, plan, impl="tiled"))


def test_gradients_are_computed_for_all_heads_at_once(used):
    q = torch.randn(1, 4, 128, 16, requires_grad=True)
    ls.attend(q, q, q, "sda.neighborhood(32, 4)", impl="tiled").sum().backward()
    assert set(used) == {0}


def test_no_leak(used):
    q, k, v = (torch.randn(1, 4, 200, 16) for _ in range(3))
    before = ls.attend(q, k, v, "ssa(16, 4)", impl="tiled")
    k[:, :, 120:], v[:, :, 120:], q[:, :, 120:] = 7.0, 5.0, -3.0
    after = ls.attend(q, k, v, "ssa(16, 4)", impl="tiled")
    assert torch.equal(before[:, :, :120], after[:, :, :120])
    assert used
