"""A toy pretraining run: it learns, it resumes to the same losses, its folder loads."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from longspan.errors import DataError, InputError, LongspanError, RunError
from longspan.hf.build import build_llama, train_tokenizer
from longspan.train import pretrain as train_pretrain
from longspan.train.data import recall_documents, tokenize_documents
from longspan.train.finite import check_weights
from longspan.train.pretrain import plan, pretrain
from longspan.train.pretrain_config import PretrainConfig
from longspan.train.pretrain_model import mean_loss
from longspan.train.pretrain_text import eval_sequences
from longspan.train.sole_writer import sole_writer

CONFIG = PretrainConfig(
    context=32,
    hidden=32,
    layers=1,
    heads=4,
    kv_heads=2,
    intermediate=48,
    vocab=300,
    steps=20,
    batch=8,
    lr=1e-2,
    warmup=4,
    dropout=0.1,
    recall_share=0.25,
    recall_count=20,
    eval_every=5,
    save_every=10,
)
TEXT = recall_documents(1, 30)
HELD_OUT = recall_documents(2, 3)


class Killed(Exception):
    """Stands for a run that ends without warning."""


def test_a_folder_that_cannot_be_written_is_refused_before_training():
    with pytest.raises(DataError, match="cannot be written"):
        pretrain(CONFIG, TEXT, "/proc/model", on_step=lambda *_: pytest.fail("trained"))


@pytest.mark.skipif(os.name == "nt", reason="Windows opens no folders")
def test_a_folder_that_another_process_trains_into_is_left_alone(tmp_path):
    with sole_writer(tmp_path), pytest.raises(RunError, match="Another process"):
        pretrain(CONFIG, TEXT, tmp_path, on_step=lambda *_: pytest.fail("trained"))
    assert not any(tmp_path.iterdir())


def test_learns_and_writes_a_folder_that_transformers_loads(tmp_path):
    seen = []
    report = pretrain(
        CONFIG,
        TEXT,
        tmp_path / "model",
        validation=HELD_OUT,
        heldout=HELD_OUT,
        on_step=lambda *values: seen.append(values),
    )
    assert [row[0] for row in report.history] == [5, 10, 15, 20]
    assert report.history[-1][2] < report.history[0][2]
    assert [row[0] for row in seen] == [10, 20]
    written = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "pretrain.json"} <= written
    assert [path.name for path in (tmp_path / "model" / "checkpoint").iterdir()] == ["state.pt"]
    saved = json.loads((tmp_path / "model" / "pretrain.json").read_text())
    assert saved["heldout_perplexity"] == pytest.approx(report.heldout_perplexity)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.max_position_embeddings == 32
    assert model.config.tie_word_embeddings
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert tokenizer.decode(tokenizer("x = 1")["input_ids"]) == "x = 1"


def test_the_reported_loss_is_that_of_the_saved_weights(tmp_path):
    report = pretrain(CONFIG, TEXT, tmp_path, validation=HELD_OUT, heldout=HELD_OUT)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text_nL = eval_sequences(tokenize_documents(tokenizer, HELD_OUT), CONFIG.context + 1)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    loss = mean_loss(saved, text_nL, CONFIG.batch)
    assert report.heldout_loss == pytest.approx(loss, abs=1e-7)
    # Those that were trained give another number on the same text.
    assert abs(report.validation_loss - loss) > 1e-6


def contents(folder):
    """Bytes and times of all files below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_finished_run_is_left_as_it_is(tmp_path, checkpoint):
    report = pretrain(CONFIG, TEXT, tmp_path, validation=HELD_OUT, heldout=HELD_OUT)
    if not checkpoint:
        shutil.rmtree(tmp_path / "checkpoint")
    before = contents(tmp_path)
    texts = {"validation": HELD_OUT, "heldout": HELD_OUT, "resume": True}
    again = pretrain(CONFIG, TEXT, tmp_path, **texts, on_step=lambda *_: pytest.fail("trained"))
    assert again == report
    rarely = dataclasses.replace(CONFIG, save_every=7)
    assert plan(rarely, TEXT, tmp_path, **texts)["steps_done"] == 20
    for change, message in (
        ({"lr": 1.0}, r"lr was 0\.01, is 1"),
        ({"steps": 19}, "was 20, is 19"),
    ):
        with pytest.raises(DataError, match=message):
            pretrain(dataclasses.replace(CONFIG, **change), TEXT, tmp_path, **texts)
    if not checkpoint:
        with pytest.raises(DataError, match="after 20 steps and its folder checkpoint is gone"):
            pretrain(dataclasses.replace(CONFIG, steps=21), TEXT, tmp_path, **texts)
    assert contents(tmp_path) == before


