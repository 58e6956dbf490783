"""Prefill methods against float64 definitions: what is selected, and what comes out."""

from __future__ import annotations

import math

import pytest
import torch
from tests.select import oracles

from longspan.errors import InputError, PolicyError
from longspan.select import block_topk, choose, fixed, vertical_slash
from longspan.select.attention import prefill, select
from longspan.select.budgets import Coverage, Ratio, Tokens
from longspan.select.estimate import norm, probe
from longspan.select.flex_prefill import jensen_shannon
from longspan.select.pooled import antidiagonal, bounds, query_means
from longspan.select.text import TERMS, parse

H, K, D, S = 4, 2, 8, 16
SHAPES = [(100, 100), (96, 96), (37, 100), (1, 50), (16, 16)]
OWN = "queries of the row's own block"
METHODS = (
    "sinks(5) + recent(20)",
    "recent(9) + tail(3) + every(7)",
    "keynorm(6)",
    "vertical_slash(6, 9, probe=8, first=2, last=3, block=16)",
    "vertical_slash(coverage(0.6), 0.1, probe=8, first=2, last=3, block=16)",
    "block_topk(3, block=16)",
    "block_topk(0.5, block=16)",
    "block_topk(coverage(0.8), block=16)",
    "block_topk(3, score=bounds, block=16)",
    "block_topk(3, score=antidiagonal, block=16)",
    "block_topk(4, over=heads, block=16)",
    "block_topk(4, over=layers, block=16)",
    "flex_prefill(0.6, 0.0, least=3, block=16)",
    "flex_prefill(0.6, 9.0, least=3, block=16)",
    "flex_prefill(0.6, 0.3, least=3, block=16)",
    "xattention(0.6, stride=4, block=16)",
    "block_topk(3, block=16) + keynorm(4) + every(30)",
)


def tensors(n, m, batch=1, seed=0):
    # Spread wide enough for attention to be uneven.
    q = 2 * oracles.random(seed, batch, H, n, D)
    return (
        q,
        2 * oracles.random(seed + 1, batch, K, m, D),
        oracles.random(seed + 2, batch, K, m, D),
    )


def mask_of(found, n):
    """Executed mask of the queries [B, H, N, M] of a prompt without padding."""
    front = found.layout.front
    m = int(found.layout.prompt.length[0])
    return found.selection.mask(found.layout.prompt)[:, :, front : front + n, :m]


def chosen_masks(find, q, k):
    """A definition that looks at one head, for all heads of one row of a batch."""
    k = oracles.rep(k, len(q))
    return torch.stack([find(q[h], k[h]) for h in range(len(q))])


def blocks(find):
    return lambda q, k: oracles.blocks_to_mask(find(q, k), len(q), len(k), S)


