"""The ledger tells what is in use by the driver's count; the peak of a stage leaves out what sleeps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from allocator import SleepPool
from rlhf_npu.hybrid.ledger import PeakMeter, read_ledger
from tests.devices import PLATFORM

MIB = 1 << 20
TAG = "ledger.weights"


@pytest.fixture
def pool() -> Iterator[SleepPool]:
    PLATFORM.activate()
    pool = SleepPool.get(PLATFORM.device())
    yield pool
    pool.wake_up()


def _tensor(mib: int) -> torch.Tensor:
    return torch.ones(mib * MIB // 4, device=PLATFORM.device())


def test_a_tag_that_sleeps_moves_from_the_device_to_the_host(pool: SleepPool) -> None:
    with pool.region(TAG):
        weights = _tensor(256)
    awake = read_ledger(PLATFORM)
    pool.sleep(discard=[TAG])
    asleep = read_ledger(PLATFORM)
    assert awake.mapped[TAG] >= 256 * MIB
    assert asleep.mapped[TAG] == 0
    assert awake.used - asleep.used == pytest.approx(256 * MIB, abs=16 * MIB)
    pool.wake_up([TAG])
    pool.sleep(offload=[TAG])
    assert read_ledger(PLATFORM).host[TAG] >= 256 * MIB
    pool.wake_up([TAG])
    assert weights.numel() == 64 * MIB


def test_a_peak_has_what_was_freed_again_and_not_what_sleeps(pool: SleepPool) -> None:
    with pool.region(TAG):
        weights = _tensor(512)
    pool.sleep(discard=[TAG])
    meter = PeakMeter(PLATFORM)
    assert meter.stop() is None
    PLATFORM.empty_cache()
    used = read_ledger(PLATFORM).used
    meter.start(used)
    activations = _tensor(192)
    del activations
    peak = meter.stop()
    assert peak is not None
    assert peak - used == pytest.approx(192 * MIB, abs=24 * MIB)
    PLATFORM.empty_cache()
    used = read_ledger(PLATFORM).used
    meter.start(used)
    again = meter.stop()
    assert again is not None
    assert used <= again < used + 24 * MIB
    pool.wake_up([TAG])
    assert weights.numel() == 128 * MIB
