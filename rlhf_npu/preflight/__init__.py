"""What to run first on a machine: whether the memory pool can be relied on there.

`scripts/preflight.py`, or `python -m rlhf_npu.preflight` where the package is installed.
"""
