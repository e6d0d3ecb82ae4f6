"""What programs do with tensors works with pooled ones: modules, optimizers, saving, numpy, workers."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from allocator import SleepPool
from tests.allocator.conftest import KEEPS_SEGMENTS, content, cpu_only, rounded


def _content(pool: SleepPool) -> int:
    return content(pool)["weights"]


@pytest.fixture
def tensor(pool: SleepPool) -> torch.Tensor:
    with pool.region("weights"):
        return torch.arange(1000, dtype=torch.float32)


def test_a_training_step_with_sleep_between_is_the_step_without(pool: SleepPool) -> None:
    def train(sleep: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        with pool.region("params"):
            model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
        for _ in range(3):
            inputs = torch.randn(16, 64)
            with pool.region("grads"):
                model(inputs).square().mean().backward()
            with pool.region("optimizer"):
                optimizer.step()
            assert all(stats.live > 0 for stats in pool.stats().values())
            optimizer.zero_grad(set_to_none=False)
            if sleep:
                pool.sleep(offload=["params", "optimizer"], discard=["grads"])
                assert sum(stats.mapped for stats in pool.stats().values()) == 0
                pool.wake_up()
                optimizer.zero_grad(set_to_none=False)
        return [parameter.detach().clone() for parameter in model.parameters()]

    with_sleep, without = train(sleep=True), train(sleep=False)
    assert all(torch.equal(*pair) for pair in zip(with_sleep, without, strict=True))


def test_a_loaded_state_dict_stays_in_the_pool(pool: SleepPool) -> None:
    with pool.region("weights"):
        model = torch.nn.Linear(100, 100)
    state = {name: value.clone() + 1 for name, value in model.state_dict().items()}
    address = model.weight.data_ptr()
    model.load_state_dict(state)
    assert model.weight.data_ptr() == address
    pool.sleep()
    pool.wake_up()
    assert torch.equal(model.weight, state["weight"])


def test_views_keep_the_memory_alive(pool: SleepPool) -> None:
    with pool.region("weights"):
        whole = torch.arange(1000)
    view = whole[500:].view(50, 10)
    del whole
    assert _content(pool) == rounded(8000)
    pool.sleep()
    pool.wake_up()
    assert view[0, 0] == 500
    del view
    assert _content(pool) == 0


def test_tensors_without_elements_take_nothing(pool: SleepPool) -> None:
    with pool.region("weights"):
        empty = [torch.empty(0), torch.empty(3, 0)]
    pool.trim()
    stats = pool.stats()["weights"]
    assert stats.mapped == stats.dead
    assert KEEPS_SEGMENTS or stats.mapped == 0
    pool.sleep()
    assert [tensor.numel() for tensor in empty] == [0, 0]


def test_copies_belong_where_they_are_made(pool: SleepPool, tensor: torch.Tensor) -> None:
    parameter = torch.nn.Parameter(tensor)
    outside = [tensor.clone(), copy.deepcopy(tensor), tensor + 1, copy.deepcopy(parameter)]
    assert _content(pool) == rounded(4000)
    with pool.region("weights"):
        inside = [tensor.clone(), tensor + 1, copy.deepcopy(parameter)]
    assert _content(pool) == 4 * rounded(4000)
    pool.sleep(level=1)
    assert float(outside[2][-1]) == 1000
    pool.wake_up()
    assert torch.equal(inside[2], tensor)


@cpu_only("torch_npu writes through a lazy copy")
def test_a_lazy_copy_is_made_when_it_is_written(pool: SleepPool, tensor: torch.Tensor) -> None:
    lazy = torch._lazy_clone(tensor)
    lazy.add_(1)
    assert float(tensor[0]) == 0
    assert float(lazy[0]) == 1
    del tensor
    assert float(lazy[-1]) == 1000


def test_growing_a_tensor_outside_takes_it_out_of_the_pool(pool: SleepPool) -> None:
    with pool.region("weights"):
        grown = torch.ones(1000)
    grown.resize_(5000)
    assert _content(pool) == 0
    assert float(grown[:1000].sum()) == 1000


@cpu_only("numpy does not share an NPU's memory")
def test_numpy_shares_the_memory_and_its_own_is_not_the_pools(pool: SleepPool) -> None:
    with pool.region("weights"):
        pooled = torch.zeros(1000)
        foreign = torch.from_numpy(np.ones(1000))
    array = pooled.numpy()
    assert _content(pool) == rounded(4000)
    pool.sleep()
    pool.wake_up()
    array[:] = 3
    assert float(pooled.sum()) == 3000
    del pooled
    assert _content(pool) == rounded(4000)
    assert float(foreign.sum()) == 1000


def test_saving_and_pickling(pool: SleepPool, tensor: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"weight": tensor}, tmp_path / "weights.pt")
    loaded = torch.load(tmp_path / "weights.pt", weights_only=True)["weight"]
    buffer = io.BytesIO(pickle.dumps(tensor))
    assert torch.equal(loaded, tensor)
    assert torch.equal(pickle.load(buffer).to(tensor.device), tensor)  # torch_npu 2.10 makes a CPU tensor of it
    assert _content(pool) == rounded(4000)
    with pool.region("weights"):
        pooled = torch.load(tmp_path / "weights.pt", weights_only=True)["weight"]
    assert _content(pool) == 2 * rounded(4000)
    del pooled


@cpu_only("processes do not share an NPU's memory")
def test_sharing_memory_with_processes_takes_a_tensor_out_of_the_pool(pool: SleepPool, tensor: torch.Tensor) -> None:
    tensor.share_memory_()
    assert _content(pool) == 0
    pool.sleep(level=2)
    assert float(tensor[-1]) == 999


@cpu_only("an NPU cannot be used in a forked process")
def test_forked_loader_workers_read_pooled_data(pool: SleepPool, tensor: torch.Tensor) -> None:
    loader = DataLoader(TensorDataset(tensor), batch_size=500, num_workers=1, multiprocessing_context="fork")
    assert [float(batch.sum()) for (batch,) in loader] == [124750.0, 374750.0]
    pool.sleep()
    pool.wake_up()
    assert float(tensor.sum()) == 499500


@cpu_only("the profiler of an NPU counts torch's own segments, and needs CANN")
def test_the_profiler_counts_pooled_memory(pool: SleepPool) -> None:
    with torch.profiler.profile(profile_memory=True) as profiler, pool.region("weights"):
        made = torch.empty(1 << 20)
    usage = {event.key: event.self_cpu_memory_usage for event in profiler.key_averages()}
    assert usage["aten::empty"] == 4 << 20
    del made


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.bfloat16, torch.float64, torch.complex64])
def test_every_type_survives(pool: SleepPool, dtype: torch.dtype, held: Callable) -> None:
    with pool.region("weights"):
        made = torch.arange(10_001).to(dtype)
    before = made.clone()
    pool.sleep()
    pool.wake_up()
    assert torch.equal(made, before)
    del made
    pool.trim()
    pool.release_host()
    assert set(held().values()) == {0}
