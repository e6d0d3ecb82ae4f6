"""A jump of the difference between rollout and trainer is said once."""

from __future__ import annotations

from rlhf_npu.trainer.mismatch_watch import WATCHED, MismatchWatch


def warnings(*differences: float) -> list[int]:
    """The steps, from 1, after which there was a warning."""
    watch = MismatchWatch()
    return [step for step, value in enumerate(differences, start=1) if watch.observe({WATCHED: value}, step)]


def test_a_jump_is_told_once_and_again_after_it_came_back() -> None:
    assert warnings(0.001, 0.0012, 0.0009, 0.02, 0.03, 0.001, 0.05) == [4, 7]


def test_what_stays_small_or_grows_slowly_is_no_jump() -> None:
    assert warnings(1e-7, 1e-7, 1e-7, 5e-5, 1e-7) == []
    assert warnings(*(0.001 * 1.05**step for step in range(60))) == []


def test_the_first_steps_have_nothing_to_be_compared_with() -> None:
    assert warnings(1.0, 2.0, 0.01) == []
    assert MismatchWatch().observe({"critic/score/mean": 1.0}, 1) == []


def test_the_warning_says_what_and_where_to_look() -> None:
    watch = MismatchWatch()
    for step, value in enumerate((0.001, 0.001, 0.5), start=1):
        said = watch.observe({WATCHED: value}, step)
    assert "jumped to 5.0e-01 from 1.0e-03" in said[0]
    assert "preflight.py --model" in said[0]