def xattention(q, k):
    """The definition needs whole blocks: zeros in front and behind, in rows that are cut off."""
    n, m = len(q), len(k)
    wide = -(-m // S) * S
    mass = oracles.antidiagonal(
        torch.cat([q.new_zeros(m - n, D), q, q.new_zeros(wide - m, D)]),
        torch.cat([k, k.new_zeros(wide - m, D)]),
        4,
        S,
        m,
    )
    return oracles.xattention(mass, 0.6)


DEFINITIONS = {
    "block_topk(3, block=16)": blocks(
        lambda q, k: oracles.block_topk(oracles.pooled(q, k, S), Tokens(3).count)
    ),
    "block_topk(0.5, block=16)": blocks(
        lambda q, k: oracles.block_topk(oracles.pooled(q, k, S), Ratio(0.5).count)
    ),
    "block_topk(3, score=bounds, block=16)": blocks(
        lambda q, k: oracles.block_topk(oracles.bounds(q, k, S), Tokens(3).count)
    ),
    "xattention(0.6, stride=4, block=16)": blocks(xattention),
    "flex_prefill(0.6, 0.0, least=3, block=16)": lambda q, k: oracles.flex_prefill(
        q, k, 0.6, 0.0, 3, S
    )[0],
    "flex_prefill(0.6, 9.0, least=3, block=16)": lambda q, k: oracles.flex_prefill(
        q, k, 0.6, 9.0, 3, S
    )[0],
    "flex_prefill(0.6, 0.3, least=3, block=16)": lambda q, k: oracles.flex_prefill(
        q, k, 0.6, 0.3, 3, S
    )[0],
}


@pytest.mark.parametrize(("n", "m"), [(100, 100), (96, 96), (37, 100)])
@pytest.mark.parametrize("text", DEFINITIONS)
def test_what_is_selected_follows_the_definition(text, n, m):
    if text.startswith("xattention") and n < m:
        # Rows of zeros in front would fill the first cells, which chunks do not have.
        n = 36
    q, k, v = tensors(n, m)
    wanted = chosen_masks(DEFINITIONS[text], q[0], k[0])
    assert torch.equal(mask_of(select(q, k, v, text), n)[0], wanted)


@pytest.mark.parametrize(("n", "m"), [(100, 100), (37, 100)])
def test_vertical_slash_is_the_papers_mask_rounded_to_blocks(n, m):
    q, k, v = tensors(n, m)
    text = "vertical_slash(6, 9, probe=8, first=2, last=3, block=16)"
    found = mask_of(select(q, k, v, text), n)[0]
    sizes = {"rows": 8, "first": 2, "last": 3}
    assert torch.equal(found, oracles.vertical_slash(q[0], k[0], 6, 9, S, **sizes))
    ideal, _, _ = oracles.ideal_vertical_slash(q[0], k[0], 6, 9, **sizes)
    assert not (ideal & ~found).any()
    # The two blocks that a diagonal crosses reach less than two blocks from it.
    near = torch.nn.functional.max_pool1d(ideal.float(), 4 * S - 1, 1, 2 * S - 1) > 0
    assert not (found & ~near).any()


@pytest.mark.parametrize(("n", "m"), [(100, 100), (37, 100)])
@pytest.mark.parametrize(("text", "sign"), [("", -1), (", large=false", 1)])
def test_embeddings_of_a_norm_are_columns_of_all_heads(n, m, text, sign):
    q, k, v = tensors(n, m, batch=2)
    embeddings = oracles.random(5, 2, m, 3)
    norms = embeddings.norm(dim=-1)
    found = select(q, k, v, f"block_topk(3, block=16) + embeddingnorm(7{text})", norms=norms)
    own = mask_of(select(q, k, v, "block_topk(3, block=16)"), n)
    for b in range(2):
        ranked = sorted(range(m), key=lambda j: sign * math.dist([0, 0, 0], embeddings[b, j]))
        wanted = torch.zeros(m, dtype=torch.bool)
        wanted[ranked[:7]] = True
        seen = own[b] | (wanted & oracles.causal(n, m))
        assert torch.equal(mask_of(found, n)[b], seen)
        out, lse = oracles.attend(q[b], k[b], v[b], seen)
        torch.testing.assert_close(found.attend()[0][b], out, atol=1e-10, rtol=0)
        torch.testing.assert_close(found.attend()[1][b], lse, atol=1e-10, rtol=0)
    # A budget for everything is dense, whatever the norms are.
    dense = prefill(q, k, v, "embeddingnorm(1.0)", norms=norms)
    wanted, _ = oracles.attend(q[0], k[0], v[0], oracles.causal(n, m))
    torch.testing.assert_close(dense[0], wanted, atol=1e-10, rtol=0)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_norms_of_padding_do_not_count(side):
    n, gap, text = 75, 20, "sinks(1) + embeddingnorm(0.2)"
    q, k, v = tensors(n + gap, n + gap, batch=2)
    norms = oracles.random(6, 2, n + gap).abs()
    token = torch.ones(2, n + gap, dtype=torch.bool)
    hole = {"left": slice(0, gap), "right": slice(n, None), "middle": slice(30, 30 + gap)}[side]
    token[1, hole] = False
    norms[1, hole] = 99.0
    out = prefill(q, k, v, text, mask=token, norms=norms)
    kept = token[1]
    parts = (q[1:, :, kept], k[1:, :, kept], v[1:, :, kept])
    alone = prefill(*parts, text, norms=norms[1:, kept])
    torch.testing.assert_close(out[1:, :, kept], alone, atol=1e-10, rtol=0)
    assert not out[1, :, ~kept].any()


def test_norms_that_are_missing_or_misshapen_are_asked_for():
    q, k, v = tensors(20, 20)
    with pytest.raises(InputError, match="needs the norms of the embeddings"):
        prefill(q, k, v, "embeddingnorm(3)")
    with pytest.raises(InputError, match=r"norms must be \[batch, keys\] \[1, 20\]"):
        prefill(q, k, v, "embeddingnorm(3)", norms=torch.ones(20))


@pytest.mark.parametrize(("n", "m"), SHAPES)
@pytest.mark.parametrize("text", METHODS)
def test_output_is_dense_attention_under_the_executed_mask(text, n, m):
    q, k, v = tensors(n, m, batch=2)
    found = select(q, k, v, text, layer=1, layers=3)
    mask = mask_of(found, n)
    assert mask.any(-1).all()
    assert not (mask & ~oracles.causal(n, m)).any()
    out, lse = found.attend()
    for b in range(2):
        wanted, total = oracles.attend(q[b], k[b], v[b], mask[b])
        torch.testing.assert_close(out[b], wanted, atol=1e-10, rtol=0)
        torch.testing.assert_close(lse[b], total, atol=1e-10, rtol=0)


@pytest.mark.parametrize("text", METHODS)
def test_density_counts_the_executed_pairs(text):
    q, k, v = tensors(53, 100, batch=2)
    found = select(q, k, v, text, layer=1, layers=3)
    pairs = mask_of(found, 53).sum((2, 3)).double() / oracles.causal(53, 100).sum()
    torch.testing.assert_close(found.density(), pairs, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "text",
    [
        "recent(500)",
        "every(1)",
        "keynorm(1.0)",
        "vertical_slash(500, 1, probe=8, last=1, block=16)",
        "vertical_slash(1, 500, probe=8, first=1, block=16)",
        "block_topk(99, block=16)",
        "block_topk(1.0, block=16)",
        "block_topk(99, over=heads, block=16)",
        "flex_prefill(1.0, 0.0, block=16)",
        "xattention(1.0, stride=4, block=16)",
    ],
)
def test_a_budget_for_everything_is_dense(text):
    q, k, v = tensors(90, 90)
    wanted, _ = oracles.attend(q[0], k[0], v[0], oracles.causal(90, 90))
    torch.testing.assert_close(prefill(q, k, v, text)[0], wanted, atol=1e-10, rtol=0)


@pytest.mark.parametrize("text", METHODS)
@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_a_padded_row_is_the_row_alone(text, side):
    n, gap = 75, 20
    q, k, v = tensors(n + gap, n + gap, batch=2)
    token = torch.ones(2, n + gap, dtype=torch.bool)
    hole = {"left": slice(0, gap), "right": slice(n, None), "middle": slice(30, 30 + gap)}[side]
    token[1, hole] = False
    out = prefill(q, k, v, text, mask=token)
    kept = token[1]
    alone = prefill(q[1:, :, kept], k[1:, :, kept], v[1:, :, kept], text)
    torch.testing.assert_close(out[1:, :, kept], alone, atol=1e-10, rtol=0)
    assert not out[1, :, ~kept].any()
    torch.testing.assert_close(out[:1], prefill(q[:1], k[:1], v[:1], text), atol=1e-10, rtol=0)


@pytest.mark.parametrize("text", ["block_topk(3, block=16)", "xattention(0.6, 4, block=16)"])
def test_rows_that_decide_for_themselves_do_not_care_about_chunks(text):
    q, k, v = tensors(96, 96)
    parts = [
        prefill(q[:, :, a : a + 32], k[:, :, : a + 32], v[:, :, : a + 32], text)
        for a in (0, 32, 64)
    ]
    torch.testing.assert_close(torch.cat(parts, 2), prefill(q, k, v, text), atol=1e-10, rtol=0)


@pytest.mark.parametrize("text", METHODS)
def test_values_of_later_tokens_never_leak(text):
    q, k, v = tensors(100, 100)
    before = prefill(q, k, v, text)
    v[:, :, 60:] = 1e6
    assert torch.equal(prefill(q, k, v, text)[:, :, :60], before[:, :, :60])


@pytest.mark.parametrize("text", [m for m in METHODS if not parse(m).depends])
def test_what_depends_on_nothing_later_does_not_change_at_all(text):
    q, k, v = tensors(100, 100)
    before = prefill(q, k, v, text)
    for x in (q, k, v):
        x[:, :, 60:] = oracles.random(9, *x[:, :, 60:].shape)
    assert torch.equal(prefill(q, k, v, text)[:, :, :60], before[:, :, :60])


@pytest.mark.parametrize("text", [m for m in METHODS if parse(m).depends == OWN])
def test_own_block_methods_change_within_the_block_only(text):
    q, k, v = tensors(100, 100)
    before = prefill(q, k, v, text)
    for x in (q, k, v):
        x[:, :, 60:] = oracles.random(9, *x[:, :, 60:].shape)
    assert torch.equal(prefill(q, k, v, text)[:, :, :48], before[:, :, :48])


@pytest.mark.parametrize("m", [96, 100])
def test_no_tail_is_no_tail_where_the_last_block_is_cut_off(m):
    q, k, v = tensors(m, m)
    without = mask_of(select(q, k, v, f"block_topk(3, block={S})"), m)
    assert torch.equal(mask_of(select(q, k, v, f"tail(0) + block_topk(3, block={S})"), m), without)


def test_planted_columns_and_diagonals_are_found():
    n = 200
    q, k, v = (x.clone() for x in tensors(n, n))
    q[..., 0] = 6.0
    k[:, :, 77] = 0.0
    k[:, :, 77, 0] = 8.0
    found = select(q, k, v, "vertical_slash(8, 4, probe=16, first=2, last=2, block=16)")
    assert (found.selection.columns == 77).any(-1).all()

    q, k, v = (x.clone() for x in tensors(n, n))
    # Row i asks for what row i - 90 says.
    q[:, :, 90:] = 4 * oracles.rep(k[0], H)[None, :, : n - 90]
    mask = mask_of(select(q, k, v, "vertical_slash(4, 8, probe=16, first=2, last=2, block=16)"), n)
    rows = torch.arange(90, n)
    assert mask[:, :, rows, rows - 90].all()


@pytest.mark.parametrize(
    ("small", "large"),
    [
        ("block_topk(3, block=16)", "block_topk(5, block=16)"),
        ("vertical_slash(4, 5, 8, 2, 3, 16)", "vertical_slash(9, 12, 8, 2, 3, 16)"),
        ("xattention(0.4, 4, block=16)", "xattention(0.9, 4, block=16)"),
        ("flex_prefill(0.4, 0.0, 3, 16)", "flex_prefill(0.9, 0.0, 3, 16)"),
    ],
)
def test_larger_budgets_select_supersets(small, large):
    q, k, v = tensors(100, 100)
    less, more = (mask_of(select(q, k, v, text), 100) for text in (small, large))
    assert not (less & ~more).any()
    assert (more & ~less).any()


def test_spreads_keep_the_sum_exact():
    q, k, v = tensors(160, 160)
    even = select(q, k, v, "block_topk(5, block=16)").selection.blocks
    heads = select(q, k, v, "block_topk(5, over=heads, block=16)").selection.blocks
    assert torch.equal(even.sum((1, 3)), heads.sum((1, 3)))
    assert (heads.sum(-1) != even.sum(-1)).any()
    # The last block of queries sees ten blocks, budgets of 5 fall from layer to layer.
    text = "block_topk(5, over=layers, block=16)"
    last = [
        int(select(q, k, v, text, layer=layer, layers=4).selection.blocks[0, 0, -1].sum())
        for layer in range(4)
    ]
    assert last == sorted(last, reverse=True)
    # Three are forced, so only layers above that are the pyramid's own.
    assert last[0] > 5 > last[-1] >= 3


def test_gradients_flow_through_what_was_selected():
    q, k, v = (x.requires_grad_() for x in tensors(50, 50))
    text = "block_topk(3, block=16) + every(9)"
    mask = mask_of(select(q, k, v, text), 50)
    weight = oracles.random(7, 1, H, 50, D)
    found = torch.autograd.grad((prefill(q, k, v, text) * weight).sum(), (q, k, v))
    out, _ = oracles.attend(q[0], k[0], v[0], mask[0])
    wanted = torch.autograd.grad((out * weight[0]).sum(), (q, k, v))
    for own, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, other, atol=1e-9, rtol=0)


