"""Every route on a GPU against dense float32 attention under the executed mask."""

from __future__ import annotations

import pytest
import torch

from longspan.select import columns as column_pass
from longspan.select.attention import ROUTES, prefill, select
from longspan.select.measure import sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # The compiler of the kernel there raises warnings of its own.
    pytest.mark.filterwarnings("default"),
]
TEXTS = (
    "block_topk(3)",
    "vertical_slash(64, 300)",
    "sinks(128) + recent(300) + every(50)",
    "xattention(0.6, stride=16)",
)


def prompt(n, m, dtype):
    parts = [sample(m, 8, 2, 64, dtype=dtype, device="cuda", seed=row) for row in range(2)]
    q, k, v = (torch.cat(x) for x in zip(*parts, strict=True))
    return q[:, :, m - n :].contiguous(), k, v


def expected(found):
    own = found.layout.prompt
    mask = found.selection.mask(own)
    k, v = (own.per_head(x.float()) for x in (own.k, found.v))
    logits = (own.q.float() @ k.mT * own.scale).masked_fill(~mask, -torch.inf)
    lse = logits.logsumexp(-1, keepdim=True)
    weight = (logits - lse.masked_fill(lse == -torch.inf, 0.0)).exp()
    return found.layout.take_back(weight @ v, 0.0), found.layout.take_back(lse, -torch.inf)[..., 0]


@torch.no_grad()
@pytest.mark.parametrize("impl", ROUTES)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("shape", ["whole", "odd", "chunk", "padded"])
def test_a_route_computes_what_was_selected(impl, text, shape):
    n, m = {"whole": (1024, 1024), "odd": (901, 901), "chunk": (300, 1100)}.get(shape, (700, 700))
    q, k, v = prompt(n, m, torch.bfloat16)
    place = None
    if shape == "padded":
        place = torch.arange(n, device="cuda") - torch.tensor([[0], [133]], device="cuda")
        place = place.clamp(min=-1)
    found = select(q, k, v, text, place=place)
    if why := ROUTES[impl][0](found.layout.prompt, found.v):
        pytest.skip("; ".join(why))
    out, lse = found.attend(impl)
    right, total = expected(found)
    assert float((out.float() - right).norm() / right.norm()) < 1e-2
    seen = torch.isfinite(total)
    assert torch.equal(torch.isfinite(lse), seen)
    assert float((lse - total)[seen].abs().max()) < 2e-3


@torch.no_grad()
def test_prompts_of_all_lengths_share_a_graph_of_columns(monkeypatch):
    monkeypatch.setattr(column_pass, "_fused", {})
    for n in (700, 512, 901, 1024, 1300):
        q, k, v = prompt(n, n, torch.bfloat16)
        found = select(q, k, v, "block_topk(1) + every(40)")
        out, lse = found.attend("ranges")
        right, total = expected(found)
        assert float((out.float() - right).norm() / right.norm()) < 1e-2
        assert float((lse - total).abs().max()) < 2e-3
    (only,) = column_pass._fused.values()
    code = getattr(only, "_torchdynamo_orig_callable").__code__  # noqa: B009
    assert len(torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code)) == 1


def test_gradients_go_through_ranges():
    q, k, v = (x.requires_grad_() for x in prompt(512, 512, torch.float32))
    grads = torch.autograd.grad(prefill(q, k, v, "block_topk(2) + every(30)").sum(), (q, k, v))
    wide = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    wanted = torch.autograd.grad(prefill(*wide, "block_topk(2) + every(30)").sum(), wide)
    for own, other in zip(grads, wanted, strict=True):
        assert float((own.cpu() - other).norm() / other.norm()) < 1e-2
