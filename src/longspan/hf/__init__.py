"""Hugging Face models: patterns and longer positions in, and out again.

The only package that imports transformers and peft, on first use of a name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longspan._lazy import lazy

_HOME = {
    "Applied": "switch",
    "Report": "routes",
    "add_lora": "lora",
    "apply": "switch",
    "build_llama": "build",
    "convert": "conversion",
    "extend": "switch",
    "inspect": "routes",
    "load_adapter": "lora",
    "load_mechanism": "conversion",
    "load_model": "models",
    "merge_and_save": "lora",
    "parallel": "context_parallel",
    "prefill": "sparse_prefill",
    "recompute_layers": "recompute",
    "remove": "switch",
    "rope_parameters": "rope",
    "save_adapter": "lora",
    "save_mechanism": "conversion",
    "save_model": "build",
    "set_rope": "rope",
    "train_tokenizer": "build",
    "trained_length": "rope",
}

__all__ = [
    "Applied",
    "Report",
    "add_lora",
    "apply",
    "build_llama",
    "convert",
    "extend",
    "inspect",
    "load_adapter",
    "load_mechanism",
    "load_model",
    "merge_and_save",
    "parallel",
    "prefill",
    "recompute_layers",
    "remove",
    "rope_parameters",
    "save_adapter",
    "save_mechanism",
    "save_model",
    "set_rope",
    "train_tokenizer",
    "trained_length",
]

if TYPE_CHECKING:
    from longspan.hf.build import build_llama, save_model, train_tokenizer
    from longspan.hf.context_parallel import parallel
    from longspan.hf.conversion import convert, load_mechanism, save_mechanism
    from longspan.hf.lora import add_lora, load_adapter, merge_and_save, save_adapter
    from longspan.hf.models import load_model
    from longspan.hf.recompute import recompute_layers
    from longspan.hf.rope import rope_parameters, set_rope, trained_length
    from longspan.hf.routes import Report, inspect
    from longspan.hf.sparse_prefill import prefill
    from longspan.hf.switch import Applied, apply, extend, remove
else:
    __getattr__, __dir__ = lazy(__name__, _HOME)
