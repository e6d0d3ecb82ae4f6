"""The two engines that share a device: the DeepSpeed trainer and the vLLM rollout."""
