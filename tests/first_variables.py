"""The first function of a forked process: what it is to call is read, and imported, once its variables are set."""

from __future__ import annotations

import os
import pickle
from typing import Any


def call_with(environment: dict[str, str], function: bytes, *args: Any) -> None:
    """Call a function that lies pickled in `function` where `environment` holds."""
    os.environ |= environment
    pickle.loads(function)(*args)
