"""Sleep and wake-up of NPU tensors with the real torch_npu: memory is counted by the simulated device itself."""

from collections.abc import Iterator

import pytest
import torch

from allocator import HookError, SleepPool
from tests.aclsim import control

MIB = 1 << 20


@pytest.fixture
def pool(request: pytest.FixtureRequest) -> Iterator[SleepPool]:
    made = SleepPool.get("npu:0", namespace=request.node.name)
    errors = control.stats().errors
    yield made
    made.wake_up()
    assert control.stats().errors == errors
    assert control.stats().undefined == 0


def _weights(pool: SleepPool) -> list[torch.Tensor]:
    with pool.region("weights"):
        return [torch.full((size,), float(size), device="npu") for size in (10, 1000, MIB, 8 * MIB, 16 * MIB + 1)]


def test_level_one_keeps_addresses_and_bytes_and_holds_no_device_memory(pool: SleepPool) -> None:
    before = control.stats().used_physical
    weights = _weights(pool)
    with pool.region("kv_cache"):
        cache = torch.ones(4 * MIB, device="npu")
    copies = [tensor.cpu() for tensor in weights]
    addresses = [tensor.data_ptr() for tensor in [*weights, cache]]
    pool.sleep(level=1)
    assert control.stats().used_physical == before
    assert [control.probe(address) for address in addresses] == [0] * len(addresses)
    pool.wake_up()
    assert [tensor.data_ptr() for tensor in [*weights, cache]] == addresses
    for tensor, copy in zip(weights, copies, strict=True):
        assert torch.equal(tensor.cpu(), copy)


def test_what_was_freed_in_a_region_is_not_copied_and_is_used_again(pool: SleepPool) -> None:
    weights = _weights(pool)
    held = control.stats().used_physical
    freed = weights[3].data_ptr()
    del weights[3]
    pool.sleep()
    stats = pool.stats()["weights"]
    live = sum(tensor.nbytes for tensor in weights)
    assert live <= stats.host <= 1.02 * live
    assert stats.sleep.copied == stats.host
    pool.wake_up()
    assert control.stats().used_physical == held
    with pool.region("weights"):
        again = torch.ones(8 * MIB, device="npu")
    assert again.data_ptr() == freed
    assert control.stats().used_physical == held
    assert [float(tensor[-1:].cpu()) for tensor in weights] == [10.0, 1000.0, MIB, 16 * MIB]  # in float32


@pytest.mark.parametrize("variable", ["PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_expandable_segments_by_environment_are_refused(
    pool: SleepPool, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "max_split_size_mb:64, expandable_segments:True")
    with pytest.raises(HookError, match=variable), pool.region("weights"):
        raise AssertionError("the region opened")
