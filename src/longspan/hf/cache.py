"""A cache for ``generate()`` that forgets by a policy, in any model that longspan can attend in.

    cache = longspan.kv.cache(model, "sinks(4) + recent(256) + heavy(256)")
    model.generate(**inputs, past_key_values=cache)
    print(cache.report())

Layers that keep everything get the policy; layers with a window of their own (Gemma, gpt-oss)
keep transformers' layer, which forgets by itself. Positions are the original ones, or packed: kept
keys are then read at places side by side before the newest token, turned by the model's own
rotation from where they were, every time, so that rounding does not add up. That is the geometry
of StreamingLLM (Xiao et al. 2023, arXiv 2309.17453): rotated logits depend on distances alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from longspan.errors import InputError, Refusal
from longspan.hf._cache_calls import check_calls
from longspan.hf._cache_handover import refuse_to_take_back
from longspan.hf._cache_layer import KeptLayer
from longspan.hf._cache_tokens import Role
from longspan.hf.embedded import embedding_norms
from longspan.hf.register import described, registered
from longspan.hf.rotation import still_layers, turner
from longspan.hf.switch import apply
from longspan.hf.unwrap import base_model
from longspan.kv.policy import Policy
from longspan.kv.policy import policy as read_policy
from longspan.kv.quest import Quest
from longspan.pattern import Causal, Pattern


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What one layer holds.

    Attributes:
        layer: its index in the model.
        kind: ``"policy"``, or the name of transformers' class for a layer with its own window.
        least: tokens of the head that keeps fewest.
        most: tokens of the head that keeps most.
        tokens: of all batch rows and key heads together.
        bytes: allocated, with room for the next tokens and what the policy notes.
        dense_bytes: what keys and values of all tokens seen would take.
    """

    layer: int
    kind: str
    least: int
    most: int
    tokens: int
    bytes: int
    dense_bytes: int


@dataclass(frozen=True, kw_only=True)
class CacheReport:
    """What a cache holds.

    Attributes:
        policy: its text.
        seen: tokens seen, padding counted.
        layers: one entry each.
    """

    policy: str
    seen: int
    layers: tuple[LayerReport, ...]

    @property
    def bytes(self) -> int:
        """Bytes allocated in all layers."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Bytes that keeping everything would take."""
        return sum(layer.dense_bytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "bytes": self.bytes, "dense_bytes": self.dense_bytes}

    def __str__(self) -> str:
        share = f" ({self.bytes / self.dense_bytes:.1%})" if self.dense_bytes else ""
        lines = [
            f"{self.policy}: {self.seen:,} tokens seen, {self.bytes:,} of "
            f"{self.dense_bytes:,} bytes{share}"
        ]
        for row in self.layers:
            kept = f"{row.least:,}" if row.least == row.most else f"{row.least:,}-{row.most:,}"
            lines.append(f"  layer {row.layer} ({row.kind}): {kept} tokens, {row.bytes:,} bytes")
        return "\n".join(lines)


