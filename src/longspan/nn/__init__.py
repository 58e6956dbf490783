"""Layers for people who build models."""

from longspan.nn.attention import Attention
from longspan.nn.local import LocalAttention
from longspan.nn.rotary import rotate
from longspan.nn.vertical_slash import VerticalSlashAttention

__all__ = ["Attention", "LocalAttention", "VerticalSlashAttention", "rotate"]
