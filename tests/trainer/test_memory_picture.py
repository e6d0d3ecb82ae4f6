"""The picture of a step's memory: the bytes that it shows, of which rank, and names that can be read."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from rlhf_npu.hybrid.ledger import Ledger
from rlhf_npu.hybrid.switch_plan import Stage
from rlhf_npu.hybrid.switch_report import SwitchReport
from rlhf_npu.trainer.memory_picture import COLOURS, OTHER_COLOURS, PHASE_COLOURS, draw_memory, spread
from rlhf_npu.trainer.memory_timeline import memory_timeline
from rlhf_npu.trainer.switch_times import StepSwitches
from tests.trainer.switches import GENERATING, GIB, SCORING, START, measured_step


def pixels(file: Path, colour: str) -> int:
    """How many pixels of the picture have a colour."""
    picture = matplotlib.image.imread(file)[..., :3]
    return int((np.abs(picture - to_rgb(colour)).max(axis=-1) < 0.01).sum())


def test_areas_are_bytes_times_seconds(tmp_path: Path) -> None:
    file = tmp_path / "memory.png"
    draw_memory(measured_step(), file)
    cache, weights, params = (pixels(file, COLOURS[tag]) for tag in ("kv_cache", "weights", "actor.params"))
    assert cache / weights == pytest.approx(20 / 4, rel=0.15)
    assert params / weights == pytest.approx((8 * 2.8) / (4 * 6.8), rel=0.15)
    assert all(pixels(file, colour) for colour in PHASE_COLOURS.values())


def test_a_tag_that_holds_nothing_all_along_is_not_in_the_picture(tmp_path: Path) -> None:
    file = tmp_path / "memory.png"
    draw_memory(measured_step(), file)
    assert pixels(file, COLOURS["critic.optimizer"]) == 0


def test_the_fullest_rank_is_drawn(tmp_path: Path) -> None:
    whole, second = tmp_path / "whole.png", tmp_path / "second.png"
    step = measured_step()
    draw_memory(step, whole)
    step.entries = [entry[::-1] for entry in step.entries]
    draw_memory(step, second)
    one, other = (matplotlib.image.imread(file) for file in (whole, second))
    title = int(0.06 * len(one))  # the rank's number is there
    assert np.array_equal(one[title:], other[title:])
    assert not np.array_equal(one[:title], other[:title])


def test_a_tag_without_a_colour_of_its_own_and_a_step_of_one_stage_are_drawn(tmp_path: Path) -> None:
    file = tmp_path / "memory.png"
    step = StepSwitches("step 1", START)
    after = Ledger({"adapter.params": 3 * GIB, "empty": 0}, {}, used=4 * GIB, capacity=None, resident=GIB)
    step.add([SwitchReport(Stage.GENERATE, (), after, None, START)])
    step.ended = START + 5
    draw_memory(step, file)
    assert max(pixels(file, colour) for colour in OTHER_COLOURS) > 100_000


def test_what_sleeps_and_wakes_changes_in_its_phase_and_nowhere_else() -> None:
    step = measured_step()
    states = {round(point.time - START, 3): point.mapped for point in memory_timeline(step.of_rank(0), None)}
    assert states[6.0] == GENERATING
    assert states[6.5] == GENERATING | {"weights": 0, "kv_cache": 0}
    assert states[6.9] == states[7.0] == states[9.0] == SCORING
    assert states[9.4] == SCORING | {"weights": GENERATING["weights"]}
    assert states[9.9] == GENERATING


def test_what_came_before_a_step_is_where_its_first_phase_begins() -> None:
    step = measured_step()
    known = memory_timeline(step.of_rank(0)[1:], step.of_rank(0)[0].after)
    assert known[0].mapped == GENERATING
    assert memory_timeline(step.of_rank(0)[1:], None)[0].mapped == SCORING


@pytest.mark.parametrize(
    ("places", "moved"),
    [
        ([0.1, 0.5], [0.1, 0.5]),
        ([0.1, 0.11, 0.12], [0.1, 0.2, 0.3]),
        ([0.95, 0.99, 1.0], [0.8, 0.9, 1.0]),
    ],
)
def test_names_of_short_stages_get_room(places: list[float], moved: list[float]) -> None:
    assert spread(places, 0.1) == pytest.approx(moved)
