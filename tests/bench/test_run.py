"""Benchmarks: nothing wrong is timed, peers compute what we compute, runs are resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import longspan as ls
from longspan.bench import admit, memory, oracle, peers, run
from longspan.bench.run import Bench
from longspan.bench.setting import Setting, both_ways
from longspan.bench.timing import in_turns, summary
from longspan.errors import DataError, InputError, PatternError, Refusal, RunError
from longspan.eval.records import Records
from longspan.ops.kernels import native

SMALL = Setting(n=1, heads=4, key_heads=2, width=16)
LONGLORA = next(peer for peer in peers.PEERS if peer.name.startswith("LongLoRA"))


def bench(*patterns: str, **changed) -> Bench:
    asked = {"lengths": (96,), "setting": SMALL, "rounds": 2, "memory": False}
    return Bench(patterns=patterns, **{**asked, **changed})


def names(record, key="seconds"):
    return [row["name"] for row in record["rows"] if key in row]


def test_calls_take_turns_and_warm_up_does_not_count():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    found = in_turns(calls, rounds=3, warm_up=2)
    assert order == list("ab" * 5)
    assert {name: len(taken) for name, taken in found.items()} == {"a": 3, "b": 3}


def test_summary():
    found = summary([4.0, 1.0, 3.0, 2.0, 5.0])
    assert found["seconds"] == 3.0
    assert found["least"] == 1.0
    assert found["spread"] == pytest.approx(1.0)
    assert summary([2.0])["spread"] == 0.0


@pytest.mark.parametrize("n", [96, 1500])
def test_a_record_says_how_fast_and_how_exact(n):
    asked = bench("window(20)", lengths=(n,))
    first, second = run.run(asked, Records(None, {}))
    assert (first["way"], second["way"]) == ("forward", "forward+backward")
    ours, dense = second["rows"]
    own = "native" if native.level() else "tiled"
    assert ours["kernels"] == [own]
    assert set(ours["errors"]) == {"out", "dq", "dk", "dv"} | ({"rows"} if n > 1024 else set())
    assert max(ours["errors"].values()) < 2e-5
    assert dense["of_dense"] == 1.0
    pairs = ls.plan(ls.Window(20), n, 4).pairs
    assert ours["pairs_per_second"] == pytest.approx(pairs / ours["seconds"])
    assert dense["pairs_per_second"] == pytest.approx(4 * n * (n + 1) / 2 / dense["seconds"])
    assert ours["of_dense"] == pytest.approx(ours["pairs_per_second"] / dense["pairs_per_second"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gradients_that_vanish_are_not_wrong(dtype):
    setting = replace(SMALL, dtype=dtype)
    for record in run.run(bench("window(1)", setting=setting), Records(None, {})):
        assert "longspan auto" in names(record)
        assert not any(row.get("wrong") for row in record["rows"])


def test_an_error_where_the_gradient_vanishes_is_seen():
    plan = ls.plan(ls.Window(1), 12, 2)
    exact = oracle.reference(plan, 0.5)

    def leaking(q, k, v):
        out, lse = exact(q, k, v)
        return out + 1e-3 * q, lse

    inputs = [x.double() for x in torch.randn(3, 1, 2, 12, 4)]
    assert oracle.errors(exact, exact, inputs, use_lse=False)["dq"] < 1e-12
    assert oracle.errors(leaking, exact, inputs, use_lse=False)["dq"] > 1e-4


def spoil(call, where):
    """A call whose output or gradients are a little wrong."""

    def wrong(q, k, v, *rest, **named):
        out = call(q, k, v, *rest, **named)
        if where == "out":
            return out * 1.01
        # Right forward, wrong backward.
        return out + (v * 0.01).mean(1, keepdim=True) - (v * 0.01).mean(1, keepdim=True).detach()

    return wrong


@pytest.mark.parametrize(("where", "found"), [("out", "out"), ("gradient", "dv")])
def test_what_is_wrong_is_not_timed(monkeypatch, where, found):
    monkeypatch.setattr(run, "attend", spoil(run.attend, where))
    record = run.measure(
        bench("window(20)"), "window(20)", replace(SMALL, n=96), "forward+backward"
    )
    assert found in record["rows"][0]["wrong"]
    assert names(record) == ["dense SDPA"]


def test_what_is_wrong_only_at_full_length_is_not_timed(monkeypatch):
    right = run.attend

    def wrong(q, k, v, laid, **named):
        out = right(q, k, v, laid, **named)
        return out if q.shape[2] <= admit.CHECKED_ROWS else out * 1.01

    monkeypatch.setattr(run, "attend", wrong)
    record = run.measure(bench("window(20)"), "window(20)", replace(SMALL, n=1300), "forward")
    assert "rows" in record["rows"][0]["wrong"]


def test_a_peer_whose_borders_differ_is_checked_between_them(monkeypatch):
    """Each half of a group at either end, as long as the rows of the check, differs."""
    monkeypatch.setattr(admit, "CHECKED_ROWS", 64)
    pattern, setting, calls = ls.ShiftedChunk(64), replace(SMALL, n=512), {}
    row = admit.admit(
        LONGLORA, pattern, ls.plan(pattern, 512, 4), setting, "forward+backward", calls
    )
    assert not row["wrong"]
    assert list(calls) == [LONGLORA.name]
    assert 0.0 < row["errors"]["dq"] < 1e-5


@pytest.mark.parametrize("way", ["forward", "forward+backward"])
@pytest.mark.parametrize(
    ("n", "pairs", "said"),
    [(64, 1 << 27, "which are all of 64: give at least 128 rows"), (512, 4 * 127**2, "memory")],
)
def test_a_peer_whose_borders_leave_nothing_to_check_is_not_timed(
    way, n, pairs, said, monkeypatch
):
    monkeypatch.setattr(admit, "CHECKED_ROWS", 64)
    monkeypatch.setattr(admit, "CHECKED_PAIRS", pairs)
    pattern, setting, calls = ls.ShiftedChunk(64), replace(SMALL, n=n), {}
    row = admit.admit(LONGLORA, pattern, ls.plan(pattern, n, 4), setting, way, calls)
    assert said in row["refused"]
    assert not calls


def test_a_peer_with_long_borders_is_checked_on_fewer_heads(monkeypatch):
    monkeypatch.setattr(admit, "CHECKED_ROWS", 64)
    monkeypatch.setattr(admit, "CHECKED_PAIRS", 4 * 128**2)
    pattern, calls = ls.ShiftedChunk(64), {}
    setting = replace(SMALL, n=512, heads=16, key_heads=8)
    checked, errors = [], admit._errors
    monkeypatch.setattr(
        admit, "_errors", lambda *given: checked.append(given[2]) or errors(*given)
    )
    laid = ls.plan(pattern, 512, 16)
    row = admit.admit(LONGLORA, pattern, laid, setting, "forward+backward", calls)
    assert not row["wrong"]
    assert [(one.n, one.heads, one.key_heads) for one in checked] == [(128, 4, 2)]
    assert 0.0 < row["errors"]["rows"] < 1e-5


@pytest.mark.parametrize("text", ["scca.flow(16)", "ssa(12, 4)", "longnet([16, 64], [1, 4])"])
def test_rows_are_checked_through_orders_and_passes(text):
    plan = ls.plan(ls.parse(text), 90, 4)
    inputs = replace(SMALL, n=90).tensors()
    out = ls.attend(*inputs, plan)
    assert oracle.row_error(plan, inputs, out, [0, 40, 89]) < 1e-5
    out[:, 3, 40, 2] += 1.0
    assert oracle.row_error(plan, inputs, out, [0, 40, 89]) > 1e-3


PEERS = {peer.name: peer for peer in peers.PEERS}


def test_peers_that_are_absent_or_cannot_are_named():
    record = run.measure(
        bench("window(20)", peers=True), "window(20)", replace(SMALL, n=96), "forward+backward"
    )
    said = {row["name"]: row for row in record["rows"]}
    for name in ("flash-attn 2", "NATTEN"):
        assert "cpu" in said[name]["refused"]
    assert "backward" in said["FlexAttention, mask by hand"]["refused"]
    assert {"absent", "seconds"} & set(said["local-attention"])


def test_how_to_install_what_is_absent(monkeypatch):
    gone = peers.Peer(name="gone", package="gone-py", module="gone.inside", make=lambda *_: None)
    built = replace(gone, name="built", how="from its sources")
    monkeypatch.setattr(run, "PEERS", (gone, built))
    record = run.measure(
        bench("window(9)", peers=True), "window(9)", replace(SMALL, n=50), "forward"
    )
    said = {row["name"]: row.get("absent") for row in record["rows"]}
    assert said["gone"] == "not installed: pip install gone-py"
    assert said["built"] == "not installed: from its sources"


def test_a_peer_that_fails_does_not_stop_the_run(monkeypatch):
    def broken(pattern, setting):
        raise OSError("no driver")

    peer = peers.Peer(name="broken", make=broken)
    monkeypatch.setattr(run, "PEERS", (peer,))
    record = run.measure(
        bench("window(9)", peers=True), "window(9)", replace(SMALL, n=50), "forward"
    )
    assert (
        next(r for r in record["rows"] if r["name"] == "broken")["failed"] == "OSError: no driver"
    )
    assert "longspan auto" in names(record)


def test_runs_are_resumed(tmp_path: Path, monkeypatch):
    path = tmp_path / "records.jsonl"
    asked = bench("window(9)")
    run.run(asked, Records(path, asked.settings()))
    calls = []
    real = run.measure
    monkeypatch.setattr(run, "measure", lambda *x: calls.append(x[1]) or real(*x))
    more = bench("window(9)", "chunk(8)")
    found = run.run(more, Records(path, more.settings()))
    assert calls == ["chunk(8)", "chunk(8)"]
    assert [r["pattern"] for r in found] == ["window(9)"] * 2 + ["chunk(8)"] * 2
    header = json.loads(path.read_text().splitlines()[0])["header"]["settings"]
    assert header["environment"]["packages"]["torch"] == torch.__version__
    # Each record says by itself how it was measured.
    for line in path.read_text().splitlines()[1:]:
        record = json.loads(line)
        assert (record["warm_up"], record["rounds"]) == (2, 2)
        assert record["versions"]["torch"] == torch.__version__
        assert "cores" in record["hardware"]
    other = bench("window(9)", rounds=3)
    with pytest.raises(DataError, match="rounds was 2, is 3"):
        Records(path, other.settings())


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"impls": ("quick",)}, "quick"),
        ({"ways": ("sideways",)}, "sideways"),
        ({"rounds": 0}, "round"),
        # The last length and the last pattern are looked at before the first is measured.
        ({"lengths": (64, 0)}, "n must be at least 1"),
        ({"patterns": ("window(9)", "window(")}, "window"),
        ({"patterns": ("window(9)", "heads(window(9), sink(1), chunk(8))")}, "4"),
        # One layer's figures under the name of all would be wrong.
        ({"patterns": ("layers(window(9), causal())",)}, r'layers, "window\(9\)", "causal\(\)"'),
    ],
)
def test_wrong_questions(changed, word):
    with pytest.raises((InputError, PatternError), match=word):
        bench(*changed.pop("patterns", ("window(9)",)), **changed)


def test_wrong_sizes():
    for changed, word in (
        ({"dtype": "int8"}, "int8"),
        ({"device": "tpu"}, "cpu or cuda"),
        ({"key_heads": 0}, "key_heads must be at least 1"),
        ({"key_heads": 3}, "divide"),
        ({"n": 0}, "n"),
    ):
        with pytest.raises(InputError, match=word):
            replace(SMALL, **changed)


def test_a_kernel_that_cannot_is_refused():
    with pytest.raises(Refusal, match="flex"):
        run.measure(
            bench("window(9)", impls=("flex",)), "window(9)", replace(SMALL, n=50), "forward"
        )


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_a_process_that_ends_without_an_answer_is_said(monkeypatch):
    monkeypatch.setattr(memory.sys, "executable", "false")
    with pytest.raises(RunError, match=r"window\(64\) at 1,024 rows.*killed.*--no-memory"):
        memory.in_fresh_process("window(64)", replace(SMALL, n=1024), "forward")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_of_a_fresh_process_sees_what_a_call_allocates():
    setting = Setting(n=8192, heads=4, key_heads=4, width=64)
    found = memory.in_fresh_process("window(64)", setting, "forward+backward")
    assert found is not None
    # Output, three gradients and what the kernel needs: at least four tensors like q.
    assert found > 3 * 8192 * 4 * 64 * 4
    # Of the kernel that was named: the dense oracle holds a score for each pair.
    asked = bench("window(64)", lengths=(2048,), ways=("forward",), memory=True)
    (record,) = run.run(replace(asked, impls=("tiled", "reference")), Records(None, {}))
    tiled, reference, _ = (row["memory_bytes"] for row in record["rows"])
    assert reference > 4 * 2048 * 2048 * 4 > tiled


def test_both_ways():
    inputs = replace(SMALL, n=8).tensors()
    ways = both_ways(
        lambda q, k, v: q * k.repeat_interleave(2, 1) + v.repeat_interleave(2, 1), inputs
    )
    assert not ways["forward"]().requires_grad
    dq, _, dv = ways["forward+backward"]()
    torch.testing.assert_close(dq, inputs[1].repeat_interleave(2, 1))
    torch.testing.assert_close(dv, torch.full_like(inputs[2], 2.0))


def test_kernels_are_named_for_passes_and_for_heads_of_their_own(monkeypatch):
    said = """plan of dilated(4, [1, 2])
  pairs    10: kernel of nothing
pass 0: kernel hopper: our own kernel for Hopper
  not flex: possible, comes later in the order
heads 0 to 3 in steps of 2, rows by remainder mod 2: kernel flex: FlexAttention over ranges"""
    monkeypatch.setattr(run, "explain", lambda *_, **__: said)
    q = torch.zeros(1, 4, 4, 8)
    laid = ls.plan(ls.Dilated(4, (1, 2)), 4, 4)
    assert run.kernels([q, q, q], laid, "auto", "forward") == ["hopper", "flex"]