def test_a_finished_run_goes_on_with_more_steps(tmp_path):
    pretrain(CONFIG, TEXT, tmp_path / "once")
    more = dataclasses.replace(CONFIG, steps=32)
    before = contents(tmp_path / "once")

    def kill(step, loss, validation):
        if step == 32:
            raise Killed

    shutil.copytree(tmp_path / "once", tmp_path / "cut")
    with pytest.raises(Killed):
        pretrain(more, TEXT, tmp_path / "cut", resume=True, on_step=kill)
    # The model that is finished stays until the next one is.
    for path, (content, _) in before.items():
        if path.name != "state.pt":
            assert (tmp_path / "cut" / path.relative_to(tmp_path / "once")).read_bytes() == content
    with pytest.raises(DataError, match="steps was 32, is 20"):
        pretrain(CONFIG, TEXT, tmp_path / "cut", resume=True)
    reports = [pretrain(more, TEXT, tmp_path / name, resume=True) for name in ("once", "cut")]
    assert reports[0].history == reports[1].history
    assert [row[0] for row in reports[0].history] == [5, 10, 15, 20, 25, 30, 32]
    assert reports[0].goals == [(0, 20), (20, 32)]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "cut")]
    assert weights[0] == weights[1]
    assert reports[0].tokens_seen == 32 * 8 * 32


@pytest.mark.parametrize("moment", ["measure", "save", "rename", "report"])
@pytest.mark.parametrize("raised", [False, True])
def test_a_kill_after_the_last_step_loses_no_step(tmp_path, monkeypatch, moment, raised):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    config = CONFIG
    for folder in (whole, cut):
        if raised:
            pretrain(CONFIG, TEXT, folder, heldout=HELD_OUT)
            config = dataclasses.replace(CONFIG, steps=23)
    expected = pretrain(config, TEXT, whole, heldout=HELD_OUT, resume=raised)
    with monkeypatch.context() as patch:

        def killed(*_):
            raise Killed

        def half(_, __, folder):
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(b"half")
            raise Killed

        replace = Path.replace

        def last(path, target):
            if path.name == "tokenizer.json" and Path(target).parent == cut:
                raise Killed
            return replace(path, target)

        patch.setattr(
            *{
                "measure": (train_pretrain, "round_weights", killed),
                "save": (train_pretrain, "save_model", half),
                "rename": (Path, "replace", last),
                "report": (train_pretrain, "write_json", killed),
            }[moment]
        )
        with pytest.raises(Killed):
            pretrain(config, TEXT, cut, heldout=HELD_OUT, resume=raised)
    steps = []
    resumed = pretrain(
        config, TEXT, cut, heldout=HELD_OUT, resume=True, on_step=lambda *row: steps.append(row)
    )
    assert not steps
    assert resumed.history == expected.history
    assert resumed.heldout_loss == expected.heldout_loss
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_report_that_is_none_is_named(tmp_path):
    pretrain(CONFIG, TEXT, tmp_path)
    (tmp_path / "pretrain.json").write_text("{}")
    with pytest.raises(DataError, match=r"pretrain\.json is no report of this version"):
        pretrain(CONFIG, TEXT, tmp_path, resume=True)


def test_a_resumed_run_gives_the_same_losses(tmp_path):
    whole = pretrain(CONFIG, TEXT, tmp_path / "whole", validation=HELD_OUT)

    def kill(step, loss, validation):
        if step == 20:
            raise Killed

    with pytest.raises(Killed):
        pretrain(CONFIG, TEXT, tmp_path / "cut", validation=HELD_OUT, on_step=kill)
    resumed = pretrain(CONFIG, TEXT, tmp_path / "cut", validation=HELD_OUT, resume=True)
    assert resumed.history == whole.history
    weights = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("whole", "cut")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_resume_refuses_another_run(tmp_path):
    with pytest.raises(DataError, match="nothing to resume"):
        pretrain(CONFIG, TEXT, tmp_path / "none", resume=True)

    def kill(step, loss, validation):
        if step == 20:
            raise Killed

    with pytest.raises(Killed):
        pretrain(CONFIG, TEXT, tmp_path / "cut", on_step=kill)
    with pytest.raises(DataError, match=r"other settings: lr was 0\.01, is 1\.0"):
        pretrain(dataclasses.replace(CONFIG, lr=1.0), TEXT, tmp_path / "cut", resume=True)
    with pytest.raises(DataError, match="training text was"):
        pretrain(CONFIG, recall_documents(3, 30), tmp_path / "cut", resume=True)
    with pytest.raises(DataError, match="validation text was"):
        pretrain(CONFIG, TEXT, tmp_path / "cut", validation=HELD_OUT, resume=True)
    with pytest.raises(DataError, match="holds a run that was interrupted"):
        pretrain(CONFIG, TEXT, tmp_path / "cut")
    (tmp_path / "cut" / "notes.txt").touch()
    with pytest.raises(DataError, match="not an empty folder"):
        pretrain(CONFIG, TEXT, tmp_path / "cut")
    (state,) = tmp_path.rglob("state.pt")
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"state\.pt is damaged"):
        pretrain(CONFIG, TEXT, tmp_path / "cut", resume=True)


def test_a_run_that_diverges_ends_and_writes_no_model(tmp_path):
    config = dataclasses.replace(CONFIG, lr=1e30, warmup=1)
    with pytest.raises(RunError, match=r"the run is broken.*rate \(now 1e\+30\)"):
        pretrain(config, TEXT, tmp_path / "model", validation=HELD_OUT)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["checkpoint"]


