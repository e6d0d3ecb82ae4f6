"""torch's own operators on the simulated NPU: results are the CPU's, operands must have memory behind them, and what
nobody simulates fails.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_npu
from torch.utils._pytree import tree_map

from allocator import SleepPool
from tests.aclsim import control

PROJECT = Path(__file__).parents[2]
MIB = 1 << 20
Operation = Callable[..., Any]


def on_npu(value: Any) -> Any:
    return tree_map(lambda x: x.detach().to("npu") if isinstance(x, torch.Tensor) else x, value)


def on_cpu(value: Any) -> Any:
    return tree_map(lambda x: x.detach().cpu() if isinstance(x, torch.Tensor) else x, value)


def assert_same(operation: Operation, *arguments: Any) -> None:
    """The results, and the arguments afterwards, are to the last bit those that the CPU has."""
    there = on_npu(arguments)
    result = on_cpu((operation(*there), there))
    torch.testing.assert_close(result, (operation(*arguments), arguments), rtol=0, atol=0, equal_nan=True)


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program, which has torch and torch_npu, in a new Python."""
    variables = {**os.environ, "PYTHONPATH": f"{PROJECT}:{os.environ.get('PYTHONPATH', '')}", **environment}
    command = [sys.executable, "-c", f"import torch, torch_npu\n{program}"]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=120)


# ---- numbers -----------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["Llama", "Qwen2"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_loss_and_gradients_of_a_model_are_the_cpus_to_the_last_bit(
    architecture: str, dtype: torch.dtype, attention: str
) -> None:
    import transformers

    torch.manual_seed(0)
    configuration = getattr(transformers, f"{architecture}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attn_implementation=attention,
    )  # fmt: skip
    model = getattr(transformers, f"{architecture}ForCausalLM")(configuration).to(dtype)
    tokens = torch.randint(0, 64, (3, 17))
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0

    def losses_and_gradients(device: str) -> list[torch.Tensor]:
        placed = model.to(device)
        optimizer = torch.optim.AdamW(placed.parameters(), lr=1e-3)
        found = []
        for _ in range(2):
            inputs = tokens.to(device)
            loss = placed(input_ids=inputs, attention_mask=mask.to(device), labels=inputs).loss
            loss.backward()
            found += [loss.detach().cpu(), *(one.grad.detach().clone().cpu() for one in placed.parameters())]
            torch.nn.utils.clip_grad_norm_(placed.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        return found

    weights = {name: value.clone() for name, value in model.state_dict().items()}
    expected = losses_and_gradients("cpu")
    model.load_state_dict(weights)
    found = losses_and_gradients("npu")
    assert float(expected[0]) > 1
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


A = torch.arange(-12.0, 12.0).reshape(4, 6)


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        (torch.tan, (A.t(),)),
        (torch.tan, (A[1:3, ::2],)),
        (torch.tan, (A.expand(2, 4, 6),)),
        (torch.cumsum, (A, -1)),
        (torch.Tensor.erf_, (A.clone(),)),
        (torch.Tensor.clamp_, (A.clone(), -2.5, 3)),
        (torch.Tensor.transpose_, (A.clone(), 0, 1)),
        (torch.Tensor.unsqueeze_, (A.clone(), 0)),
        (torch.topk, (A, 3)),
        (torch.sort, (A, 1, True)),
        (lambda a: a[a > 0], (A,)),
        (lambda a, i: a[i], (A, torch.tensor([3, 0, 0]))),
        (torch.Tensor.index_put_, (A.clone(), (torch.tensor([1, 1]),), torch.tensor(5.0), True)),
        (torch.where, (A > 0, A, -1.0)),
        (torch.rot90, (A,)),
        (torch.tan, (torch.empty(0, 3),)),
        (torch.cat, ([A, torch.empty(0), A],)),
        (torch.sum, (torch.empty(0, 3), 0)),
        (torch.clamp, (A, None, torch.tensor(2.0))),
        (torch.nn.functional.linear, (A, torch.ones(2, 6), None)),
        (torch.nn.functional.cross_entropy, (A, torch.tensor([0, 1, -100, 5]))),
        (torch.histc, (A, 5)),
        (torch.equal, (A, A.clone())),
        (torch._foreach_mul, ([A, A[0]], 2.0)),
        (torch._foreach_norm, ([A, A[0]],)),
        (torch._foreach_addcdiv_, ([A.clone()], [A], [A.abs() + 1], 0.5)),
        (torch.view_as_real, (torch.complex(A, A).conj().resolve_conj(),)),
        (lambda a: torch.complex(a, a).conj().imag.tan(), (A,)),
        (torch.nn.functional.one_hot, (torch.tensor([0, 2, 1]),)),
        (torch.repeat_interleave, (A, 2, 0)),
    ],
)  # fmt: skip
def test_an_operator_has_the_cpus_result(operation: Operation, arguments: tuple[Any, ...]) -> None:
    assert_same(operation, *arguments)


