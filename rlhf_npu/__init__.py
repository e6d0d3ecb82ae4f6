"""RL post-training for Ascend NPUs in which one set of devices both generates and trains."""

__version__ = "0.1.0"
