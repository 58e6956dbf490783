"""The same on a CUDA device, through the kernel that is chosen there."""

from __future__ import annotations

import copy

import pytest
import torch

import longspan as ls

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # The compiler of the kernel there raises warnings of its own.
    pytest.mark.filterwarnings("default"),
]
PATTERN = ls.Window(40) | ls.Sink(4)
N = 301


@pytest.fixture
def model(tiny):
    """A tiny model whose heads are wide enough for every kernel."""
    return tiny.build("llama", hidden_size=128, head_dim=32, max_position_embeddings=512).cuda()


def relative(got, expected):
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


def test_logits_and_gradients_equal_an_explicit_mask(tiny, model):
    ids = tiny.tokens(2, N).cuda()
    oracle = tiny.oracle(model.cpu(), PATTERN).double().train()
    expected = oracle(ids.cpu(), labels=ids.cpu(), use_cache=False)
    expected.loss.backward()
    model = model.cuda().train()
    ls.hf.apply(model, PATTERN)
    got = model(ids, labels=ids, use_cache=False)
    got.loss.backward()
    assert relative(got.logits.cpu(), expected.logits) < 2e-3
    wanted = dict(oracle.named_parameters())
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad.cpu(), wanted[name].grad) < 1e-2, name


@torch.no_grad()
def test_half_precision_with_padding(tiny, model):
    ids = tiny.tokens(2, N).cuda()
    mask = torch.ones_like(ids)
    mask[0, :77] = 0
    oracle = tiny.oracle(model.cpu(), PATTERN)
    expected = oracle(ids[:1, 77:].cpu(), use_cache=False).logits
    model = model.cuda().bfloat16()
    ls.hf.apply(model, PATTERN)
    got = model(ids, attention_mask=mask, use_cache=False).logits
    assert relative(got[:1, 77:].cpu(), expected) < 5e-2


@pytest.mark.parametrize("cache", [None, "static"])
@torch.no_grad()
def test_generate_equals_full_forwards(tiny, model, cache):
    ids = tiny.tokens(1, 60).cuda()
    ls.hf.apply(model, PATTERN)
    options = {} if cache is None else {"cache_implementation": cache}
    got = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=8,
        do_sample=False,
        **options,
    )
    alone = ids
    for _ in range(8):
        step = model(alone, use_cache=False).logits[:, -1:]
        alone = torch.cat([alone, step.argmax(dim=-1)], dim=1)
    assert got.tolist() == alone.tolist()


MECHANISMS = {
    "AdaptiveSpan": {"max_span": 40, "ramp": 16},
    "BlockGate": {"block": 16, "top": 4},
    "DualChunkAttention": {"chunk": 60, "local": 40},
    "LinearAttention": {},
    "MoBA": {"block": 16, "top": 4},
    "NSA": {"block": 16, "stride": 8, "select_block": 16, "select": 4, "window": 40},
    "PooledChunkAttention": {"chunk": 16, "pool": "learned"},
    "TopK": {"keep": 30},
}


@pytest.mark.parametrize("name", MECHANISMS)
def test_mechanisms_equal_the_cpu_and_generate(tiny, model, name):
    ids = tiny.tokens(2, N)
    mask = torch.arange(N) >= torch.tensor([[0], [77]])
    given = {"attention_mask": mask.long(), "use_cache": False}
    ls.hf.convert(model, name, **MECHANISMS[name])
    host = copy.deepcopy(model).cpu().double()
    got = model(ids.cuda(), **{**given, "attention_mask": mask.long().cuda()}).logits
    expected = host(ids, **given).logits
    # What is selected may differ where two scores are nearly equal.
    apart = [relative(a[m], b[m]) for a, b, m in zip(got.cpu(), expected, mask, strict=True)]
    assert max(apart) < (0.1 if name in ("BlockGate", "MoBA", "NSA", "TopK") else 5e-3)
    for out in (got, expected):
        out.square().mean().backward()
    wanted = dict(host.named_parameters())
    for path, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert relative(parameter.grad.cpu(), wanted[path].grad) < 0.2, path
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    given = {"attention_mask": mask.long().cuda()}
    found = model.eval().generate(ids.cuda(), **given, **settings)
    plain = model.generate(ids.cuda(), **given, **settings, use_cache=False)
    assert torch.equal(found, plain)
