"""Sparse, chunked and linear attention for long contexts."""

__version__ = "0.1.0"
