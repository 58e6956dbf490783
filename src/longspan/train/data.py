"""Text for training and evaluation: documents -> tokens -> sequences, without hidden state.

Documents are joined with the end-of-text token and cut into sequences, as LongLoRA does
(arXiv 2309.12307). The Python standard library serves as a corpus that every machine has; two
fixed lists of modules keep held-out text (reported figures) and validation text (choices such as
the number of steps) away from training.

Axes: T tokens of one document or stream, n sequences, L sequence length.
"""

from __future__ import annotations

import gzip
import json
import sysconfig
import tokenize
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from longspan.errors import DataError
from longspan.train.document import Document
from longspan.train.recall import passkey_text, recall_documents

__all__ = [
    "Document",
    "Sampler",
    "passkey_text",
    "python_sources",
    "read_documents",
    "recall_documents",
    "require",
    "tokenize_documents",
    "windows",
]

SUFFIXES = (".txt", ".md", ".py", ".rst", ".jsonl")

# Long modules that every supported Python has, as a file or as a package of that name.
HELD_OUT_MODULES = frozenset(
    {
        "argparse",
        "difflib",
        "doctest",
        "ipaddress",
        "mailbox",
        "statistics",
        "subprocess",
        "tarfile",
        "typing",
    }
)
VALIDATION_MODULES = frozenset({"configparser", "ftplib", "optparse", "plistlib", "smtplib"})

# Generated tables and installed packages: not the library's own hand-written code.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "lib-dynload"}
)
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})

Split = Literal["train", "validation", "heldout"]


def read_documents(paths: Sequence[Path | str]) -> list[Document]:
    """Read files, and folders recursively, in a deterministic order.

    A folder gives its ``.txt .md .py .rst .jsonl`` files (also ``.gz``), hidden ones skipped; a
    file named directly is read whatever its suffix. A ``.jsonl`` file gives one document per line,
    from the key ``text``. A pipe gives one document, and only once.

    Raises:
        DataError: a path that does not exist or is something else, a file that is not UTF-8 text,
            a malformed ``.jsonl`` line, or no text at all.
    """
    documents: list[Document] = []
    for path in map(Path, paths):
        if path.is_dir():
            for file in _text_files(path):
                documents += _read_file(file)
        elif path.is_file() or path.is_fifo():
            documents += _read_file(path)
        elif path.exists():
            raise DataError(
                f"data path is neither a file nor a folder nor a pipe: {path}. Pass one of those; "
                "/dev/stdin is one where something is piped into it."
            )
        else:
            raise DataError(
                f"data path not found: {path}. Pass files or folders that exist on this machine."
            )
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        given = ", ".join(str(path) for path in paths) or "nothing"
        raise DataError(
            f"no text found in: {given}. "
            f"Expected {' '.join(SUFFIXES)} files (also .gz) that are not empty, or pipes that "
            "nobody has read."
        )
    return documents


def python_sources(
    split: Split = "train", *, tests: bool = False, root: Path | None = None
) -> list[Document]:
    """The standard library's own ``.py`` files, sorted by module name.

    Args:
        split: ``heldout`` and ``validation`` give the modules of the fixed lists, ``train`` all
            others.
        tests: also the library's test suite, where it is installed, without the tests of the
            modules on the two lists. It belongs to the ``train`` split.
        root: library folder; default: the running interpreter's.

    Raises:
        DataError: this Python carries no source files (stripped or zipped installations).
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    documents = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED_FOLDERS & set(parts[:-1]) or parts[0].startswith(
            ("config-", "_sysconfigdata")
        ):
            continue
        if _TEST_FOLDERS & set(parts) and not (tests and _tests_nothing_listed(parts)):
            continue
        if _split_of(parts[0]) != split:
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            # Deliberately broken fixtures are no code to learn from.
            continue
        if text.strip():
            name = ".".join(part for part in parts if part != "__init__")
            documents.append(Document(name, text))
    if not documents:
        raise DataError(
            f"no standard library source files for the {split} split under {root}. "
            "This Python is installed without its .py files; pass --data with text of your own."
        )
    return sorted(documents, key=lambda document: document.name)


def tokenize_documents(tokenizer: Any, documents: Sequence[Document]) -> list[Tensor]:
    """Tokens of each document, the end-of-text token last: a list of int64 [T].

    Raises:
        DataError: the tokenizer has no end-of-text token to join documents with.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError(
            "the tokenizer has no eos_token, which joins documents; "
            "set tokenizer.eos_token before use."
        )
    if not documents:
        return []
    # verbose=False: a document longer than the trained context is what this library is for.
    encoded = tokenizer(
        [document.text for document in documents], add_special_tokens=False, verbose=False
    )
    return [
        torch.tensor([*ids, end], dtype=torch.int64, device="cpu") for ids in encoded["input_ids"]
    ]


