"""Synthetic Python text in which a value must be recalled: training documents and passkey probes.

    PASS_KEY = 48213                 somewhere in the text, at a chosen depth
    ...                              filler code with other names and other numbers
    print(PASS_KEY)  # 48213         the answer repeats the value digit by digit

The probe is the passkey retrieval of Landmark Attention (arXiv 2305.16300) and LongLoRA (arXiv
2309.12307), written as code so that a model trained on code is asked in its own language.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from longspan.train.document import Document

PASS_KEY_NAME = "PASS_KEY"

_WORD_LIST = """
buffer cache chunk client config count cursor data default depth entry error event field file
filter flag format frame group handle header host index info item key label level limit line
link list lock mode module name node offset option order output owner page parent part path
pattern peer pool port prefix query queue rate record result root row rule scope section
server shape size slot source stack state step stream table task text thread time token total
type unit user value version view weight width worker
"""
_WORDS = _WORD_LIST.split()

_FILLER = (
    "def {a}_{b}(self, {c}):\n    if {c} is None:\n        return self.{a}\n"
    "    return self.{b}({c})\n",
    "class {A}{B}:\n    def __init__(self, {c}, {d}={n}):\n        self.{c} = {c}\n"
    "        self.{d} = {d}\n",
    "for {a} in {b}s:\n    if {a}.{c} > {n}:\n        {d}.append({a})\n",
    "{a}_{b} = {c}.get({d!r}, {n})\n",
    "try:\n    {a} = {b}.{c}()\nexcept ValueError:\n    {a} = None\n",
    "# The {a} of each {b} is kept until its {c} is closed.\n",
    "while {a} < len({b}):\n    {c} = {b}[{a}]\n    {a} += {n}\n",
    "if not isinstance({a}, {B}):\n    raise TypeError('{a} must be a {b}')\n",
    "with open({a}_{b}) as {c}:\n    {d} = {c}.read()\n",
    "{a}s = [{b}.{c} for {b} in {d}s if {b}.{a}]\n",
    'def {a}_{b}():\n    """Return the {a} of the current {b}."""\n    return {c}_{d}\n',
    "assert {a}.{b} == {n}, {a}\n",
)


def recall_documents(
    seed: int, n: int, *, min_chars: int = 300, max_chars: int = 1300
) -> list[Document]:
    """Documents with one to three values to remember and as many recalls at the end.

    Args:
        seed: any two seeds give different names, values, filler and depths.
        n: number of documents.
        min_chars: shortest filler, in characters.
        max_chars: longest filler, in characters.
    """
    documents = []
    for number in range(n):
        rng = np.random.default_rng([seed, number])
        filler = _filler_to(rng, int(rng.integers(min_chars, max_chars + 1)))
        pairs = {PASS_KEY_NAME: _key(rng)} if rng.random() < 0.5 else {}
        for _ in range(int(rng.integers(1, 3))):
            first, second = rng.choice(_WORDS, size=2)
            pairs[f"{first}_{second}".upper()] = _key(rng)
        for name, key in pairs.items():
            filler.insert(int(rng.integers(len(filler) + 1)), f"{name} = {key}\n")
        recalls = [f"print({name})  # {pairs[name]}\n" for name in rng.permutation(list(pairs))]
        documents.append(Document(f"recall-{seed}-{number}", "".join(filler + recalls)))
    return documents


def passkey_text(length_chars: int, depth: float, key: str, seed: int) -> tuple[str, str, str]:
    """One passkey probe.

    Args:
        length_chars: about how long the context is (filler and assignment), in characters; never
            longer, unless the assignment alone is.
        depth: where the assignment stands, 0 (start) to 1 (end).
        key: the value, for example ``"48213"``.
        seed: chooses the filler.

    Returns:
        (context, question, answer): the model reads context + question and must continue with
        the answer.
    """
    rng = np.random.default_rng(seed)
    assignment = f"{PASS_KEY_NAME} = {key}\n"
    filler = _filler_to(rng, length_chars - len(assignment))
    filler.insert(round(depth * len(filler)), assignment)
    return "".join(filler), f"print({PASS_KEY_NAME})  # ", key


def _filler_to(rng: np.random.Generator, chars: int) -> list[str]:
    filler, used = [], 0
    for snippet in _snippets(rng):
        used += len(snippet)
        if used > chars:
            return filler
        filler.append(snippet)
    raise AssertionError("the snippets never end")


def _snippets(rng: np.random.Generator) -> Iterator[str]:
    while True:
        a, b, c, d = (str(word) for word in rng.choice(_WORDS, size=4, replace=False))
        form = _FILLER[rng.integers(len(_FILLER))]
        yield form.format(a=a, b=b, c=c, d=d, A=a.title(), B=b.title(), n=int(rng.integers(100)))


def _key(rng: np.random.Generator) -> str:
    return str(rng.integers(10_000, 100_000))
