from __future__ import annotations

import itertools

import pytest

from rlhf_npu.data.loader import Position, PromptLoader
from rlhf_npu.data.prompts import PromptDataset, PromptSample
from rlhf_npu.errors import DataError
from tests.prompt_data import dataset_of


def dataset(size: int) -> PromptDataset:
    return dataset_of([PromptSample(index, (1,), "1", "digits", None, {}) for index in range(size)], skipped=2)


def indices(loader: PromptLoader, epoch: int) -> list[list[int]]:
    return [[sample.index for sample in batch] for batch in loader.batches(epoch)]


def test_in_order_without_shuffling() -> None:
    loader = PromptLoader(dataset(7), 3, shuffle=False, seed=1)
    assert len(loader) == 2
    assert indices(loader, 0) == indices(loader, 5) == [[0, 1, 2], [3, 4, 5]]


def test_an_epoch_has_each_prompt_once() -> None:
    batches = indices(PromptLoader(dataset(12), 4, shuffle=True, seed=1), 0)
    assert sorted(itertools.chain(*batches)) == list(range(12))


def test_seed_and_epoch_decide_the_order() -> None:
    loader = PromptLoader(dataset(64), 16, shuffle=True, seed=1)
    later = indices(loader, 3)
    assert later == indices(PromptLoader(dataset(64), 16, shuffle=True, seed=1), 3)
    assert later != indices(loader, 4)
    assert later != indices(PromptLoader(dataset(64), 16, shuffle=True, seed=2), 3)


def test_what_fills_no_batch_is_left_out_and_comes_in_another_epoch() -> None:
    loader = PromptLoader(dataset(5), 4, shuffle=True, seed=0)
    seen = {index for epoch in range(20) for batch in indices(loader, epoch) for index in batch}
    assert all(len(indices(loader, epoch)) == 1 for epoch in range(20))
    assert seen == set(range(5))


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.train_batch_size=4: the training files have 3 prompts \(2 skip"):
        PromptLoader(dataset(3), 4, shuffle=True, seed=0)


def test_a_stream_has_one_epoch_after_the_other() -> None:
    loader = PromptLoader(dataset(7), 3, shuffle=True, seed=1)
    stream = loader.stream()
    taken = [[sample.index for sample in next(stream)] for _ in range(6)]
    assert taken == [*indices(loader, 0), *indices(loader, 1), *indices(loader, 2)]


@pytest.mark.parametrize(
    ("batch", "positions"), [(3, [(0, 0), (0, 3), (0, 6), (0, 9), (1, 3)]), (4, [(0, 0), (0, 4), (0, 8), (1, 4)])]
)
def test_a_stream_goes_on_from_any_position(batch: int, positions: list[tuple[int, int]]) -> None:
    stream = PromptLoader(dataset(10), batch, shuffle=True, seed=1).stream()
    seen = []
    for _ in range(8):
        position = stream.position
        seen.append((position, [sample.index for sample in next(stream)]))
    for start, (position, _) in enumerate(seen):
        again = PromptLoader(dataset(10), batch, shuffle=True, seed=1).stream(position)
        assert [[sample.index for sample in next(again)] for _ in seen[start:]] == [taken for _, taken in seen[start:]]
    assert [position for position, _ in seen[: len(positions)]] == [Position(*each) for each in positions]


def test_another_batch_size_takes_what_the_first_left() -> None:
    stream = PromptLoader(dataset(12), 4, shuffle=True, seed=1).stream()
    first = [sample.index for sample in next(stream)]
    rest = PromptLoader(dataset(12), 2, shuffle=True, seed=1).stream(stream.position)
    others = [sample.index for _ in range(4) for sample in next(rest)]
    assert sorted([*first, *others]) == list(range(12))
    assert rest.position == Position(0, 12)


@pytest.mark.parametrize("position", [Position(0, 13), Position(0, -1), Position(-1, 0)])
def test_a_position_of_other_prompts_is_refused(position: Position) -> None:
    loader = PromptLoader(dataset(12), 4, shuffle=True, seed=1)
    message = f"go on at record {position.offset} of epoch {position.epoch}, but the training files have 12 records"
    with pytest.raises(DataError, match=message):
        loader.stream(position)
