"""The pool's own declarations of AscendCL agree with the headers in the torch_npu wheel."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_API = _ROOT / "allocator" / "csrc" / "acl_api.h"


def _compile(folder: Path) -> subprocess.CompletedProcess[str]:
    found = importlib.util.find_spec("torch_npu")
    assert found is not None
    assert found.submodule_search_locations is not None
    headers = Path(found.submodule_search_locations[0]) / "include" / "third_party" / "acl" / "inc"
    source = _ROOT / "tests" / "allocator" / "csrc" / "acl_declarations.cpp"
    command = ["c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-I", str(folder)]
    return subprocess.run(
        [*command, "-isystem", str(headers), str(source)], capture_output=True, text=True, check=False
    )


def test_they_agree() -> None:
    result = _compile(_API.parent)
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
def test_a_wrong_one_does_not_compile(tmp_path: Path, right: str, wrong: str, named: str) -> None:
    text = _API.read_text()
    assert right in text
    (tmp_path / "acl_api.h").write_text(text.replace(right, wrong))
    result = _compile(tmp_path)
    assert result.returncode != 0
    assert named in result.stderr
