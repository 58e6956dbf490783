"""Copies of code documents with other identifiers: a small corpus that cannot be learned by heart.

Names that belong to a document (frequent in it, rare in the corpus) are exchanged for names of the
same kind from other documents, consistently within one copy. Which name comes next can then only be
told from the text before, so that a model learns to look names up in its context instead of
memorising files.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from longspan.train.document import Document

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{3,}")


def rename_identifiers(
    documents: Sequence[Document],
    *,
    copies: int,
    seed: int,
    rare: float = 0.02,
    least: int = 3,
) -> list[Document]:
    """The documents followed by ``copies`` renamed versions of each.

    Args:
        documents: code.
        copies: renamed versions of each document; 0 returns the documents as they are.
        seed: decides the names; copies differ from each other.
        rare: an identifier is exchanged only if at most this share of the documents has it, which
            spares keywords, builtins and everyday words.
        least: and if it occurs at least this often in its document.
    """
    counts = [Counter(_IDENTIFIER.findall(document.text)) for document in documents]
    spread = Counter(name for count in counts for name in count)
    limit = max(1, int(rare * len(documents)))
    own = [
        [name for name, times in count.items() if times >= least and spread[name] <= limit]
        for count in counts
    ]
    pools: dict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(name for names in own for name in names):
        pools[_kind(name)].append(name)

    out = list(documents)
    for copy in range(1, copies + 1):
        for index, (document, names) in enumerate(zip(documents, own, strict=True)):
            rng = np.random.default_rng([seed, copy, index])
            new = {}
            for name in names:
                pool = pools[_kind(name)]
                new[name] = pool[int(rng.random() * len(pool))]
            out.append(Document(f"{document.name}#{copy}", _exchange(document.text, new)))
    return out


def _exchange(text: str, new: dict[str, str]) -> str:
    return _IDENTIFIER.sub(lambda match: new.get(match[0], match[0]), text)


def _kind(name: str) -> str:
    if name.isupper():
        return "CONSTANT"
    if "_" in name.strip("_"):
        return "snake_case"
    return "Title" if name[0].isupper() else "lower"
