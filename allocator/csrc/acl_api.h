// The few functions of AscendCL that the pool calls, declared here so that no CANN header is needed to build.
// tests/allocator/csrc/acl_declarations.cpp holds them against the real headers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace allocator::acl {

using Error = int;
using Stream = void*;
using Event = void*;
using PhysicalHandle = void*;

constexpr Error kSuccess = 0;
constexpr Error kRepeatInitialize = 100002;
constexpr Error kOutOfMemory = 207001;

// Enumerations of AscendCL, each an int in its ABI.
constexpr int kNoShareableHandle = 0;     // aclrtMemHandleType
constexpr int kPinned = 0;                // aclrtMemAllocationType
constexpr int kHbm = 1;                   // aclrtMemAttr: device memory of any page size
constexpr int kHbmHugePages = 4;          // aclrtMemAttr: device memory in pages of 2 MiB
constexpr int kOnDevice = 1;              // aclrtMemLocationType
constexpr int kMinimumGranularity = 0;    // aclrtMemGranularityOptions
constexpr int kHostToDevice = 1;          // aclrtMemcpyKind
constexpr int kDeviceToHost = 2;          // aclrtMemcpyKind
constexpr std::uint32_t kEventSync = 1;   // flag of aclrtCreateEventExWithFlag
constexpr std::uint64_t kReserveHuge = 1; // flags of aclrtReserveMemAddress: addresses for pages of 2 MiB

struct Location {
  std::uint32_t id;
  int type;
};

struct PhysicalProperties {
  int handle_type;
  int allocation_type;
  int attribute;
  Location location;
  std::uint64_t reserved;
};

// X(result, name, parameters)
// clang-format off
#define SLEEP_POOL_ACL_FUNCTIONS(X)                                                                            \
  X(Error, aclInit, (const char* config))                                                                      \
  X(const char*, aclGetRecentErrMsg, ())                                                                       \
  X(Error, aclrtGetDeviceCount, (std::uint32_t* count))                                                        \
  X(Error, aclrtGetDevice, (std::int32_t* device))                                                             \
  X(Error, aclrtSetDevice, (std::int32_t device))                                                              \
  X(Error, aclrtGetMemInfo, (int attribute, std::size_t* free_bytes, std::size_t* total_bytes))                \
  X(Error, aclrtMemGetAllocationGranularity, (PhysicalProperties* properties, int option, std::size_t* bytes)) \
  X(Error, aclrtReserveMemAddress, (void** address, std::size_t bytes, std::size_t alignment, void* expected,  \
                                    std::uint64_t flags))                                                      \
  X(Error, aclrtReleaseMemAddress, (void* address))                                                            \
  X(Error, aclrtMallocPhysical, (PhysicalHandle* handle, std::size_t bytes,                                    \
                                 const PhysicalProperties* properties, std::uint64_t flags))                   \
  X(Error, aclrtFreePhysical, (PhysicalHandle handle))                                                         \
  X(Error, aclrtMapMem, (void* address, std::size_t bytes, std::size_t offset, PhysicalHandle handle,          \
                         std::uint64_t flags))                                                                 \
  X(Error, aclrtUnmapMem, (void* address))                                                                     \
  X(Error, aclrtMallocHost, (void** memory, std::size_t bytes))                                                \
  X(Error, aclrtFreeHost, (void* memory))                                                                      \
  X(Error, aclrtCreateStream, (Stream* stream))                                                                \
  X(Error, aclrtCreateEventExWithFlag, (Event* event, std::uint32_t flag))                                     \
  X(Error, aclrtRecordEvent, (Event event, Stream stream))                                                     \
  X(Error, aclrtSynchronizeEvent, (Event event))                                                               \
  X(Error, aclrtSynchronizeDevice, ())                                                                         \
  X(Error, aclrtMemcpyAsync, (void* to, std::size_t capacity, const void* from, std::size_t bytes, int kind,   \
                              Stream stream))                                                                  \
  X(Error, aclrtMemsetAsync, (void* to, std::size_t capacity, std::int32_t value, std::size_t bytes,           \
                              Stream stream))
// clang-format on

struct Functions {
#define SLEEP_POOL_ACL_POINTER(result, name, parameters) result(*name) parameters = nullptr;
  SLEEP_POOL_ACL_FUNCTIONS(SLEEP_POOL_ACL_POINTER)
#undef SLEEP_POOL_ACL_POINTER
};

}  // namespace allocator::acl