@pytest.mark.parametrize("shape", [(0,), (1,), (4, 6)])
def test_out_is_resized_and_keeps_its_identity(shape: tuple[int, ...]) -> None:
    out = torch.empty(shape, device="npu")
    a = A.to("npu")
    assert torch.tan(a, out=out) is out
    assert torch.equal(out.cpu(), torch.tan(A))
    values, indices = torch.empty(0, device="npu"), torch.empty(0, dtype=torch.int64, device="npu")
    torch.max(a.t(), 1, out=(values, indices))
    assert torch.equal(values.cpu(), A.max(0).values)
    assert torch.equal(indices.cpu(), A.max(0).indices)


def test_operands_that_overlap_are_refused_as_on_the_cpu() -> None:
    a = torch.arange(6.0, device="npu")
    with pytest.raises(RuntimeError, match=r"single memory location"):
        a[:1].expand(3).erf_()
    with pytest.raises(RuntimeError, match=r"single memory location"):
        torch.tan(a[:5], out=a[1:])


def test_operands_on_several_devices_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"argument 'other' \(float32 \[3\]\) of aten::atan2 is on cpu"):
        torch.atan2(torch.ones(3, device="npu"), torch.ones(3))
    assert torch.atan2(torch.ones(3, device="npu"), torch.tensor(1.0)).device.type == "npu"


def test_float64_becomes_float32_as_torch_npu_does_it() -> None:
    assert A.to("npu").double().dtype == torch.float32


def test_autograd_saves_and_differentiates_compositions() -> None:
    def gradients(device: str) -> list[torch.Tensor]:
        x = (A / 12).to(device).requires_grad_()
        y = torch.nn.functional.silu(x @ x.t()).softmax(-1).repeat_interleave(2, 0)
        y = torch.nn.functional.kl_div(y.log(), y.detach() + 0.1, reduction="batchmean")
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        first.pow(2).sum().backward()
        assert x.grad is not None
        return [y.detach().cpu(), first.detach().cpu(), x.grad.cpu()]

    for found, expected in zip(gradients("npu"), gradients("cpu"), strict=True):
        assert torch.equal(found, expected)


def test_autocast_computes_in_bfloat16() -> None:
    weight = torch.ones(6, 6, device="npu", requires_grad=True)
    with torch.autocast("npu", torch.bfloat16):
        product = A.to("npu") @ weight
        assert product.dtype == torch.bfloat16
        assert product.softmax(-1).dtype == torch.float32
    product.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_computes_the_same(backend: str) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x @ x.t()).softmax(-1).sum()

    x = A.to("npu").requires_grad_()
    found = torch.compile(function, backend=backend)(x)
    found.backward()
    reference = A.clone().requires_grad_()
    function(reference).backward()
    assert x.grad is not None
    assert reference.grad is not None
    assert torch.equal(x.grad.cpu(), reference.grad)


# ---- random numbers ----------------------------------------------

