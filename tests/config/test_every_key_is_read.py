"""No key that nothing reads.

Every leaf is given another name in a copy of the package; mypy then reports each place that reads the old
one, with the class it belongs to. A leaf that nobody misses is read by nothing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import rlhf_npu
from rlhf_npu.config.schema import SCHEMAS

LEAVES = [leaf for schema in SCHEMAS.values() for leaf in schema.leaves.values()]
PACKAGE = Path(rlhf_npu.__file__).parent
PROJECT = PACKAGE.parent
READ = re.compile(
    r'^(?P<file>[^:]+):\d+: error: (Item )?"(?P<owner>\w+)"( of "[^"]+")? has no attribute "(?P<name>\w+)"'
)


def rename_leaves(package: Path) -> None:
    modules = {leaf.owner.__module__.rsplit(".", 1)[-1] for leaf in LEAVES}
    for module in modules:
        file = package / "config" / f"{module}.py"
        names = {leaf.name for leaf in LEAVES if leaf.owner.__module__.endswith(f".{module}")}
        declaration = re.compile(rf"^    ({'|'.join(names)})(?=: .*= key\()", re.MULTILINE)
        file.write_text(declaration.sub(r"    renamed_\1", file.read_text()))


def reads_reported_by_mypy(folder: Path) -> Iterator[tuple[str, str]]:
    """(class, name) of each read outside the configuration itself, which only declares and checks."""
    command = [sys.executable, "-m", "mypy", "--config-file", str(PROJECT / "pyproject.toml")]
    options = [
        "--cache-dir",
        str(folder / "cache"),
        "--show-absolute-path",
        "--no-error-summary",
        "--no-pretty",
    ]
    result = subprocess.run([*command, *options, "rlhf_npu"], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stdout + result.stderr
    for match in filter(None, map(READ.match, result.stdout.splitlines())):
        if Path(match["file"]).parent.name != "config":
            yield match["owner"], match["name"]


def test_every_key_is_read_by_the_code(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "rlhf_npu", ignore=shutil.ignore_patterns("__pycache__"))
    rename_leaves(tmp_path / "rlhf_npu")
    read = set(reads_reported_by_mypy(tmp_path))
    unread = [leaf.key for leaf in LEAVES if not {(owner.__name__, leaf.name) for owner in leaf.owner.__mro__} & read]
    assert not unread, "nothing reads " + ", ".join(unread)
