"""Patterns: where a token may look, as values.

See ``algebra`` for the idea; each family of atoms is one file.
"""

from longspan.pattern.algebra import And, At, Atom, Or, Pattern, Sub
from longspan.pattern.chunk import Chunk, ShiftedChunk
from longspan.pattern.document import Document
from longspan.pattern.local import Causal, Dense, Window
from longspan.pattern.prefix import Prefix, Sink
from longspan.pattern.scca import SCCA
from longspan.pattern.text import names, parse
from longspan.pattern.vary import PerHead, PerLayer

__all__ = [
    "SCCA",
    "And",
    "At",
    "Atom",
    "Causal",
    "Chunk",
    "Dense",
    "Document",
    "Or",
    "Pattern",
    "PerHead",
    "PerLayer",
    "Prefix",
    "ShiftedChunk",
    "Sink",
    "Sub",
    "Window",
    "names",
    "parse",
]
