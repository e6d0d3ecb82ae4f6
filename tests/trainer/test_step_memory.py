"""What a step's switches say in metrics.jsonl: seconds of the slowest rank, bytes of the largest."""

from __future__ import annotations

import pytest

from tests.trainer.switches import BACKUP, GIB, measured_step

GB = 1e9


def test_seconds_are_those_of_the_slowest_rank_and_add_up_to_the_steps() -> None:
    metrics = measured_step().metrics()
    assert metrics["switch_s/old_log_prob/sleep"] == pytest.approx(0.6)
    assert metrics["switch_s/old_log_prob/wake_up"] == pytest.approx(0.4)
    assert metrics["switch_s/generate/wake_up"] == pytest.approx(0.3)
    assert metrics["timing_s/sleep"] == pytest.approx(0.6 + 0.2)
    assert metrics["timing_s/wake_up"] == pytest.approx(0.4 + 0.3)
    assert metrics["timing_s/reshard"] == metrics["switch_s/generate/reshard"] == pytest.approx(0.3)


def test_a_step_without_a_switch_took_no_time_for_it() -> None:
    step = measured_step()
    step.entries = step.entries[:1]
    metrics = step.metrics()
    assert [metrics[f"timing_s/{phase}"] for phase in ("sleep", "wake_up", "reshard")] == [0, 0, 0]
    assert "reshard/version" not in metrics


def test_a_reshard_is_counted_over_all_ranks() -> None:
    metrics = measured_step().metrics()
    assert metrics["reshard/version"] == 7
    assert metrics["reshard/gb"] == pytest.approx(8.0)


def test_what_sleeps_holds_nothing_on_the_device_and_its_backup_is_told() -> None:
    metrics = measured_step().metrics()
    assert metrics["memory/old_log_prob/weights/mapped_gb"] == 0
    assert metrics["memory/old_log_prob/kv_cache/mapped_gb"] == 0
    assert metrics["memory/old_log_prob/actor.params/mapped_gb"] == pytest.approx(8 * GIB / GB)
    assert metrics["memory/generate/actor.params/mapped_gb"] == 0
    assert metrics["memory/generate/kv_cache/mapped_gb"] == pytest.approx(20 * GIB / GB)
    assert metrics["memory/actor.params/host_gb"] == pytest.approx(BACKUP / GB)


def test_memory_in_use_is_the_fullest_ranks_when_a_stage_begins_and_at_its_peak() -> None:
    metrics = measured_step().metrics()
    assert metrics["memory/generate/used_gb"] == pytest.approx((24 + 3) * GIB / GB)
    assert metrics["memory/generate/peak_gb"] == pytest.approx(30 * GIB / GB)
    assert metrics["memory/old_log_prob/used_gb"] == pytest.approx((8 + 3) * GIB / GB)
    assert metrics["perf/max_memory_used_gb"] == metrics["memory/old_log_prob/peak_gb"] == pytest.approx(35 * GIB / GB)
    assert metrics["perf/max_memory_pool_gb"] == pytest.approx(24 * GIB / GB)
