"""Sentences about candidates, made of their figures; and the lines that use one."""

from __future__ import annotations

from typing import Any

from longspan.bench.advise.asked import Advise
from longspan.bench.advise.facts import NEAR, Facts
from longspan.bench.advise.rank import SLACK, Place
from longspan.errors import InputError

# Dense attention as a pattern: causal or not.
DENSE = {True: "causal()", False: "dense()"}
RULE = (
    "Ranked by what was measured and counted here: a candidate beats another if it sees no less "
    f"in one layer and of the {NEAR} nearest keys, and sees more without being slower or is "
    f"faster (times within {SLACK:.0%} are equal). What nothing beats is front 1. Inside a front "
    "{order}. Quality on text is not measured."
)
ORDERS = {
    "sight": "come first the fewest layers until every token has reached all that it may, then "
    "the most reached, then the most of what is near, then the least time",
    "time": "comes first the least time, then the fewest layers until every token has reached all "
    "that it may",
}


def rule(prefer: str) -> str:
    """How candidates are ranked."""
    return RULE.format(order=ORDERS[prefer])


def why(place: Place, first: bool, prefer: str, timed: bool) -> str:
    """Why a candidate ranks where it does."""
    cost = "fast" if timed else "cheap"
    if place.beaten_by is not None:
        worse = "slower" if timed else "dearer"
        return f"Front {place.front}: {place.beaten_by} sees no less and is not {worse}."
    if first and prefer == "sight":
        return f"Front 1, first: nothing as {cost} sees as much, and of those it connects best."
    if first:
        return f"Front 1, first: nothing as {cost} sees as much, and of those it takes least."
    return f"Front 1: nothing as {cost} sees as much."


def cannot(known: Facts, layers: int, causal: bool) -> str:
    """What a candidate does not see."""
    what = "earlier tokens" if causal else "tokens"
    said = []
    if known.one_layer < 1:
        said.append(f"one layer hides {_share(1 - known.one_layer)} of {what}")
    if known.complete is None:
        said.append(f"{layers} layers still hide {_share(1 - known.reached)}")
    elif known.one_layer < 1:
        said.append(f"{known.complete} layers hide none")
    if known.near < 1:
        said.append(f"the average head misses {_share(1 - known.near)} of its {NEAR} nearest keys")
    if known.blind:
        said.append(f"{known.blind:,} tokens never see the one before them")
    if known.complete is None and abs(known.reached - known.one_layer) < 1e-9:
        said.append("more layers add nothing")
    if not said:
        return f"Nothing: in one layer some head sees each of the {what}."
    sentence = f"{', '.join(said)}."
    return sentence[0].upper() + sentence[1:]


def lines(text: str, n: int, drop_in: bool, asked: Advise) -> list[dict[str, str]]:
    """What to write or run to use a pattern, and to learn how good it is on text."""
    if text in DENSE.values():
        call = "torch.nn.functional.scaled_dot_product_attention"
        line = f"out = {call}(q, k, v, is_causal={asked.setting.causal})"
        return [{"what": "one call; a model is left as it is", "line": line}]
    found = [{"what": "one call", "line": f'out = ls.attend(q, k, v, "{text}")'}]
    if not asked.setting.causal:
        layer = f'ls.nn.Attention(d_model, {asked.setting.heads}, "{text}")'
        return [*found, {"what": "a layer of a model to train", "line": layer}]
    perplexity = f'longspan eval ppl MODEL --lengths {n} --pattern "{text}" --data TEXT'
    if drop_in:
        found += [
            {"what": "a pretrained model", "line": f'ls.hf.apply(model, "{text}")'},
            {"what": "its quality on text, as it is", "line": perplexity},
        ]
    tuned = f'longspan extend MODEL --length {n} --pattern "{text}" --data TEXT --out RUN'
    return [
        *found,
        {"what": "fine-tuning, measured before and after", "line": tuned},
        {
            "what": "retrieval",
            "line": f'longspan eval passkey MODEL --lengths {n} --pattern "{text}"',
        },
    ]


def note(order: list[dict[str, Any]]) -> str | None:
    """What to know where the first entry is no gain, or where there is none."""
    if not order:
        return "Nothing fits: allow more, or ask for less."
    first = order[0]
    if first["family"] == "dense":
        return "Dense attention fits, and nothing beats it: no pattern is needed here."
    taken = first["of_dense_time"]
    if taken is not None and taken * (1 + SLACK) >= 1:
        return (
            "It is no faster than dense attention here, which sees everything: use that unless "
            "it is the number of keys that counts."
        )
    return None


def unmet(known: Facts, asked: Advise) -> list[str]:
    """Needs that a candidate does not meet, before anything is timed."""
    found = []
    if asked.within is not None and (known.complete is None or known.complete > asked.within):
        count = f"{asked.within} layer" + "s" * (asked.within > 1)
        reached = "" if asked.within < asked.layers else f" ({_share(known.reached)} is reached)"
        needs = "" if known.complete is None else f"; it takes {known.complete}"
        found.append(f"some token has not reached all after {count}{reached}{needs}")
    if asked.previous and known.blind:
        found.append(f"{known.blind:,} tokens never see the one before them")
    if asked.drop_in and not known.drop_in:
        found.append("needs fine-tuning: some head misses a predecessor or the first token")
    return found


def must_see(text: str) -> dict[str, bool]:
    """``"all"``, ``"previous"`` or both with a comma, as flags of ``all`` and ``previous``.

    Raises:
        InputError: for any other word.
    """
    words = [word.strip() for word in text.split(",")]
    known = ("all", "previous")
    unknown = [word for word in words if word not in known]
    if unknown:
        raise InputError(
            f"--must-see takes {' and '.join(known)}, with a comma between them; got {text!r}"
        )
    return {word: word in words for word in known}


def over(entry: dict[str, Any], asked: Advise, n: int) -> str | None:
    """By how much an entry is over the budget; None if it is not."""
    budget = asked.budget_at(n)
    value = spent(entry, budget.kind)
    if value is None or value <= budget.amount:
        return None
    amount = f"{value:.0%}" if budget.kind == "time" else f"{value:,.4g}"
    return f"over the budget ({amount}; {budget})"


def spent(entry: dict[str, Any], kind: str) -> float | None:
    """What an entry takes, in the unit of a budget; None where it is not known."""
    found = {
        "keys": entry["keys"],
        "time": entry["of_dense_time"],
        "memory": entry["memory_bytes"] and entry["memory_bytes"] / 2**20,
        "cache": entry["cache_bytes"] and entry["cache_bytes"] / 2**20,
    }
    return found[kind]


def _share(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 or not share else "less than 0.1%"
