"""Layers for people who build models."""

from longspan.nn.attention import Attention
from longspan.nn.local import LocalAttention
from longspan.nn.rotary import rotate

__all__ = ["Attention", "LocalAttention", "rotate"]
