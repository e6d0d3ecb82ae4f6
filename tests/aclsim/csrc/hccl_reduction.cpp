#include "hccl_reduction.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace hccl {
namespace {

struct BFloat16 {
  std::uint16_t bits;

  BFloat16() = default;
  explicit BFloat16(float value) {
    std::uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    // To the nearest, and to the even one of two; a NaN stays one.
    bits = static_cast<std::uint16_t>(std::isnan(value) ? wide >> 16 | 0x40 : (wide + 0x7fff + (wide >> 16 & 1)) >> 16);
  }
  explicit operator float() const {
    const std::uint32_t wide = std::uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
};

// Integers wrap around as on the device: computed without sign, where that is defined.
template <typename Wide>
Wide combine(Wide a, Wide b, HcclReduceOp operation) {
  switch (operation) {
    case HCCL_REDUCE_SUM: return a + b;
    case HCCL_REDUCE_PROD: return a * b;
    case HCCL_REDUCE_MAX: return a != a || a > b ? a : b;
    default: return a != a || a < b ? a : b;
  }
}

std::int64_t combine_integers(std::int64_t a, std::int64_t b, HcclReduceOp operation) {
  if (operation == HCCL_REDUCE_MAX || operation == HCCL_REDUCE_MIN) return combine<std::int64_t>(a, b, operation);
  const auto unsigned_a = static_cast<std::uint64_t>(a);
  return static_cast<std::int64_t>(combine<std::uint64_t>(unsigned_a, static_cast<std::uint64_t>(b), operation));
}

template <typename T>
void reduce_floats(T* to, const T* other, std::size_t count, HcclReduceOp operation) {
  for (std::size_t i = 0; i < count; ++i) {
    to[i] = static_cast<T>(combine(static_cast<float>(to[i]), static_cast<float>(other[i]), operation));
  }
}

template <typename T>
void reduce_integers(T* to, const T* other, std::size_t count, HcclReduceOp operation) {
  for (std::size_t i = 0; i < count; ++i) to[i] = static_cast<T>(combine_integers(to[i], other[i], operation));
}

}  // namespace

std::size_t width(HcclDataType type) {
  switch (type) {
    case HCCL_DATA_TYPE_INT8:
    case HCCL_DATA_TYPE_UINT8:
      return 1;
    case HCCL_DATA_TYPE_INT16:
    case HCCL_DATA_TYPE_UINT16:
    case HCCL_DATA_TYPE_FP16:
    case HCCL_DATA_TYPE_BFP16:
      return 2;
    case HCCL_DATA_TYPE_INT32:
    case HCCL_DATA_TYPE_UINT32:
    case HCCL_DATA_TYPE_FP32:
      return 4;
    case HCCL_DATA_TYPE_INT64:
    case HCCL_DATA_TYPE_UINT64:
    case HCCL_DATA_TYPE_FP64:
      return 8;
    default:
      return 0;
  }
}

bool can_reduce(HcclDataType type, HcclReduceOp operation) {
  if (operation < HCCL_REDUCE_SUM || operation > HCCL_REDUCE_MIN) return false;
  switch (type) {
    case HCCL_DATA_TYPE_INT8:
    case HCCL_DATA_TYPE_INT32:
    case HCCL_DATA_TYPE_INT64:
    case HCCL_DATA_TYPE_FP16:
    case HCCL_DATA_TYPE_FP32:
      return true;
    case HCCL_DATA_TYPE_INT16:
    case HCCL_DATA_TYPE_BFP16:
      return operation != HCCL_REDUCE_PROD;
    default:
      return false;
  }
}

void reduce(void* to, const void* other, std::size_t bytes, HcclDataType type, HcclReduceOp operation) {
  const auto floats = [&]<typename T>(T*) {
    reduce_floats(static_cast<T*>(to), static_cast<const T*>(other), bytes / sizeof(T), operation);
  };
  const auto integers = [&]<typename T>(T*) {
    reduce_integers(static_cast<T*>(to), static_cast<const T*>(other), bytes / sizeof(T), operation);
  };
  switch (type) {
    case HCCL_DATA_TYPE_INT8: return integers(static_cast<std::int8_t*>(nullptr));
    case HCCL_DATA_TYPE_INT16: return integers(static_cast<std::int16_t*>(nullptr));
    case HCCL_DATA_TYPE_INT32: return integers(static_cast<std::int32_t*>(nullptr));
    case HCCL_DATA_TYPE_INT64: return integers(static_cast<std::int64_t*>(nullptr));
    case HCCL_DATA_TYPE_FP16: return floats(static_cast<_Float16*>(nullptr));
    case HCCL_DATA_TYPE_FP32: return floats(static_cast<float*>(nullptr));
    case HCCL_DATA_TYPE_BFP16: return floats(static_cast<BFloat16*>(nullptr));
    default: break;  // can_reduce() refused the call
  }
}

}  // namespace hccl
