"""One prompt read once, many policies: copies of a cache that go on as another policy's.

Reading a long prompt costs far more than forgetting part of it, and what a prompt leaves behind
does not depend on the policy as long as nothing was evicted. So the cache of one that waits, and
that notes all that the others need, stands in for theirs:

    cache = longspan.kv.cache(model, waiting([policy, ...]))
    model(prompt, past_key_values=cache)
    copies = [fork(cache, policy) for policy in ...]

A copy has decided already, as its policy would have by the first token after the prompt. O(C D)
memory and time a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from longspan.errors import InputError
from longspan.hf._cache_layer import KeptLayer
from longspan.hf.cache import KVCache
from longspan.kv.policy import Policy, policy


def waiting(policies: Sequence[Any]) -> Policy:
    """A policy that notes what all of these need and evicts nothing while a prompt comes in."""
    parts = {str(part): part for each in policies for part in policy(each).scorers}
    return Policy(tuple(parts.values()), 0)


def fork(cache: KVCache, wanted: Any) -> KVCache:
    """A copy of a cache as another policy would have it now; the original stays as it is.

    Args:
        cache: made by ``longspan.kv.cache``; has read a prompt, in one piece or several, and
            evicted nothing.
        wanted: a policy, a part or text.

    Raises:
        PolicyError: if the policy does not parse.
        InputError: if the cache has evicted something, is empty, or has not noted what the policy
            needs.
    """
    chosen = policy(wanted)
    return KVCache([_layer(layer, chosen) for layer in cache.layers], chosen)


def _layer(old: Any, chosen: Policy) -> Any:
    if not isinstance(old, KeptLayer):
        return copy.deepcopy(old)
    if old.store is None or old._evicted:
        raise InputError(
            "fork needs a cache that has read a prompt and evicted nothing: make it with the "
            "policy longspan.hf.fork.waiting([...]) and give it no single tokens."
        )
    lacking = [
        what
        for what, needed, noted in (
            ("the last queries", chosen.observes, old.policy.observes),
            ("attention received", chosen.needs_sums, old.policy.needs_sums),
            ("mean queries", chosen.needs_moments, old.policy.needs_moments),
        )
        if needed > noted
    ]
    if lacking:
        raise InputError(
            f"This cache has not noted {' and '.join(lacking)}, which {chosen} needs: make it "
            "with the policy longspan.hf.fork.waiting([...])."
        )
    config = old._config()
    new = KeptLayer(
        chosen, config, layer=old.layer, layers=old.layers, packed=old.packed, turn=old.turn
    )
    new.store = copy.copy(old.store)
    new.store.buffers = {
        name: buffer.clone()
        for name, buffer in old.store.buffers.items()
        if name != "sums" or chosen.needs_sums
    }
    new.is_initialized, new.seen = True, old.seen
    new._scale, new._real = old._scale, old._real
    if chosen.observes:
        assert old._queries is not None
        assert old._query_at is not None
        new._queries = old._queries[:, :, -chosen.observes :].clone()
        new._query_at = old._query_at[:, -chosen.observes :].clone()
    if chosen.needs_moments:
        # Replaced as a whole when queries come, never changed.
        new._moments = old._moments
    if chosen.evicts:
        new.evict()
    return new
