"""A small model whose sequence lies on several ranks, and the same in one process."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch

import longspan as ls
from longspan.errors import InputError, Refusal

N, BATCH = 45, 2
PATTERN = "window(9) | strided(4) | sink(2)"
SEGMENTS = np.stack([np.repeat([0, 1], [20, 25]), np.repeat([-1, 0, 1], [4, 30, 11])])
RUNS: dict[str, dict[str, Any]] = {
    "even": {},
    "zigzag": {"shards": "zigzag"},
    "documents": {"shards": "zigzag", "segments": SEGMENTS},
    "checkpointed": {"shards": "zigzag", "segments": SEGMENTS, "checkpointed": True},
}
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def tiny() -> tuple[Any, torch.Tensor]:
    """A Llama in float64 and a batch, the same in every process."""
    torch.manual_seed(0)
    model = ls.hf.build_llama(
        vocab_size=50, hidden=32, layers=2, heads=4, kv_heads=2, intermediate=48, context=64
    )
    return model.double(), torch.randint(50, (BATCH, N))


def gradients(model: Any) -> list[torch.Tensor]:
    """Of all weights."""
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]


def across(name: str) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """This rank's logits, loss and gradients."""
    options = dict(RUNS[name])
    segments, checkpointed = (options.pop(key, None) for key in ("segments", "checkpointed"))
    model, ids = tiny()
    if checkpointed:
        model.train()
        ls.hf.recompute_layers(model)
    with ls.hf.parallel(model, PATTERN, **options) as handle:
        batch = handle.shard(ids, labels=ids, segments=segments)
        found = model(**batch)
        if checkpointed:
            # The next batch may be cut before the backward pass of this one.
            handle.shard(ids[:, :40])
        # Transformers' own loss is computed in float32.
        loss = summed(found.logits, batch["shift_labels"]) / batch["num_items_in_batch"]
        torch.testing.assert_close(found.loss.double(), loss, rtol=1e-6, atol=1e-6)
        loss.backward()
    return found.logits.detach(), loss.detach(), gradients(model)


def summed(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Cross entropy of all rows together."""
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum"
    )


def alone(name: str) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The same from a process that has it all."""
    # Documents one by one, each as a sequence of its own; without documents a row is one.
    segments = RUNS[name].get("segments", np.zeros((BATCH, N), np.int64))
    model, ids = tiny()
    logits, total, count = torch.zeros(BATCH, N, 50, dtype=torch.float64), [], 0
    with ls.hf.apply(model, PATTERN):
        for b, row in enumerate(segments):
            for segment in np.unique(row[row >= 0]):
                own = torch.from_numpy(row == segment)
                here = model(ids[b : b + 1, own], use_cache=False).logits
                logits[b, own] = here[0].detach()
                total.append(summed(here[:, :-1], ids[b, own][1:]))
                count += len(ids[b, own]) - 1
        loss = torch.stack(total).sum() / count
        loss.backward()
    return logits, loss.detach(), gradients(model)


def refusals(rank: int) -> dict[str, str]:
    """What all ranks are told of calls that would be read wrong."""
    model, ids = tiny()
    told = {}
    with ls.hf.parallel(model, PATTERN) as handle:
        own = ids[:, : N // 2 + (rank == 0)]
        calls = {
            "not cut": lambda: model(own, use_cache=False),
            "own positions": lambda: (handle.shard(ids), model(own, use_cache=False)),
            "padding": lambda: model(
                **handle.shard(ids), attention_mask=torch.full_like(own, rank == 0)
            ),
            "labels": lambda: handle.shard(ids, labels=own),
            "ids": lambda: handle.shard(ids[0]),
            "segments": lambda: handle.shard(ids, segments=SEGMENTS[:, :-1]),
        }
        for name, call in calls.items():
            try:
                call()
                told[name] = ""
            except ls.LongspanError as error:
                told[name] = str(error)
        model.config.output_router_logits = True
        assert handle.shard(ids)
        with pytest.raises(InputError, match="adds a loss of its routers"):
            handle.shard(ids, labels=ids)
    counting()
    if importlib.util.find_spec("transformers.models.gemma4"):
        sharing()
    told["routers"] = routers()
    return told


def routers() -> str:
    """What a rank is told of the routers' loss, asked for in the call alone."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2))
    ids = torch.randint(50, (BATCH, N))
    with ls.hf.parallel(model, PATTERN) as handle:
        # Without a loss of the tokens there is none of the routers.
        assert model(**handle.shard(ids), output_router_logits=True).router_logits
        batch = handle.shard(ids, labels=ids)
        assert model(**batch).loss > 0
        with pytest.raises(InputError) as told:
            model(**batch, output_router_logits=True)
    return str(told.value)


def sharing() -> None:
    """Gemma 4 computes the layers that share keys for some rows alone, if it is asked to."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    options: dict[str, Any] = {
        **SIZES,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "global_head_dim": 8,
    }
    kinds = ["sliding_attention", "full_attention"] * 2
    small: dict[str, Any] = {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 50}
    torch.manual_seed(0)
    config = Gemma4TextConfig(**options, **small, layer_types=kinds, sliding_window=8)
    model, ids = Gemma4ForCausalLM(config).eval(), torch.randint(50, (BATCH, N))
    with torch.no_grad():
        with ls.hf.apply(model, PATTERN):
            expected = model(ids, use_cache=False).logits
        with ls.hf.parallel(model, PATTERN) as handle:
            batch = handle.shard(ids)
            found = model(**batch).logits
            with pytest.raises(InputError, match="leave logits_to_keep out"):
                model(**batch, logits_to_keep=1)
    torch.testing.assert_close(found, expected[:, batch["position_ids"][0]], atol=1e-5, rtol=1e-5)


def counting() -> None:
    """Llama 4's temperature counts the rows that a model is given, on a rank from 0; so does Bart.

    Bart was given positions, and ignored them.
    """
    from transformers import BartConfig, BartForCausalLM, Llama4ForCausalLM, Llama4TextConfig

    small: dict[str, Any] = {
        "d_model": 32,
        "decoder_layers": 1,
        "decoder_ffn_dim": 16,
        "vocab_size": 50,
    }
    bart = BartForCausalLM(BartConfig(**small, decoder_attention_heads=4))
    with pytest.raises(Refusal, match="BartForCausalLM takes no position_ids"):
        ls.hf.parallel(bart, PATTERN)

    own: dict[str, Any] = {
        "intermediate_size_mlp": 16,
        "num_local_experts": 2,
        "no_rope_layers": [1, 0],
    }
    options = {**SIZES, **own}
    tuned = Llama4ForCausalLM(Llama4TextConfig(**options))
    before = tuned.config._attn_implementation
    with pytest.raises(Refusal, match=r"counts the rows .*layers\.1\.self_attn"):
        ls.hf.parallel(tuned, PATTERN)
    assert tuned.config._attn_implementation == before
    plain = Llama4ForCausalLM(Llama4TextConfig(**options, attn_temperature_tuning=False))
    with ls.hf.parallel(plain, PATTERN):
        pass
