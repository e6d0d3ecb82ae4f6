"""Whatever of the NPU's own operators has no reference fails by name; what it was asked beyond one, too."""

import subprocess
import sys
from pathlib import Path

import acl
import pytest
import torch
import torch_npu
from simulated_npu import npu_operators, references
from simulated_npu.references import CALLS, NotSimulatedError
from simulated_npu.triton_kernels import compute_slot_mapping

from tests.aclsim import control

npu_operators.install()

ROOT = Path(__file__).parents[2]
HOST_TO_DEVICE = 1


def npu(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, device="npu")


def test_vllm_ascends_and_atbs_operators_raise_where_there_is_no_reference() -> None:
    with pytest.raises(NotSimulatedError, match="_C_ascend::npu_hc_post is not simulated"):
        torch.ops._C_ascend.npu_hc_post(npu(2), npu(2), npu(2), npu(2))
    with pytest.raises(NotSimulatedError, match="atb::_npu_group_topk is not simulated"):
        torch_npu._npu_group_topk(npu(2, 4), 1, 1, 1)


def test_torch_npus_operators_raise_where_there_is_no_reference() -> None:
    with pytest.raises(RuntimeError, match=r"aclnnGeluMul .* not in libopapi.so"):
        torch_npu.npu_gelu_mul(npu(2, 4))


def test_an_argument_without_a_reference_is_refused_by_name_unless_it_is_at_its_default() -> None:
    tokens, places = npu(2, 4), torch.arange(2, device="npu")
    torch_npu.npu_moe_token_unpermute(tokens, places, padded_mode=False)
    with pytest.raises(NotSimulatedError, match=r"npu_moe_token_unpermute: padded_mode .* given as True"):
        torch_npu.npu_moe_token_unpermute(tokens, places, padded_mode=True)
    with pytest.raises(NotSimulatedError, match=r"npu_rotary_mul: rotate .* a tensor of shape \[4, 4\]"):
        torch_npu.npu_rotary_mul(npu(1, 1, 1, 4), npu(1, 1, 1, 4), npu(1, 1, 1, 4), "half", npu(4, 4))


def test_a_reference_for_arguments_that_the_operator_lacks_is_refused() -> None:
    def wrong(x: torch.Tensor, *, dims: int) -> None: ...

    with pytest.raises(TypeError, match="npu::npu_swiglu has no dims"):
        references.implementation("npu::npu_swiglu", wrong, frozenset())


def test_calls_are_counted() -> None:
    before = CALLS["npu::npu_swiglu"]
    torch_npu.npu_swiglu(npu(2, 4))
    assert CALLS["npu::npu_swiglu"] == before + 1


def test_context_parallelism_is_refused() -> None:
    with pytest.raises(NotSimulatedError, match="TOTAL_CP_WORLD_SIZE of 2"):
        compute_slot_mapping[(1,)](
            *(0, 0, npu(1), npu(1), npu(1, 1), 1, 1, npu(1)),
            TOTAL_CP_WORLD_SIZE=2,
            TOTAL_CP_RANK=0,
            CP_KV_CACHE_INTERLEAVE_SIZE=1,
            PAD_ID=-1,
            BLOCK_SIZE=1024,
        )


# Below the references: what happens in a program that does without them.
WITHOUT_REFERENCES = """
import ctypes, torch, torch_npu
from torch_npu.op_plugin.atb._atb_ops import _register_atb_extensions
import vllm_ascend.vllm_ascend_C
from tests.aclsim import control

def ones(*shape, dtype=torch.bfloat16):
    return torch.ones(*shape, dtype=dtype).to("npu")

def failed(call):
    before = control.stats().errors
    try:
        call()
        torch.npu.synchronize()
    except RuntimeError as error:
        print("raised", str(error).splitlines()[0])
    print("counted", control.stats().errors - before)

_register_atb_extensions()
x, positions = ones(3, 64), torch.arange(3).to("npu")
print("at first", control.stats().errors)
failed(lambda: torch_npu._npu_rotary_embedding(positions, x, x.clone(), 32, ones(10, 32), True))
failed(lambda: torch.ops._C_ascend.bgmv_shrink(x, ones(2, 8, 64), positions, ones(3, 8, dtype=torch.float32), 1.0))

ran = []
function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(ran.append)
stream = ctypes.c_void_p(torch.npu.current_stream().npu_stream)
assert ctypes.CDLL("libascendcl.so").aclrtLaunchHostFunc(stream, function, ctypes.c_void_p(5)) == 0
print("host function ran", len(ran), end=", ")
torch.npu.synchronize()
print("then", ran)
"""


@pytest.mark.parametrize("stream", ["eager", "lazy"])
def test_kernels_and_atb_operations_fail_by_name_and_host_functions_run_in_their_turn(
    monkeypatch: pytest.MonkeyPatch, stream: str
) -> None:
    monkeypatch.setenv("ACLSIM_STREAM", stream)
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_REFERENCES], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    known = ("at first", "raised", "counted", "host function")
    lines = [line for line in ran.stdout.splitlines() if line.startswith(known)]
    assert lines[:3] == ["at first 0", "raised RopeOperation CreateOperation failed!", "counted 1"]
    assert lines[3].startswith("raised")
    assert lines[4] == "counted 1"
    assert lines[5] == f"host function ran {int(stream == 'eager')}, then [5]"
    assert "ATB's Rope is not simulated" in ran.stderr
    assert "no kernel is simulated, and one was launched by launch_and_profiling_bgmv_shrink_bfloat16_t" in ran.stderr


def test_pyacl_tells_of_the_devices_and_copies_and_has_nothing_else() -> None:
    assert acl.get_soc_name() == "Ascend910B3"
    assert acl.rt.get_device_count() == (torch_npu.npu.device_count(), 0)
    source, target = torch.arange(4.0), torch.zeros(4, device="npu")
    torch_npu.npu.synchronize()
    assert acl.rt.memcpy(target.data_ptr(), 16, source.data_ptr(), 16, HOST_TO_DEVICE) == 0
    assert torch.equal(target.cpu(), source)
    before = control.stats().errors
    assert acl.rt.memcpy(target.data_ptr(), 8, source.data_ptr(), 16, HOST_TO_DEVICE) != 0
    assert control.stats().errors == before + 1
    with pytest.raises(AttributeError, match="malloc"):
        acl.rt.malloc(16, 0)  # type: ignore[attr-defined]
