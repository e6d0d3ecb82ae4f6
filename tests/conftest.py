"""The order of all tests, and what they find around them."""

from __future__ import annotations

import signal

import pytest


def pytest_configure() -> None:
    """Ctrl-C reaches the tests' processes even if a shell that runs them in the background had it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first: of two processes that share out the files neither ends much before the other."""
    items.sort(key=lambda item: "trainer" not in item.path.parts)
