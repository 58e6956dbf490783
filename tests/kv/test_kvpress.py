"""Scores against kvpress's definitions: by formula always, by its presses where it is there.

``pip install --no-deps kvpress`` is enough: its presses are loaded one by one, because its package
file patches transformers' attention for the whole process and imports things that they do without.
Differences are listed in docs/kv-cache.md.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers")

import longspan as ls
from longspan.hf.fork import waiting
from longspan.kv.policy import best
from longspan.select.budgets import Ratio, adaptive, pyramid

N, WINDOW, KERNEL, SINKS = 41, 8, 5, 4
PARTS = {
    "knorm": "keynorm(8)",
    "keydiff": "keydiff(8)",
    "snapkv": f"snapkv(8, window={WINDOW}, kernel={KERNEL})",
    "tova": "tova(8)",
    "expected_attention": f"expected_attention(8, sinks={SINKS})",
    "observed_attention": "heavy(8, age=true)",
}


@pytest.fixture(scope="module")
def presses():
    """Classes by module name."""
    found = importlib.util.find_spec("kvpress")
    if found is None:
        pytest.skip("kvpress is not installed: pip install --no-deps kvpress")
    before = dict(sys.modules)
    bare = ModuleType("kvpress")
    bare.__path__ = list(found.submodule_search_locations or ())
    sys.modules["kvpress"] = bare

    def load(name, press):
        return getattr(importlib.import_module(f"kvpress.presses.{name}_press"), press)

    yield load
    for name in set(sys.modules) - set(before):
        if name.startswith("kvpress"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def layers(tiny_model):
    """Of each layer: our view, and what a press is called with."""
    model = ls.hf.load_model(tiny_model, dtype="float64")[0]
    ids = torch.randint(20, 250, (2, N), generator=torch.Generator().manual_seed(3))
    cache = ls.kv.cache(model, waiting(list(PARTS.values())))
    called = []

    def note(module, _, given):
        called.append((module, given["hidden_states"], given["position_embeddings"]))

    hooks = [
        layer.self_attn.register_forward_pre_hook(note, with_kwargs=True)
        for layer in model.model.layers
    ]
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        for hook in hooks:
            hook.remove()
        ls.hf.remove(model)
        model.set_attn_implementation("eager")
        weights = model(ids, output_attentions=True).attentions
    found = []
    for held, (module, hidden, rotary), weight in zip(cache.layers, called, weights, strict=True):
        view = held.view()
        config = SimpleNamespace(
            num_attention_heads=module.config.num_attention_heads,
            num_key_value_heads=module.config.num_key_value_heads,
            num_hidden_layers=len(weights),
            _attn_implementation="sdpa",
        )
        stand_in = SimpleNamespace(
            config=config,
            head_dim=module.head_dim,
            q_proj=module.q_proj,
            layer_idx=module.layer_idx,
            rotary_emb=model.model.rotary_emb,
        )
        given = (stand_in, hidden, view.keys, view.values)
        found.append((view, weight, given, {"position_embeddings": rotary}))
    return found


def grouped(weight, groups):
    """Mean over the query heads of a group."""
    return weight.view(len(weight), groups, -1, *weight.shape[2:]).mean(2)


def formula(name, view, weight, given):
    """What the definition says, in terms of the attention matrix."""
    keys, values, groups = view.keys, view.values, view.keys.shape[1]
    if name == "knorm":
        return -(keys**2).sum(-1).sqrt()
    if name == "keydiff":
        unit = keys / keys.norm(dim=-1, keepdim=True)
        anchor = unit.mean(2, keepdim=True)
        return -(unit * anchor).sum(-1) / anchor.norm(dim=-1)
    if name == "tova":
        return weight[:, :, -1].mean(1)[:, None].expand(-1, groups, -1)
    if name == "observed_attention":
        return grouped(weight.sum(2) / torch.arange(N, 0, -1), groups)
    if name == "snapkv":
        mass = weight[:, :, -WINDOW:, :-WINDOW].mean(2)
        pooled = F.avg_pool1d(mass, KERNEL, 1, KERNEL // 2, count_include_pad=False)
        return F.pad(grouped(pooled, groups), (0, WINDOW))
    module, hidden, _, _ = given
    width = module.head_dim
    q = module.q_proj(hidden[:, SINKS:]).unflatten(-1, (-1, width)).transpose(1, 2)
    mean, off = q.mean(2), q - q.mean(2, keepdim=True)
    spread = off.mT @ off / q.shape[2]
    cos, sin = (x[0] for x in module.rotary_emb(q, torch.arange(N, N + 512)[None]))
    half = torch.zeros(width, width, dtype=q.dtype)
    half[: width // 2, width // 2 :] = -torch.eye(width // 2)
    half[width // 2 :, : width // 2] = torch.eye(width // 2)
    turn = (cos[:, :, None] * torch.eye(width) + sin[:, :, None] * half).mean(0)
    mean, spread = mean @ turn.T, turn @ spread @ turn.T
    k = keys[:, :, SINKS:].repeat_interleave(q.shape[1] // groups, 1)
    logit = torch.einsum("bhd,bhnd->bhn", mean, k) / width**0.5
    logit = logit + torch.einsum("bhnd,bhde,bhne->bhn", k, spread, k) / (2 * width)
    score = grouped(logit.softmax(-1), groups) * values[:, :, SINKS:].norm(dim=-1)
    return F.pad(score, (SINKS, 0))


def ours(name, view):
    """Our scores, on the scale of the definition: means where ours are sums."""
    (part,) = ls.kv.parse(PARTS[name]).parts
    score = part.score(view)
    if name == "snapkv":
        return score / WINDOW
    if name == "observed_attention":
        return score / (view.queries.shape[1] / view.keys.shape[1])
    return score


def close(name, mine, theirs):
    # Softmax of transformers and of presses is float32, and so are our sums of attention.
    tolerance = 1e-9 if name in ("knorm", "keydiff") else 1e-6
    torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", PARTS)
@torch.inference_mode()
def test_scores_are_those_of_the_formula(layers, name):
    for view, weight, given, _ in layers:
        expected = formula(name, view, weight, given)
        close(name, ours(name, view), expected)


@pytest.mark.parametrize(
    ("name", "press", "more"),
    [
        ("knorm", "KnormPress", {}),
        ("keydiff", "KeyDiffPress", {}),
        ("snapkv", "SnapKVPress", {"window_size": WINDOW, "kernel_size": KERNEL}),
        ("tova", "TOVAPress", {}),
        ("expected_attention", "ExpectedAttentionPress", {"n_sink": SINKS}),
        ("observed_attention", "ObservedAttentionPress", {}),
    ],
)
@torch.inference_mode()
def test_scores_are_those_of_the_press(layers, presses, name, press, more):
    made = presses(name, press)(compression_ratio=0.5, **more)
    for view, weight, given, rest in layers:
        attentions = weight if name == "observed_attention" else None
        theirs, mine = made.score(*given, attentions, rest), ours(name, view)
        where = slice(None)
        if name == "tova":
            # The press always keeps the newest token; ours does by recent(...), as all policies.
            where = slice(0, N - 1)
        elif name == "expected_attention":
            where = slice(SINKS, N)
        elif name == "snapkv":
            # Its pooling counts zeros beyond the ends; ours averages over the keys that are there.
            where = slice(0, N - WINDOW)
            there = torch.ones(1, 1, N - WINDOW, dtype=mine.dtype)
            share = F.avg_pool1d(there, KERNEL, 1, KERNEL // 2)
            assert share[0, 0, 0] == pytest.approx(0.6)
            mine = mine[..., where] * share
        close(name, mine[..., where], theirs[..., where])


@pytest.mark.parametrize("kept", [5, 12, 30])
def test_first_and_last_tokens_are_those_of_the_press(layers, presses, kept):
    view, _, given, rest = layers[0]
    # A little more than the share, as int() cuts.
    made = presses("streaming_llm", "StreamingLLMPress")(1 - (kept + 0.01) / N)
    theirs = made.score(*given, None, rest).bool()
    mine = ls.kv.parse(f"sinks(4) + recent({kept - 4})").keep(view)
    assert torch.equal(mine, theirs)
    assert int(mine[0, 0].sum()) == kept


@pytest.mark.parametrize("floor", [0.0, 0.2, 1.0])
def test_heads_share_a_layer_as_the_press_does(layers, presses, floor):
    _, _, given, rest = layers[0]
    draw = torch.rand(2, 2, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scorer = presses("scorer", "ScorerPress")(0.5)
    scorer.score = lambda *_: draw.clone()
    made = presses("adakv", "AdaKVPress")(scorer, floor)
    made.compress(*given, None, rest)
    theirs = torch.ones(2, 2, N, dtype=torch.bool)
    theirs[given[0].masked_key_indices] = False
    kept = Ratio(0.5).count(N)
    mine = best(draw, adaptive(draw, 2 * kept, floor=int(floor * kept)))
    assert torch.equal(mine, theirs)


def test_the_pyramid_of_the_press_is_flat_for_short_prompts_and_rounds(presses):
    made = presses("pyramidkv", "PyramidKVPress")(0.9, window_size=64)

    def theirs(tokens, depth):
        module = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=depth))
        return [
            made.get_layer_budget(SimpleNamespace(**vars(module), layer_idx=i), tokens)
            for i in range(depth)
        ]

    # Below 64 tokens in the last layer it falls back to the same budget everywhere.
    assert set(theirs(4096, 32)) == {410}
    assert len(set(pyramid(32, 410 - 64).tolist())) > 1
    mine, other = pyramid(31, 1638), theirs(16384, 31)
    assert mine.sum() == 31 * 1638
    assert sum(other) == pytest.approx(31 * 1638.4, abs=31 / 2)
    assert max(abs(int(a) - b) for a, b in zip(mine, other, strict=True)) <= 2


def test_a_share_cut_off_by_rounding_is_one_token_less_in_kvpress(presses):
    presses("knorm", "KnormPress")
    kept = importlib.import_module("kvpress.utils").compute_n_kept
    assert kept(100, 0.9) == 9
    assert Ratio(0.1).count(100) == 10
