"""The metrics of LongBench for English and code, each 0 to 1 for one answer.

LongBench (Bai et al. 2024, arXiv 2308.14508), metrics.py and eval.py of THUDM/LongBench:

    qa_f1           F1 of the words as multisets, without case, punctuation, articles
    rouge_l         ROUGE-L of Lin (2004) on whole summaries, as the package ``rouge`` 1.0 counts:
                    union of the longest common subsequences of all pairs of sentences, distinct
                    words, F = 2 P R / (P + R + 1e-8)
    classification  1 / (class names found) if the right one is among them
    retrieval       share of the numbers said that are the number of the right paragraph
    count           share of the numbers said that are the right one
    code_sim        similarity of the first line that is no comment, in whole percents

How ours differ. Published sentences of together about a thousand words overflow a recursion and
score 0; here they are scored. ``fuzz.ratio`` of fuzzywuzzy is what difflib says, or another edit
distance where python-Levenshtein is installed; LongBench installs none, and ours is difflib's.
Cost O(words of the answer x words of the reference) for ``rouge_l``.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PARAGRAPH = re.compile(r"Paragraph (\d+)")
_NUMBER = re.compile(r"\d+")


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and runs of white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def qa_f1(said: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words of both, each counted as often as it stands there."""
    ours, theirs = normalised(said).split(), normalised(answer).split()
    common = (Counter(ours) & Counter(theirs)).total()
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def rouge_l(said: str, answer: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L of two summaries; 0 if one of them has no sentence."""
    ours, theirs = _sentences(said), _sentences(answer)
    if not ours or not theirs:
        return 0.0
    shared = {word for left in theirs for right in ours for word in _common(left, right)}
    precision = len(shared) / len({word for sentence in ours for word in sentence})
    recall = len(shared) / len({word for sentence in theirs for word in sentence})
    return 2 * (precision * recall / (precision + recall + 1e-8))


def _sentences(text: str) -> list[list[str]]:
    # A sentence of white space alone is one empty word, as published.
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common(left: list[str], right: list[str]) -> list[str]:
    """The words of a longest common subsequence; of several, the published one."""
    lengths = [[0] * (len(right) + 1)]
    for word in left:
        above, row = lengths[-1], [0]
        for j, other in enumerate(right):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        lengths.append(row)
    i, j, found = len(left), len(right), []
    while i and j:
        if left[i - 1] == right[j - 1]:
            found.append(left[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def classification(said: str, answer: str, classes: Sequence[str] = ()) -> float:
    """1 / (class names that were said) if the right one is among them."""
    found = [name for name in classes if name in said]
    place = 0
    while place < len(found):
        name = found[place]
        # Names inside the right one are no guesses. The published loop removes from the list that
        # it walks, so the one behind a removed name is not looked at.
        if name in answer and name != answer:
            found.remove(name)
        place += 1
    return 1 / len(found) if answer in found else 0.0


def retrieval(said: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers said that are the one of ``Paragraph N`` in the answer."""
    right = _PARAGRAPH.search(answer)
    return 0.0 if right is None else count(said, right[1])


def count(said: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers said that are the answer."""
    numbers = _NUMBER.findall(said)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def code_sim(said: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Similarity of the first line that holds no comment or fence to the line asked for."""
    lines = said.lstrip("\n").split("\n")
    line = next((x for x in lines if not any(mark in x for mark in ("`", "#", "//"))), "")
    if line == answer:
        return 1.0
    if not line or not answer:
        return 0.0
    return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100


Metric = Callable[[str, str, Sequence[str]], float]

METRICS: dict[str, Metric] = {
    "qa_f1": qa_f1,
    "rouge_l": rouge_l,
    "classification": classification,
    "retrieval": retrieval,
    "count": count,
    "code_sim": code_sim,
}


def best(
    metric: str,
    said: str,
    answers: Sequence[str],
    classes: Sequence[str] = (),
    *,
    first_line: bool = False,
) -> float:
    """The best score over several right answers.

    Args:
        metric: one of ``METRICS``.
        said: what the model wrote.
        answers: any of them is right.
        classes: for ``classification``, the names of all classes.
        first_line: only the first line that is not empty counts, as for few-shot tasks.
    """
    if first_line:
        said = said.lstrip("\n").split("\n")[0]
    return max((METRICS[metric](said, answer, classes) for answer in answers), default=0.0)