class KVCache(Cache):
    """A transformers cache whose layers follow a policy; make it with ``longspan.kv.cache``.

    Its length is the number of tokens *seen*; ``report()`` says what is kept. It is good for one
    conversation: further calls of ``generate`` go on where it stands, ``reset()`` starts anew, and
    ``copy.deepcopy`` makes another one of what was read. Pickles are refused.
    """

    def __init__(self, layers: list[Any], policy: Policy) -> None:
        super().__init__(layers=layers)
        self.policy = policy

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take the new keys and values of a layer; see ``KeptLayer.update``.

        Raises:
            Refusal: if the model has more layers than the one that the cache was made for, or its
                layer before did not read its keys through longspan.
        """
        if layer_idx >= len(self.layers):
            raise Refusal(
                f"This cache was made for a model of {len(self.layers)} layers; make one with "
                "longspan.kv.cache(model, ...) for the model that uses it."
            )
        # Layers are computed one after another.
        if layer_idx and isinstance(before := self.layers[layer_idx - 1], KeptLayer):
            before.check_read()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def activate_past_recording(self) -> None:
        """Refuse what begins so: assisted decoding, which takes back what was not accepted.

        Raises:
            Refusal: always.
        """
        refuse_to_take_back()

    def compress(self) -> None:
        """Let the policy decide now, instead of when it would.

        For a context that is read once and then asked about: ``model(context,
        past_key_values=cache)``, ``cache.compress()``, then prompts as usual.
        """
        for layer in self.layers:
            if isinstance(layer, KeptLayer) and layer.policy.evicts:
                layer.evict()

    def report(self) -> CacheReport:
        """What every layer holds, in tokens and in bytes."""
        return CacheReport(
            policy=str(self.policy),
            seen=self.get_seq_length(),
            layers=tuple(_row(index, layer) for index, layer in enumerate(self.layers)),
        )


def cache(model: Any, policy: Any, *, positions: str = "original") -> KVCache:
    """See ``longspan.kv.cache``."""
    base = base_model(model)
    config = base.config.get_text_config()
    wanted = read_policy(policy)
    if positions not in ("original", "packed"):
        raise InputError(f"expected positions original or packed, got {positions!r}.")
    packed = positions == "packed"
    if packed and any(isinstance(p, Quest) for p in wanted.parts):
        raise Refusal("quest bounds keys where they are; it cannot read them packed.")
    if getattr(config, "kv_lora_rank", None):
        raise Refusal(
            f"{type(base).__name__} caches latents (multi-head latent attention), from which keys "
            "are made afterwards: a policy would keep or forget what it cannot read."
        )
    if shared := getattr(config, "num_kv_shared_layers", None):
        raise Refusal(
            f"The last {shared} layers of {type(base).__name__} read the keys of earlier ones, "
            "which a policy has decided about by then."
        )
    layers: list[Any] = list(DynamicCache(config=config).layers)
    chosen = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
    if not chosen:
        kinds = sorted({type(layer).__name__ for layer in layers})
        raise Refusal(
            f"{type(base).__name__} has no layer that keeps all tokens ({', '.join(kinds)}): "
            "there is nothing for a policy to forget."
        )
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    wanted.check(len(chosen), heads)
    turn = turner(base) if packed or wanted.needs_moments else None
    # Without a rotation it does not matter where a key is read.
    still = still_layers(base) if turn else frozenset[int]()
    present = registered(config._attn_implementation)
    if present is None:
        apply(base, Causal())
    elif not isinstance(present, Pattern):
        raise Refusal(
            f"The model computes {described(config._attn_implementation)}, which keeps keys in "
            "its own way; a cache with a policy needs a pattern: longspan.hf.remove(model) first."
        )
    check_calls(base)
    norms = embedding_norms(base) if wanted.needs_norms else None
    modules = frozenset(id(x.config) for x in base.modules() if hasattr(x, "config"))
    for place, index in enumerate(chosen):
        role = Role(
            policy=wanted,
            layer=place,
            layers=len(chosen),
            packed=packed and index not in still,
            turn=_stay if index in still else turn,
            norms=norms,
        )
        layers[index] = KeptLayer(role, config, modules)
    return KVCache(layers, wanted)


def _stay(x: Tensor, places: Tensor) -> Tensor:
    """The turn of a layer that does not rotate."""
    return x


def _row(index: int, layer: Any) -> LayerReport:
    common = {"layer": index}
    if isinstance(layer, KeptLayer):
        store = layer.store
        if store is None:
            return LayerReport(
                **common, kind="policy", least=0, most=0, tokens=0, bytes=0, dense_bytes=0
            )
        per_token = sum(
            store.buffers[name].shape[-1] * store.buffers[name].element_size()
            for name in ("keys", "values")
        )
        return LayerReport(
            **common,
            kind="policy",
            least=int(store.length.min()),
            most=store.longest,
            tokens=int(store.length.sum()),
            bytes=layer.bytes,
            dense_bytes=store.length.numel() * layer.seen * per_token,
        )
    keys, values = layer.keys, layer.values
    held = 0 if keys is None else keys.shape[-2]
    size = 0 if keys is None else keys.nbytes + values.nbytes
    return LayerReport(
        **common,
        kind=type(layer).__name__,
        least=held,
        most=held,
        tokens=0 if keys is None else keys.shape[0] * keys.shape[1] * held,
        bytes=size,
        dense_bytes=size // held * layer.get_seq_length() if held else 0,
    )
