"""The trainer's weights into the rollout: who takes what, how it moves, and the proof that it arrived."""
