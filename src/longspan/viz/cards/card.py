"""The form of a card, and the papers and families that cards name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Where a pattern comes from.

    Attributes:
        text: authors and year.
        arxiv: its number there; empty if it is not there.
    """

    text: str
    arxiv: str = ""


@dataclass(frozen=True, kw_only=True)
class Card:
    """One entry of the gallery.

    Attributes:
        name: of the pattern in its text form.
        title: heading.
        family: for the filter.
        says: what it does, in a sentence or two.
        equation: which pairs it allows; lines.
        paper: origin, if it has one.
        cost: time for N tokens.
        example: text form that is drawn over ``tokens`` tokens and ``heads`` heads.
        full: text form of the same idea at N = 32,768.
        small: text form that is small enough to be checked by hand, over ``small_tokens`` tokens
            and ``small_heads`` heads.
        tokens: of the picture.
        heads: of the picture.
        layers: of the picture of reach.
        also: names of other patterns that this entry speaks of.
        python: the call that makes ``example``, for published compositions.
        small_tokens: of the small example.
        small_heads: of the small example.
    """

    name: str
    title: str
    family: str
    says: str
    equation: str
    cost: str
    example: str
    full: str
    small: str
    paper: Paper | None = None
    tokens: int = 64
    heads: int = 4
    layers: int = 3
    also: tuple[str, ...] = ()
    python: str = ""
    small_tokens: int = 8
    small_heads: int = 1


LONGFORMER = Paper(text="Longformer, Beltagy et al. 2020", arxiv="2004.05150")
LONGLORA = Paper(text="LongLoRA, Chen et al. 2023", arxiv="2309.12307")
SCCA = Paper(text="SCCA, Guo 2023", arxiv="2312.07305")
BIGBIRD = Paper(text="BigBird, Zaheer et al. 2020", arxiv="2007.14062")
LONGNET = Paper(text="LongNet, Ding et al. 2023", arxiv="2307.02486")
NEIGHBORHOOD = Paper(text="NAT and DiNAT, Hassani et al. 2022", arxiv="2209.15001")
SPARSE = Paper(text="Sparse Transformer, Child et al. 2019", arxiv="1904.10509")
SSA = Paper(text="Shifted Sparse Attention")
TRANSFORMER = Paper(text="Attention Is All You Need, Vaswani et al. 2017", arxiv="1706.03762")

ETC = Paper(text="ETC, Ainslie et al. 2020", arxiv="2004.08483")
MINFERENCE = Paper(text="MInference, Jiang et al. 2024", arxiv="2407.02490")

DENSE, LOCAL, CHUNKS, SHIFTED = "Dense", "Local", "Chunks", "Shifted over heads"
DILATED, GLOBAL = "Strided and dilated", "Global tokens"
RANDOM, MADE, PRESETS = "Random and blocks", "Made of others", "Published mixes"
