"""The compiled part, torch_operators.so of the simulated CANN: CPU kernels for torch's operators."""

from __future__ import annotations

import os
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

_NAME = "torch_operators"


def file() -> Path | None:
    """Where the simulated CANN that this process uses has it; None: the process uses none."""
    home = os.environ.get("ASCEND_HOME_PATH")
    path = Path(home, "lib64", f"{_NAME}.so") if home else None
    return path if path and path.is_file() else None


def load() -> ModuleType:
    """Loads it, once a process. torch and torch_npu must be imported."""
    if _NAME not in sys.modules:
        loader = ExtensionFileLoader(_NAME, str(file()))
        spec = spec_from_loader(_NAME, loader)
        assert spec is not None
        module = module_from_spec(spec)
        loader.exec_module(module)
        sys.modules[_NAME] = module
    return sys.modules[_NAME]