DRAWS: list[Callable[[], torch.Tensor]] = [
    lambda: torch.randn(8, device="npu"),
    lambda: torch.rand(8, device="npu"),
    lambda: torch.randint(0, 1000, (8,), device="npu"),
    lambda: torch.randperm(100, device="npu"),
    lambda: torch.empty(8, device="npu").exponential_(),
    lambda: torch.bernoulli(torch.full((64,), 0.5, device="npu")),
    lambda: torch.multinomial(torch.ones(50, device="npu"), 8),
    lambda: torch.nn.functional.dropout(torch.ones(64, device="npu"), 0.5),
    lambda: torch.rand_like(torch.ones(8, device="npu")),
]


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_follow_the_npus_generator_alone(draw: Callable[[], torch.Tensor]) -> None:
    torch_npu.npu.manual_seed(3)
    before = torch.get_rng_state()
    first, second = draw().cpu(), draw().cpu()
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    state = torch_npu.npu.get_rng_state()
    third = draw().cpu()
    torch_npu.npu.set_rng_state(state)
    assert torch.equal(draw().cpu(), third)
    torch_npu.npu.manual_seed(3)
    torch.rand(5)  # the CPU's own draws do not matter
    assert torch.equal(draw().cpu(), first)
    torch_npu.npu.manual_seed(4)
    assert not torch.equal(draw().cpu(), first)


def test_a_generator_that_is_given_is_used() -> None:
    def drawn(seed: int) -> torch.Tensor:
        generator = torch.Generator("npu").manual_seed(seed)
        return torch.empty(8, device="npu").exponential_(generator=generator).cpu()

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    with pytest.raises(RuntimeError, match="generator"):
        torch.empty(8, device="npu").exponential_(generator=torch.Generator())


# ---- memory behind operands --------------------------------------


@pytest.fixture
def asleep(request: pytest.FixtureRequest) -> Iterator[torch.Tensor]:
    """A tensor of shape [2, 3] in memory that sleeps; the test must count faults."""
    pool = SleepPool.get("npu:0", namespace=request.node.name)
    with pool.region("weights"):
        tensor = torch.ones(2, 3, device="npu")
    pool.sleep()
    faults = control.stats().faults
    yield tensor
    assert control.stats().faults > faults
    pool.wake_up()
    assert torch.equal(torch.tan(tensor).cpu(), torch.tan(torch.ones(2, 3)))


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        (torch.tan, "aten::tan: argument 'self' (float32 [2, 3])"),
        (lambda a: torch.atan2(torch.ones_like(A[:2, :3], device="npu"), a), "argument 'other' (float32 [2, 3])"),
        (lambda a: torch.tan(a[1:, :2]), "argument 'self' (float32 [1, 2])"),
        (lambda a: torch.tan(A.to("npu")[:2, :3], out=a), "argument 'out' (float32 [2, 3])"),
        (lambda a: torch.tan(A.to("npu")[0, :1], out=a[:0, 0]), "argument 'out' (float32 [0])"),
        (lambda a: a.erf_(), "argument 'self' (float32 [2, 3])"),
        (lambda a: torch._foreach_mul_([A.to("npu"), a], 2.0), "argument 'self[1]' (float32 [2, 3])"),
        (lambda a: torch.stack([A.to("npu")[:2, :3], a]), "(float32 [2, 3])"),
        (lambda a: a + 1, "aclnnAdds: its tensor 1 of 2 (float32 [2, 3])"),
        (lambda a: a.mul_(2), "aclnnInplaceMuls: its tensor 1 of 1 (float32 [2, 3])"),
        (lambda a: torch.cat([A.to("npu")[:2, :3], a]), "aclnnCat: its tensor 2 of 3 (float32 [2, 3])"),
    ],
)
def test_an_operand_in_memory_that_sleeps_is_named(asleep: torch.Tensor, operation: Operation, words: str) -> None:
    with pytest.raises(RuntimeError) as error:
        operation(asleep)
    assert words in str(error.value)
    assert "sleeps" in str(error.value)


# ---- streams -----------------------------------------------------

LAZY = """
from tests.aclsim import control
a = torch.ones(4, device="npu")
torch.npu.synchronize()
assert control.stats().pending == 0
{operation}
print("pending", control.stats().pending)
print("value", b.cpu().tolist())
"""


def test_torch_npus_own_kernels_are_delayed_by_a_lazy_stream() -> None:
    done = run(LAZY.format(operation="b = a.exp_().neg_()"), ACLSIM_STREAM="lazy", TASK_QUEUE_ENABLE="0")
    assert "pending 2" in done.stdout, done.stdout + done.stderr
    assert "value [-2.718" in done.stdout


