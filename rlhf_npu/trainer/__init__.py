"""The PPO loop and what surrounds it: validation, metrics, trackers, the terminal, the output folder."""
