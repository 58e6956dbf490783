"""What a call of a model asks transformers to collect on the way, such as attention weights.

Some layers do not hand keyword arguments on (GPT-2, OPT, StableLM), so that an attention function
is not told. transformers notes for its hooks what the call in progress collects, and this is read.
"""

from __future__ import annotations

try:
    from transformers.utils.output_capturing import _active_collector as _collector
except ImportError:
    # Another release: what layers are told is all there is.
    _collector = None


def collected(name: str) -> bool:
    """Whether the call in progress collects ``name``, as in ``output_<name>=True``."""
    found = None if _collector is None else _collector.get()
    return bool(found) and name in found
