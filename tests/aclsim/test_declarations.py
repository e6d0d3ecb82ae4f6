"""The pool's own declarations of AscendCL agree with the headers in the torch_npu wheel."""

import importlib.util
from pathlib import Path

import pytest

from tests.allocator.declarations import compile_against, compile_changed


@pytest.fixture
def headers() -> Path:
    found = importlib.util.find_spec("torch_npu")
    assert found is not None
    assert found.submodule_search_locations is not None
    return Path(found.submodule_search_locations[0]) / "include" / "third_party" / "acl" / "inc"


def test_they_agree(headers: Path) -> None:
    result = compile_against(headers, "acl_declarations.cpp")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("right", "wrong", "named"),
    [
        ("(void** memory, std::size_t bytes)", "(void** memory, std::uint32_t bytes)", "aclrtMallocHost"),
        ("std::size_t offset, PhysicalHandle handle", "PhysicalHandle handle, std::size_t offset", "aclrtMapMem"),
        ("kHbmHugePages = 4", "kHbmHugePages = 5", "kHbmHugePages"),
        ("std::uint64_t reserved;", "std::uint32_t reserved[4];", "PhysicalProperties"),
    ],
)
def test_a_wrong_one_does_not_compile(tmp_path: Path, headers: Path, right: str, wrong: str, named: str) -> None:
    result = compile_changed(tmp_path, headers, "acl_declarations.cpp", "acl_api.h", right, wrong)
    assert result.returncode != 0
    assert named in result.stderr
