"""Which of torch's operators on an NPU are computed by what.

Three kinds. torch_npu's own kernels stay for memory and views, and for those in ``_ACLNN``, whose host code then runs
up to the simulated libopapi.so. All others that have a CPU kernel are computed by it. Composite operators that
torch_npu fuses, and the CPU does not, are composed as torch itself does it. What is none of these stays torch_npu's,
and ends in the error of an aclnn operator that libopapi.so lacks.
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

# torch's operators, and the aclnn operators that torch_npu's kernels of them call for any operands. A kernel that calls
# others too, which libopapi.so lacks, is not here: addmm_, all.all_out, div.Tensor_mode, eq_.Tensor, index.Tensor,
# max.dim ...
_ACLNN = """
    _log_softmax: LogSoftmax InplaceZero
    _softmax: Softmax InplaceZero Cast InplaceCopy
    abs abs.out abs_: Abs
    add.Tensor add.out: Add Adds
    add_.Tensor: InplaceAdd InplaceAdds
    addcdiv_: InplaceAddcdiv
    addcmul_: InplaceAddcmul
    addmm addmm.out: Addmm
    all all.dim all.out: All
    any any.all_out any.dim any.out: Any
    arange arange.out arange.start arange.start_out arange.start_step: Arange
    argmax.out: ArgMax InplaceZero
    bmm bmm.out: BatchMatMul
    cat cat.out: Cat
    cos cos.out cos_: Cos InplaceCos
    div.Tensor div.out: Div Divs
    div_.Tensor: InplaceDiv InplaceDivs
    embedding: Embedding
    eq.Scalar eq.Tensor eq.Tensor_out: EqTensor EqScalar
    equal: Equal
    exp exp.out exp_: Exp InplaceExp
    fill_.Scalar full full.out: InplaceFillScalar
    fill_.Tensor: InplaceFillScalar InplaceFillTensor
    gather gather.out: Gather
    ge.Scalar ge.Tensor ge.Tensor_out: GeTensor GeScalar
    gt.Scalar gt.Tensor gt.Tensor_out: GtTensor GtScalar
    index_select index_select.out: IndexSelect
    le.Scalar le.Tensor le.Tensor_out: LeTensor LeScalar
    lerp_.Scalar: InplaceLerps
    logical_not logical_not.out logical_not_: LogicalNot InplaceLogicalNot
    lt.Scalar lt.Tensor lt.Tensor_out: LtTensor LtScalar
    max: Max InplaceZero
    mean mean.dim mean.out: Mean InplaceZero
    min: Min InplaceZero
    mm mm.out: Mm
    mul.Tensor mul.out: Mul Muls
    mul_.Tensor: InplaceMul InplaceMuls
    ne.Scalar ne.Tensor ne.Tensor_out: NeTensor NeScalar
    neg neg.out neg_: Neg
    normal_: InplaceNormal
    ones ones.out ones_like: InplaceOne InplaceFillScalar
    pow.Tensor_Scalar: PowTensorScalar
    relu: Relu
    rsqrt rsqrt.out rsqrt_: Rsqrt InplaceRsqrt
    sigmoid sigmoid.out sigmoid_: Sigmoid InplaceSigmoid
    silu silu_: Silu
    sin sin.out sin_: Sin InplaceSin
    sqrt sqrt.out sqrt_: Sqrt InplaceSqrt
    sub.Tensor sub.out: Sub Subs
    sub_.Tensor: InplaceSub InplaceSubs
    sum sum.dim_IntList: ReduceSum
    uniform_: InplaceUniform
    where.self where.self_out: SWhere
    zero_ zeros zeros.out: InplaceZero
"""


@cache
def _has_aclnn(name: str) -> bool:
    return hasattr(ctypes.CDLL("libopapi.so"), f"aclnn{name}")


@cache
def aclnn_operators() -> frozenset[str]:
    """The operators that torch_npu's own kernels compute, by aclnn operators that libopapi.so all has."""
    kept: set[str] = set()
    for line in _ACLNN.strip().splitlines():
        names, calls = line.split(":")
        if all(map(_has_aclnn, calls.split())):
            kept.update(f"aten::{name}" for name in names.split())
    return frozenset(kept)


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
    compositions = (registered["CompositeImplicitAutograd"] & fused) - registered["CPU"]
    compiled.register_compositions(sorted(compositions - {"aten::scaled_dot_product_attention"}))
