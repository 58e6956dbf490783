"""Extension end to end with a tiny model: results, resume after a kill, bad input."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from longspan.errors import DataError, InputError, LongspanError, PatternError, Refusal, RunError
from longspan.eval.losses import TokenLoss
from longspan.eval.records import read_lines
from longspan.eval.subject import Subject
from longspan.eval.suite import SuiteConfig, spread
from longspan.hf import load_model
from longspan.hf.models import contents_hash
from longspan.pattern import Window
from longspan.position import LongFactors
from longspan.train.checkpoint import Checkpoints
from longspan.train.extend import extend
from longspan.train.extend_folder import check_output
from longspan.train.loop import LoopConfig
from longspan.train.prepare import doubling, hold_out, prepare, rehearse
from longspan.train.settings import ExtendSettings
from longspan.train.sole_writer import sole_writer

SUITE: dict[str, Any] = {"lengths": (64, 256), "sequences": 2, "trials": 1, "style": "code"}
LOOP: dict[str, Any] = {"steps": 4, "lr": 1e-2, "warmup": 1, "save_every": 2}


def settings(model: Path, text: Path, **changes: Any) -> ExtendSettings:
    suite = SuiteConfig(**{**SUITE, "depths": (0.5,), **changes.pop("suite", {})})
    loop = LoopConfig(**{**LOOP, **changes.pop("loop", {})})
    values: dict[str, Any] = {
        "model": str(model),
        "length": 256,
        "pattern": "scca.flow(64)",
        "data": (str(text),),
        "rank": 2,
        **changes,
    }
    return ExtendSettings(loop=loop, suite=suite, **values)


def losses(log: Path) -> list[float]:
    return [line["loss"] for line in read_lines(log)]


@pytest.fixture(scope="module")
def finished(
    tiny_model: Path, some_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], ExtendSettings]:
    """A whole run with a comparison."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    asked = settings(tiny_model, some_text, compare_dense=True)
    seen: list[str] = []
    report = extend(
        asked,
        out,
        merge=True,
        progress=lambda what, done, total, note="": seen.append(what),
        command=["longspan", "extend", "a b"],
    )
    assert list(dict.fromkeys(seen)) == [
        f"{state}: {work}"
        for state, works in (
            ("base", ("perplexity", "passkey")),
            ("scaled", ("perplexity", "passkey")),
            ("trained", ("training", "perplexity", "passkey")),
            ("dense", ("training", "perplexity", "passkey")),
        )
        for work in works
    ]
    return out, report, asked


def test_report_holds_every_state(finished: tuple[Path, dict[str, Any], ExtendSettings]) -> None:
    out, report, _ = finished
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    for state in ("base", "scaled", "trained", "dense"):
        rows = report[state]["perplexity"]["lengths"]
        assert [row["length"] for row in rows] == [64, 256]
        assert report[state]["passkey"]["lengths"] == [64, 256]
    assert report["command"] == "longspan extend 'a b'"
    assert len(report["trained"]["losses"]) == 4
    assert report["trained"]["pattern"] == "scca.flow(64)"
    assert report["dense"]["pattern"] is None
    assert report["trained"]["losses"] != report["dense"]["losses"]
    assert "scca.flow(64)" in (out / "report.html").read_text()


def test_training_lowers_the_measured_perplexity(
    finished: tuple[Path, dict[str, Any], ExtendSettings],
) -> None:
    _, report, _ = finished
    before, after = (report[s]["perplexity"]["lengths"][-1]["nll"] for s in ("scaled", "trained"))
    assert after < before - 0.05


def test_adapter_and_merged_model_give_the_reported_numbers(
    finished: tuple[Path, dict[str, Any], ExtendSettings], some_text: Path
) -> None:
    out, report, asked = finished
    job = prepare(asked, out, resume=True)
    rows = torch.stack(spread(job.heldout_text, 256, 2))
    expected = report["trained"]["perplexity"]["lengths"][-1]["nll"]

    how = json.loads((out / "adapter" / "longspan.json").read_text())
    asked_for = {"length": 256, "rope": "yarn", "pattern": "scca.flow(64)"}
    assert asked_for.items() <= how.items()
    subject = Subject(model=asked.model, length=256, adapter=out / "adapter")
    merged, _ = load_model(out / "merged")
    assert merged.config.max_position_embeddings == 256
    with torch.no_grad(), subject.open() as (loss, _):
        assert loss(rows).mean().item() == pytest.approx(expected, abs=1e-4)
        assert TokenLoss(merged)(rows).mean().item() == pytest.approx(expected, abs=1e-4)


