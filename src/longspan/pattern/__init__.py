"""Patterns: where a token may look, as values.

See ``algebra`` for the idea; each family of atoms is one file, ``presets`` are published
compositions of them.
"""

from longspan.pattern.algebra import And, At, Atom, Or, Pattern, Sub
from longspan.pattern.blocks import BandBlocks, Blocks, EdgeBlocks
from longspan.pattern.chunk import Chunk, ShiftedChunk
from longspan.pattern.document import Document
from longspan.pattern.global_tokens import Global
from longspan.pattern.local import Causal, Dense, Nothing, Window
from longspan.pattern.longnet import LongNet, LongNetBranch, LongNetSet
from longspan.pattern.mixture import Mixture
from longspan.pattern.neighborhood import Neighborhood
from longspan.pattern.prefix import Prefix, Sink
from longspan.pattern.presets import bigbird, etc, longformer, sparse_transformer, swin
from longspan.pattern.random_keys import Random, RandomBlocks
from longspan.pattern.scca import SCCA
from longspan.pattern.sda import SDA, longmixed
from longspan.pattern.ssa import SSA
from longspan.pattern.strided import Diagonals, Dilated, Strided
from longspan.pattern.summaries import Summaries
from longspan.pattern.text import names, parse
from longspan.pattern.vary import PerHead, PerLayer
from longspan.pattern.vertical_slash import VerticalSlash

__all__ = [
    "SCCA",
    "SDA",
    "SSA",
    "And",
    "At",
    "Atom",
    "BandBlocks",
    "Blocks",
    "Causal",
    "Chunk",
    "Dense",
    "Diagonals",
    "Dilated",
    "Document",
    "EdgeBlocks",
    "Global",
    "LongNet",
    "LongNetBranch",
    "LongNetSet",
    "Mixture",
    "Neighborhood",
    "Nothing",
    "Or",
    "Pattern",
    "PerHead",
    "PerLayer",
    "Prefix",
    "Random",
    "RandomBlocks",
    "ShiftedChunk",
    "Sink",
    "Strided",
    "Sub",
    "Summaries",
    "VerticalSlash",
    "Window",
    "bigbird",
    "etc",
    "longformer",
    "longmixed",
    "names",
    "parse",
    "sparse_transformer",
    "swin",
]
