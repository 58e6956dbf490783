"""The unit of text that the data layer passes around."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text and the name it is reported under."""

    name: str
    text: str