def test_the_report_is_written_before_the_merge(
    tiny_model: Path, some_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no merge")

    monkeypatch.setattr("longspan.hf.lora.merge_and_save", fail)
    out = tmp_path / "run"
    with pytest.raises(RuntimeError, match="no merge"):
        extend(settings(tiny_model, some_text), out, merge=True)
    report = json.loads((out / "report.json").read_text())
    assert len(report["trained"]["losses"]) == 4
    assert report["dense"] is None
    assert (out / "report.html").exists()


def test_longrope_goes_from_the_settings_to_adapter_card_and_merged_model(
    tiny_model: Path, some_text: Path, tmp_path: Path
) -> None:
    factors = LongFactors(short=(1.0, 1.0, 1.1, 1.2), long=(1.0, 1.5, 3.0, 4.0))
    asked = settings(
        tiny_model,
        some_text,
        rope="longrope",
        rope_factors=factors,
        loop={"steps": 1},
        suite={"sequences": 1, "trials": 0},
    )
    out = tmp_path / "run"
    extend(asked, out, merge=True)
    # The run goes on with the same factors only.
    prepare(asked, out, resume=True)
    with pytest.raises(DataError, match="rope_factors was"):
        prepare(
            replace(asked, rope_factors=replace(factors, short=factors.long)), out, resume=True
        )
    merged, _ = load_model(out / "merged")
    entry = merged.config.rope_parameters
    assert (entry["rope_type"], entry["factor"]) == ("longrope", 4.0)
    assert entry["long_factor"] == list(factors.long)
    subject = Subject(model=asked.model, length=256, adapter=out / "adapter")
    with torch.no_grad(), subject.open() as (loss, _):
        for length in (60, 200):
            ids = torch.arange(length)[None] % 90
            torch.testing.assert_close(loss(ids), TokenLoss(merged)(ids))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_card_of_the_adapter_loads_it_without_longspan(
    finished: tuple[Path, dict[str, Any], ExtendSettings],
) -> None:
    out, _, asked = finished
    card = (out / "adapter" / "README.md").read_text()
    assert asked.model in card
    assert "scca.flow(64)" in card
    (lines,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "longspan" not in lines
    names: dict[str, Any] = {}
    exec(lines, names)
    merged, tokenizer = load_model(out / "merged")
    assert tokenizer.model_max_length >= 256
    ids = torch.arange(200)[None]
    with torch.no_grad():
        torch.testing.assert_close(names["model"].eval()(ids).logits, merged(ids).logits)


def test_a_full_disk_while_writing_weights_is_one_clear_error(
    tiny_model: Path, some_text: Path, tmp_path: Path
) -> None:
    import resource

    # Checkpoints fit, the merged model does not.
    asked = settings(
        tiny_model, some_text, rank=1, embeddings_and_norms=False, suite={"trials": 0}
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        with pytest.raises(RunError, match=r"could not be written.*--resume"):
            extend(asked, tmp_path / "run", merge=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
    report = extend(asked, tmp_path / "run", merge=True, resume=True)
    assert len(report["trained"]["losses"]) == 4
    load_model(tmp_path / "run" / "merged")


def test_finished_run_resumes_without_work(
    finished: tuple[Path, dict[str, Any], ExtendSettings],
) -> None:
    out, report, asked = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    seen: list[tuple[Any, ...]] = []
    # The merged model that is there is neither asked for again nor missing.
    again = extend(asked, out, resume=True, progress=lambda *what: seen.append(what))
    assert again == json.loads(json.dumps(report))
    assert [what[:3] for what in seen] == [("finished", 4, 4)]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_finished_run_goes_on_with_more_steps(
    finished: tuple[Path, dict[str, Any], ExtendSettings], tmp_path: Path
) -> None:
    whole, report, asked = finished
    more = replace(asked, loop=replace(asked.loop, steps=6))
    once = extend(more, tmp_path / "once")
    out = shutil.copytree(whole, tmp_path / "on")
    measured = {path: path.stat().st_mtime_ns for path in (out / "eval").iterdir()}
    again = extend(more, out, resume=True)
    # What came before the training is not measured again.
    for path, time_ns in measured.items():
        assert (path.stat().st_mtime_ns == time_ns) == (path.name[:4] in ("base", "scal"))
    assert again["base"] == json.loads(json.dumps(report["base"]))
    for arm in ("trained", "dense"):
        assert again[arm]["losses"] == once[arm]["losses"]
        assert again[arm]["perplexity"] == once[arm]["perplexity"]
        assert again[arm]["perplexity"] != report[arm]["perplexity"]
    # The merged model is not left behind.
    assert again["merged"]
    merged, _ = load_model(out / "merged")
    rows = torch.stack(spread(prepare(more, out, resume=True).heldout_text, 256, 2))
    with torch.no_grad():
        expected = again["trained"]["perplexity"]["lengths"][-1]["nll"]
        assert TokenLoss(merged)(rows).mean().item() == pytest.approx(expected, abs=1e-4)
    with pytest.raises(DataError, match=r"loop\.steps was 6, is 4"):
        extend(asked, out, resume=True)


@pytest.mark.parametrize("place", ["forget_end", "train", "write_card", "write_report"])
def test_a_kill_on_the_way_to_more_steps_loses_nothing(
    tiny_model: Path,
    some_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    asked = settings(tiny_model, some_text, suite={"trials": 0, "sequences": 1})
    more = replace(asked, loop=replace(asked.loop, steps=6))
    once = extend(more, tmp_path / "once")
    first = json.loads(json.dumps(extend(asked, tmp_path / "on")))

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"longspan.train.extend.{place}", killed)
        with pytest.raises(KeyboardInterrupt):
            extend(more, tmp_path / "on", resume=True)
    assert json.loads((tmp_path / "on" / "report.json").read_text()) == first
    again = extend(more, tmp_path / "on", resume=True)
    for key in ("losses", "perplexity"):
        assert again["trained"][key] == once["trained"][key]
    weights = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("once", "on")
    ]
    assert weights[0] == weights[1]


def test_a_finished_run_is_merged_on_request(
    tiny_model: Path, some_text: Path, tmp_path: Path
) -> None:
    asked = settings(tiny_model, some_text, loop={"steps": 1}, suite={"trials": 0})
    assert not extend(asked, tmp_path / "run")["merged"]
    assert extend(asked, tmp_path / "run", merge=True, resume=True)["merged"]
    load_model(tmp_path / "run" / "merged")


def test_killed_run_resumes_to_the_same_losses(
    tiny_model: Path, some_text: Path, tmp_path: Path
) -> None:
    steps = 30
    asked = settings(
        tiny_model, some_text, loop={"steps": steps, "save_every": 3}, suite={"trials": 0}
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = (
        f"--length 256 --pattern scca.flow(64) --data {some_text} --rank 2 --steps {steps} "
        "--lr 1e-2 --warmup 1 --save-every 3 --accumulate 1 --eval-lengths 64,256 "
        "--eval-sequences 2 --passkey-trials 0 --passkey-style code --passkey-depths 0.5"
    ).split()
    command = [sys.executable, "-m", "longspan.cli.app", "extend", str(tiny_model), *options]
    child = subprocess.Popen(
        [*command, "--device", "cpu", "--out", str(cut)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = cut / "trained.train.jsonl"
    deadline = time.monotonic() + 120
    try:
        while not log.exists() or len(log.read_text().splitlines()) < 5:
            assert child.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    before = losses(log)
    assert 5 <= len(before) < steps
    assert Checkpoints(cut / "trained").steps()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        extend(asked, cut, resume=True)
        extend(asked, whole)
    finally:
        torch.set_num_threads(threads)
    expected = losses(whole / "trained.train.jsonl")
    assert len(expected) == steps
    assert losses(log) == expected
    assert before == expected[: len(before)]


def test_full_disk_while_saving_keeps_the_last_checkpoint(
    tiny_model: Path, some_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(tiny_model, some_text, suite={"trials": 0})
    save = torch.save
    calls: list[int] = []

    def fill(state: Any, file: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, file)

    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(RunError, match=r"step 4 .*No space left.*step-00000002\.pt.*--resume"):
        extend(asked, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "trained").iterdir()] == ["step-00000002.pt"]
    report = extend(asked, tmp_path / "run", resume=True)
    assert len(report["trained"]["losses"]) == 4


def test_gradient_checkpointing_changes_no_loss(
    tiny_model: Path, some_text: Path, tmp_path: Path
) -> None:
    few = {"loop": {"steps": 2}, "suite": {"trials": 0, "sequences": 1}}
    plain = extend(settings(tiny_model, some_text, **few), tmp_path / "a")
    asked = settings(tiny_model, some_text, gradient_checkpointing=True, **few)
    saved = extend(asked, tmp_path / "b")
    assert saved["trained"]["losses"] == pytest.approx(plain["trained"]["losses"], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model": "/nowhere/model"}, DataError, "/nowhere/model does not exist"),
        ({"model": "meta-llama/Llama-2-7b"}, DataError, "name on the Hugging Face hub"),
        ({"pattern": "windw(64)"}, PatternError, "window"),
        ({"pattern": "window(64"}, PatternError, r"window\(64"),
        ({"length": 64}, InputError, "trained for 64 tokens; a length of 64 extends nothing"),
        ({"length": 32}, InputError, "trained for 64 tokens"),
        ({"length": 65536}, DataError, "training text is shorter than one sequence"),
        ({"data": ("/nowhere/text",)}, DataError, "/nowhere/text"),
        ({"data": ()}, DataError, "There is no text"),
        ({"rope": "stretch"}, InputError, "Unknown RoPE scaling 'stretch'"),
        ({"pattern": "layers(causal(), heads(causal(), causal(), causal()))"}, PatternError, "4"),
        ({"pattern": "neighborhood(8) & causal()"}, PatternError, "depends on the length"),
        ({"device": "cuda:99"}, InputError, "cuda:99"),
        ({"device": "gpu"}, InputError, "Device 'gpu' cannot be used"),
        ({"device": "meta"}, InputError, "Device 'meta' cannot be used"),
        ({"suite": {"lengths": (32,)}}, DataError, "passkey probe needs at least"),
        ({"suite": {"lengths": (64, 60000)}}, DataError, "shorter than one sequence"),
        ({"suite": {"style": "verse"}}, InputError, "passkey style 'verse'"),
        ({"eval_attention": "both"}, InputError, "dense or pattern, got 'both'"),
        ({"dtype": "int8"}, InputError, "Unknown dtype 'int8'"),
        ({"recall_share": 1.0}, InputError, "recall_share"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_bad_input_is_refused_before_any_work(
    tiny_model: Path,
    some_text: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    kind: type[LongspanError],
    message: str,
) -> None:
    out = tmp_path / "run"
    with pytest.raises(kind, match=message):
        extend(settings(changes.pop("model", tiny_model), some_text, **changes), out)
    assert not out.exists()


def test_model_that_does_not_route_is_refused_by_name(some_text: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BloomConfig(vocab_size=300, hidden_size=16, n_layer=1, n_head=2)
    model = transformers.BloomForCausalLM(config)
    from longspan.hf import save_model, train_tokenizer

    save_model(model, train_tokenizer(["a b c"], 260), tmp_path / "bloom")
    with pytest.raises(Refusal, match="BloomForCausalLM"):
        extend(settings(tmp_path / "bloom", some_text), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_attention_dropout_is_refused_before_any_work(
    tiny_model: Path, some_text: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    with pytest.raises(InputError, match=r"attention dropout 0\.1"):
        extend(settings(folder, some_text), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert extend(settings(folder, some_text, pattern="none"), tmp_path / "run")["trained"]


def test_rehearsal_leaves_the_model_as_it_was(tiny_model: Path) -> None:
    model, _ = load_model(tiny_model)
    own = model.config._attn_implementation
    rehearse(model, Window(4))
    assert not model.training
    assert model.config._attn_implementation == own
    assert all(p.grad is None for p in model.parameters())


def test_text_that_holding_out_would_use_up_is_counted_whole(
    tiny_model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("word and word\n" * 30)
    with pytest.raises(DataError, match=r"[1-9]\d+ tokens found, 256 needed, and 256 more"):
        extend(settings(tiny_model, text), tmp_path / "run")


@pytest.mark.parametrize("folder", ["/proc/run", "/dev/null/run"])
def test_output_folder_that_cannot_be_made_is_refused_before_any_work(folder: str) -> None:
    with pytest.raises(DataError, match=f"{folder} cannot be written"):
        check_output(Path(folder), resume=False)


def test_output_folder_is_never_mixed(tiny_model: Path, some_text: Path, tmp_path: Path) -> None:
    asked = settings(tiny_model, some_text)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="is not empty"):
        extend(asked, tmp_path)
    with pytest.raises(DataError, match=r"settings\.json is missing"):
        extend(asked, tmp_path, resume=True)
    with pytest.raises(DataError, match="is a file"):
        extend(asked, tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    # What a run leaves that was killed before it began.
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "settings.json.tmp").write_text("{")
    prepare(asked, tmp_path / "killed")


def test_resume_with_other_settings_or_text_names_them(
    finished: tuple[Path, dict[str, Any], ExtendSettings], some_text: Path, tmp_path: Path
) -> None:
    out, _, asked = finished
    changed = settings(Path(asked.model), some_text, compare_dense=True, rank=3, loop={"lr": 1e-3})
    with pytest.raises(DataError, match=r"loop\.lr was 0\.01, is 0\.001, rank was 2, is 3"):
        extend(changed, out, resume=True)
    more = tmp_path / "more.txt"
    more.write_text("other text " * 4000)
    changed = settings(Path(asked.model), more, compare_dense=True)
    with pytest.raises(DataError, match="training text was"):
        extend(changed, out, resume=True)
    replaced = shutil.copytree(asked.model, tmp_path / "model")
    shutil.copytree(out, tmp_path / "run")
    same = settings(replaced, some_text, compare_dense=True)
    assert prepare(same, tmp_path / "new").fingerprint()["model contents"] == contents_hash(
        asked.model
    )
    weights = bytearray((replaced / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (replaced / "model.safetensors").write_bytes(weights)
    with pytest.raises(DataError, match="model contents was"):
        extend(same, tmp_path / "run", resume=True)
    rarely = settings(Path(asked.model), some_text, compare_dense=True, loop={"save_every": 9})
    prepare(rarely, out, resume=True)


def test_batches_depend_on_their_number_alone(tiny_model: Path, some_text: Path) -> None:
    asked = settings(tiny_model, some_text, batch=3, recall_share=0.4, loop={"steps": 10})
    job = prepare(asked, Path("unused"))
    first, second = job.batches(), job.batches()
    rows = torch.cat([first(n) for n in range(10)])
    assert torch.equal(second(7), rows[21:24])
    assert rows.shape == (30, 256)
    key = torch.tensor(job.tokenizer("PASS_KEY", add_special_tokens=False)["input_ids"])
    recalled = [(row.unfold(0, len(key), 1) == key).all(1).any().item() for row in rows]
    assert 0 < sum(recalled) <= 12


def test_held_out_text_is_the_end_and_nothing_is_in_both() -> None:
    documents = [torch.arange(0, 50), torch.arange(50, 90), torch.arange(90, 100)]
    rest, held = hold_out(documents, at_least=5)
    assert torch.cat(rest).tolist() == list(range(90))
    assert torch.cat(held).tolist() == list(range(90, 100))
    rest, held = hold_out(documents, at_least=30)
    assert torch.cat(rest).tolist() == list(range(70))
    assert torch.cat(held).tolist() == list(range(70, 100))
    rest, held = hold_out(documents, at_least=500)
    assert rest == []
    assert torch.cat(held).tolist() == list(range(100))


def test_lengths_double_up_to_the_target() -> None:
    assert doubling(512, 4096) == (512, 1024, 2048, 4096)
    assert doubling(64, 200) == (64, 128, 200)


@pytest.mark.skipif(os.name == "nt", reason="Windows opens no folders")
def test_a_folder_that_another_process_trains_into_is_left_alone(
    tiny_model: Path, some_text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with sole_writer(out), pytest.raises(RunError, match="Another process"):
        extend(settings(tiny_model, some_text), out)
    assert not any(out.iterdir())


def test_a_file_in_the_place_of_the_adapter_is_one_clear_error(
    tmp_path: Path, finished: tuple[Path, dict[str, Any], ExtendSettings]
) -> None:
    whole, _, asked = finished
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "adapter")
    (out / "adapter").touch()
    with pytest.raises(RunError, match="could not be written: File exists"):
        extend(asked, out, resume=True)
