"""A plan in words: what ``print(plan)`` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longspan.planning.passes import Pass
    from longspan.planning.plan import Plan


def explain_plan(plan: Plan, head_dim: int = 128, block: int = 128) -> str:
    """Describe passes, density, useful pairs, operations, bytes and tiles of a plan."""
    # More queries than keys have places of their own, of which a plan knows nothing.
    first = plan.keys - plan.n + 1
    causal_pairs = plan.heads * plan.n * (first + plan.keys) // 2 if first > 0 else 0
    tiles = plan.tiles(block)
    used = plan.pairs / (tiles * block * block) if tiles else 0.0
    lines = [
        f"plan of {plan.pattern}",
        f"  {plan.n:,} queries x {plan.keys:,} keys, {plan.heads} heads"
        + (f", {plan.batch} different batch rows (figures per row)" if plan.batch > 1 else ""),
        f"  pairs    {plan.pairs:,}: {plan.density:.3%} of all"
        + (f", {plan.pairs / causal_pairs:.3%} of causal" if causal_pairs else ""),
        f"           {plan.pairs / (plan.heads * plan.n):,.1f} keys per query and head",
        f"  work     {_unit(plan.flops(head_dim))}FLOP forward, "
        f"{_unit(plan.flops(head_dim, backward=True))}FLOP with backward (head width {head_dim})",
        f"  traffic  {_unit(plan.bytes(head_dim), 1024)}B at least, 2 bytes per number",
        f"  tiles    {tiles:,} of {block} x {block}, {used:.1%} of their area useful",
        f"  memory   {_unit(plan.nbytes, 1024)}B of ranges",
    ]
    for index, part in enumerate(plan.passes):
        _, classes, _, width = part.lo.shape
        lines.append(
            f"  pass {index}   {_order(part, plan.n)}; ranges per query: {width}, "
            f"classes of heads: {classes}, pairs: {part.pairs:,}"
        )
    return "\n".join(lines)


def _order(part: Pass, n: int) -> str:
    words = "keys " + ", then ".join(_keys(step) for step in part.steps)
    if part.query_order is None:
        return words
    taken = part.query_order.shape[2]
    return words + (", queries too" if taken == n else f", {taken:,} of the queries")


def _keys(step: int) -> str:
    if step == 1:
        return "in their own order"
    return f"by remainder mod {step}" if step else "that are listed"


def _unit(value: float, step: int = 1000) -> str:
    """A number with its prefix: ``12.3 G``; binary prefixes for a step of 1024."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"] if step == 1000 else ["", "Ki", "Mi", "Gi", "Ti"]
    size = float(value)
    for prefix in prefixes[:-1]:
        if size < step:
            return f"{size:.3g} {prefix}"
        size /= step
    return f"{size:.3g} {prefixes[-1]}"
