"""Tests on the NPU stack that users install, over the simulated AscendCL: collected only where torch_npu is."""

import importlib.util

if importlib.util.find_spec("torch_npu") is None:
    collect_ignore_glob = ["test_*.py"]
