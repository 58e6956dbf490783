"""Several processes equal one, in outputs, lse and gradients, and move what was said."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.parallel import models
from tests.parallel.cases import CASES, graded

import longspan as ls

ROOT = Path(__file__).parents[2]
NAMES = ("out", "lse", "dq", "dk", "dv")
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_equal_one(ranks, tmp_path):
    """One test, because starting the ranks is what takes time."""
    found = run(ranks, tmp_path, "gloo")
    equal_one(found)
    move_what_explain_says(found)
    ask_their_neighbour_for_a_window(found)
    leak_nothing(found)
    refuse_together(found)
    agree_in_groups_meshes_and_compilers(found)
    if "models" in found[0]:
        for name in models.RUNS:
            models_equal_one(found, name)
        models_refuse_what_would_be_misread(found)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_gpus_equal_one(tmp_path):
    found = run(2, tmp_path, "nccl")
    equal_one(found)
    move_what_explain_says(found)
    leak_nothing(found)


def run(ranks, folder, backend):
    """What each rank wrote."""
    command = [sys.executable, "-W", "error", "-m", "tests.parallel.rank"]
    runs = [
        subprocess.Popen(
            [*command, str(r), str(ranks), folder, backend],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(ranks)
    ]
    try:
        errors = [run.communicate(timeout=120)[1] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert not any(run.returncode for run in runs), "\n".join(errors)
    return [torch.load(folder / f"{r}.pt") for r in range(ranks)]


@cache
def whole(name):
    """One process, in float64, on the kernel that is the specification."""
    case = CASES[name]

    def attend(q, k, v):
        return ls.attend(
            q, k, v, case.pattern, segments=case.segments, return_lse=True, impl="reference"
        )

    return graded(attend, [t.double() for t in case.tensors()])


def equal_one(found):
    for name, case in CASES.items():
        lie = case.lie(len(found))
        for what, expected, *parts in zip(
            NAMES, whole(name), *(one["cases"][name][0] for one in found), strict=True
        ):
            got = lie.join(parts, 2)
            close = CLOSE[case.dtype]
            wide = what == "lse" and case.dtype == torch.bfloat16
            assert got.dtype == (torch.float32 if wide else case.dtype), (name, what)
            difference = (got.double() - expected).abs().nan_to_num(0.0)
            assert (got.isinf() == expected.isinf()).all(), (name, what)
            assert (difference <= close * (1 + expected.abs())).all(), (name, what)


def move_what_explain_says(found):
    ranks = len(found)
    for name, case in CASES.items():
        said = ls.parallel.explain(
            case.pattern,
            case.n,
            ranks,
            heads=case.heads,
            key_heads=case.key_heads,
            shards=case.lie(ranks),
            segments=case.segments,
        )
        # Where batch rows differ, explain counts the mean of them.
        share = case.batch
        calls = [one["cases"][name][1] for one in found]
        assert all(len(own) == 2 for own in calls), f"{name}: one call forward, one backward"
        for rank, (forward, backward) in enumerate(calls):
            expected = said.vectors[rank]
            assert [n // share for n in forward[0]] == expected.tolist(), name
            assert [n // share for n in forward[1]] == said.vectors[:, rank].tolist(), name
            # Gradients go back the way that keys came.
            assert backward[:2] == forward[1::-1], name
            assert forward[2] == backward[2] == found[0]["width"], name


def ask_their_neighbour_for_a_window(found):
    for rank, one in enumerate(found):
        (got, gave, _), _ = one["cases"]["window"][1]
        heads = CASES["window"].key_heads
        asked = [0] * len(found)
        if rank:
            asked[rank - 1] = 11 * heads
        assert got == asked
        assert sum(gave) == (11 * heads if rank < len(found) - 1 else 0)


def leak_nothing(found):
    early, later = (
        [one["cases"][name][0] for one in found] for name in ("leak", "leak, later rows changed")
    )
    case = CASES["leak"]
    lie, edge = case.lie(len(found)), case.graded
    for index, what in enumerate(NAMES):
        one, other = (lie.join([own[index] for own in each], 2) for each in (early, later))
        assert torch.equal(one[:, :, :edge], other[:, :, :edge]), what
        if index >= 2:
            assert not one[:, :, edge:].any(), what
        else:
            assert not torch.equal(one[:, :, edge:], other[:, :, edge:]), what


def refuse_together(found):
    told = [one["told"] for one in found]
    last = len(found) - 1
    everywhere = {
        "after it": "7 queries and 8 keys",
        "no pattern": "PatternError",
        "a plan": "expected a pattern or its text form, got Plan",
        "depends on the end": "depends on the length",
        "heads": "divides 2",
        "kernel": "unknown impl 'fastest'; choose one of auto",
        "shards": 'must be "even", "zigzag" or Shards',
        "zigzag": "rows on the ranks, they hold [8",
        "other dtype": "dtype: rank 0 torch.float64",
        "other pattern": "pattern: rank 0 window(3)",
        "gradients": "gradients of keys or values: rank 0 False",
        "segments": "segments: rank 0",
        "wrong segments": "segments must have shape",
        "ragged": "positions must have shape",
        "fractions": "segments must be whole numbers",
        "group": "group must be a process group, a device mesh or None, got str",
        "batch": "positions or segments have 2 batch rows, q has 1",
    }
    for name, words in everywhere.items():
        for own in told:
            assert words in own[name], (name, own[name])
    by_one = {
        "rows": "7 queries and 8 keys",
        "longer number": "",
        "named kernel": "kernel 'flash' cannot take these inputs",
        "shard": f"rank {last} holds 7 rows, its shard has 8",
        "dtype": "must share one floating dtype",
        "scale": "scale must be a finite number",
        "no tensor": "expected q [B, H, N, D]",
    }
    for name, words in by_one.items():
        for rank, own in enumerate(told):
            assert words in own[name], (name, own[name])
            if rank != last:
                assert f"rank {last} refused what it was given" in own[name], own[name]
    assert ["this process is not in the group" in own["not in the group"] for own in told] == [
        False,
        *[True] * last,
    ]


def agree_in_groups_meshes_and_compilers(found):
    for one in found:
        for other in one["groups"][1:]:
            torch.testing.assert_close(other, one["groups"][0], rtol=1e-12, atol=1e-12)
    assert np.isfinite(torch.cat([one["groups"][0] for one in found], 2).numpy()).all()


def models_equal_one(found, name):
    logits, loss, grads = models.alone(name)
    lie = getattr(ls.parallel.Shards, models.RUNS[name].get("shards", "even"))(models.N, 2)
    each = [one["models"][name] for one in found]
    got = lie.join([own[0] for own in each], 1)
    if name not in ("even", "zigzag"):
        # What a model says about padding is nobody's business.
        got = got * (logits != 0)
    torch.testing.assert_close(got, logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sum(own[1] for own in each), loss, rtol=1e-10, atol=1e-10)
    for parts, expected in zip(zip(*(own[2] for own in each), strict=True), grads, strict=True):
        torch.testing.assert_close(sum(parts), expected, rtol=1e-9, atol=1e-10)


def models_refuse_what_would_be_misread(found):
    words = {
        "not cut": "nobody said which rows",
        "own positions": "position_ids are not those of this rank's rows",
        "padding": "padding is a negative segment",
        "labels": "labels must have the shape of input_ids",
        "ids": "expected input_ids [batch, tokens]",
        "segments": "segments must have shape [45]",
        "routers": "adds a loss of its routers",
    }
    for name, expected in words.items():
        for one in found:
            assert expected in one["models told"][name], (name, one["models told"][name])
