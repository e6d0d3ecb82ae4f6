"""Says what an installation lacks before an import fails in the middle of a library."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import re
from base64 import urlsafe_b64encode
from pathlib import Path

from rlhf_npu.errors import InstallationError

ENGINES = ("torch", "deepspeed", "vllm", "ray", "transformers", "tensordict")
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")
# What vllm-ascend imports when its worker is made: its patches touch models with images, its scheduler reads tables.
NPU_ONLY = ("vllm-ascend", "torchvision", "triton-ascend", "scipy", "pandas")
VLLM_WITHOUT_DEVICE = (
    "VLLM_VERSION_OVERRIDE={0} VLLM_TARGET_DEVICE=empty "
    "pip install --no-deps --no-build-isolation --no-binary vllm vllm=={0}"
)
_PROJECT = "rlhf-npu"
_PIN = re.compile(r"(?P<name>[\w.-]+)(\[[^]]*])?==(?P<version>[\w.]+) *; *extra *== *['\"](?P<extra>\w+)['\"]")
_RELEASE = re.compile(r"\d+(\.\d+)*(?=\.post|\.dev|rc|\+|$)")


def check_installation() -> None:
    """Look for the engines without importing them; where torch-npu is installed, for what they need on an NPU.

    Raises:
        InstallationError: a package is missing, or one that is there does not go with another. Says how to mend it.
    """
    missing = [name for name in ENGINES if importlib.util.find_spec(name) is None]
    if missing:
        raise InstallationError(
            f"{', '.join(missing)} not installed; install rlhf-npu with the extra for your device: "
            "rlhf-npu[cpu] or rlhf-npu[cuda], or for an NPU as docs/npu.md says"
        )
    if installed_version("torch-npu") is None:
        _check_for_cuda_builds()
    else:
        _check_for_npu()


def installed_version(name: str) -> str | None:
    """The version of an installed package, by its metadata; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def pinned_versions(extra: str) -> dict[str, str]:
    """The versions that an extra of this project pins: those to use together.

    Raises:
        PackageNotFoundError: this project is not installed, only copied.
    """
    pins = [_PIN.match(requirement) for requirement in importlib.metadata.requires(_PROJECT) or ()]
    return {pin["name"]: pin["version"] for pin in pins if pin is not None and pin["extra"] == extra}


def _check_for_cuda_builds() -> None:
    if not importlib.metadata.version("torch").endswith("+cpu"):
        return
    broken = [name for name in CUDA_ONLY if "+cpu" not in (installed_version(name) or "+cpu")]
    if broken:
        raise InstallationError(
            f"{', '.join(broken)} built for CUDA cannot be imported beside torch's CPU build; nothing here needs "
            f"them: pip uninstall {' '.join(broken)}"
        )


def _check_for_npu() -> None:
    missing = [name for name in NPU_ONLY if installed_version(name) is None]
    if missing:
        raise InstallationError(
            f"{', '.join(missing)} not installed, which vLLM needs on an NPU: "
            f"pip install --no-deps {' '.join(_pinned(name) for name in missing)} (docs/npu.md says from where)"
        )
    _check_pair("torch-npu", "torch", f"pip install --no-deps {_pinned('torch')} {_pinned('torch-npu')}")
    _check_pair("vllm-ascend", "vllm", VLLM_WITHOUT_DEVICE.format(_release("vllm-ascend")))
    if installed_version("triton") is not None and (path := _overwritten("triton-ascend")):
        raise InstallationError(
            f"triton {installed_version('triton')} has overwritten {path} of triton-ascend, and has no backend for an "
            "NPU: pip uninstall -y triton, then "
            f"pip install --no-deps --force-reinstall triton-ascend=={installed_version('triton-ascend')}"
        )


def _check_pair(plugin: str, package: str, command: str) -> None:
    if _release(plugin) != _release(package):
        raise InstallationError(
            f"{plugin} {installed_version(plugin)} is made for {package} {_release(plugin)}, but {package} "
            f"{installed_version(package)} is installed: {command}"
        )


def _release(name: str) -> str:
    """The numbers of a package's version, without what names a build or a correction of the same release."""
    version = importlib.metadata.version(name)
    match = _RELEASE.match(version)
    return version if match is None else match[0]


def _pinned(name: str) -> str:
    try:
        version = pinned_versions("npu").get(name)
    except importlib.metadata.PackageNotFoundError:
        version = None
    return name if version is None else f"{name}=={version}"


def _overwritten(name: str) -> str | None:
    """A Python file of a package that is not as it was installed: another package has put its own in that place."""
    for file in importlib.metadata.files(name) or ():
        if file.suffix != ".py" or file.hash is None:
            continue
        path = Path(str(file.locate()))
        content = path.read_bytes() if path.is_file() else b""
        digest = urlsafe_b64encode(hashlib.new(file.hash.mode, content).digest()).rstrip(b"=").decode()
        if digest != file.hash.value:
            return str(file)
    return None
