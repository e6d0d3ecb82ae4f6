"""Run by a .pth file in each Python process: once torch_npu and vllm-ascend's worker are imported, their operators are
replaced (npusim, npu_ops, npu_kernels). So Ray's workers and main_ppo need no change."""
import importlib.abc, importlib.util, os, sys


def after_torch_npu():
    import simulated_npu.torch_operators  # noqa: F401


def after_worker():
    from simulated_npu import npu_operators, triton_kernels
    triton_kernels.install()


AFTER = {"torch_npu": after_torch_npu, "vllm_ascend.worker.worker": after_worker}


class Finder(importlib.abc.MetaPathFinder):
    busy = set()

    def find_spec(self, name, path=None, target=None):
        if name not in AFTER or name in self.busy:
            return None
        self.busy.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.busy.discard(name)
        if spec is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            AFTER.pop(name, lambda: None)()

        spec.loader.exec_module = exec_module
        return spec


if True:
    sys.meta_path.insert(0, Finder())
