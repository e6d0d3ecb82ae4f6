"""Reinforcement learning as pure functions of (batch, time) tensors and masks."""
