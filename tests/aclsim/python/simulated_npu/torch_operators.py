"""Makes torch_npu's operators run on the CPU: `import npusim` after torch_npu. Own prototype, see report.md."""
import os, sys
from pathlib import Path
import torch, torch_npu
from simulated_npu.library import cpu_fallback

# What torch_npu must do itself: memory, views, copies between devices, and what has to do with streams.
KEEP = """empty.memory_format empty_strided as_strided view _reshape_alias view_as_real view_as_complex unfold resize_ _resize_
copy_ _copy_from _copy_from_and_resize _to_copy to.dtype_layout to.device to.dtype to.other set_ set_.source_Storage
set_.source_Storage_storage_offset set_.source_Tensor _local_scalar_dense record_stream is_pinned _pin_memory pin_memory
empty_like new_empty_strided clone contiguous detach alias is_set_to set_data data to.prim_Device to.prim_dtype item
_has_compatible_shallow_copy_type is_same_size new_empty empty_quantized _efficientzerotensor lift lift_fresh _fused_adamw_""".split()


def returns_view(name):
    base, _, overload = name[6:].partition(".")
    schema = getattr(getattr(torch.ops.aten, base), overload or "default")._schema
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def install():
    cpu = set(cpu_fallback.having("aten::", "CPU"))
    npu = set(cpu_fallback.having("aten::", "PrivateUse1"))
    composite = set().union(*(cpu_fallback.having("aten::", k) for k in
        ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")))
    wanted = sorted(n for n in cpu | (composite & npu) if n[6:] not in KEEP and not returns_view(n))
    without = cpu_fallback.take(wanted)
    info = dict(cpu=len(cpu), npu=len(npu), both=len(cpu & npu), taken=len(wanted) - len(without), without=without)
    return info


INFO = install()

# Composite operators that torch_npu replaces by fused ones: back to the composition, which autograd knows.
aten = torch.library.Library("aten", "IMPL")


def decompose_composites():
    composite = set(cpu_fallback.having("aten::", "CompositeImplicitAutograd"))
    npu = set(cpu_fallback.having("aten::", "PrivateUse1")) | set(cpu_fallback.having("aten::", "AutogradPrivateUse1"))
    taken = []
    for name in sorted(composite & npu):
        if name[6:] in KEEP or returns_view(name) or name[6:] == "scaled_dot_product_attention":
            continue
        base, _, overload = name[6:].partition(".")
        op = getattr(getattr(torch.ops.aten, base), overload or "default")
        for key in ("AutogradPrivateUse1", "PrivateUse1"):
            aten.impl(name[6:], (lambda op: lambda *a, **k: op.decompose(*a, **k))(op), key)
        taken.append(name[6:])
    return taken


INFO["composites"] = decompose_composites()


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # the composition only adds masks
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]


for key in ("AutogradPrivateUse1", "PrivateUse1"):
    aten.impl("scaled_dot_product_attention", attention, key)
