"""Tables of the GPU benchmarks: what earlier runs and the last one say together."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from longspan.ops import measured

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
DENSE = "dense FlashAttention-4"


@pytest.fixture
def scripts(monkeypatch):
    """The harness and the routes, on a GPU that was never measured."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    return importlib.import_module("gpu_harness"), importlib.import_module("gpu_routes")


def speed(kernel, rate, dense, *, pattern="window(64)", **more):
    about = {"keys": 64.0, "apart": False, "several": False, "passes": 1, "n": 32768, "width": 128}
    own = {"kind": "speed", "pattern": pattern, "kernel": kernel, "way": "forward"}
    return {**about, **own, "tflops": rate, "of_dense": rate / dense, "seconds": 1.0, **more}


def log_of(harness, folder, *earlier):
    """The log of a run that begins with records of an earlier one."""
    path = folder / "earlier.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in earlier))
    return harness.Log(folder / "routes.jsonl", path)


def test_kernels_of_several_runs_are_held_against_each_other_by_their_shares(scripts, tmp_path):
    harness, routes = scripts
    rows = [
        speed("cudnn", 300.0, 600.0),
        speed("hopper", 360.0, 600.0),
        speed(DENSE, 600.0, 600.0),
        # A record from before this was written down, of a case without a later one.
        {k: x for k, x in speed("cudnn", 1.0, 2.0, pattern="chunk(64)").items() if k != "several"},
        speed(DENSE, 2.0, 2.0, pattern="chunk(64)"),
    ]
    log = log_of(harness, tmp_path, *rows)
    # The machine is slower today.
    log.add(**speed("hopper", 400.0, 500.0))
    log.add(**speed(DENSE, 500.0, 500.0))
    (case,) = routes.measured(log, "a command")["gpus"]["a GPU"]["cases"]
    assert case["tflops"] == {"cudnn": 250.0, "hopper": 400.0}
    assert (case["pattern"], case["keys"], case["backward"]) == ("window(64)", 64, False)
    assert "a GPU" not in measured.stored()["gpus"]


def test_a_kernel_that_fails_today_has_no_rate(scripts, tmp_path, monkeypatch):
    harness, routes = scripts
    stored = {"pattern": "window(64)", "width": 128, "backward": False}
    rates = {"hopper": 8.0, "flash": 7.0}
    other = {"pattern": "chunk(64)", "width": 128, "backward": True, "tflops": {"hopper": 1.0}}

    def found():
        cases = [{**stored, "tflops": dict(rates)}, {**other, "tflops": dict(other["tflops"])}]
        return {"gpus": {"a GPU": {"command": "", "cases": cases}}}

    monkeypatch.setattr(measured, "stored", found)
    log = harness.Log(tmp_path / "routes.jsonl")
    for row in (speed(DENSE, 9.0, 9.0), speed("flex", 1.0, 9.0), speed("cudnn", 3.0, 9.0)):
        log.add(**row)
    log.add(**speed("hopper", 5.0, 9.0))
    log.add(**{k: x for k, x in speed("hopper", 1, 1).items() if k != "tflops"}, error="no")
    # In both ways, and without a case of its own.
    wrong = {"kind": "speed", "pattern": "chunk(64)", "n": 32768, "width": 128}
    log.add(**wrong, kernel="hopper", error="wrong")
    cases = routes.measured(log, "a command")["gpus"]["a GPU"]["cases"]
    # What was not tried keeps its rate.
    assert [case["tflops"] for case in cases] == [{}, {"flash": 7.0, "flex": 1.0, "cudnn": 3.0}]


def test_dense_attention_that_fails_today_leaves_the_earlier_scale(scripts, tmp_path):
    harness, routes = scripts
    rows = [
        speed("cudnn", 300.0, 600.0),
        speed("hopper", 360.0, 600.0),
        speed(DENSE, 600.0, 600.0),
    ]
    log = log_of(harness, tmp_path, *rows)
    log.add(**{k: x for k, x in rows[2].items() if k not in ("tflops", "of_dense")}, error="OOM")
    (case,) = routes.measured(log, "a command")["gpus"]["a GPU"]["cases"]
    assert case["tflops"] == {"cudnn": 300.0, "hopper": 360.0}


def test_the_scale_is_that_of_the_newest_record(scripts, tmp_path):
    harness, routes = scripts
    rows = [speed("cudnn", 350.0, 700.0), speed("dense cuDNN", 700.0, 700.0)]
    log = log_of(harness, tmp_path, *rows)
    log.add(**speed("hopper", 400.0, 500.0))
    log.add(**speed(DENSE, 500.0, 500.0))
    (case,) = routes.measured(log, "a command")["gpus"]["a GPU"]["cases"]
    assert case["tflops"] == {"cudnn": 250.0, "hopper": 400.0}


def test_records_made_anew_are_left_out_of_the_file(scripts, tmp_path):
    harness, _ = scripts
    old = [
        {"kind": "machine", "gpu": "one"},
        speed("hopper", 1.0, 2.0),
        speed("hopper", 1.0, 2.0, way="forward+backward"),
        {"kind": "check", "kernel": "hopper", "width": 64, "case": "window", "wrong": {}},
        {"kind": "done", "seconds": 1.0},
        # Failed before it was timed, in both ways: not so today.
        {"kind": "speed", "kernel": "flex", "pattern": "window(64)", "n": 32768, "width": 128},
    ]
    log = log_of(harness, tmp_path, *old)
    new = [{"kind": "machine", "gpu": "two"}, speed("hopper", 1.5, 2.0), {**old[3], "wrong": 1}]
    new.append(speed("flex", 1.0, 2.0))
    for row in new:
        log.add(**row)
    log.without_superseded()
    found = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert found == [old[0], old[2], old[4], *new]


def test_both_lengths_are_of_one_kernel(scripts, tmp_path):
    harness, routes = scripts
    log = harness.Log(tmp_path / "routes.jsonl")
    (short, far), *_ = routes.GROWTH
    for kernel, text, n, seconds in (
        ("hopper", short, routes.SHORT_N, 1.0),
        ("cudnn", short, routes.SHORT_N, 2.0),
        ("hopper", far, routes.LONG_N, 8.8),
        ("cudnn", far, routes.LONG_N, 24.0),
    ):
        log.add(
            **{"kind": "long", "pattern": text, "n": n, "kernel": kernel, "width": 128},
            **{
                "seconds": seconds,
                "tflops": 1.0,
                "peak_of_qkvo": 1.0,
                "plan_seconds": 0.1,
                "pairs": n,
            },
        )
    lines = [line for line in routes.growth(log).splitlines() if "1,048,576" in line]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert [(row[2], row[6]) for row in cells] == [("hopper", "1.10"), ("cudnn", "1.50")]


def test_both_lengths_are_of_one_run(scripts, tmp_path, monkeypatch):
    harness, routes = scripts
    log = harness.Log(tmp_path / "routes.jsonl")
    told = {routes.SHORT_N: {"tflops": 1.0}, routes.LONG_N: {"error": "no memory"}}
    monkeypatch.setattr(routes, "long", lambda text, kernel, *, n: {"kind": "long", **told[n]})
    routes.lengths("a", "b", "hopper", log)
    assert log.rows == [{"kind": "long", "error": "no memory"}]
    told[routes.LONG_N] = {"tflops": 2.0}
    routes.lengths("a", "b", "hopper", log)
    assert [row.get("tflops") for row in log.rows] == [None, 1.0, 2.0]
