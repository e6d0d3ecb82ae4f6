"""Python's search for garbage while the engines are imported and built: a million objects are made, which stay."""

from __future__ import annotations

import gc

USUAL = gc.get_threshold()
SELDOM = (100_000, 50, 100)


def search_seldom() -> None:
    """Search once for a hundred thousand new objects: going through all that is imported takes a fifth of a start."""
    gc.set_threshold(*SELDOM)


def search_as_usual() -> None:
    """End that."""
    gc.set_threshold(*USUAL)
