"""Documents, splits, sequences and the synthetic recall text."""

from __future__ import annotations

import gzip
import json
import os
import threading
from pathlib import Path

import pytest
import torch

from longspan.errors import DataError
from longspan.hf.build import train_tokenizer
from longspan.train.data import (
    HELD_OUT_MODULES,
    VALIDATION_MODULES,
    Document,
    Sampler,
    passkey_text,
    python_sources,
    read_documents,
    recall_documents,
    tokenize_documents,
    windows,
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([document.text for document in recall_documents(0, 20)], 400)


def _library(root: Path) -> Path:
    """A folder laid out like a standard library."""
    files = {
        "queue.py": "import threading\n",
        "argparse.py": "# held out\n",
        "typing/__init__.py": "# held out package\n",
        "typing/extra.py": "# held out submodule\n",
        "ftplib.py": "# validation\n",
        "json/__init__.py": "# package\n",
        "json/decoder.py": "# submodule\n",
        "empty.py": "\n",
        "site-packages/other.py": "# installed\n",
        "encodings/cp1.py": "# table\n",
        "test/test_queue.py": "# a test\n",
        "test/test_argparse.py": "# a test of held-out code\n",
        "idlelib/idle_test/test_x.py": "# a test\n",
        "broken.py": "# -*- coding: no-such-codec -*-\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_splits_follow_the_module_name(tmp_path):
    root = _library(tmp_path)
    train = [document.name for document in python_sources("train", root=root)]
    assert train == ["json", "json.decoder", "queue"]
    heldout = [document.name for document in python_sources("heldout", root=root)]
    assert heldout == ["argparse", "typing", "typing.extra"]
    assert [d.name for d in python_sources("validation", root=root)] == ["ftplib"]
    tests = [d.name for d in python_sources("train", tests=True, root=root)]
    assert tests == [
        "idlelib.idle_test.test_x",
        "json",
        "json.decoder",
        "queue",
        "test.test_queue",
    ]


def test_heldout_modules_never_occur_in_training():
    splits = {name: python_sources(name) for name in ("train", "validation", "heldout")}
    first = {
        name: {document.name.split(".")[0] for document in documents}
        for name, documents in splits.items()
    }
    assert first["heldout"] == HELD_OUT_MODULES
    assert first["validation"] == VALIDATION_MODULES
    assert not first["train"] & (HELD_OUT_MODULES | VALIDATION_MODULES)
    # Long enough that a context of thousands of tokens is filled by one module.
    assert all(len(d.text) > 20_000 for d in splits["heldout"] if "." not in d.name)
    assert len(splits["train"]) > 200


def test_a_python_without_sources_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"installed without its \.py files; pass --data"):
        python_sources("train", root=tmp_path)


def test_reads_folders_in_order_and_every_format(tmp_path):
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.md").write_text("z")
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "one"}) + "\n\n" + '{"text": "two"}\n')
    (tmp_path / "d.py.gz").write_bytes(gzip.compress(b"d = 1"))
    (tmp_path / "skipped.bin").write_bytes(b"\xff")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "blank.txt").write_text(" \n")
    assert [document.text for document in read_documents([tmp_path])] == [
        "z",
        "b",
        "one",
        "two",
        "d = 1",
    ]
    (tmp_path / "notes").write_text("named directly")
    assert read_documents([tmp_path / "notes"])[0].text == "named directly"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"\xff\xfe\xff", r"x\.txt is not UTF-8 text \(byte 0\)"),
        ("x.txt", b" ", "no text found in"),
        ("x.jsonl", b'{"text": "a"}\n{', "line 2 is not JSON"),
        ("x.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("x.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
        ("x.jsonl", b'{"text": "a\\ud800"}', "line 1 holds half of a character"),
        ("x.jsonl", b'{"body": "a"}', 'line 1 has no string under the key "text"'),
        ("x.txt.gz", b"no gzip", "could not be read"),
        ("x.txt.gz", gzip.compress(b"a" * 50, mtime=0)[:-9], "could not be read"),
        ("x.txt.gz", gzip.compress(b"a", mtime=0)[:10] + b"\xff" * 20, "could not be read"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_documents([tmp_path / name])


def test_missing_path_is_named(tmp_path):
    with pytest.raises(DataError, match=r"data path not found: .*nowhere"):
        read_documents([tmp_path / "nowhere"])


def test_a_pipe_is_read_once_and_a_device_not_at_all(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for text in ("one\ntwo", " "):
        writer = threading.Thread(target=pipe.write_text, args=(text,))
        writer.start()
        if text.strip():
            assert read_documents([pipe]) == [Document(str(pipe), text)]
        else:
            with pytest.raises(DataError, match="or pipes that nobody has read"):
                read_documents([pipe])
        writer.join()
    with pytest.raises(DataError, match="neither a file nor a folder nor a pipe: /dev/zero"):
        read_documents(["/dev/zero"])


def test_documents_end_with_the_end_of_text_token(tokenizer):
    texts = ["def f():\n    return 12\n", "naïve = 'ü'\n"]
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    encoded = tokenize_documents(tokenizer, documents)
    for ids_T, text in zip(encoded, texts, strict=True):
        assert ids_T.dtype == torch.int64
        assert ids_T[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids_T[:-1]) == text


def test_digits_are_single_tokens(tokenizer):
    assert [tokenizer.decode(i) for i in tokenizer("# 48213")["input_ids"]][-5:] == list("48213")


def test_windows_join_and_cut():
    documents_T = [torch.tensor([1, 2, 0]), torch.tensor([3, 0]), torch.tensor([4, 5, 6, 0])]
    assert windows(documents_T, 4, seed=None).tolist() == [[1, 2, 0, 3], [0, 4, 5, 6]]
    shuffled = windows(documents_T, 3, seed=1)
    assert torch.equal(shuffled, windows(documents_T, 3, seed=1))
    assert shuffled.flatten().sort().values.tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 6]


def test_too_little_text_states_both_numbers():
    with pytest.raises(DataError, match="3 tokens found, 4 needed"):
        windows([torch.tensor([1, 2, 0])], 4, seed=None)
    with pytest.raises(DataError, match="0 tokens found, 8 needed"):
        Sampler([], 8, seed=0)


def test_a_sequence_depends_on_seed_and_index_alone():
    documents_T = [torch.arange(i, i + 7) for i in range(0, 70, 7)]
    forward, other = Sampler(documents_T, 8, seed=3), Sampler(documents_T, 8, seed=4)
    taken = [forward.sequence(i) for i in range(24)]
    backward = Sampler(documents_T, 8, seed=3)
    for i in reversed(range(24)):
        assert torch.equal(backward.sequence(i), taken[i])
    assert any(not torch.equal(other.sequence(i), taken[i]) for i in range(8))
    assert torch.equal(forward.batch(5, 3), torch.stack(taken[5:8]))
    # One epoch shows every cut sequence once, the next one in another order.
    assert forward.sequences_per_epoch == 8
    assert torch.stack(taken[:8]).unique(dim=0).shape[0] == 8
    assert not torch.equal(torch.stack(taken[:8]), torch.stack(taken[8:16]))


def test_recall_documents_repeat_each_value_once():
    documents = recall_documents(7, 30)
    assert documents == recall_documents(7, 30)
    assert documents != recall_documents(8, 30)
    for document in documents:
        lines = document.text.splitlines()
        recalls = [line for line in lines if line.startswith("print(")]
        assert recalls
        for line in recalls:
            name, value = line.removeprefix("print(").split(")  # ")
            assert lines.count(f"{name} = {value}") == 1
        assert len(document.text) < 1600


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_passkey_stands_at_its_depth(depth):
    context, question, answer = passkey_text(4000, depth, "48213", seed=5)
    assert len(context) <= 4000
    assert (question, answer) == ("print(PASS_KEY)  # ", "48213")
    assert context.count("48213") == 1
    assert context.index("PASS_KEY = 48213\n") / len(context) == pytest.approx(depth, abs=0.06)
