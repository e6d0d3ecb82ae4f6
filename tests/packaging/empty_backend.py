"""A build backend whose package holds nothing: it stands for the project's own build in test_scripts."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

NAME = "nothing-0.0-py3-none-any.whl"


def build_editable(wheel_directory: str, *_settings: Any, **_options: Any) -> str:
    with zipfile.ZipFile(Path(wheel_directory) / NAME, "w") as wheel:
        info = "nothing-0.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: nothing\nVersion: 0.0\n")
        tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{info}/WHEEL", tag)
        wheel.writestr(f"{info}/RECORD", "")
    return NAME
