"""Which of torch's operators on an NPU are computed by what.

Three kinds. torch_npu's own kernels stay for memory and views, and for the operators in ``ACLNN``, whose host code then
runs up to the simulated libopapi.so. All others that have a CPU kernel are computed by it. Composite operators that
torch_npu fuses are composed as torch itself does it. What is none of these stays torch_npu's, and ends in the error of
an aclnn operator that libopapi.so lacks.
"""

from __future__ import annotations

import ctypes
from functools import cache

from simulated_npu import library

# Memory, copies between devices, and what has to do with streams.
_MEMORY = [
    "_copy_from",
    "_copy_from_and_resize",
    "_has_compatible_shallow_copy_type",
    "_local_scalar_dense",
    "_pin_memory",
    "_resize_",
    "_to_copy",
    "clone",
    "contiguous",
    "copy_",
    "data",
    "empty.memory_format",
    "empty_like",
    "empty_quantized",
    "empty_strided",
    "is_pinned",
    "is_same_size",
    "is_set_to",
    "item",
    "lift",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "pin_memory",
    "record_stream",
    "resize_",
    "set_",
    "set_.source_Storage",
    "set_.source_Storage_storage_offset",
    "set_.source_Tensor",
    "set_data",
    "to.device",
    "to.dtype",
    "to.dtype_layout",
    "to.other",
    "to.prim_Device",
    "to.prim_dtype",
]

# The aclnn operators that torch_npu's kernel may call.
ACLNN = {
    "abs": "Abs",
    "abs.out": "Abs",
    "abs_": "InplaceAbs",
    "zero_": "InplaceZero",
    "fill_.Scalar": "InplaceFillScalar",
    "fill_.Tensor": "InplaceFillScalar InplaceFillTensor",
    "add.Tensor": "Add Adds",
    "add_.Tensor": "InplaceAdd InplaceAdds",
    "sub.Tensor": "Sub Subs",
    "sub_.Tensor": "InplaceSub InplaceSubs",
    "mul.Tensor": "Mul Muls",
    "mul_.Tensor": "InplaceMul InplaceMuls",
    "div.Tensor": "Div Divs",
    "div_.Tensor": "InplaceDiv InplaceDivs",
    "addcmul_": "InplaceAddcmul",
    "addcdiv_": "InplaceAddcdiv",
    "pow.Tensor_Scalar": "PowTensorScalar",
    "mm": "Mm",
    "bmm": "BatchMatMul",
    "addmm": "Addmm",
    "embedding": "Embedding",
    "index_select": "IndexSelect",
    "gather": "Gather",
    "cat": "Cat",
    "where.self": "SWhere",
    "_softmax": "Softmax",
    "_log_softmax": "LogSoftmax",
}


@cache
def _has_aclnn(name: str) -> bool:
    return hasattr(ctypes.CDLL("libopapi.so"), f"aclnn{name}")


def aclnn_operators() -> frozenset[str]:
    """The operators that torch_npu's own kernels compute, by aclnn operators that libopapi.so all has."""
    return frozenset(f"aten::{name}" for name, calls in ACLNN.items() if all(map(_has_aclnn, calls.split())))


@cache
def install() -> None:
    """Registers them, once a process. torch_npu must be imported."""
    compiled = library.load()
    kept = aclnn_operators() | {f"aten::{name}" for name in _MEMORY}
    registered = {
        key: set(compiled.registered(key)) - kept
        for key in (
            "CPU",
            "PrivateUse1",
            "AutogradPrivateUse1",
            "CompositeExplicitAutograd",
            "CompositeExplicitAutogradNonFunctional",
            "CompositeImplicitAutograd",
        )
    }
    explicit = registered["CompositeExplicitAutograd"] | registered["CompositeExplicitAutogradNonFunctional"]
    compiled.register_cpu_kernels(sorted(registered["CPU"] | (explicit & registered["PrivateUse1"])))
    fused = registered["PrivateUse1"] | registered["AutogradPrivateUse1"]
    compositions = registered["CompositeImplicitAutograd"] & fused
    compiled.register_compositions(sorted(compositions - {"aten::scaled_dot_product_attention"}))