def test_a_last_step_that_breaks_the_weights_is_found_out():
    check_weights([torch.ones(3)], 1.0)
    with pytest.raises(RunError, match="no longer finite after the last step"):
        check_weights([torch.ones(3), torch.tensor([1.0, float("inf")])], 1.0)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_keeps_the_step_that_it_came_in(tmp_path, capfd):
    whole = pretrain(CONFIG, TEXT, tmp_path / "whole")
    config = dataclasses.replace(CONFIG, save_every=100)

    def interrupt(step, loss, validation):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        pretrain(config, TEXT, tmp_path / "cut", on_step=interrupt)
    assert "stops after this step" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert plan(config, TEXT, tmp_path / "cut", resume=True)["steps_done"] == 11
    assert pretrain(config, TEXT, tmp_path / "cut", resume=True).history == whole.history


def test_a_kill_before_the_first_checkpoint_does_not_lock_the_folder(tmp_path):
    def kill(step, loss, validation):
        raise Killed

    config = dataclasses.replace(CONFIG, save_every=100)
    with pytest.raises(Killed):
        pretrain(config, TEXT, tmp_path / "model", on_step=kill)
    assert plan(config, TEXT, tmp_path / "model", resume=True)["steps_done"] == 0
    (state,) = tmp_path.rglob("state.pt")
    state.rename(state.with_name("state.pt.tmp"))
    with pytest.raises(DataError, match="Start without resume"):
        pretrain(config, TEXT, tmp_path / "model", resume=True)
    pretrain(config, TEXT, tmp_path / "model")
    assert [path.name for path in (tmp_path / "model" / "checkpoint").iterdir()] == ["state.pt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "no even head width"),
        ({"kv_heads": 3}, "do not divide"),
        ({"vocab": 10}, "vocabulary of 10 is too small"),
        ({"context": 100_000}, "100001 needed"),
    ],
)
def test_a_plan_refuses_what_a_run_refuses_and_writes_nothing(tmp_path, change, message):
    config = dataclasses.replace(CONFIG, **change)
    for ask in (plan, pretrain):
        with pytest.raises(LongspanError, match=message):
            ask(config, TEXT, tmp_path / "model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(DataError, match="not an empty folder"):
        plan(CONFIG, TEXT, tmp_path / "full")
    with pytest.raises(DataError, match="nothing to resume"):
        plan(CONFIG, TEXT, tmp_path / "model", resume=True)
    assert plan(CONFIG, TEXT, tmp_path / "model")["steps_done"] == 0
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("seed", [-1, 10**20])
def test_seeds_that_not_all_generators_take_are_refused(seed):
    with pytest.raises(InputError, match=f"below 2\\^63, got {seed}"):
        dataclasses.replace(CONFIG, seed=seed)


def test_a_batch_without_real_text_is_refused():
    with pytest.raises(InputError, match=r"0\.9 of a batch of 2 leaves no sequence of real text"):
        dataclasses.replace(CONFIG, recall_share=0.9, batch=2)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path):
    config = dataclasses.replace(CONFIG, save_every=5)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step, loss, validation):
        if step == 10:
            (state,) = tmp_path.rglob("state.pt")
            resource.setrlimit(resource.RLIMIT_FSIZE, (state.stat().st_size // 2, before[1]))

    try:
        with pytest.raises(OSError, match=r"File too large: '.*state\.pt'"):
            pretrain(config, TEXT, tmp_path / "model", on_step=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    report = pretrain(config, TEXT, tmp_path / "model", resume=True)
    assert report.history == pretrain(config, TEXT, tmp_path / "whole").history


@pytest.mark.parametrize(
    "change", [{"lr": 0.0}, {"lr": -1.0}, {"lr": float("inf")}, {"weight_decay": -0.1}]
)
def test_values_that_make_no_sense_are_refused(change):
    with pytest.raises(InputError, match="lr must be positive"):
        dataclasses.replace(CONFIG, **change)


def test_too_little_text_fails_before_training(tmp_path):
    with pytest.raises(DataError, match=r"\d+ tokens found, 100001 needed"):
        pretrain(dataclasses.replace(CONFIG, context=100_000), TEXT, tmp_path / "model")


def test_schedule_rises_then_falls_to_a_tenth():
    config = dataclasses.replace(CONFIG, steps=104, warmup=4, lr=1.0)
    assert [config.lr_at(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert config.lr_at(4) == 1.0
    assert config.lr_at(54) == pytest.approx(0.55)
    assert config.lr_at(104) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"recall_share": 1.0}, r"recall_share must be in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_configuration_is_checked(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_impossible_shapes_are_named():
    shape = {"vocab_size": 300, "layers": 1, "intermediate": 8, "context": 8}
    with pytest.raises(InputError, match="multiple of 2 x heads"):
        build_llama(hidden=30, heads=4, kv_heads=2, **shape)
    with pytest.raises(InputError, match="3 KV heads do not divide 4 heads"):
        build_llama(hidden=32, heads=4, kv_heads=3, **shape)
    with pytest.raises(InputError, match="bytes and special tokens need 258"):
        train_tokenizer(["text"], 100)
