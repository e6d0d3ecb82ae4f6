"""Says what an installation lacks before an import fails in the middle of a library."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from rlhf_npu.errors import InstallationError

ENGINES = ("torch", "deepspeed", "vllm", "ray", "transformers", "tensordict")
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")


def check_installation() -> None:
    """Look for the engines without importing them.

    Raises:
        InstallationError: an engine is missing, or a package built for CUDA lies beside torch's CPU build.
    """
    missing = [name for name in ENGINES if importlib.util.find_spec(name) is None]
    if missing:
        raise InstallationError(
            f"{', '.join(missing)} not installed; install rlhf-npu with the extra for your device: "
            "rlhf-npu[cpu], rlhf-npu[cuda] or rlhf-npu[npu]"
        )
    if not importlib.metadata.version("torch").endswith("+cpu"):
        return
    broken = [name for name in CUDA_ONLY if _is_cuda_build(name)]
    if broken:
        raise InstallationError(
            f"{', '.join(broken)} built for CUDA cannot be imported beside torch's CPU build; nothing here needs "
            f"them: pip uninstall {' '.join(broken)}"
        )


def _is_cuda_build(name: str) -> bool:
    try:
        return "+cpu" not in importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
