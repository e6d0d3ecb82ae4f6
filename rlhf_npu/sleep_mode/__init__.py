"""vLLM's sleep mode in the sleep pool: a plug-in of vLLM, which knows nothing of RL."""
