"""What a person reads about the plan after the first step."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from rlhf_npu.config import PPOConfig, compose_config
from rlhf_npu.errors import PlanError
from rlhf_npu.hybrid.measured_plan import SecondPlan, second_plan
from rlhf_npu.hybrid.memory.memory_demand import Device, Models
from rlhf_npu.hybrid.memory.memory_plan import MemoryPlan, plan_memory
from rlhf_npu.hybrid.switch_plan import Stage
from rlhf_npu.trainer.plan_watch import PlanWatch
from rlhf_npu.trainer.terminal import PPO_LINE, Terminal
from tests.hybrid.shapes import qwen2_7b
from tests.hybrid.test_memory_plan import TWO_DEVICES
from tests.packaging.test_plan import model_folder

GIB = 1 << 30
DEVICE = Device("npu", 79 * GIB, 79 * GIB)


@dataclass
class Run:
    """A 7 B on two devices, planned and not started."""

    overrides: list[str]
    models: Models
    terminal: Terminal
    output: io.StringIO

    @property
    def config(self) -> PPOConfig:
        return compose_config(self.overrides)

    @property
    def predicted(self) -> MemoryPlan:
        return plan_memory(self.config, self.models, DEVICE)

    def second(self, **seen: int) -> SecondPlan:
        """What is decided when stages took so much beside the tags."""
        predicted = self.predicted
        sizes = {tag.name: tag.bytes for tag in predicted.switch_plan.tags}
        peaks = {Stage[name]: size for name, size in seen.items()}
        return second_plan(self.config, predicted.switch_plan, sizes, peaks, predicted)

    def said(self, second: SecondPlan) -> str:
        watch = PlanWatch(self.config, DEVICE, self.predicted.switch_plan, self.terminal.say, self.terminal.warn)
        watch.observe(second)
        watch.observe(second)
        return self.output.getvalue()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    shape, output = qwen2_7b(), io.StringIO()
    overrides = [*TWO_DEVICES, model_folder(tmp_path / "model")]
    return Run(overrides, Models(shape, shape), Terminal(1, PPO_LINE, Console(file=output)), output)


def test_nothing_is_said_of_a_plan_that_stays(run: Run) -> None:
    assert run.said(run.second()) == ""


def test_another_plan_is_said_once(run: Run) -> None:
    room = 79 * GIB - run.predicted.used(Stage.LOG_PROB)
    second = run.second(LOG_PROB=run.predicted.workspace[Stage.LOG_PROB] + room + 1)
    assert second.plan != run.predicted.switch_plan
    assert run.said(second) == f"after the first step: {second.plan}\n"


def test_a_plan_that_does_not_fit_is_a_warning_with_stage_tag_bytes_and_settings_that_would(run: Run) -> None:
    least = run.predicted.switch_plan.tags
    training = sum(tag.bytes for tag in least if Stage.TRAIN_ACTOR in tag.needed)
    second = run.second(TRAIN_ACTOR=79 * GIB - training + GIB)
    assert second.plan == run.predicted.switch_plan
    said = run.said(second).splitlines()[0]
    assert said.startswith("warning: after the first step: stage 'update_actor' does not fit: it needs 80.00 GiB (")
    assert "1,073,741,824 bytes are missing, and the largest tag there is actor.optimizer" in said
    nearest = re.sub(r".*it would fit with ", "", said).split()
    changed = compose_config([*run.overrides, *nearest])
    assert plan_memory(changed, run.models, DEVICE, second.surplus).peak <= 79 * GIB
    with pytest.raises(PlanError, match="update_actor"):
        plan_memory(run.config, run.models, DEVICE, second.surplus)
