"""The pool's own declarations of CUDA's driver agree with CUDA's header, where there is one."""

import os
import subprocess
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_API = _ROOT / "allocator" / "csrc" / "cuda_api.h"
_CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))

pytestmark = pytest.mark.skipif(
    not (_CUDA / "include" / "cuda.h").is_file(), reason=f"{_CUDA} has no CUDA header; CUDA_HOME names another folder"
)


def _compile(folder: Path) -> subprocess.CompletedProcess[str]:
    sources = Path(__file__).parent / "csrc"
    command = ["c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-I", str(folder)]
    command += ["-isystem", str(_CUDA / "include"), str(sources / "cuda_declarations.cpp")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_they_agree() -> None:
    result = _compile(_API.parent)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("right", "wrong", "named"),
    [
        ("(void* memory, std::size_t bytes, unsigned flags)", "(void* memory, unsigned bytes)", "cuMemHostRegister"),
        ("(Address address, std::size_t bytes))", "(Address address))", "cuMemUnmap"),
        ("kReadWrite = 3", "kReadWrite = 1", "kReadWrite"),
        ('"cuMemGetInfo_v2"', '"cuMemGetInfo"', "cuMemGetInfo"),
        ("void* win32;", "int win32;", "PhysicalProperties"),
    ],
)
def test_a_wrong_one_does_not_compile(tmp_path: Path, right: str, wrong: str, named: str) -> None:
    text = _API.read_text()
    assert right in text
    (tmp_path / "cuda_api.h").write_text(text.replace(right, wrong))
    result = _compile(tmp_path)
    assert result.returncode != 0
    assert named in result.stderr
