"""The compiled part: CPU kernels for torch's operators."""
import importlib.machinery
import importlib.util
import os
from pathlib import Path


def _load():
    path = Path(os.environ["ASCEND_HOME_PATH"]) / "lib64" / "torch_operators.so"
    loader = importlib.machinery.ExtensionFileLoader("torch_operators", str(path))
    spec = importlib.util.spec_from_file_location("torch_operators", path, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


cpu_fallback = _load()
