"""The card beside an adapter: how to load it with transformers and peft alone.

An adapter holds no positions: on a base model whose positions are not scaled it gives worse
numbers than were measured, without any error. The card says the lines that scale them.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from pprint import pformat
from typing import Any

from longspan.eval.plain import to_json
from longspan.train.checkpoint import write_text
from longspan.train.settings import ExtendSettings

_CARD = """\
---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- longspan
---

# {name}, extended to {length:,} tokens

A LoRA adapter for `{base}`, made by `longspan extend`: trained with {attention}, {rope} positions.

The positions of the base model must be scaled before the adapter is loaded:

```python
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained({base!r})
text = config.get_text_config()
text.rope_parameters = {parameters}
text.max_position_embeddings = {positions}
model = AutoModelForCausalLM.from_pretrained({base!r}, config=config)
model = PeftModel.from_pretrained(model, {folder!r})
```

This attends densely. For the pattern it was trained with, where there is one:
`longspan.hf.apply(model, {pattern!r})`.
"""


def write_card(folder: Path, settings: ExtendSettings, config: Any) -> None:
    """Write README.md and longspan.json into the folder of an adapter.

    Args:
        folder: where the adapter lies.
        settings: of the extension.
        config: configuration of the model, its positions scaled.
    """
    text = config.get_text_config()
    how = {
        "length": settings.length,
        "rope": settings.rope,
        "rope_factors": settings.rope_factors and asdict(settings.rope_factors),
        "pattern": settings.pattern,
        "rope_parameters": text.rope_parameters,
        "max_position_embeddings": text.max_position_embeddings,
    }
    card = _CARD.format(
        base=settings.model,
        name=Path(settings.model).name,
        length=settings.length,
        attention="dense attention" if settings.pattern == "none" else f"`{settings.pattern}`",
        rope=settings.rope,
        parameters=pformat(text.rope_parameters, width=80),
        positions=text.max_position_embeddings,
        folder=str(folder),
        pattern=settings.pattern,
    )
    for name, content in (
        ("README.md", card),
        ("longspan.json", to_json(how, indent=1) + "\n"),
    ):
        write_text(folder / name, content)
