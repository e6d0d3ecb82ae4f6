"""The order of all tests."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first: of two processes that share out the files neither ends much before the other."""
    items.sort(key=lambda item: "trainer" not in item.path.parts)
