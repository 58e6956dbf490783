"""Who may be timed: what is there, can do it, and equals the oracle in output and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longspan.bench import oracle
from longspan.bench.peers import Peer
from longspan.bench.setting import Call, Setting
from longspan.errors import Refusal
from longspan.pattern import Pattern
from longspan.planning import Plan, plan

# Rows of the check against the whole oracle; longer ones are checked on a few rows besides.
CHECKED_ROWS = 1024
# Pairs of rows, over all heads, that the whole oracle is asked for at most where a peer's borders
# are long: 6 GiB on a CPU, in float64.
CHECKED_PAIRS = 1 << 27


def admit(
    peer: Peer,
    pattern: Pattern,
    laid: Plan,
    setting: Setting,
    way: str,
    calls: dict[str, Call],
) -> dict[str, Any]:
    """Let a peer take part if it is there, can do it, and does it right; else say why not."""
    if setting.device not in peer.devices:
        return {"refused": f"does not run on {setting.device}"}
    if peer.absent():
        return {"absent": f"not installed: {peer.install}"}
    if way != "forward" and setting.device not in peer.trains:
        return {"refused": f"has no backward on {setting.device}"}
    try:
        call = peer.make(pattern, setting)
        border = peer.border(pattern)
        row = check(lambda own: peer.make(pattern, own), call, pattern, laid, setting, way, border)
    except Refusal as refusal:
        return {"refused": str(refusal)}
    # What another library raises is told and does not stop the run.
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:300]}
    if not row["wrong"]:
        calls[peer.name] = call
    return row


def check(
    at: Callable[[Setting], Call],
    call: Call,
    pattern: Pattern,
    laid: Plan,
    setting: Setting,
    way: str,
    border: int,
) -> dict[str, Any]:
    """Errors against the oracle at a short length, and of some rows at full length.

    Raises:
        Refusal: if nothing would be compared, or the oracle would take too much memory.
    """
    dtype = getattr(torch, setting.dtype)
    short, own = laid, _short(setting, border)
    if own != setting:
        short = plan(pattern, own.n, own.heads)
    found: dict[str, float] = {}
    try:
        short_call = call if own == setting else at(own)
        found = _errors(short_call, short, own, way, border)
    except Refusal:
        # Some libraries need whole blocks, which the short length is not.
        if own.n == setting.n:
            raise
    if own != setting:
        n = setting.n
        rows = [row for row in (0, n // 3, n // 2 + 1, n - 1) if border <= row < n - border]
        with torch.no_grad():
            inputs = setting.tensors()
            found["rows"] = oracle.row_error(laid, inputs, call(*inputs), rows)
    return {"errors": found, "wrong": oracle.wrong(found, dtype)}


def _short(setting: Setting, border: int) -> Setting:
    """What is checked against the whole oracle: half of its rows are no border's, if it has them.

    Where borders are long it has fewer key heads, of as many query heads each.
    """
    n = min(setting.n, max(CHECKED_ROWS, 4 * border))
    if n <= 2 * border:
        raise Refusal(
            f"{border} rows at either end are computed differently, which are all of {n}: "
            f"give at least {4 * border} rows"
        )
    group, key_heads = setting.heads // setting.key_heads, setting.key_heads
    while border and key_heads % 4 == 0 and group * key_heads * n * n > CHECKED_PAIRS:
        key_heads //= 2
    if border and group * key_heads * n * n > CHECKED_PAIRS:
        raise Refusal(
            f"{border} rows at either end are computed differently: checking {n} rows of "
            f"{group * key_heads} heads takes too much memory; give a smaller pattern"
        )
    return replace(setting, n=n, heads=group * key_heads, key_heads=key_heads)


def _errors(call: Call, laid: Plan, setting: Setting, way: str, border: int) -> dict[str, float]:
    inner = slice(border, setting.n - border)
    theirs = oracle.reference(laid, setting.scale)

    def inside(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return pair[0][:, :, inner], pair[1][:, :, inner]

    if way == "forward":
        with torch.no_grad():
            inputs = setting.tensors()
            exact = inside(theirs(*(x.double() for x in inputs)))[0]
            return {"out": oracle.relative(call(*inputs)[:, :, inner], exact)}
    ours = oracle.beside(call, theirs)
    found = oracle.errors(
        lambda *x: inside(ours(*x)),
        lambda *x: inside(theirs(*x)),
        setting.tensors(),
        use_lse=False,
    )
    del found["lse"]
    return found
