"""The CPU hook: compiled once whoever asks, with clear errors, and a c10 allocator in all its ways."""

import multiprocessing
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from allocator import HookBuildError, SleepPool, torch_hooks
from tests.allocator.conftest import cpu_only

pytestmark = cpu_only("about the CPU's hook and the core, which do not depend on the device")

_SOURCES = Path(__file__).parent / "csrc"
_CORE = Path(torch_hooks.__file__).parent / "csrc"


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return tmp_path / "extensions" / "sleep_pool"


def _script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_processes_that_start_together_compile_once(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = _script(tmp_path / "compiler", f'#!/bin/sh\necho run >> {tmp_path}/log\nexec c++ "$@"\n')
    monkeypatch.setenv("CXX", compiler)
    processes = [multiprocessing.get_context("fork").Process(target=torch_hooks.build_cpu_hook) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "log").read_text() == "run\n"
    assert len(list(empty_cache.glob("*.so"))) == 1
    assert sorted(path.suffix for path in empty_cache.iterdir()) == [".lock", ".so"]


def test_no_compiler_says_what_to_install(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(empty_cache))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(HookBuildError, match=r"install g\+\+"):
        torch_hooks.build_cpu_hook()
    monkeypatch.setenv("CXX", "no-such-compiler -x")
    with pytest.raises(HookBuildError, match="CXX names 'no-such-compiler'"):
        torch_hooks.build_cpu_hook()


def test_a_compiler_that_fails_is_quoted(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", _script(tmp_path / "compiler", "#!/bin/sh\necho broken pipe dream >&2\nexit 1\n"))
    with pytest.raises(HookBuildError, match="broken pipe dream"):
        torch_hooks.build_cpu_hook()
    assert not list(empty_cache.glob("*.so"))


def test_a_folder_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/proc/extensions")
    with pytest.raises(HookBuildError, match=r"/proc/extensions.*TORCH_EXTENSIONS_DIR"):
        torch_hooks.build_cpu_hook()


@pytest.fixture(scope="module")
def c10_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calls of c10's allocator interface that Python has no way to make."""
    built = tmp_path_factory.mktemp("c10") / "c10_calls.so"
    torch_folder = Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    command = ["c++", "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", abi]
    command += ["-isystem", str(torch_folder / "include"), str(_SOURCES / "c10_calls.cpp")]
    command += ["-L", str(torch_folder / "lib"), "-lc10", "-o", str(built)]
    subprocess.run(command, check=True)
    return built


def test_raw_allocations_and_clones_find_their_owner(run_python: Callable, c10_program: Path) -> None:
    program = f"""
import ctypes, torch
from allocator import HookError, SleepPool
calls = ctypes.CDLL({str(c10_program)!r})
pool = SleepPool.get("cpu")
def live():
    return pool.stats()["weights"].live
with pool.region("weights"):
    calls.raw_allocate_two()
    print(live())
    calls.raw_allocate_one_more()
    print(live())
    print(calls.clone_keeps_bytes(), live())
calls.raw_deallocate_all()
print(live())
calls.raw_allocate_two()  # outside: torch's own
with pool.region("weights"):
    calls.raw_deallocate_all()
    print(calls.clone_keeps_bytes(), live())
calls.register_over_it()
try:
    with pool.region("weights"):
        pass
except HookError as error:
    print(error)
"""
    result = run_python(program)
    lines = result.stdout.splitlines()
    assert lines[:5] == ["2000", "3000", "1 3000", "0", "1 0"], result.stderr
    assert lines[5].startswith("another CPU allocator was registered")
    assert (len(lines), result.returncode) == (6, 0)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_the_core_is_clean_under_sanitizers(tmp_path: Path, sanitizer: str) -> None:
    unity = tmp_path / "unity.cpp"
    sources = [path for path in sorted(_CORE.glob("*.cpp")) if path.name != "torch_cpu.cpp"]
    unity.write_text("".join(f'#include "{path}"\n' for path in [*sources, _SOURCES / "stress.cpp"]))
    program = tmp_path / "stress"
    command = ["c++", "-std=c++17", "-O0", "-g1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    command += ["-pthread", "-I", str(_CORE), str(unity), "-o", str(program)]
    subprocess.run(command, check=True)
    result = subprocess.run([program, "2"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("clean: ")


def test_what_is_outside_regions_is_untouched(pool: SleepPool) -> None:
    with pool.region("weights"):
        pass
    before = pool.driver_calls()
    for size in (10, 1000, 1 << 20):
        assert float(torch.ones(size).sum()) == size
    assert pool.driver_calls() == before
