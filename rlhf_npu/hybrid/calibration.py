"""What each stage takes beside the tags, by the driver's count."""

from __future__ import annotations

from rlhf_npu.hybrid.switch_plan import Stage
from rlhf_npu.hybrid.switch_report import StagePeak
from rlhf_npu.platform import Platform


class Calibration:
    """Measures workspaces while a step runs: activations, buffers, graphs, what libraries keep for themselves.

    Memory that torch has cached is given back before each stage, so that its peak is its own.
    """

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self.workspace: dict[Stage, int] = {}

    def leave(self, peak: StagePeak | None, awake_bytes: int) -> None:
        """A stage is over, of whose bytes `awake_bytes` were those of tags; None before the first stage."""
        if peak is not None:
            self.workspace[peak.stage] = max(peak.used - awake_bytes, self.workspace.get(peak.stage, 0))
        self._platform.empty_cache()
