"""What tests of a cache with a policy share: policies, feeding, and an oracle of kept sets."""

from __future__ import annotations

import copy

import torch

import longspan as ls
from longspan.hf._cache_layer import KeptLayer
from longspan.hf.routes import routed

PAD = 5
POLICIES = [
    "sinks(2) + recent(4) + heavy(5)",
    "every(3, sinks(1) + recent(3) + heavy(coverage(0.7), true))",
    "sinks(1) + recent(2) + tova(6)",
    "sinks(2) + recent(0) + snapkv(6, 4, 3)",
    "each_step(sinks(2) + snapkv(6, 3) + recent(3))",
    "sinks(1) + recent(2) + pyramidkv(6, 3, 3, max)",
    "sinks(1) + recent(2) + adakv(snapkv(6, 4, 3, max), 0.3)",
    "recent(3) + keydiff(6)",
    "recent(0.3) + sinks(0) + keynorm(0.2)",
    "sinks(2) + recent(4) + expected_attention(6)",
    "sinks(1) + recent(3) + embeddingnorm(6)",
    "recent(7)",
    "duo([[0.1, 0.9], [0.8, 0.2]], sinks=2, recent=5)",
    "sinks(2) + recent(4) + heavy(5) + keydiff(2)",
]


def padded(tiny, n, pad=PAD):
    """Token ids and mask [2, n]; the second row begins with padding."""
    ids, mask = tiny.tokens(2, n), torch.ones(2, n, dtype=torch.int64)
    ids[1, :pad], mask[1, :pad] = 0, 0
    return ids, mask


def feed(model, ids, mask, cuts, cache):
    """Logits of the tokens fed in pieces [0:cuts[0]], [cuts[0]:cuts[1]], ... through a cache."""
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits, begin = [], 0
    with torch.no_grad():
        for end in cuts:
            out = model(
                ids[:, begin:end],
                attention_mask=mask[:, :end],
                position_ids=places[:, begin:end],
                past_key_values=cache,
            )
            logits.append(out.logits)
            begin = end
    return torch.cat(logits, 1)


class Watch:
    """Notes which positions each layer of a cache holds when its queries look: the kept sets."""

    def __init__(self, monkeypatch):
        self.seen = {}
        attend = KeptLayer.attend

        def watched(layer, query, *rest):
            held = None if layer.store is None else layer.positions.cpu()
            self.seen.setdefault(layer.held.role.layer, []).append((query.shape[2], held))
            return attend(layer, query, *rest)

        monkeypatch.setattr(KeptLayer, "attend", watched)

    def mask(self, layer, heads, n, pads):
        """bool [B, H, n, n]: what the queries of a layer could see, in columns of the batch."""
        batch = len(pads)
        seen = torch.zeros(batch, heads, n, n, dtype=torch.bool)
        begin = 0
        for count, held in self.seen[layer]:
            new = torch.ones(count, count, dtype=torch.bool).tril()
            seen[:, :, begin : begin + count, begin : begin + count] = new
            if held is not None:
                share = heads // held.shape[1]
                for b in range(batch):
                    for h in range(heads):
                        own = held[b, h // share]
                        columns = own[own >= 0] + pads[b]
                        seen[b, h, begin : begin + count, columns] = True
            begin += count
        for b, pad in enumerate(pads):
            seen[b, :, :, :pad] = False
        # Rows of padding see themselves, as a softmax needs something.
        return seen | torch.eye(n, dtype=torch.bool)


def oracle(tiny, model, watch, ids, mask, pads):
    """Logits of one eager pass, every layer masked by what the cache held."""
    eager = copy.deepcopy(model)
    ls.hf.remove(eager)
    eager.set_attn_implementation("eager")
    n, kept = ids.shape[1], 0
    for layer, (_, module) in enumerate(routed(eager)):
        own = torch.from_numpy(tiny.own(model, layer).mask(n))
        if type(model.model.layers[layer].self_attn).__name__.startswith("Gemma") and (
            model.config.layer_types[layer] == "sliding_attention"
        ):
            seen = own[None].expand(2, 4, n, n).clone()
            for b, pad in enumerate(pads):
                seen[b, :, :, :pad] = False
            seen = seen | torch.eye(n, dtype=torch.bool)
        else:
            seen = watch.mask(kept, 4, n, pads)
            kept += 1
        bias = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)

        def hook(_, args, kwargs, bias=bias):
            return args, {**kwargs, "attention_mask": bias}

        module.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        return eager(ids, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False).logits
