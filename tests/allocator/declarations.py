"""Compiles the pool's declarations of a vendor's functions against the vendor's own header."""

import subprocess
from pathlib import Path

_SOURCES = Path(__file__).parent / "csrc"
CORE = Path(__file__).parents[2] / "allocator" / "csrc"


def compile_against(headers: Path, source: str, core: Path = CORE) -> subprocess.CompletedProcess[str]:
    """Checks `source` with the vendor's `headers` and the declarations in the folder `core`."""
    command = ["c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-I", str(core)]
    command += ["-isystem", str(headers), str(_SOURCES / source)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def compile_changed(
    folder: Path, headers: Path, source: str, api: str, right: str, wrong: str
) -> subprocess.CompletedProcess[str]:
    """The same with one declaration of the file `api` changed, in a copy in `folder`."""
    text = (CORE / api).read_text()
    assert right in text
    (folder / api).write_text(text.replace(right, wrong))
    return compile_against(headers, source, folder)
