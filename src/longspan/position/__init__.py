"""RoPE scaling as pure functions: width, base and lengths in, frequencies and temperature out."""

from longspan.position.dynamic import dynamic
from longspan.position.frequencies import Frequencies, default
from longspan.position.linear import linear
from longspan.position.llama3 import llama3
from longspan.position.longrope import LongFactors, longrope, read_factors
from longspan.position.ntk import ntk, ntk_base
from longspan.position.yarn import yarn, yarn_temperature

__all__ = [
    "Frequencies",
    "LongFactors",
    "default",
    "dynamic",
    "linear",
    "llama3",
    "longrope",
    "ntk",
    "ntk_base",
    "read_factors",
    "yarn",
    "yarn_temperature",
]
