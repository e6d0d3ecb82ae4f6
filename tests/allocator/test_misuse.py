"""Each misuse gets an error of its own type, before anything was changed."""

from collections.abc import Callable, Iterator

import pytest
import torch

from allocator import (
    DriverError,
    InvalidArgumentError,
    PersistentTagError,
    SleepPool,
    SleepPoolError,
    TagAsleepError,
    UnknownTagError,
)
from tests.allocator.conftest import ON_NPU


@pytest.fixture
def filled(pool: SleepPool) -> Iterator[SleepPool]:
    """Tags weights and kv_cache awake, runtime persistent, sleeper asleep."""
    tensors = []
    for tag in ("weights", "kv_cache", "runtime", "sleeper"):
        with pool.region(tag):
            tensors.append(torch.ones(1000))
    pool.set_persistent("runtime")
    pool.sleep(offload=["sleeper"])
    yield pool
    pool.wake_up()
    assert all(float(tensor.sum()) == 1000 for tensor in tensors)


MISUSES: dict[str, tuple[type[SleepPoolError], str, Callable[[SleepPool], object]]] = {
    "level 0": (InvalidArgumentError, "level is 0", lambda pool: pool.sleep(level=0)),
    "level 3": (InvalidArgumentError, "level is 3", lambda pool: pool.sleep(level=3)),
    "level true": (InvalidArgumentError, "level is True", lambda pool: pool.sleep(level=True)),
    "level and tags": (InvalidArgumentError, "not both", lambda pool: pool.sleep(1, offload=["weights"])),
    "both": (
        InvalidArgumentError,
        "weights",
        lambda pool: pool.sleep(offload=["weights", "kv_cache"], discard=["weights"]),
    ),
    "a string": (InvalidArgumentError, r"\['weights'\]", lambda pool: pool.sleep(offload="weights")),
    "a string to wake": (InvalidArgumentError, r"\['sleeper'\]", lambda pool: pool.wake_up("sleeper")),
    "unknown to offload": (UnknownTagError, "wieghts.*weights", lambda pool: pool.sleep(offload=["wieghts"])),
    "unknown after known": (
        UnknownTagError,
        "kv",
        lambda pool: pool.sleep(offload=["weights"], discard=["kv_cache", "kv"]),
    ),
    "unknown to wake": (UnknownTagError, "kv", lambda pool: pool.wake_up(["sleeper", "kv"])),
    "unknown to require": (UnknownTagError, "kv", lambda pool: pool.require_resident("kv")),
    "unknown to prepare": (UnknownTagError, "kv", lambda pool: pool.prepare_host("kv")),
    "persistent": (
        PersistentTagError,
        "runtime",
        lambda pool: pool.sleep(offload=["weights"], discard=["runtime"]),
    ),
    "persistent while asleep": (TagAsleepError, "sleeper", lambda pool: pool.set_persistent("sleeper")),
    "not resident": (TagAsleepError, "sleeper", lambda pool: pool.require_resident("sleeper")),
    "region of a sleeper": (TagAsleepError, "sleeper", lambda pool: pool.region("sleeper").__enter__()),
    "no name": (InvalidArgumentError, "1 to 127", lambda pool: pool.region("").__enter__()),
    "long name": (InvalidArgumentError, "1 to 127", lambda pool: pool.region("x" * 128).__enter__()),
    "capacity": (InvalidArgumentError, "-1", lambda pool: pool.set_capacity(-1)),
    "fault": (InvalidArgumentError, "copy_out", lambda pool: pool.inject_fault("copy", 1)),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_changes_nothing(filled: SleepPool, misuse: str) -> None:
    kind, message, call = MISUSES[misuse]
    before, calls = filled.stats(), filled.driver_calls()
    with pytest.raises(kind, match=message) as error:
        call(filled)
    assert isinstance(error.value, ValueError)
    assert filled.stats() == before
    assert filled.driver_calls() == calls


@pytest.mark.parametrize("device", ["", "cpu:x", "xpu"])
def test_a_device_without_a_driver_is_refused(device: str) -> None:
    with pytest.raises(InvalidArgumentError):
        SleepPool.get(device)


@pytest.mark.skipif(ON_NPU, reason="there is an NPU here, or a simulated one")
def test_an_npu_without_cann_is_refused_by_what_is_missing() -> None:
    with pytest.raises(DriverError, match=r"libascendcl.so.*set_env.sh"):
        SleepPool.get("npu:0")


def test_a_gpu_that_is_not_there_is_refused_by_what_is_missing() -> None:
    with pytest.raises(DriverError, match=r"libcuda.so.1.*an NVIDIA driver is needed|there is no cuda:99"):
        SleepPool.get("cuda:99")


def test_a_tensor_made_for_a_tag_that_fell_asleep_is_an_error(pool: SleepPool) -> None:
    with pool.region("weights"):
        first = torch.ones(10)
        pool.sleep()
        reason = "NPU out of memory" if ON_NPU else r"'weights'.*wake it up"  # torch_npu does not know the pool's
        with pytest.raises(RuntimeError, match=reason):
            torch.ones(10)
        pool.wake_up()
        second = torch.ones(10)
    assert float((first + second).sum()) == 20


def test_a_tag_without_memory_sleeps_too(pool: SleepPool) -> None:
    with pool.region("weights"):
        pass
    pool.sleep()
    with pytest.raises(TagAsleepError), pool.region("weights"):
        pass
    pool.wake_up()
    with pool.region("weights"):
        assert float(torch.ones(10).sum()) == 10
