"""Recall by the definition, and the length from which a method pays."""

from __future__ import annotations

import pytest
import torch
from tests.select import oracles
from tests.select.test_prefill import METHODS, H, mask_of, tensors

from longspan.select import measure
from longspan.select.attention import select


@pytest.mark.parametrize("text", METHODS)
def test_recall_is_the_mass_that_dense_attention_gives_to_what_is_kept(text):
    q, k, v = tensors(40, 100)
    found = select(q, k, v, text, layer=1, layers=3)
    mass = oracles.probs(q[0], oracles.rep(k[0], H), oracles.causal(40, 100))
    wanted = (mass * mask_of(found, 40)[0]).sum(-1).mean(-1)
    # As many looked at as there are rows: each is looked at once.
    torch.testing.assert_close(measure.recall(found, 40)[0], wanted, atol=1e-10, rtol=0)


def test_recall_is_a_measurement_without_gradients():
    q, k, v = tensors(40, 40)
    found = select(q.requires_grad_(), k, v, "block_topk(0.5, block=16)")
    assert not measure.recall(found, 16).requires_grad
    assert found.attend()[0].requires_grad


def test_recall_skips_padding():
    q, k, v = tensors(60, 60, batch=2)
    text = "block_topk(2, block=16)"
    place = torch.stack([torch.arange(60), torch.arange(60) - 23]).clamp(min=-1)
    rolled = [torch.stack([x[0], x[1].roll(-23, 1)]) for x in (k, v)]
    padded = measure.recall(select(q, *rolled, text, place=place), 37)
    alone = select(q[1:, :, 23:], k[1:, :, 23:], v[1:, :, 23:], text)
    torch.testing.assert_close(padded[1:], measure.recall(alone, 37), atol=1e-10, rtol=0)


def test_break_even_is_measured_once_and_between_the_lengths_tried():
    sizes = {"heads": 2, "kv_heads": 1, "width": 16, "seconds": 0.0, "longest": 2048}
    measure._break_even.cache_clear()
    found = measure.break_even("sinks(4) + recent(64)", **sizes)
    assert found in (1024, 2048)
    assert measure.break_even("sinks(4) + recent(64)", **sizes) == found
    assert measure._break_even.cache_info().hits == 1


def test_a_method_that_does_everything_never_pays(monkeypatch):
    times = iter([2.0, 1.0] * 20)
    monkeypatch.setattr(measure, "best_time", lambda run, device: next(times))
    measure._break_even.cache_clear()
    sizes = {"heads": 2, "kv_heads": 1, "width": 16, "longest": 4096}
    assert measure.break_even("recent(100000)", **sizes) == 8192
    # Slower, faster, faster: from the second length on.
    times = iter([2.0, 1.0, 1.0, 2.0, 1.0, 2.0])
    measure._break_even.cache_clear()
    assert measure.break_even("recent(100000)", **sizes) == 2048


def test_a_sample_has_heavy_keys_and_near_ones():
    q, k, _ = measure.sample(512, 4, 2, 32, dtype=torch.float32, device="cpu")
    mass = oracles.probs(q[0].double(), oracles.rep(k[0], 4).double(), oracles.causal(512, 512))
    rows = mass[:, 256:]
    near = torch.stack([rows[:, i, 256 + i - 63 : 257 + i].sum(-1) for i in range(256)]).mean()
    # Even attention would give 64 of about 384 keys a sixth, and 4 keys a hundredth.
    assert near > 0.2
    assert rows[..., :4].sum(-1).mean() > 0.03
