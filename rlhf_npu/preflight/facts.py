"""What a report says of the machine beside the checks, and how personal data is kept out of it."""

from __future__ import annotations

import contextlib
import getpass
import os
import platform
import re
import socket
from importlib import metadata
from pathlib import Path

# Of all variables only these are told. None of them holds a secret, a name or an address.
VARIABLES = (
    "ACL_DEVICE_SYNC_TIMEOUT",
    "ASCEND_GLOBAL_LOG_LEVEL",
    "ASCEND_HOME_PATH",
    "ASCEND_LAUNCH_BLOCKING",
    "ASCEND_OPP_PATH",
    "ASCEND_RT_VISIBLE_DEVICES",
    "ASCEND_TOOLKIT_HOME",
    "ATB_HOME_PATH",
    "CPU_AFFINITY_CONF",
    "CUDA_VISIBLE_DEVICES",
    "DS_ACCELERATOR",
    "HCCL_BUFFSIZE",
    "HCCL_CONNECT_TIMEOUT",
    "HCCL_DETERMINISTIC",
    "HCCL_EXEC_TIMEOUT",
    "HCCL_NPU_SOCKET_PORT_RANGE",
    "HCCL_OP_EXPANSION_MODE",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_NPU_ALLOC_CONF",
    "RLHF_NPU_SLEEP_MODE",
    "TASK_QUEUE_ENABLE",
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
    "VLLM_ASCEND_ENABLE_NZ",
    "VLLM_VERSION",
    "VLLM_WORKER_MULTIPROC_METHOD",
)
_OS = Path("/etc/os-release")
_ADDRESSES = re.compile(
    r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.])"  # IPv4
    r"|(?<![\w:])(?=[\da-fA-F:]*::|(?:[\da-fA-F]+:){5})[\da-fA-F:]{6,}(?![\w:])"  # IPv6, and a network card's address
)
_SECRETS = re.compile(r"\b(?:hf|gh[opsu]|github_pat|glpat|sk|pk|xox[bp])[-_][\w-]{12,}|(?<=://)[^/@\s]+(?=@)")
_HOMES = re.compile(r"/(?:home|Users)/[^/\s:'\"]+")


def facts() -> dict[str, dict[str, str]]:
    """The operating system, the packages and the variables, without personal data."""
    return {"system": _system(), "packages": _packages(), "environment": _environment()}


def without_addresses(text: str) -> str:
    """The text without personal data, network addresses among it."""
    return _ADDRESSES.sub("(address)", scrubbed(text))


def scrubbed(text: str) -> str:
    """The text without home folders, the names of user and machine, and what looks like a key."""
    for home in {str(Path.home()), str(Path.home().resolve())} - {"/"}:
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    text = _HOMES.sub("~", _SECRETS.sub("(secret)", text))
    for name, instead in _names().items():
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", instead, text)
    return text


def _names() -> dict[str, str]:
    host = socket.gethostname()
    names = {host: "(host)", host.partition(".")[0]: "(host)"}
    with contextlib.suppress(KeyError, OSError):  # a container's user may have no name
        names[getpass.getuser()] = "(user)"
    # These name nobody, and are words of the report.
    return {name: instead for name, instead in names.items() if name not in ("", "localhost", "root")}


def _system() -> dict[str, str]:
    return {
        "os": _os_name(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "cores": str(len(os.sched_getaffinity(0))),
    }


def _os_name() -> str:
    lines = _OS.read_text().splitlines() if _OS.is_file() else []
    names = (line.partition("=")[2].strip('"') for line in lines if line.startswith("PRETTY_NAME="))
    return next(names, platform.system())


def _packages() -> dict[str, str]:
    """All packages: any of them may be the one that breaks another."""
    found = {distribution.metadata["Name"]: distribution.version for distribution in metadata.distributions()}
    return dict(sorted((name, version) for name, version in found.items() if name))


def _environment() -> dict[str, str]:
    return {name: without_addresses(os.environ[name]) for name in VARIABLES if name in os.environ}
