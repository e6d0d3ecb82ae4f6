// The few functions of CUDA's driver that the pool calls, declared here so that no CUDA header is needed to build.
// tests/allocator/csrc/cuda_declarations.cpp holds them against the real header.
#pragma once

#include <cstddef>
#include <cstdint>

namespace allocator::cuda {

using Error = int;
using Device = int;
using Context = void*;
using Stream = void*;
using Event = void*;
using Address = unsigned long long;
using PhysicalHandle = unsigned long long;

constexpr Error kSuccess = 0;
constexpr Error kOutOfMemory = 2;

// Enumerations of CUDA, each an int in its ABI.
constexpr int kPinned = 1;               // CUmemAllocationType
constexpr int kOnDevice = 1;             // CUmemLocationType
constexpr int kMinimumGranularity = 0;   // CUmemAllocationGranularity_flags
constexpr int kReadWrite = 3;            // CUmemAccess_flags
constexpr unsigned kNonBlocking = 1;     // CUstream_flags: not ordered with the default stream
constexpr unsigned kWithoutTiming = 2;   // CUevent_flags
constexpr unsigned kPortable = 1;        // of cuMemHostRegister: pinned for every context

struct Location {
  int type;
  int id;
};

struct PhysicalProperties {
  int allocation_type;
  int handle_types;
  Location location;
  void* win32;
  struct {
    unsigned char compression;
    unsigned char rdma;
    unsigned short usage;
    unsigned char reserved[4];
  } flags;
};

struct Access {
  Location location;
  int flags;
};

// X(name, symbol, parameters): the symbol is that of the header's newest version of the name.
// clang-format off
#define SLEEP_POOL_CUDA_FUNCTIONS(X)                                                                           \
  X(cuInit, "cuInit", (unsigned flags))                                                                        \
  X(cuGetErrorString, "cuGetErrorString", (Error error, const char** words))                                   \
  X(cuDeviceGetCount, "cuDeviceGetCount", (int* count))                                                        \
  X(cuDeviceGet, "cuDeviceGet", (Device* device, int ordinal))                                                 \
  X(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (Context* context, Device device))                   \
  X(cuCtxPushCurrent, "cuCtxPushCurrent_v2", (Context context))                                                \
  X(cuCtxPopCurrent, "cuCtxPopCurrent_v2", (Context* context))                                                 \
  X(cuCtxSynchronize, "cuCtxSynchronize", ())                                                                  \
  X(cuMemGetInfo, "cuMemGetInfo_v2", (std::size_t* free_bytes, std::size_t* total_bytes))                      \
  X(cuMemGetAllocationGranularity, "cuMemGetAllocationGranularity",                                            \
    (std::size_t* bytes, const PhysicalProperties* properties, int option))                                    \
  X(cuMemAddressReserve, "cuMemAddressReserve",                                                                \
    (Address* address, std::size_t bytes, std::size_t alignment, Address wanted, unsigned long long flags))    \
  X(cuMemAddressFree, "cuMemAddressFree", (Address address, std::size_t bytes))                                \
  X(cuMemCreate, "cuMemCreate",                                                                                \
    (PhysicalHandle* handle, std::size_t bytes, const PhysicalProperties* properties, unsigned long long flags)) \
  X(cuMemRelease, "cuMemRelease", (PhysicalHandle handle))                                                     \
  X(cuMemMap, "cuMemMap",                                                                                      \
    (Address address, std::size_t bytes, std::size_t offset, PhysicalHandle handle, unsigned long long flags)) \
  X(cuMemSetAccess, "cuMemSetAccess",                                                                          \
    (Address address, std::size_t bytes, const Access* access, std::size_t count))                             \
  X(cuMemUnmap, "cuMemUnmap", (Address address, std::size_t bytes))                                            \
  X(cuMemHostRegister, "cuMemHostRegister_v2", (void* memory, std::size_t bytes, unsigned flags))              \
  X(cuMemHostUnregister, "cuMemHostUnregister", (void* memory))                                                \
  X(cuStreamCreate, "cuStreamCreate", (Stream* stream, unsigned flags))                                        \
  X(cuEventCreate, "cuEventCreate", (Event* event, unsigned flags))                                            \
  X(cuEventRecord, "cuEventRecord", (Event event, Stream stream))                                              \
  X(cuEventSynchronize, "cuEventSynchronize", (Event event))                                                   \
  X(cuMemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2",                                                                 \
    (void* to, Address from, std::size_t bytes, Stream stream))                                                \
  X(cuMemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2",                                                                 \
    (Address to, const void* from, std::size_t bytes, Stream stream))                                          \
  X(cuMemsetD8Async, "cuMemsetD8Async",                                                                        \
    (Address to, unsigned char value, std::size_t bytes, Stream stream))
// clang-format on

struct Functions {
#define SLEEP_POOL_CUDA_POINTER(name, symbol, parameters) Error(*name) parameters = nullptr;
  SLEEP_POOL_CUDA_FUNCTIONS(SLEEP_POOL_CUDA_POINTER)
#undef SLEEP_POOL_CUDA_POINTER
};

}  // namespace allocator::cuda
