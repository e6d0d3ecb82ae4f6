// HCCL's data types and reductions.
#pragma once

#include <cstddef>

#include "hccl/hccl_types.h"

namespace hccl {

// Bytes of an element; 0 for a type that is not simulated.
std::size_t width(HcclDataType type);
// Those that HCCL's documentation names for Atlas A2: AllReduce, Reduce and ReduceScatter of int8, int16, int32, int64,
// float16, float32 and bfloat16, with prod not of int16 and bfloat16.
bool can_reduce(HcclDataType type, HcclReduceOp operation);
// to[i] = operation(to[i], other[i]), rounded to the type.
void reduce(void* to, const void* other, std::size_t bytes, HcclDataType type, HcclReduceOp operation);

}  // namespace hccl
