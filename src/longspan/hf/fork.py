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
    layers = [
        layer.fork(chosen) if isinstance(layer, KeptLayer) else copy.deepcopy(layer)
        for layer in cache.layers
    ]
    return KVCache(layers, chosen)
