"""Placements, routes and what explain says, without processes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.parallel.cases import CASES

import longspan as ls
from longspan.errors import InputError
from longspan.parallel.needs import Places, route_of

ROOT = Path(__file__).parents[2]
Shards = ls.parallel.Shards


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("n", [1, 5, 16, 91])
@pytest.mark.parametrize("kind", ["even", "zigzag"])
def test_each_row_lies_once(kind, n, ranks):
    lie = getattr(Shards, kind)(n, ranks)
    rows = [lie.rows(rank) for rank in range(ranks)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(n))
    assert (lie.n, lie.ranks, lie.sizes) == (n, ranks, tuple(map(len, rows)))
    assert max(lie.sizes) - min(lie.sizes) <= (1 if kind == "even" else 2)
    x = torch.randn(2, n, 3)
    assert torch.equal(lie.join([lie.take(x, rank, 1) for rank in range(ranks)], 1), x)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Shards((((0, 4),), ((5, 9),))), "row 4 is missing"),
        (lambda: Shards((((0, 4),), ((3, 9),))), "row 3 is on two ranks"),
        (lambda: Shards((((1, 4),),)), "row 0 is missing"),
        (lambda: Shards((((0, 4), (5, 4)),)), "start <= stop"),
        (lambda: Shards(()), "from 1 to"),
        (lambda: Shards((((0, 0),),)), "from 1 to"),
        (lambda: Shards(((0, 4),)), "list of stretches"),
        (lambda: Shards("even"), "list of stretches"),
        (lambda: Shards.even(0, 2), "whole numbers of rows and ranks"),
        (lambda: Shards.even(8, 0), "whole numbers of rows and ranks"),
        (lambda: Shards.zigzag(8.0, 2), "whole numbers of rows and ranks"),
        (lambda: Shards.of_sizes([3, -1]), "number of rows of each rank"),
        (lambda: Shards.of_sizes(3), "number of rows of each rank"),
        (lambda: Shards.even(8, 2).take(torch.zeros(7), 0), "8 rows in axis -1"),
        (lambda: Shards.even(8, 2).take([1], 0), "got list"),
        (lambda: Shards.even(8, 2).join([torch.zeros(8)]), "parts of"),
        (lambda: ls.parallel.explain("causal()", 8, 2, shards="ring"), '"even", "zigzag"'),
        (lambda: ls.parallel.explain("causal()", 8, 2, shards=Shards.even(8, 3)), "on 3 ranks"),
        (lambda: ls.parallel.explain("causal()", 8, 2, heads=3, key_heads=2), "must divide"),
        (lambda: ls.parallel.explain("causal()", 8, 2, heads=0), "heads must be"),
    ],
)
def test_wrong_shards_are_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_without_a_group_nothing_starts():
    x = torch.randn(1, 1, 4, 8)
    with pytest.raises(InputError, match="no process group: start with torchrun"):
        ls.parallel.attend(x, x, x, "causal()")
    with pytest.raises(InputError, match="no process group"):
        ls.hf.parallel(None, "causal()")


@pytest.mark.parametrize("name", CASES)
def test_both_ends_of_each_message_agree(name):
    """And ranks get what their queries see, by the definition of the pattern, and nothing else."""
    case, ranks = CASES[name], 4
    lie, places = case.lie(ranks), Places(case.n, segments=case.segments)
    given = (case.heads, case.key_heads, places)
    routes = [route_of(case.pattern, lie, rank, *given) for rank in range(ranks)]
    whole = ls.plan(case.pattern, case.n, case.heads, segments=case.segments).mask()
    share = case.heads // case.key_heads
    for r, mine in enumerate(routes):
        for s, theirs in enumerate(routes):
            assert len(mine.get[s]) == len(theirs.send[r])
            seen = whole[:, :, lie.rows(r)][..., lie.rows(s)].any(axis=2)
            seen = seen.reshape(len(seen), case.key_heads, share, -1).any(axis=2)
            sent = theirs.kept[0] if r == s else theirs.send[r]
            assert sent.tolist() == np.flatnonzero(seen).tolist()


def test_a_sparse_pattern_moves_little():
    said = ls.parallel.explain("window(100) | sink(2)", 4096, 4, heads=8, key_heads=2)
    assert said.rows.tolist()[2] == [2, 99, 1024, 0]
    assert said.received.tolist() == [0, 101, 101, 101]
    assert said.peers.tolist() == [0, 1, 2, 2]
    assert said.nbytes(64, 2).tolist() == [0] + 3 * [2 * 64 * 2 * 2 * 101]
    assert said.share == 2 * 3 * 101 / (2 * 4096 * 3)
    assert "gets 101 rows (2 from 0, 99 from 1)" in str(said)


def test_heads_move_their_own_remainders():
    said = ls.parallel.explain("strided(8)", 1024, 2, heads=8)
    assert said.rows[1, 0] == 512
    assert said.vectors[1, 0] == 512


def test_zigzag_balances_causal_patterns():
    even, zigzag = (
        ls.parallel.explain("causal()", 4096, 4, shards=shards) for shards in ("even", "zigzag")
    )
    assert even.balance > 1.7
    assert zigzag.balance < 1.001
    assert even.pairs.sum() == zigzag.pairs.sum() == 4096 * 4097 // 2


def test_explain_needs_no_torch():
    code = "import sys, longspan as ls; ls.parallel.explain('causal()', 64, 2); " + (
        "print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_the_table_of_the_page_is_what_the_command_writes():
    place = ROOT / "benchmarks" / "context_parallel.py"
    spec = importlib.util.spec_from_file_location("context_parallel_table", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "\n".join(module.table()) in (ROOT / "docs" / "context-parallel.md").read_text()