def test_half_precision_is_close():
    q, k, v = tensors(100, 100)
    text = "sinks(16) + recent(40)"
    wanted = prefill(q, k, v, text)
    out = prefill(*(x.bfloat16() for x in (q, k, v)), text)
    assert out.dtype == torch.bfloat16
    assert ((out - wanted).norm() / wanted.norm()) < 0.02


def test_cover_takes_the_fewest_and_forced_mass_counts():
    mass = torch.tensor([[0.1, 0.4, 0.2, 0.3]], dtype=torch.float64)
    none = torch.zeros(1, 4, dtype=torch.bool)
    assert choose.cover(mass, 0.7, none).tolist() == [[False, True, False, True]]
    forced = torch.tensor([[False, False, True, False]])
    assert choose.cover(mass, 0.55, forced).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("text", [m for m in METHODS if "coverage" not in m and "flex" not in m])
def test_numbers_known_here_choose_what_numbers_on_the_device_choose(text, monkeypatch):
    q, k, v = tensors(53, 100, batch=2)
    wanted = mask_of(select(q, k, v, text, layer=1, layers=3), 53)
    for module in (block_topk, fixed, vertical_slash):
        monkeypatch.setattr(module, "amount", lambda *given: choose.counts(*given[:3]))
    assert torch.equal(mask_of(select(q, k, v, text, layer=1, layers=3), 53), wanted)


