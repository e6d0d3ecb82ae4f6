"""Modules import downwards: entry points, trainer, workers, roles, hybrid, engines, sleep mode, what all share."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).parents[2]
LAYERS = (
    ("main_ppo", "main_sft", "main_dpo", "main_reward", "learning_from_files", "plan", "preflight"),
    ("trainer",),
    ("workers",),
    ("roles",),
    ("hybrid",),
    ("engines",),
    ("sleep_mode",),
)
HEIGHTS = {name: len(LAYERS) - depth for depth, names in enumerate(LAYERS) for name in names}
MODULES = {
    ".".join(file.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__"): file
    for package in ("allocator", "rlhf_npu")
    for file in (PROJECT / package).rglob("*.py")
}


def height(module: str) -> int:
    """How far up a module is; -1 for the allocator, which knows nothing of rlhf_npu."""
    package, _, rest = module.partition(".")
    return -1 if package == "allocator" else HEIGHTS.get(rest.partition(".")[0], 0)


def imports(module: str) -> Iterator[str]:
    """Modules of the project that `module` imports, at whatever depth."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            yield from (
                name if (name := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names
            )


def test_modules_import_downwards_only() -> None:
    up = [(module, other) for module in MODULES for other in imports(module) if height(other) > height(module)]
    assert len(MODULES) > 100
    assert not up


def test_modules_do_not_import_each_other_in_circles() -> None:
    below = {module: set(imports(module)) for module in MODULES}
    while free := {module for module, others in below.items() if not others & below.keys()}:
        below = {module: others for module, others in below.items() if module not in free}
    assert not below


def test_sleep_mode_knows_nothing_of_rl() -> None:
    used = {other for module in MODULES if module.startswith("rlhf_npu.sleep_mode.") for other in imports(module)}
    apart = {other for other in used if not other.startswith(("allocator", "rlhf_npu.sleep_mode."))}
    assert apart == {"rlhf_npu.errors", "rlhf_npu.run_id"}
