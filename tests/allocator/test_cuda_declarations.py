"""The pool's own declarations of CUDA's driver agree with CUDA's header, where there is one."""

import os
from pathlib import Path

import pytest

from tests.allocator.declarations import compile_against, compile_changed

_CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))

pytestmark = pytest.mark.skipif(
    not (_CUDA / "include" / "cuda.h").is_file(), reason=f"{_CUDA} has no CUDA header; CUDA_HOME names another folder"
)


def test_they_agree() -> None:
    result = compile_against(_CUDA / "include", "cuda_declarations.cpp")
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
    headers = _CUDA / "include"
    result = compile_changed(tmp_path, headers, "cuda_declarations.cpp", "cuda_api.h", right, wrong)
    assert result.returncode != 0
    assert named in result.stderr
