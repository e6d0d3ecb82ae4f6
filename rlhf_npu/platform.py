"""The device facade: the only file that names `torch.npu`, `torch.cuda` and the CPU."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from rlhf_npu.errors import DeviceError

RESET_PEAK_RESIDENT = "5"  # proc_pid_clear_refs(5)


@dataclass(frozen=True)
class Platform:
    """What differs between the devices that rlhf_npu runs on.

    Attributes:
        name: torch's device type: "cpu", "cuda" or "npu".
        ray_resource: the Ray resource that one device takes.
        dist_backend: the torch.distributed backend between devices.
        deepspeed_accelerator: the value of DeepSpeed's DS_ACCELERATOR.
        visible_devices: the variable that says which devices a process sees.
        environment: variables that a worker process on this device needs.
    """

    name: str
    ray_resource: str
    dist_backend: str
    deepspeed_accelerator: str
    visible_devices: str | None
    environment: Mapping[str, str]

    def device(self) -> torch.device:
        """The device of this process; Ray shows each worker exactly one accelerator."""
        return torch.device("cpu") if self.name == "cpu" else torch.device(self.name, 0)

    def activate(self) -> None:
        """Make `device()` the current device of this process."""
        if self.name != "cpu":
            getattr(torch, self.name).set_device(0)

    def synchronize(self) -> None:
        """Wait for all work queued on the device."""
        if self.name != "cpu":
            getattr(torch, self.name).synchronize()

    def empty_cache(self) -> None:
        """Give memory that is cached but not used back to the device, or on the CPU to the operating system."""
        if self.name == "cpu":
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        else:
            getattr(torch, self.name).empty_cache()

    def fork_rng(self) -> AbstractContextManager[None]:
        """Within it torch's generators may be seeded, this device's and the CPU's; after it they are as before."""
        devices = [] if self.name == "cpu" else [0]
        return torch.random.fork_rng(devices, device_type=self.name)

    def held_bytes(self) -> int:
        """Bytes that torch's allocator holds of the device, asleep or not; on the CPU the process's resident bytes."""
        return resident_bytes() if self.name == "cpu" else int(getattr(torch, self.name).memory_reserved())

    def peak_held_bytes(self) -> int:
        """The most that `held_bytes` was since `reset_peak_held`."""
        return _status_bytes("VmHWM") if self.name == "cpu" else int(getattr(torch, self.name).max_memory_reserved())

    def reset_peak_held(self) -> None:
        """Let `peak_held_bytes` begin anew; on a CPU whose kernel forbids it, it goes on from the process's start."""
        if self.name != "cpu":
            getattr(torch, self.name).reset_peak_memory_stats()
            return
        with suppress(PermissionError, FileNotFoundError):
            Path("/proc/self/clear_refs").write_text(RESET_PEAK_RESIDENT)

    def memory_bytes(self) -> int:
        """Memory of one device, or of the machine on the CPU.

        The driver is asked in a process of its own, since asking takes memory of the device for as long as a process
        lives.

        Raises:
            DeviceError: it does not answer.
        """
        if self.name == "cpu":
            return int(psutil.virtual_memory().total)
        ask = f"import torch; print(torch.{self.name}.mem_get_info(0)[1])"
        answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
        if answer.returncode:
            reason = answer.stderr.strip().rpartition("\n")[2]
            raise DeviceError(f"the {self.name} driver does not say how much memory a device has: {reason}")
        return int(answer.stdout.split()[-1])

    def only_visible(self, number: int) -> dict[str, str]:
        """Variables that show a process the device of that number alone, and call it 0; none on the CPU."""
        return {} if self.visible_devices is None else {self.visible_devices: str(number)}

    def count(self) -> int:
        """Devices on this machine; on the CPU a device is a core that this process may use."""
        if self.name == "cpu":
            return len(os.sched_getaffinity(0))
        return int(getattr(torch, self.name).device_count())


CPU = Platform(
    "cpu",
    ray_resource="CPU",
    dist_backend="gloo",
    deepspeed_accelerator="cpu",
    visible_devices=None,
    environment={"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
)
CUDA = Platform(
    "cuda",
    ray_resource="GPU",
    dist_backend="nccl",
    deepspeed_accelerator="cuda",
    visible_devices="CUDA_VISIBLE_DEVICES",
    environment={},
)
NPU = Platform(
    "npu",
    ray_resource="NPU",
    dist_backend="hccl",
    deepspeed_accelerator="npu",
    visible_devices="ASCEND_RT_VISIBLE_DEVICES",
    # FRACTAL_NZ weights cannot be updated in place, and with expandable segments sleep would free nothing.
    environment={
        "VLLM_ASCEND_ENABLE_NZ": "0",
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:False",
        "HCCL_NPU_SOCKET_PORT_RANGE": "auto",
        "TASK_QUEUE_ENABLE": "1",
    },
)
PLATFORMS = {platform.name: platform for platform in (CPU, CUDA, NPU)}


def resident_bytes() -> int:
    """Resident memory of this process in bytes, by the operating system's count."""
    return _status_bytes("VmRSS")


def detect_platform(name: str = "auto") -> Platform:
    """The platform called `name`; "auto" takes NPU, else CUDA, else the CPU.

    Raises:
        DeviceError: `name` is unknown or this machine has no such device.
    """
    if name == "auto":
        return next((p for p in (NPU, CUDA) if _available(p)), CPU)
    if name not in PLATFORMS:
        raise DeviceError(f"trainer.device={name!r} is unknown; use auto, {', '.join(PLATFORMS)}")
    platform = PLATFORMS[name]
    if not _available(platform):
        raise DeviceError(f"trainer.device={name}: torch sees no {name} device here; use trainer.device=auto")
    return platform


def _available(platform: Platform) -> bool:
    if platform.name == "cpu":
        return True
    if platform.name == "npu" and importlib.util.find_spec("torch_npu") is None:
        return False
    module = getattr(torch, platform.name, None)
    return module is not None and bool(module.is_available())


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in status if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
