"""Settings that all tests share."""

from __future__ import annotations

import importlib
import os
import signal
from pathlib import Path

import pytest

# Two test processes on two cores: more threads than one each only get in each other's way.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def interruptible():
    """As a terminal starts programs; shells have those in the background ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Llama with 20 000 random weights and a trained context of 64."""
    pytest.importorskip("transformers")
    import torch

    from longspan.hf import build_llama, save_model, train_tokenizer

    tokenizer = train_tokenizer([(Path(__file__).read_text())], 300)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_llama(
            vocab_size=len(tokenizer),
            hidden=32,
            layers=2,
            heads=4,
            kv_heads=2,
            intermediate=48,
            context=64,
        )
    folder = tmp_path_factory.mktemp("model")
    save_model(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def some_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with about 30 000 characters of code in three files."""
    folder = tmp_path_factory.mktemp("text")
    for name in ("textwrap", "string", "bisect"):
        source = Path(importlib.import_module(name).__file__ or "")
        (folder / f"{name}.py").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    return folder
