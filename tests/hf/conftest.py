"""Tiny models of several families, built in memory, and an oracle that masks them explicitly."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from longspan.hf.routes import routed  # noqa: E402
from longspan.pattern import Causal, Pattern, Window  # noqa: E402

VOCAB = 97
HEADS = 4
WINDOW = 10

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    # Larger than usual, so that attention differs enough from its average to be tested.
    "initializer_range": 0.15,
}
FAMILIES = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "gemma3": (
        "Gemma3",
        {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
        },
    ),
}
# Families that the tests of all of them leave out: their layers have experts and learned sinks.
OTHERS = {
    "gpt-oss": (
        "GptOss",
        {
            "sliding_window": WINDOW,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
}


def build(family: str, **changes):
    """A tiny model in evaluation mode; the same weights for the same arguments."""
    name, own = {**FAMILIES, **OTHERS}[family]
    config_name = "Gemma3TextConfig" if family == "gemma3" else f"{name}Config"
    config = getattr(transformers, config_name)(**{**COMMON, **own, **changes})
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def own_pattern(model, layer: int) -> Pattern:
    """What a layer of a tiny model may see by itself."""
    types = getattr(model.config, "layer_types", None)
    kind = types[layer] if types else "sliding_attention"
    size = getattr(model.config, "sliding_window", None)
    return Window(size) if size and kind == "sliding_attention" else Causal()


def eager_oracle(model, pattern: Pattern):
    """A copy of the model whose layers attend eagerly under the dense mask of the pattern.

    The mask comes from the pattern's own predicate, pair by pair, not from ranges.
    """
    oracle = copy.deepcopy(model)
    oracle.set_attn_implementation("eager")

    def mask_layer(layer: int) -> Callable:
        def hook(module, args, kwargs):
            n = kwargs["hidden_states"].shape[1] if "hidden_states" in kwargs else args[0].shape[1]
            seen = (pattern.at_layer(layer) & own_pattern(model, layer)).mask(n, heads=HEADS)
            bias = torch.from_numpy(np.where(seen, 0.0, -np.inf)).float()[None]
            return args, {**kwargs, "attention_mask": bias}

        return hook

    for layer, (_, module) in enumerate(routed(oracle)):
        module.register_forward_pre_hook(mask_layer(layer), with_kwargs=True)
    return oracle


def tokens(batch: int, n: int, seed: int = 1) -> torch.Tensor:
    """Token ids without the padding token, [batch, n]."""
    return torch.randint(1, VOCAB, (batch, n), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small only lose time to a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny():
    """The tools above, for tests in other modules of this folder."""
    from types import SimpleNamespace

    return SimpleNamespace(
        build=build, oracle=eager_oracle, own=own_pattern, tokens=tokens, families=list(FAMILIES)
    )


@pytest.fixture(params=list(FAMILIES))
def model(request):
    """One tiny model of each family."""
    return build(request.param)


@pytest.fixture
def llama(tiny):
    return tiny.build("llama", max_position_embeddings=256)
