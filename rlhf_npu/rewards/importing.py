"""Imports a file of a user's, with the modules beside it, without getting in the way of installed packages.

Python puts a script's folder first on its path, where a `torch.py` would take torch's place in this process. Here the
folder comes last. A module beside the file that has the name of an installed package would then not be found, so a
file that imports such a name is refused.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType


class ImportRefusedError(ImportError):
    """The file would be imported as something else than its author meant; says why."""


def import_file(path: Path) -> ModuleType:
    """The module in `path`; its folder stays importable, so that functions may import from it when they are called.

    A file with relative imports is imported as part of its package, which is the topmost folder with an
    `__init__.py`.

    Raises:
        ImportRefusedError: a name it imports means two things, or it imports relatively outside a package.
        SyntaxError: it is no Python.
    """
    tree = ast.parse(path.read_bytes(), filename=str(path))
    _refuse_ambiguous_imports(path, tree)
    _append_to_path(path.parent)
    if any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree)):
        return _import_from_package(path)
    return _import_alone(path)


def _import_alone(path: Path) -> ModuleType:
    # The file's own classes must be found again by name when they are pickled.
    name = f"rlhf_npu_reward_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_from_package(path: Path) -> ModuleType:
    root = path.parent
    if not (root / "__init__.py").is_file():
        raise ImportRefusedError(
            f"it has relative imports, but its folder is no package; write `import name` instead of "
            f"`from . import name`, or put an __init__.py into {root}"
        )
    while (root.parent / "__init__.py").is_file():
        root = root.parent
    _append_to_path(root.parent)
    name = ".".join(path.relative_to(root.parent).with_suffix("").parts)
    module = importlib.import_module(name)
    if not _is_same(module.__file__, path):
        raise ImportRefusedError(
            f"it has relative imports, and its package {root.name!r} has the name of {module.__file__}; rename {root}"
        )
    return module


def _append_to_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    importlib.invalidate_caches()


def _refuse_ambiguous_imports(path: Path, tree: ast.Module) -> None:
    """Look at all imports in the file, and in the files beside it that it imports, at whatever depth they stand."""
    seen, waiting = {path}, [(path, tree)]
    while waiting:
        file, parsed = waiting.pop()
        for name in _imported_names(parsed):
            sibling = _sibling(path.parent, name)
            if sibling is None or sibling in seen:
                continue
            seen.add(sibling)
            _check_is_found(file, name, sibling)
            if sibling.name != "__init__.py":
                waiting.append((sibling, ast.parse(sibling.read_bytes(), filename=str(sibling))))


def _check_is_found(file: Path, name: str, sibling: Path) -> None:
    elsewhere = _found_elsewhere(name, sibling)
    if elsewhere is not None:
        raise ImportRefusedError(
            f"{file.name} imports {name!r}, which is {sibling} as well as {elsewhere}; rename the former"
        )


def _found_elsewhere(name: str, sibling: Path) -> str | None:
    """What `import name` finds, unless it is the sibling."""
    if name in sys.stdlib_module_names:
        return "a module of Python's own"
    places = [place for place in sys.path if not _is_same(place or ".", sibling.parent)]
    spec = PathFinder.find_spec(name, places)
    if spec is None or (spec.origin is None and sibling.exists()):  # a folder without __init__.py gives way
        return None
    return None if _is_same(spec.origin, sibling) else spec.origin


def _imported_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.partition(".")[0]


def _sibling(folder: Path, name: str) -> Path | None:
    for candidate in (folder / name / "__init__.py", folder / f"{name}.py"):
        if candidate.is_file():
            return candidate
    return None


def _is_same(first: str | Path | None, second: Path) -> bool:
    return first is not None and Path(first).resolve() == second.resolve()