def test_a_cpu_kernel_waits_for_its_stream_first() -> None:
    done = run(LAZY.format(operation="a.exp_()\nb = a.tan().frac()"), ACLSIM_STREAM="lazy", TASK_QUEUE_ENABLE="0")
    assert "pending 0" in done.stdout, done.stdout + done.stderr
    assert "value [-0.450" in done.stdout


def test_memory_that_falls_asleep_before_a_lazy_stream_runs_is_an_error_when_waited_for() -> None:
    program = """
from tests.aclsim import control
import ctypes
from allocator import SleepPool
pool = SleepPool.get("npu:0")
with pool.region("weights"):
    a = torch.ones(2, 3, device="npu")
torch.npu.synchronize()
a.exp_()
lib = ctypes.CDLL("libascendcl.so")
lib.aclrtUnmapMem.argtypes = [ctypes.c_void_p]
assert lib.aclrtUnmapMem(a.data_ptr() // (2 << 20) * (2 << 20)) == 0
try:
    torch_npu.npu.synchronize()
except RuntimeError as error:
    print("raised", error)
    print("faults", control.stats().faults)
__import__("os")._exit(0)
"""
    done = run(program, ACLSIM_STREAM="lazy", TASK_QUEUE_ENABLE="0")
    assert "raised" in done.stdout, done.stdout + done.stderr
    assert "aclnnInplaceExp: its tensor 1 of 1 (float32 [2, 3])" in done.stdout
    assert "faults 1" in done.stdout


# ---- what nobody simulates ---------------------------------------


def test_an_aclnn_operator_that_is_missing_raises_at_the_call() -> None:
    with pytest.raises(RuntimeError, match=r"aclnnComplex or aclnnComplexGetWorkspaceSize not in libopapi\.so"):
        torch.complex(A.to("npu"), A.to("npu")).conj().cumsum(0)
    assert float(torch.full((3,), 2.0, device="npu").sum()) == 6


@pytest.mark.parametrize("queue", ["0", "1"])
def test_an_operator_of_the_older_interface_ends_the_process_and_is_named(queue: str) -> None:
    program = """
a = torch_npu.npu_confusion_transpose(torch.ones(2, 3, 4, 6, device="npu"), (0, 2, 1, 3), (2, 4, 18), True)
print(a.cpu())
"""
    done = run(program, TASK_QUEUE_ENABLE=queue)
    assert done.returncode < 0, done.stdout + done.stderr
    assert "the simulated NPU has no operator ConfusionTransposeD" in done.stderr
    assert done.stdout == ""


# ---- registration ------------------------------------------------


def test_each_process_registers_them_once_and_without_a_word() -> None:
    program = """
import importlib, simulated_npu.start, simulated_npu.torch_operators
importlib.reload(simulated_npu.start)
import sys
assert sum(getattr(one, "__module__", "") == "simulated_npu.start" for one in sys.meta_path) == 1
print(torch.ones(2, device="npu").tan().sum())
"""
    done = run(program)
    assert done.returncode == 0, done.stderr
    assert "Overriding" not in done.stderr
    assert "Warning" not in done.stderr.replace("Warning: The current CANN", "").replace("Warning: Device do not", "")


@pytest.mark.parametrize("home", ["", "/"])
def test_without_the_simulated_cann_the_import_says_what_to_do(home: str) -> None:
    done = run("", ASCEND_HOME_PATH=home)
    assert done.returncode != 0
    assert f"source {sys.prefix}/cann/set_env.sh" in done.stderr
    assert "Segmentation" not in done.stderr
    program = "import importlib.util; print(importlib.util.find_spec('torch_npu') is not None)"
    environment = {**os.environ, "ASCEND_HOME_PATH": home}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "True\n"


def test_torch_npus_kernels_stay_where_libopapi_has_what_they_call() -> None:
    operators = importlib.import_module("simulated_npu.torch_operators").aclnn_operators()
    assert "aten::add.Tensor" in operators
    for name in operators:
        dump = torch._C._dispatch_dump(name)
        assert "torch_operators.cpp" not in dump, name
    assert "torch_operators.cpp" in torch._C._dispatch_dump("aten::tan")
