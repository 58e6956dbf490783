"""The command line from outside: quick help, exit codes, one paragraph per error."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

from longspan import __version__
from longspan.cli.app import main
from longspan.cli.demo import findings
from longspan.cli.progress import Bars
from longspan.cli.values import numbers, whole_numbers
from longspan.errors import InputError, LongspanError, Refusal, RunError
from longspan.train.interrupt import TERMINATED

Result = tuple[int, str, str]


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["longspan", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
        except SystemExit as end:
            code = end.code
        else:
            code = 0
        out, err = capfd.readouterr()
        assert isinstance(code, int | None)
        return code or 0, out, err

    return run


def test_the_package_runs_as_a_module() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "longspan", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout == f"longspan {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["extend", "--help"], ["eval", "ppl", "--help"]]
)
def test_help_is_quick_and_loads_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys; from longspan.cli.app import main; sys.argv = ['longspan', *sys.argv[1:]]\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Time on a core, not on the clock: other processes may be at work.
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0, done.stderr
        assert "Usage" in done.stdout
        if seconds[-1] < 1:
            break
    assert min(seconds) < 1


def test_version(call: Callable[..., Result]) -> None:
    assert call("--version") == (0, f"longspan {__version__}\n", "")


def test_errors_are_one_paragraph_and_an_exit_code(
    call: Callable[..., Result], tmp_path: Path
) -> None:
    code, out, err = call(
        "extend", tmp_path / "none", "--length", 512, "--data", tmp_path, "--out", tmp_path / "o"
    )
    assert (code, out) == (2, "")
    assert err.startswith("longspan: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize(("kind", "code"), [(RunError, 1), (InputError, 2), (Refusal, 3)])
def test_each_error_has_its_exit_code(
    call: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    kind: type[LongspanError],
    code: int,
) -> None:
    def fail() -> None:
        raise kind("what and why")

    monkeypatch.setattr("longspan.cli.app.app", fail)
    assert call() == (code, "", "longspan: what and why\n")


def test_a_file_that_cannot_be_written_is_one_paragraph(
    call: Callable[..., Result],
    tiny_model: Path,
    some_text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["eval", "ppl", tiny_model, "--data", some_text, "--lengths", 64, "--limit", 1]
    code, out, err = call(*arguments, "--out", "/proc/none.jsonl")
    assert (code, out) == (2, "")
    assert err.startswith("longspan: The output folder /proc cannot be written: No such file")
    assert err.count("\n") == 1

    def fail() -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/none.jsonl")

    monkeypatch.setattr("longspan.cli.app.app", fail)
    assert call() == (1, "", "longspan: /proc/none.jsonl: No such file or directory\n")


@pytest.mark.parametrize(
    ("end", "exit_code"), [(KeyboardInterrupt(), 130), (SystemExit(TERMINATED), 143)]
)
def test_an_interrupt_says_how_to_go_on(
    call: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    end: BaseException,
    exit_code: int,
) -> None:
    def interrupted(*_: object) -> None:
        raise end

    monkeypatch.setattr("longspan.pattern.parse", interrupted)
    code, _, error = call("show", "causal()")
    assert code == exit_code
    assert "goes on where a run with --out stopped" in error


def test_wrong_usage(call: Callable[..., Result]) -> None:
    code, _, err = call("extend")
    assert code == 2
    assert "Usage" in err


@pytest.mark.parametrize("command", ["extnd", "evl"])
def test_unknown_commands_are_named(call: Callable[..., Result], command: str) -> None:
    code, _, err = call(command)
    assert code == 2
    assert command in err


def test_doctor(call: Callable[..., Result]) -> None:
    pytest.importorskip("transformers")
    code, out, _ = call("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["packages"]["torch"].startswith("2.")
    assert found["packages"]["longspan"] == __version__
    assert found["cores"] >= 1
    assert isinstance(found["problems"], list)
    code, out, _ = call("doctor")
    assert code == 0
    assert "torch" in out


def test_extend_dry_run_writes_nothing(
    call: Callable[..., Result], tiny_model: Path, some_text: Path, tmp_path: Path
) -> None:
    out_folder = tmp_path / "run"
    arguments = ["extend", tiny_model, "--length", 256, "--pattern", "window(64)", "--steps", 10]
    arguments += ["--data", some_text, "--out", out_folder, "--passkey-trials", 0, "--dry-run"]
    code, out, _ = call(*arguments, "--device", "cpu", "--json")
    plan = json.loads(out)
    assert code == 0
    assert plan["tokens_to_see"] == 10 * 8 * 256
    assert plan["eval_lengths"] == [64, 128, 256]
    causal, window = 256 * 257 / 2, 64 * 65 / 2 + 192 * 64
    assert plan["pattern_share_of_causal"] == pytest.approx(window / causal)
    assert plan["rope"]["factor"] == 4
    code, out, _ = call(*arguments, "--device", "cpu")
    assert code == 0
    assert "tokens to see" in out
    assert not out_folder.exists()


def test_extend_prints_and_writes_the_report(
    call: Callable[..., Result], tiny_model: Path, some_text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    folder = tmp_path / "run"
    arguments = ["extend", tiny_model, "--length", 128, "--pattern", "window(64)", "--steps", 2]
    arguments += ["--data", some_text, "--out", folder, "--passkey-trials", 0, "--accumulate", 1]
    arguments += ["--eval-sequences", 1, "--device", "cpu"]
    code, out, err = call(*arguments)
    assert code == 0
    assert "trained: training 2/2" in err
    assert str(folder / "report.html") in out.replace("\n", "")
    code, out, err = call(*arguments, "--resume", "--json")
    assert code == 0
    assert json.loads(out)["trained"]["pattern"] == "window(64)"
    assert "training" not in err


def test_eval_ppl(
    call: Callable[..., Result], tiny_model: Path, some_text: Path, tmp_path: Path
) -> None:
    records = tmp_path / "r.jsonl"
    arguments = ["eval", "ppl", tiny_model, "--data", some_text, "--device", "cpu"]
    code, out, _ = call(*arguments, "--lengths", "32,64", "--out", records, "--json")
    assert code == 0
    found = json.loads(out)
    # Random weights know nothing: close to uniform over the vocabulary of 300.
    assert found["lengths"][1]["perplexity"] == pytest.approx(300, rel=0.1)
    lines = records.read_text().splitlines()
    assert len(lines) == 1 + sum(row["windows"] for row in found["lengths"])
    code, out, _ = call(*arguments, "--lengths", "32,64", "--out", records)
    assert code == 0
    assert f"{found['lengths'][0]['perplexity']:.3f}" in out
    assert records.read_text().splitlines() == lines
    code, _, err = call(*arguments, "--lengths", "32,64", "--rope", "linear", "--out", records)
    assert code == 2
    assert "rope was None, is 'linear'" in err


def test_eval_does_not_take_the_records_of_weights_that_were_there_before(
    call: Callable[..., Result], tiny_model: Path, some_text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    import torch

    from longspan import hf

    def write_adapter(scale: float) -> None:
        model, _ = hf.load_model(tiny_model)
        adapted = hf.add_lora(model, rank=2, alpha=2)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, scale)
        hf.save_adapter(adapted, adapter)

    adapter, model = tmp_path / "adapter", shutil.copytree(tiny_model, tmp_path / "model")
    arguments = ["eval", "ppl", model, "--data", some_text, "--device", "cpu", "--lengths", 64]
    arguments += ["--limit", 1, "--out", tmp_path / "r.jsonl"]
    more = ["--adapter", adapter, "--rope", "none"]
    write_adapter(0.0)
    assert call(*arguments, *more)[0] == 0
    assert call(*arguments, *more)[0] == 0
    write_adapter(0.5)
    code, _, err = call(*arguments, *more)
    assert code == 2
    assert "adapter_contents was" in err

    (tmp_path / "r.jsonl").unlink()
    assert call(*arguments)[0] == 0
    changed, tokenizer = hf.load_model(model)
    torch.nn.init.normal_(changed.model.layers[0].self_attn.q_proj.weight)  # type: ignore[union-attr]
    hf.save_model(changed, tokenizer, model)  # type: ignore[arg-type]
    code, _, err = call(*arguments)
    assert code == 2
    assert "contents was" in err


@pytest.mark.parametrize("command", ["ruler", "kv", "longbench"])
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--pattern", "window(0)"], "from 1 to"),
        (["--pattern", "heads(window(3), window(4), window(5))"], "cannot be spread"),
        (["--adapter", "nowhere"], "adapter folder nowhere does not exist"),
        (["--adapter", "nowhere", "--rope", "none"], "no saved adapter"),
        (["--rope", "tall"], "Unknown RoPE scaling"),
        (["--dtype", "int8"], "Unknown dtype"),
        (["--out", "FILE/x.jsonl"], "The output folder"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would_refuse(
    call: Callable[..., Result],
    tiny_model: Path,
    some_text: Path,
    tmp_path: Path,
    command: str,
    more: list[str],
    words: str,
) -> None:
    (tmp_path / "FILE").write_text("")
    asked = {"input": "Who?", "context": "Ada.", "answers": ["Ada"], "dataset": "qasper"}
    (tmp_path / "lb.jsonl").write_text(json.dumps(asked))
    own = {
        "ruler": ["--lengths", 512, "--tasks", "passkey"],
        "kv": ["--data", some_text, "--length", 256, "--tasks", "none", "--budgets", 50],
        "longbench": ["--data", tmp_path / "lb.jsonl", "--length", 512],
    }[command]
    arguments = ["eval", command, tiny_model, *own, "--device", "cpu", "--dry-run"]
    code, _, err = call(*arguments)
    assert code == 0, err
    given = [word.replace("FILE", str(tmp_path / "FILE")) for word in more]
    code, out, err = call(*arguments, *given)
    assert code == 2
    assert not out
    assert words in err


def test_eval_pattern_and_rope_change_the_result(
    call: Callable[..., Result], tiny_model: Path, some_text: Path
) -> None:
    def nll(*options: object) -> float:
        arguments = ["eval", "ppl", tiny_model, "--data", some_text, "--device", "cpu"]
        code, out, err = call(*arguments, "--lengths", 128, "--limit", 3, "--json", *options)
        assert code == 0, err
        return json.loads(out)["lengths"][0]["nll"]

    plain = nll()
    assert nll("--pattern", "causal()") == pytest.approx(plain, abs=1e-6)
    assert abs(nll("--pattern", "window(8)") - plain) > 1e-6
    assert abs(nll("--rope", "linear") - plain) > 1e-6
    assert abs(nll("--protocol", "sliding") - plain) > 1e-6


def test_eval_passkey(call: Callable[..., Result], tiny_model: Path) -> None:
    arguments = ["eval", "passkey", tiny_model, "--lengths", "256,512", "--depths", "0,1"]
    arguments += ["--trials", 1, "--style", "code", "--device", "cpu"]
    code, out, _ = call(*arguments, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["accuracy"] == [[0.0, 0.0], [0.0, 0.0]]
    assert all(3 < nll < 9 for row in found["nll"] for nll in row)
    code, out, _ = call(*arguments)
    assert code == 0
    assert "depth 1" in out
    assert out.startswith("Passkey retrieval, 1 probe each\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ppl", "MODEL", "--lengths", "x"], "whole numbers with commas"),
        (["ppl", "MODEL", "--lengths", "64"], "There is no text"),
        (["ppl", "MODEL", "--lengths", "64", "--protocol", "all"], "Unknown protocol 'all'"),
        (["ppl", "none", "--lengths", "64", "--python-stdlib"], "none does not exist"),
        (["passkey", "MODEL", "--lengths", "999", "--depths", "2"], "Depths go from 0"),
        (["passkey", "MODEL", "--lengths", "999", "--pattern", "wndow(4)"], "window"),
        (
            ["passkey", "MODEL", "--lengths", "999", "--adapter", "none"],
            "adapter folder none does not exist",
        ),
        (
            ["passkey", "MODEL", "--lengths", "999", "--adapter", "MODEL"],
            "longspan.json is missing",
        ),
    ],
)
def test_eval_says_what_is_wrong(
    call: Callable[..., Result], tiny_model: Path, arguments: list[str], message: str
) -> None:
    code, out, err = call("eval", *(tiny_model if a == "MODEL" else a for a in arguments))
    assert code == 2
    assert out == ""
    assert message in err


def test_values() -> None:
    assert whole_numbers("512,4_096") == (512, 4096)
    assert numbers("0,0.5") == (0.0, 0.5)
    with pytest.raises(InputError, match=r"0,0\.5,1"):
        numbers("half")


def test_plain_lines_are_few_and_bars_are_drawn_on_terminals() -> None:
    with Bars(every=1000) as bars:
        bars._console = Console(record=True, quiet=False, force_terminal=False, width=100)
        for done in range(1, 51):
            bars("training", done, 50, f"loss {done}")
        lines = bars._console.export_text().splitlines()
    assert lines == ["training 1/50, loss 1", "training 50/50, loss 50"]
    shown = Bars()
    shown._console = Console(record=True, force_terminal=True, width=100)
    with shown as bars:
        bars("training", 3, 50, "loss 2.5")
        bars("training", 50, 50, "loss 1.5")
    text = shown._console.export_text()
    assert "50/50" in text
    assert "loss 1.5" in text


def report(trained: float, dense: float | None) -> dict[str, Any]:
    def state(near: float, far: float, **more: Any) -> dict[str, Any]:
        rows = [{"length": 512, "perplexity": near}, {"length": 4096, "perplexity": far}]
        return {"perplexity": {"lengths": rows}, **more}

    return {
        "job": {"trained_length": 512, "length": 4096},
        "base": state(5.0, 1234.5),
        "trained": state(5.0, trained, pattern="scca.flow(512)", seconds=50.0),
        "dense": dense and state(5.0, dense, seconds=100.0),
    }


def test_findings_say_what_came_true_and_what_did_not() -> None:
    good = findings(report(4.0, 3.9))
    assert "1,234 at 4,096" in good[0]
    assert "the longer context helps" in good[1]
    assert "+2.6%" in good[2]
    assert "0.50 of the time" in good[2]
    bad = findings(report(5.5, None))
    assert "does NOT help" in bad[1]
    assert len(bad) == 2


def with_keys(base: float, trained: float, dense: float | None) -> dict[str, Any]:
    found = report(4.0, None if dense is None else 3.9)
    for state, share in (("base", base), ("trained", trained), ("dense", dense)):
        if share is not None:
            found[state]["passkey"] = {
                "lengths": [512, 4096],
                "depths": [0.0, 1.0],
                "trials": 5,
                "accuracy": [[1.0, 1.0], [share, share]],
            }
    return found


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ((0.0, 0.4, 0.9), "90% after dense training: FEWER with scca.flow(512)."),
        ((0.0, 0.4, 0.2), "20% after dense training: MORE with"),
        ((0.0, 0.4, 0.4), "40% after dense training: as many with"),
        ((0.1, 0.4, None), "40% found after training with scca.flow(512), 10% before."),
        ((0.4, 0.4, None), "training did NOT help retrieval in this run."),
    ],
)
def test_findings_tell_of_passkeys(shares: tuple[float, float, float | None], said: str) -> None:
    last = findings(with_keys(*shares))[-1]
    assert last.startswith("Passkeys at 4,096 tokens, 10 probes: 40% found after training with")
    assert said in last


def test_bad_values_of_pretrain_draw_no_bar(
    call: Callable[..., Result], some_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    for values, message in [
        (["--heads", 3], "gives no even head width"),
        (["--heads", 0], "heads must be at least 1, got 0"),
        (["--context", 10**7], "the data is shorter than one sequence"),
    ]:
        for dry in ([], ["--dry-run"]):
            asked = ["--data", some_text, "--out", tmp_path / "new", *values, *dry]
            code, out, err = call("pretrain", *asked)
            assert (code, out) == (2, "")
            assert message in err
            assert "\u2501" not in err
            assert "0/1000" not in err
            assert not (tmp_path / "new").exists()


def test_pretrain_says_what_it_leaves_beside_the_model(call: Callable[..., Result]) -> None:
    from longspan.train.pretrain_state import CHECKPOINT_FOLDER

    code, out, _ = call("pretrain", "--help")
    assert code == 0
    told = " ".join(out.split())
    assert f"keeps a folder named {CHECKPOINT_FOLDER}, about six times as large" in told
    assert "it may be removed after the run" in told


def test_finished_runs_say_so_and_go_on_with_more_steps(
    call: Callable[..., Result], tiny_model: Path, some_text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    small = "--context 16 --hidden 16 --layers 1 --heads 2 --kv-heads 1 --intermediate 16"
    pretrain = ["pretrain", *small.split(), "--vocab", 300, "--batch", 2, "--seed", 1]
    extend = ["extend", tiny_model, "--length", 128, "--pattern", "window(64)", "--rank", 1]
    extend += ["--accumulate", 1, "--passkey-trials", 0, "--eval-sequences", 1]
    for command in (pretrain, extend):
        folder = tmp_path / str(command[0])
        asked = [*command, "--data", some_text, "--out", folder, "--device", "cpu", "--json"]
        code, first, err = call(*asked, "--steps", 2)
        assert code == 0, err
        code, out, err = call(*asked, "--steps", 2, "--resume")
        assert (code, json.loads(out)) == (0, json.loads(first))
        assert err.split("\n")[0].endswith("to do; more steps need its checkpoint")
        code, out, err = call(*asked, "--steps", 3, "--resume", "--dry-run")
        assert (code, json.loads(out)["out"]) == (0, str(folder))
        code, out, err = call(*asked, "--steps", 3, "--resume")
        assert code == 0
        assert "finished" not in err
        assert json.loads(out) != json.loads(first)
        code, out, err = call(*asked, "--steps", 2, "--resume")
        assert (code, out) == (2, "")
        assert "steps was 3, is 2" in err


def test_long_patterns_are_not_repeated_in_sentences() -> None:
    found = report(4.0, 3.9)
    found["trained"]["pattern"] = "window(512) | sink(4) | prefix(16)"
    text = " ".join(findings(found))
    assert "After training with the pattern: 5.00 at 512, 4.00 at 4,096" in text
    assert "prefix" not in text


def test_commands_are_complete() -> None:
    from longspan.cli.app import app

    group: Any = typer.main.get_command(app)
    words = "advise bench compare demo doctor eval extend generate pretrain report show"
    assert set(group.commands) == set(words.split())
    assert set(group.commands["eval"].commands) == {"kv", "longbench", "passkey", "ppl", "ruler"}
