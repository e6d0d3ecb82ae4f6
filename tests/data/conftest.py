from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_npu.data.builtin import resolve


@pytest.fixture(scope="session")
def digits_folder() -> Path:
    """The prepared digit-sequence task; the cache folder keeps it from one test session to the next."""
    return Path(resolve("builtin:digits/model")).parent
