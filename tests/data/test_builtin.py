from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_npu.data.builtin import TASKS, resolve
from rlhf_npu.errors import DataError

RESOLVE = "import sys; from rlhf_npu.data.builtin import resolve; print(resolve(sys.argv[1]))"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLHF_NPU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_other_paths_stay_as_they_are(cache: Path) -> None:
    for path in ("data/train.jsonl", "/models/qwen", "org/builtin:digits"):
        assert resolve(path) == path
    assert not cache.exists()


@pytest.mark.parametrize("folder", ["/proc/nowhere", "/dev/null/cache", "~nobodyhere/cache"])
def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    monkeypatch.setenv("RLHF_NPU_CACHE", folder)
    with pytest.raises(DataError, match=r"et RLHF_NPU_CACHE to a folder that can be written"):
        resolve("builtin:chain_sum/train")


@pytest.mark.parametrize("path", ["builtin:digits", "builtin:digits/test", "builtin:gsm8k/train", "builtin:"])
def test_an_unknown_name_is_told_those_that_exist(cache: Path, path: str) -> None:
    with pytest.raises(DataError, match=f"^{path}: no such builtin; there are .*builtin:digits/model"):
        resolve(path)
    assert not cache.exists()


def test_preparing_happens_once(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = Path(resolve("builtin:chain_sum/train"))
    assert train.is_relative_to(cache)
    assert "preparing builtin:chain_sum" in capsys.readouterr().err
    written = train.stat().st_mtime_ns
    val = Path(resolve("builtin:chain_sum/val"))
    assert capsys.readouterr().err == ""
    assert (train.stat().st_mtime_ns, val.parent) == (written, train.parent)


def test_processes_that_ask_together_share_one_preparation(cache: Path) -> None:
    command = [sys.executable, "-c", RESOLVE, "builtin:chain_sum/train"]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
        for _ in range(2)
    ]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert len({output for output, _ in results}) == 1
    assert "".join(errors for _, errors in results).count("preparing builtin:chain_sum") == 1
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


def test_a_task_that_has_changed_gets_a_new_folder() -> None:
    """The folder's name follows the text of the modules that decide what is written."""
    from rlhf_npu.data import builtin

    first = builtin._version(TASKS["digits"])
    assert first == builtin._version(TASKS["digits"])
    assert first != builtin._version(TASKS["chain_sum"])