def windows(documents_T: Sequence[Tensor], length: int, *, seed: int | None) -> Tensor:
    """Join documents and cut them into sequences; the remainder is dropped.

    Args:
        documents_T: tokens of each document, end-of-text included.
        length: tokens per sequence.
        seed: order of the documents; None keeps the given one.

    Returns:
        int64 [n, length].

    Raises:
        DataError: fewer tokens than one sequence.
    """
    order = list(range(len(documents_T)))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(len(documents_T)).tolist()
    total = require("the data", documents_T, length)
    stream_T = torch.cat([documents_T[i] for i in order])
    return stream_T[: total // length * length].view(-1, length)


class Sampler:
    """An endless, addressable supply of training sequences.

    Sequence ``index`` depends on (documents, length, seed, index) alone, so a resumed run sees
    what an uninterrupted one would. Each epoch shuffles the documents, joins and cuts them, and
    shuffles the sequences.
    """

    def __init__(self, documents_T: Sequence[Tensor], length: int, *, seed: int) -> None:
        """Raises DataError when the documents hold fewer tokens than one sequence."""
        self._documents_T = list(documents_T)
        self._length = length
        self._seed = seed
        self.tokens = require("the data", documents_T, length)
        self.sequences_per_epoch = self.tokens // length
        self._epoch = -1
        self._sequences_nL = torch.empty(0, length, dtype=torch.int64, device="cpu")

    def sequence(self, index: int) -> Tensor:
        """Sequence number ``index`` >= 0: int64 [L]."""
        epoch, row = divmod(index, self.sequences_per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self._seed, epoch])
            cut_nL = windows(self._documents_T, self._length, seed=int(rng.integers(2**63)))
            self._sequences_nL = cut_nL[torch.from_numpy(rng.permutation(len(cut_nL)))]
            self._epoch = epoch
        return self._sequences_nL[row]

    def batch(self, start: int, size: int) -> Tensor:
        """Sequences ``start`` to ``start + size - 1``: int64 [size, L]."""
        return torch.stack([self.sequence(start + i) for i in range(size)])


def require(what: str, documents_T: Sequence[Tensor], length: int, held_out: int = 0) -> int:
    """Number of tokens of some text.

    Args:
        what: the text, in words.
        documents_T: tokens of each document.
        length: tokens of a sequence.
        held_out: tokens that are to be held out of the same text.

    Raises:
        DataError: fewer tokens than one sequence and what is held out.
    """
    found = sum(map(len, documents_T))
    if found < length + held_out:
        more = f", and {held_out} more to hold out" if held_out else ""
        raise DataError(
            f"{what} is shorter than one sequence: {found} tokens found, {length} needed{more}. "
            f"Give more text{', --eval-data,' if held_out else ''} or a shorter length."
        )
    return found


def _tests_nothing_listed(parts: tuple[str, ...]) -> bool:
    listed = HELD_OUT_MODULES | VALIDATION_MODULES
    return not any(name in part for part in parts for name in listed)


def _split_of(module: str) -> Split:
    if module in HELD_OUT_MODULES:
        return "heldout"
    return "validation" if module in VALIDATION_MODULES else "train"


def _text_files(folder: Path) -> list[Path]:
    found = []
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        name = path.name.removesuffix(".gz")
        if path.is_file() and not hidden and name.endswith(SUFFIXES):
            found.append(path)
    return sorted(found)


def _read_file(path: Path) -> list[Document]:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}). Convert it or leave it out."
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} could not be read: {error}.") from None
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        return _read_jsonl(path, text)
    return [Document(str(path), text)]


def _read_jsonl(path: Path, text: str) -> list[Document]:
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        # Brackets too deep, or numbers too long, for Python to read.
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} line {number} is not JSON: {error}.") from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise DataError(f'{path} line {number} has no string under the key "text".')
        try:
            record["text"].encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{path} line {number} holds half of a character: {error}.") from None
        documents.append(Document(f"{path}:{number}", record["text"]))
    return documents
