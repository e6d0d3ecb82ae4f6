"""Routes torch's allocations to the pool: compiles and installs the hook of a device at its first region."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from allocator import native
from allocator.errors import HookBuildError, HookError

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


def install(device: str) -> None:
    """Makes sure that torch's allocations on the device come to the pool.

    Raises:
        HookBuildError: the hook could not be compiled.
        HookError: torch would pass the pool by.
    """
    if device != "cpu":
        raise HookError(f"no torch hook for device {device!r} in this build")
    hook = _install_cpu_hook() if _cpu_hook is None else _cpu_hook
    if not hook.sleep_pool_torch_active():
        raise HookError(
            "another CPU allocator was registered with torch after the pool's: regions would catch nothing. "
            "Open the first region after it, or do without it."
        )


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
