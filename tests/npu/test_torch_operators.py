"""torch's own operators on the simulated NPU: results, memory that sleeps, and streams that are late."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch_npu

from allocator import SleepPool
from tests.aclsim import control

LATE = """
import json, torch, torch_npu
from tests.aclsim import control
from tests.npu.test_torch_operators import CALLS
pending = {}
for name, call in CALLS.items():
    arguments = [one.to("npu") if isinstance(one, torch.Tensor) else one for one in call()[1:]]
    torch_npu.npu.synchronize()
    result = call()[0](*arguments)
    pending[name] = control.stats().pending
    torch_npu.npu.synchronize()
print(json.dumps(pending))
"""


def _made(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(len(sizes)))


# By the name of the aten operator: a function and its arguments on the CPU.
CALLS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "abs": lambda: (torch.abs, _made(3, 4)),
    "add.Tensor": lambda: (torch.add, _made(3, 4), _made(3, 1)),
    "mul.Tensor": lambda: (torch.mul, _made(3, 4), 2.5),
    "div.Tensor": lambda: (torch.div, _made(3, 4), _made(4)),
    "mm": lambda: (torch.mm, _made(3, 4), _made(4, 5)),
    "bmm": lambda: (torch.bmm, _made(2, 3, 4), _made(2, 4, 5)),
    "addmm": lambda: (torch.addmm, _made(5), _made(3, 4), _made(4, 5)),
    "gather": lambda: (torch.gather, _made(3, 4), 1, torch.tensor([[0, 3], [1, 1], [2, 0]])),
    "cat": lambda: (lambda *parts: torch.cat(parts, 1), _made(3, 4), _made(3, 2)),
    "_softmax": lambda: (torch.softmax, _made(3, 4), -1),
    "_log_softmax": lambda: (torch.log_softmax, _made(3, 4), 0),
    "embedding": lambda: (torch.nn.functional.embedding, torch.tensor([[1, 2], [0, 1]]), _made(3, 4)),
    "where.self": lambda: (torch.where, _made(3, 4) > 0, _made(3, 4), _made(3, 4).neg()),
    "pow.Tensor_Scalar": lambda: (torch.pow, _made(3, 4), 2),
}
# Without an aclnn operator in the simulation.
BOXED: dict[str, Callable[[], tuple[Any, ...]]] = {
    "cumsum": lambda: (torch.cumsum, _made(3, 4), 1),
    "topk": lambda: (lambda one: torch.topk(one, 2)[1], _made(3, 4)),
    "sort": lambda: (lambda one: torch.sort(one, descending=True)[0], _made(3, 4)),
    "native_layer_norm": lambda: (torch.nn.functional.layer_norm, _made(3, 4), (4,)),
    "gelu": lambda: (torch.nn.functional.gelu, _made(3, 4).t()),
    "index_put_": lambda: (lambda one, at: one.index_put_((at,), one.new_zeros(())), _made(3, 4), torch.tensor([0, 2])),
    "scaled_dot_product_attention": lambda: (
        lambda q, m: torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=m),
        _made(1, 2, 3, 4),
        torch.ones(3, 3).tril().bool(),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS | BOXED)
def test_results_are_the_cpus(name: str, dtype: torch.dtype) -> None:
    function, *arguments = (CALLS | BOXED)[name]()
    host = [one.to(dtype) if isinstance(one, torch.Tensor) and one.is_floating_point() else one for one in arguments]
    device = [one.to("npu") if isinstance(one, torch.Tensor) else one for one in host]
    expected, result = function(*host), function(*device)
    assert result.device.type == "npu"
    assert torch.equal(result.cpu(), expected)


def test_operators_with_an_aclnn_operator_are_late_on_lazy_streams_and_the_others_are_not() -> None:
    from simulated_npu.torch_operators import aclnn_operators

    assert {f"aten::{name}" for name in CALLS} <= aclnn_operators()
    environment = os.environ | {"ACLSIM_STREAM": "lazy", "TASK_QUEUE_ENABLE": "0"}
    programs = [LATE, LATE.replace("CALLS", "BOXED")]
    late, boxed = (
        json.loads(
            subprocess.run(
                [sys.executable, "-W", "ignore", "-c", program],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for program in programs
    )
    assert [name for name, pending in late.items() if pending == 0] == []
    assert [name for name, pending in boxed.items() if pending > 0] == []


@pytest.fixture
def asleep(request: pytest.FixtureRequest) -> Iterator[torch.Tensor]:
    """A (64, 64) tensor whose memory sleeps."""
    pool = SleepPool.get("npu:0", namespace=request.node.name)
    with pool.region("weights"):
        weights = torch.ones(64, 64, device="npu")
    torch_npu.npu.synchronize()
    pool.sleep(level=2)
    yield weights
    pool.wake_up()


@pytest.mark.parametrize(
    ("use", "operator", "argument"),
    [
        (lambda weights, other: weights.cumsum(1), "aten::cumsum", "argument 'self'"),
        (lambda weights, other: torch.cumsum(other, 1, out=weights), "aten::cumsum.out", "argument 'out'"),
        (lambda weights, other: weights[3:5].erf_(), "aten::erf_", "argument 'self' (float32 [2, 64])"),
        (lambda weights, other: torch.stack([other, weights]), "aten::stack", "argument 'tensors[1]'"),
        (lambda weights, other: other + weights, "aclnnAdd", "its tensor 2 of 3 (float32 [64, 64])"),
    ],
    ids=["read", "out", "in_place", "list", "aclnn"],
)
def test_a_use_of_sleeping_memory_is_an_error_that_names_operator_and_tensor(
    asleep: torch.Tensor, use: Callable[[torch.Tensor, torch.Tensor], object], operator: str, argument: str
) -> None:
    def use_and_wait() -> None:
        use(asleep, other)
        torch_npu.npu.synchronize()

    other, faults = torch.ones(64, 64, device="npu"), control.stats().faults
    with pytest.raises(RuntimeError) as error:
        use_and_wait()
    assert operator in str(error.value)
    assert argument in str(error.value)
    assert "sleeps or is not mapped" in str(error.value) or "it sleeps, is not mapped" in str(error.value)
    assert control.stats().faults == faults + 1