def test_texts_come_back():
    for text in METHODS:
        assert parse(str(parse(text))) == parse(text)
    for term in TERMS:
        needs = term.name in ("sinks", "recent", "tail", "every", "keynorm", "embeddingnorm")
        made = term(4) if needs else term()
        assert parse(str(made)).terms == (made,)
    assert (
        str(parse("block_topk( coverage(0.90) ) | sinks(4)"))
        == "block_topk(coverage(0.9)) + sinks(4)"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("block_tpk(3)", "did you mean 'block_topk'"),
        ("window(64)", "no prefill method is called 'window'"),
        ("block_topk(0)", "block_topk(0) is fine"),
        ("block_topk(3, score=best)", "one of means, bounds, antidiagonal"),
        ("block_topk(coverage(0.9), over=heads)", "already differs"),
        ("xattention(1.5)", "share of the mass"),
        ("xattention(0.9, stride=7)", "divide the block"),
        ("flex_prefill(0.9, -1)", "tau"),
        ("vertical_slash(-1)", "columns"),
        ("keynorm(coverage(0.5))", "attention mass"),
        ("embeddingnorm(coverage(0.5))", "attention mass"),
        ("embeddingnorm(3, large=no)", "true or false, got 'no'"),
        ("coverage(0.9)", "budget, not a prefill method"),
        ("(" * 4000, "nested too deeply"),
        ("block_topk(3, block=64) + xattention(0.9)", "share a block size"),
        ("", "is empty"),
    ],
)
def test_errors_say_what_was_wrong(text, said):
    if said.endswith("is fine"):
        assert parse(text)
        return
    with pytest.raises(PolicyError) as caught:
        parse(text)
    assert said in str(caught.value)


