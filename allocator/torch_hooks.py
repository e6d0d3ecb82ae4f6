"""Routes torch's allocations to the pool: the hook of a device, made at its first region.

The CPU's is here, compiled for the installed torch; an accelerator's is in torch_mem_pool.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from allocator import native
from allocator.errors import HookBuildError, HookError
from allocator.torch_mem_pool import LiveRange, MemPoolHook

_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
# In the order of PoolFunctions in torch_cpu.cpp.
_POOL_FUNCTIONS = (
    "sleep_pool_region_open",
    "sleep_pool_malloc",
    "sleep_pool_free",
    "sleep_pool_owns_host",
    "sleep_pool_last_error",
)

_lock = threading.Lock()
_cpu_hook: ctypes.PyDLL | None = None


class Hook(Protocol):
    """What a pool asks of torch."""

    def check(self) -> None:
        """Raises HookError when torch would pass the pool by."""

    def enter(self, tag: str) -> Any:
        """Begins to route this thread's allocations; the pool has opened the tag's region already."""

    def leave(self, route: Any) -> None:
        """Ends what :meth:`enter` began, by what it returned."""

    def settle(self) -> None:
        """Before a sleep: finishes queued work and returns freed memory to the pool."""

    def resume(self, sleeping_tags: Callable[[], Collection[str]]) -> None:
        """After a sleep or a wake-up: this thread's open regions of tags that are awake go on."""

    def live_ranges(self) -> Sequence[LiveRange] | None:
        """Where tensors live; None when the pool's own allocations say it."""


class CpuHook:
    """Each CPU tensor made in a region is an allocation of the pool's.

    Raises:
        HookBuildError: the hook could not be compiled.
        HookError: torch's present allocator cannot be stood in front of.
    """

    def __init__(self) -> None:
        self._hook = _install_cpu_hook() if _cpu_hook is None else _cpu_hook

    def check(self) -> None:
        if not self._hook.sleep_pool_torch_active():
            raise HookError(
                "another CPU allocator was registered with torch after the pool's: regions would catch nothing. "
                "Open the first region after it, or do without it."
            )

    def enter(self, tag: str) -> None:
        """The pool's own region is all there is to it."""

    def leave(self, route: None) -> None:
        """Nothing to end."""

    def settle(self) -> None:
        """A CPU tensor is returned when it is freed."""

    def resume(self, sleeping_tags: Callable[[], Collection[str]]) -> None:
        """A tensor of a tag that sleeps is refused by the pool itself."""

    def live_ranges(self) -> None:
        """The pool's own allocations are the tensors."""


def make_hook(kind: str, index: int) -> Hook:
    """The route from torch's allocations on a device to the pool.

    Raises:
        HookBuildError: the CPU hook could not be compiled.
        HookError: torch cannot be routed here.
    """
    return CpuHook() if kind == "cpu" else MemPoolHook(kind, index)


def build_cpu_hook() -> Path:
    """Compiles the CPU hook for the installed torch, unless it was before; says where it lies.

    It is kept in torch's folder of extensions (TORCH_EXTENSIONS_DIR, else ~/.cache/torch_extensions). Any
    number of processes may ask at once: one compiles.

    Raises:
        HookBuildError: no compiler (CXX names one), it failed, or the folder cannot be written.
    """
    import torch

    sources = [_SOURCES / "torch_cpu.cpp", _SOURCES / "capi.h"]
    command = [*_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    digest = hashlib.sha256(" ".join(command).encode())
    for source in sources:
        digest.update(source.read_bytes())
    version = f"{torch.__version__}-{torch.version.git_version}"
    built = _cache_folder() / f"torch_cpu-{version}-{digest.hexdigest()[:16]}.so"
    if not built.is_file():
        _build_once(command, Path(torch.__file__).parent, built)
    return built


def _cache_folder() -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(root) / "sleep_pool"


def _build_once(flags: list[str], torch_folder: Path, built: Path) -> None:
    try:
        with _locked(built.with_suffix(".lock")):
            if not built.is_file():
                _compile(flags, torch_folder, built)
    except OSError as error:
        raise HookBuildError(
            f"the CPU hook cannot be written to {built.parent}: {error}; "
            "set TORCH_EXTENSIONS_DIR to a folder that can be written"
        ) from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(flags: list[str], torch_folder: Path, built: Path) -> None:
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        output = Path(folder) / built.name
        command = [
            *_compiler(),
            *flags,
            *("-isystem", str(torch_folder / "include")),
            str(_SOURCES / "torch_cpu.cpp"),
            *("-L", str(torch_folder / "lib"), "-lc10"),
            *("-o", str(output)),
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise HookBuildError(f"compiling the CPU hook failed: {' '.join(command)}\n{result.stderr[-4000:]}")
        output.replace(built)


def _compiler() -> list[str]:
    if named := os.environ.get("CXX", "").split():
        if shutil.which(named[0]):
            return named
        raise HookBuildError(f"CXX names {named[0]!r}, which is not there: name a C++17 compiler or unset it")
    for candidate in ("c++", "g++", "clang++"):
        if shutil.which(candidate):
            return [candidate]
    raise HookBuildError("no C++ compiler for the CPU hook: install g++ (Debian: apt-get install g++) or set CXX")


def _install_cpu_hook() -> ctypes.PyDLL:
    global _cpu_hook
    with _lock:
        if _cpu_hook is None:
            # PyDLL keeps the GIL, so that no other Python thread allocates while the allocator is replaced.
            hook = ctypes.PyDLL(str(build_cpu_hook()))
            _register(hook)
            _cpu_hook = hook
        return _cpu_hook


def _register(hook: ctypes.PyDLL) -> None:
    library = native.library()
    addresses = [ctypes.cast(library[name], ctypes.c_void_p) for name in _POOL_FUNCTIONS]
    outcome = hook.sleep_pool_torch_install((ctypes.c_void_p * len(addresses))(*addresses))
    if outcome == 1:
        raise HookError("torch's present CPU allocator has no raw deleter, so the pool cannot stand in front of it")
    if outcome != 0:
        raise HookError("a CPU allocator of higher priority is registered with torch: regions would catch nothing")
