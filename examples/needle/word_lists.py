"""Lists of words as text."""

from __future__ import annotations


def listed(text: str) -> list[str]:
    """The parts of ``text`` between semicolons, over as many lines as there are."""
    return [part.strip() for part in text.split(";")]