def test_wrong_inputs_are_refused():
    q, k, v = tensors(20, 20)
    with pytest.raises(InputError, match="mask must be"):
        prefill(q, k, v, "sinks(4)", mask=torch.ones(1, 7))
    with pytest.raises(PolicyError, match="expected a prefill method"):
        prefill(q, k, v, 3)


def test_coverage_counts_the_softmax_over_blocks():
    q, k, v = tensors(100, 100)
    chosen = select(q, k, v, "block_topk(coverage(0.8), block=16)").selection.blocks
    for h in range(H):
        score = oracles.pooled(q[0, h], oracles.rep(k[0], H)[h], S)
        for a in range(7):
            mass = torch.tensor([score[a, b] for b in range(a + 1)], dtype=oracles.F64).softmax(0)
            count = int(Coverage(0.8).counts(mass[None]))
            wanted = oracles.block_topk(score, lambda _, c=count: c)
            assert {b for b in range(7) if chosen[0, h, a, b]} == {b for x, b in wanted if x == a}


def test_antidiagonals_are_direct_sums_and_exact_at_stride_one():
    q, k, v = tensors(96, 96)
    prompt = select(q, k, v, "sinks(0) + block_topk(1, block=16)").layout.prompt
    whole = chosen_masks(lambda q, k: oracles.antidiagonal(q, k, 4, S, 96), q[0], k[0])
    found = antidiagonal(prompt, 4)
    torch.testing.assert_close(found[0], whole, atol=1e-10, rtol=0)
    torch.testing.assert_close(found.sum(-1), torch.full((1, H, 6), S / 4, dtype=oracles.F64))
    # At stride 1 a cell is one weight: the mass of a block is that of dense attention.
    weight = oracles.probs(q[0], oracles.rep(k[0], H), oracles.causal(96, 96))
    blocks = weight.unflatten(1, (-1, S)).unflatten(3, (-1, S)).sum((2, 4))
    torch.testing.assert_close(antidiagonal(prompt, 1)[0], blocks, atol=1e-10, rtol=0)


