"""Entry point: `python -m rlhf_npu.main_reward [key=value ...]` trains a reward model on pairs."""

from __future__ import annotations

from rlhf_npu.interrupts import exit_at_once

if __name__ == "__main__":
    exit_at_once()  # before the imports below, which take a second, and those of the engines, which take many

from rlhf_npu.config import REWARD
from rlhf_npu.learning_from_files import learn_from_files

if __name__ == "__main__":
    learn_from_files(REWARD)
