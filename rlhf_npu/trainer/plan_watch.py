"""Says on the terminal what the first step decided about the steps that follow."""

from __future__ import annotations

from rlhf_npu.config import PPOConfig
from rlhf_npu.hybrid.measured_plan import SecondPlan
from rlhf_npu.hybrid.memory.memory_demand import Device
from rlhf_npu.hybrid.memory.memory_plan import advice, models_of
from rlhf_npu.hybrid.switch_plan import SwitchPlan
from rlhf_npu.trainer.function_check import PrintLine


class PlanWatch:
    """Knows the plan that was said last.

    Args:
        config: with local paths of models.
        device: that the run was planned for.
        plan: of the first step.
        say, warn: how to print one line.
    """

    def __init__(self, config: PPOConfig, device: Device, plan: SwitchPlan, say: PrintLine, warn: PrintLine) -> None:
        self._config = config
        self._device = device
        self._plan = plan
        self._say = say
        self._warn = warn

    def observe(self, second: SecondPlan) -> None:
        """Say a plan that is another one than before; warn of one that does not fit, with settings that would."""
        if second.plan != self._plan:
            self._say(f"after the first step: {second.plan}")
            self._plan = second.plan
        if second.burst is not None:
            burst = second.burst
            nearest = advice(self._config, models_of(self._config), self._device, burst.stage, second.surplus)
            self._warn(
                f"after the first step: {burst}; {burst.missing:,} bytes are missing, and the largest tag there is "
                f"{burst.tag}. The run goes on by the plan of the first step, and may run out of memory; {nearest}"
            )
