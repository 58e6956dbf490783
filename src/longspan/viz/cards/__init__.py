"""What the gallery says of each pattern: words, equation, paper, examples; the rest is computed.

A pattern without a card is a failing test. Equations use i for the query's position, j for the
key's, h for the head (of H), all from 0.
"""

from longspan.viz.cards import blocks, near, published, shifted, strided
from longspan.viz.cards.card import PRESETS, Card

__all__ = ["CARDS", "PRESETS", "Card"]

CARDS = (*near.CARDS, *shifted.CARDS, *strided.CARDS, *blocks.CARDS, *published.CARDS)