def test_bounds_are_above_every_product():
    q, k, v = tensors(100, 100)
    prompt = select(q, k, v, "block_topk(1, block=16)").layout.prompt
    bound = bounds(prompt)
    logits = query_means(prompt) @ prompt.per_head(prompt.k).mT * prompt.scale
    logits = logits.masked_fill(~prompt.real[:, None, None], -torch.inf)
    highest = logits.unflatten(-1, (-1, S)).amax(-1)
    assert (bound >= highest - 1e-12)[..., (prompt.back >= 0)[0]].all()


@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize(("n", "m"), [(40, 100), (96, 96), (100, 100), (17, 17), (1, 50)])
def test_a_probe_is_the_attention_of_the_last_rows(n, m, rows):
    q, k, v = tensors(n, m, batch=2)
    prompt = select(q, k, v, "block_topk(1, block=16)").layout.prompt
    found = probe(prompt, rows)
    probed = min(n, rows)
    assert found.rows.tolist() == [probed, probed]
    for mass in (found.columns, found.offsets):
        whole = torch.full((2, H), float(probed), dtype=oracles.F64)
        torch.testing.assert_close(mass.sum(-1), whole)
    for b in range(2):
        for h in range(H):
            columns, offsets = oracles.probe(q[b, h], oracles.rep(k[b], H)[h], rows)
            torch.testing.assert_close(found.columns[b, h, :m], columns)
            torch.testing.assert_close(found.offsets[b, h, :m], offsets)


def test_a_probe_knows_padded_rows_apart():
    n, gap = 75, 20
    q, k, v = tensors(n + gap, n + gap, batch=2)
    place = torch.arange(n + gap) - torch.tensor([[0], [gap]])
    place = place.clamp(min=-1)
    k[1, :, :n], k[1, :, n:] = k[1, :, gap:].clone(), 0.0
    prompt = select(q, k, v, "block_topk(1, block=16)", place=place).layout.prompt
    found = probe(prompt, 64)
    for b, (rows, keys) in enumerate(((q[0], k[0]), (q[1, :, gap:], k[1, :, :n]))):
        for h in range(H):
            columns, offsets = oracles.probe(rows[h], oracles.rep(keys, H)[h], 64)
            count = keys.shape[1]
            torch.testing.assert_close(found.columns[b, h, :count], columns)
            torch.testing.assert_close(found.offsets[b, h, :count], offsets)
            assert not found.columns[b, h, count:].any()
            assert not found.offsets[b, h, count:].any()


def test_the_switch_is_a_distance_between_distributions():
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    other = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]], dtype=torch.float64)
    found = jensen_shannon(p, other)
    torch.testing.assert_close(found, torch.tensor([0.0, math.log(2)], dtype=torch.float64))


def test_norms_are_of_rows():
    x = oracles.random(3, 2, 5, 4)
    torch.testing.assert_close(norm(x), (x * x).sum(-1).sqrt())
