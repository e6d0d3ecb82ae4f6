"""A reward file and the modules beside it."""

from __future__ import annotations

import importlib.util
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_npu.config import RewardConfig
from rlhf_npu.errors import RewardError
from rlhf_npu.rewards import RewardFunction, load_reward
from tests.rewards.samples import sample


@pytest.fixture(autouse=True)
def _path() -> Iterator[None]:
    """The path and the modules as they were."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def write(folder: Path, **files: str) -> Path:
    for name, source in files.items():
        path = folder / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return folder


def load(path: Path) -> RewardFunction:
    return load_reward(RewardConfig(f"{path}:score"))


def refuses(path: Path, message: str) -> None:
    with pytest.raises(RewardError, match=re.escape(message)) as caught:
        load(path)
    assert f"reward.function={path}:score: " in str(caught.value)


def test_modules_beside_it_are_found_at_once_and_when_it_is_called(tmp_path: Path) -> None:
    write(
        tmp_path,
        reward="import sibling_at_once\ndef score(response):\n    import sibling_late\n"
        "    return sibling_at_once.half(response) + sibling_late.zero()",
        sibling_at_once="import sibling_of_sibling\ndef half(response): return sibling_of_sibling.HALF",
        sibling_of_sibling="HALF = 0.5",
        sibling_late="def zero(): return 0.0",
    )
    assert load(tmp_path / "reward.py")("x", True, sample("5")) == 0.5


def test_packages_beside_it_are_found(tmp_path: Path) -> None:
    write(tmp_path, reward="from sibling_package.marks import FULL\ndef score(response): return FULL")
    (tmp_path / "sibling_package").mkdir()
    (tmp_path / "sibling_package" / "__init__.py").touch()
    (tmp_path / "sibling_package" / "marks.py").write_text("FULL = 1.0")
    assert load(tmp_path / "reward.py")("x", True, sample("5")) == 1.0


def test_a_file_may_be_part_of_a_package(tmp_path: Path) -> None:
    folder = tmp_path / "graders" / "sums"
    folder.mkdir(parents=True)
    for package in (folder.parent, folder):
        (package / "__init__.py").touch()
    (folder.parent / "common.py").write_text("HALF = 0.5")
    (folder / "marks.py").write_text("FULL = 1.0")
    (folder / "reward.py").write_text(
        "from dataclasses import dataclass\nfrom ..common import HALF\nfrom .marks import FULL\n"
        "@dataclass\nclass Judge:\n    scale: float\n"
        "    def __call__(self, response): return self.scale * HALF * FULL\n"
        "score = Judge(3.0)"
    )
    reward = pickle.loads(pickle.dumps(load(folder / "reward.py")))
    assert reward("x", True, sample("5")) == 1.5


def test_relative_imports_outside_a_package_are_refused(tmp_path: Path) -> None:
    write(tmp_path, reward="from . import marks\ndef score(response): return 1.0", marks="")
    refuses(tmp_path / "reward.py", "it has relative imports, but its folder is no package; write `import name`")


def test_a_package_with_the_name_of_an_installed_one_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "numpy"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "core.py").write_text("from . import marks\ndef score(response): return 1.0")
    refuses(folder / "core.py", "it has relative imports, and its package 'numpy' has the name of ")


def test_what_stands_beside_it_does_not_take_the_place_of_installed_packages(tmp_path: Path) -> None:
    names = ("torch", "math_verify", "json", "vllm")
    write(tmp_path, reward="def score(response): return 1.0", **dict.fromkeys(names, "raise RuntimeError('shadowed')"))
    load(tmp_path / "reward.py")
    assert str(tmp_path) == sys.path[-1]
    for name in names:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert not str(spec.origin).startswith(str(tmp_path))


def test_a_file_may_have_the_name_of_the_package_it_uses(tmp_path: Path) -> None:
    write(tmp_path, math_verify="from math_verify import parse\ndef score(response): return float(len(parse('5')) > 0)")
    assert load(tmp_path / "math_verify.py")("x", True, sample("5")) == 1.0


@pytest.mark.parametrize(
    ("statement", "name", "elsewhere"),
    [
        ("import math_verify", "math_verify", "site-packages/math_verify/__init__.py"),
        ("from numpy.linalg import norm", "numpy", "site-packages/numpy/__init__.py"),
        ("def late():\n    import random", "random", "a module of Python's own"),
        ("import sibling", "yaml", "site-packages/yaml/__init__.py"),
    ],
)
def test_a_name_that_means_two_things_is_refused(tmp_path: Path, statement: str, name: str, elsewhere: str) -> None:
    write(tmp_path, reward=f"{statement}\ndef score(response): return 1.0", sibling="import yaml", **{name: ""})
    with pytest.raises(RewardError, match=f"imports '{name}', which is {tmp_path}/{name}.py as well as .*{elsewhere}"):
        load(tmp_path / "reward.py")


def test_a_file_in_the_working_folder_is_no_ambiguity(tmp_path: Path) -> None:
    write(
        tmp_path, reward="import helpers_here\ndef score(response): return helpers_here.ONE", helpers_here="ONE = 1.0"
    )
    program = (
        "from rlhf_npu.config import RewardConfig; from rlhf_npu.rewards import load_reward;"
        "load_reward(RewardConfig('reward.py:score')); import helpers_here; print(helpers_here.__file__)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stdout.strip().endswith("helpers_here.py"), result.stderr
