"""Tensors that are not copied although their tag is offloaded: level 2 that keeps what is no parameter."""

from collections.abc import Iterator

import pytest
import torch

from allocator import DriverError, InvalidArgumentError, SleepPool

MIB = 1 << 20


class Model:
    """Parameters that something will overwrite, and buffers in the same tag that nothing will."""

    def __init__(self, pool: SleepPool) -> None:
        with pool.region("weights"):
            self.parameters = [torch.randn(size) for size in (3 * MIB, 1000, 16, 300_001)]
            self.buffers = [torch.randn(size) for size in (5, 70_000, MIB)]
            self.parameters.append(torch.randn(250))
        self.copies = [buffer.clone() for buffer in self.buffers]

    def buffers_are_intact(self) -> bool:
        return all(torch.equal(*pair) for pair in zip(self.buffers, self.copies, strict=True))


@pytest.fixture
def model(pool: SleepPool) -> Iterator[Model]:
    pool.set_poison(True)
    yield Model(pool)
    pool.set_poison(False)


def test_what_is_not_droppable_is_kept_and_nothing_else_is_copied(pool: SleepPool, model: Model) -> None:
    for _ in range(2):
        pool.sleep(offload=["weights"], droppable=model.parameters)
        copied = pool.stats()["weights"].sleep.copied
        assert sum(buffer.nbytes for buffer in model.buffers) <= copied < sum(b.nbytes for b in model.buffers) + 1024
        pool.wake_up()
        assert model.buffers_are_intact()
        for parameter in model.parameters[:1]:
            assert torch.all(parameter.view(torch.uint8) == 0xA5)


def test_the_next_sleep_copies_everything_again(pool: SleepPool, model: Model) -> None:
    pool.sleep(offload=["weights"], droppable=model.parameters)
    pool.wake_up()
    for parameter in model.parameters:
        parameter.fill_(7)
    pool.sleep(offload=["weights"])
    pool.wake_up()
    assert model.buffers_are_intact()
    assert all(bool(torch.all(parameter == 7)) for parameter in model.parameters)


def test_overlapping_views_and_tensors_of_others_do_no_harm(pool: SleepPool, model: Model) -> None:
    large, elsewhere = model.parameters[0], torch.ones(1000)
    pool.sleep(
        offload=["weights"], droppable=[large[:MIB], large[1000 : 2 * MIB], elsewhere, large[MIB + 1 :], large[:0]]
    )
    assert pool.stats()["weights"].sleep.copied < pool.stats()["weights"].live - large.nbytes + 2048
    pool.wake_up()
    assert model.buffers_are_intact()
    assert float(elsewhere.sum()) == 1000


def test_a_failed_sleep_drops_nothing(pool: SleepPool, model: Model) -> None:
    before = [parameter.clone() for parameter in model.parameters]
    pool.inject_fault("copy_out", 2)
    with pytest.raises(DriverError):
        pool.sleep(offload=["weights"], droppable=model.parameters)
    assert all(torch.equal(*pair) for pair in zip(model.parameters, before, strict=True))
    pool.sleep(offload=["weights"])
    pool.wake_up()
    assert all(torch.equal(*pair) for pair in zip(model.parameters, before, strict=True))


def test_a_level_says_itself_what_is_dropped(pool: SleepPool, model: Model) -> None:
    with pytest.raises(InvalidArgumentError, match="a level or tags"):
        pool.sleep(level=1, droppable=model.parameters)
