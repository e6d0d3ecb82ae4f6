"""ASCEND_RT_VISIBLE_DEVICES as CANN's documentation has it: which devices a process sees, and under which numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

PROGRAM = """
import ctypes, json
import acl.rt
runtime = ctypes.CDLL("libascendcl.so")
runtime.aclGetRecentErrMsg.restype = ctypes.c_char_p
count = ctypes.c_uint32()
assert runtime.aclrtGetDeviceCount(ctypes.byref(count)) == 0
uuid = ctypes.create_string_buffer(64)
physical = []
for index in range(count.value):
    assert runtime.aclrtSetDevice(index) == 0
    assert runtime.aclrtDeviceGetUuid(index, uuid) == 0
    physical.append(uuid.raw[0] - 1)
refused = runtime.aclrtSetDevice(count.value)
words = (runtime.aclGetRecentErrMsg() or b"").decode()
print(json.dumps([acl.rt.get_device_count(), physical, refused, words]))
"""
INVALID_DEVICE = 107001


def seen(visible: str | None, program: str = PROGRAM) -> Any:
    """What a process sees of a machine of four devices."""
    environment = {name: value for name, value in os.environ.items() if name != "ASCEND_RT_VISIBLE_DEVICES"}
    environment |= {"ACLSIM_DEVICES": "4"} | ({} if visible is None else {"ASCEND_RT_VISIBLE_DEVICES": visible})
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("visible", "physical"),
    [
        (None, [0, 1, 2, 3]),
        ("2", [2]),
        ("1,3", [1, 3]),
        ("0,1,2,3", [0, 1, 2, 3]),
        ("1, 2,3", [1]),  # reading ends at the blank
        ("1,3,8", [1, 3]),  # and at a device that is not there
        ("1,x,2", [1]),
        ("7", []),
        ("npu", []),
        ("-1", []),
        ("1,0", []),  # numbers that do not ascend void the list
        ("0,1,1", []),
        ("", []),
    ],
)
def test_the_variable_says_which_devices_there_are(visible: str | None, physical: list[int]) -> None:
    python_count, found, refused, words = seen(visible)
    assert found == physical
    assert python_count == [len(physical), 0]
    assert refused == INVALID_DEVICE
    assert f"no device {len(physical)}" in words
    if visible is not None:
        assert f"ASCEND_RT_VISIBLE_DEVICES='{visible}'" in words


MEMORY_PROGRAM = """
import json
import torch, torch_npu
from tests.aclsim import control
torch.npu.set_device(1)
held = torch.zeros(8 << 20, device="npu")
print(json.dumps([torch.npu.device_count(), control.stats(0).used, control.stats(1).used]))
"""


def test_torch_npu_sees_the_same_devices_and_memory_is_counted_by_device() -> None:
    count, other, used = seen("1,3", MEMORY_PROGRAM)
    assert count == 2
    assert other == 0
    assert used >= 32 << 20
