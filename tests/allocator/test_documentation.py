"""The examples of docs/sleep_mode.md run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

from allocator import native

_ROOT = Path(__file__).parents[2]


def _example(language: str) -> str:
    text = (_ROOT / "docs" / "sleep_mode.md").read_text()
    found = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found.group(1)


def test_c(tmp_path: Path) -> None:
    source, program, library = tmp_path / "example.c", tmp_path / "example", native.library_path()
    source.write_text(_example("c"))
    command = ["cc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-I", str(_ROOT / "allocator" / "csrc"), str(source)]
    subprocess.run([*command, str(library), f"-Wl,-rpath,{library.parent}", "-o", str(program)], check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "still here\n"), result.stderr


def test_python() -> None:
    program = _example("python").replace("npu:0", "cpu")
    result = subprocess.run([sys.executable, "-c", program], cwd=_ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
