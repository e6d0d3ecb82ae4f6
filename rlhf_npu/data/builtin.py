"""Paths that start with `builtin:` name tasks that come with the package and are prepared on demand.

`builtin:digits/model`, `builtin:digits/train`, `builtin:digits/val`, `builtin:chain_sum/train` and
`builtin:chain_sum/val` stand for files in a cache folder: `RLHF_NPU_CACHE`, else `~/.cache/rlhf_npu`. So do
`builtin:digits/pairs`, `builtin:digits/flaws`, `builtin:digits/unpaired` and `builtin:digits/sft`, and each of these
with `_val`.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from rlhf_npu.edges import one_line
from rlhf_npu.errors import DataError

PREFIX = "builtin:"
CACHE_VARIABLE = "RLHF_NPU_CACHE"


@dataclass(frozen=True)
class BuiltinTask:
    """A task whose module has `prepare(folder)`.

    Attributes:
        module: name of that module in this package.
        sources: modules of this package that decide what is written; a change of one makes a new cache folder.
        parts: what can be asked for, and its name in the folder.
        duration: how long preparing takes, for people to read.
    """

    module: str
    sources: tuple[str, ...]
    parts: dict[str, str]
    duration: str


_PROMPTS = {"train": "train.jsonl", "val": "val.jsonl"}
_EXAMPLES = {
    f"{kind}{split}": f"{kind}{split}.jsonl" for kind in ("pairs", "flaws", "unpaired", "sft") for split in ("", "_val")
}
TASKS = {
    "digits": BuiltinTask("digits", ("digits",), {"model": "model", **_PROMPTS, **_EXAMPLES}, "about a minute"),
    "chain_sum": BuiltinTask("chain_sum", ("chain_sum", "reasoning_gym"), _PROMPTS, "a few seconds"),
}


def resolve(path: str) -> str:
    """The local path that `path` stands for; a path that is not builtin is returned as it is.

    The first call for a task prepares it, under a lock: others who ask meanwhile wait and then share it.

    Raises:
        DataError: there is no such builtin, or the folder that keeps it cannot be written.
    """
    if not path.startswith(PREFIX):
        return path
    name, _, part = path.removeprefix(PREFIX).partition("/")
    task = TASKS.get(name)
    if task is None or part not in task.parts:
        raise DataError(f"{path}: no such builtin; there are {', '.join(_names())}")
    try:
        return str(_prepared_folder(name, task) / task.parts[part])
    except OSError as error:
        raise DataError(
            f"{path}: cannot be prepared: {one_line(error)}; set {CACHE_VARIABLE} to a folder that can be written"
        ) from error


def cache_folder() -> Path:
    """Where prepared tasks are kept.

    Raises:
        DataError: there is no home folder.
    """
    try:
        return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "rlhf_npu").expanduser().absolute()
    except RuntimeError as error:
        raise DataError(f"{error} Set {CACHE_VARIABLE} to a folder that can be written") from error


def _names() -> list[str]:
    return [f"{PREFIX}{name}/{part}" for name, task in TASKS.items() for part in task.parts]


def _prepared_folder(name: str, task: BuiltinTask) -> Path:
    cache = cache_folder()
    folder = cache / f"{name}-{_version(task)}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{folder.name}.lock"):
        if not folder.is_dir():
            print(f"preparing {PREFIX}{name} in {folder}: {task.duration}, once", file=sys.stderr, flush=True)
            importlib.import_module(f"{__package__}.{task.module}").prepare(folder)
    return folder


def _version(task: BuiltinTask) -> str:
    digest = hashlib.sha256()
    for source in task.sources:
        digest.update(Path(__file__).with_name(f"{source}.py").read_bytes())
    return digest.hexdigest()[:12]
