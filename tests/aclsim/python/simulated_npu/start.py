"""Imported by a .pth file at the start of each Python process of the simulated stack, Ray's workers too: as soon as
torch_npu is imported, torch's operators on it are those of the simulation."""

from __future__ import annotations

import gc
import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# After a module was imported, which modules' install() is called.
AFTER = {
    "torch_npu": ("simulated_npu.torch_operators",),
    "vllm_ascend.worker.worker": ("simulated_npu.npu_operators", "simulated_npu.triton_kernels"),
}


def _refuse_without_cann() -> None:
    from simulated_npu.library import file

    if file() is None:
        raise ImportError(
            f"torch_npu runs on a simulated CANN here, and ASCEND_HOME_PATH does not name one: "
            f"source {sys.prefix}/cann/set_env.sh"
        )


class _Loader:
    """The loader of a module in AFTER."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader
        _refuse_without_cann()
        self._loader.exec_module(module)
        for name in AFTER[module.__name__]:
            importlib.import_module(name).install()


class Finder:
    """Finds the modules in AFTER where Python itself does."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in AFTER:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


# Importing the stack makes a million objects that stay; to go through them again and again was a fifth of each start.
gc.set_threshold(100_000, 50, 100)
if not any(getattr(finder, "__module__", None) == __name__ for finder in sys.meta_path):
    sys.meta_path.insert(0, Finder)
