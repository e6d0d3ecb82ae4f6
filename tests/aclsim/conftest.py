"""The pool on an NPU whose AscendCL is simulated (csrc, Makefile): collected only where torch_npu is installed."""

import importlib.util

if importlib.util.find_spec("torch_npu") is None:
    collect_ignore_glob = ["test_*.py"]
