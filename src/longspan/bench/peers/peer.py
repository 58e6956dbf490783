"""What every peer says of itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from longspan.bench.setting import Call, Setting
from longspan.pattern import Pattern


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another implementation.

    Attributes:
        name: for people.
        make: the call for a pattern; raises Refusal where it cannot compute that.
        package: what must be installed; empty if torch is enough.
        module: what is imported.
        devices: where it runs.
        trains: whether it has gradients, by device.
        border: rows at either end that it computes differently.
        how: to install it, where pip alone does not.
    """

    name: str
    make: Callable[[Pattern, Setting], Call]
    package: str = ""
    module: str = "torch"
    devices: tuple[str, ...] = ("cpu", "cuda")
    trains: tuple[str, ...] = ("cpu", "cuda")
    border: Callable[[Pattern], int] = lambda pattern: 0
    how: str = ""

    def absent(self) -> bool:
        """Whether it is not installed."""
        try:
            return importlib.util.find_spec(self.module) is None
        except ModuleNotFoundError:
            return True

    @property
    def install(self) -> str:
        """How to get it."""
        return self.how or f"pip install {self.package}"
