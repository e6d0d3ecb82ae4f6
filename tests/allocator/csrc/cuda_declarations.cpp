// Compiles only when csrc/cuda_api.h agrees with CUDA's own header.
#include <cuda.h>

#include <cstddef>
#include <string_view>

#include "cuda_api.h"
#include "same_signature.h"

namespace own = allocator::cuda;

template <>
struct Same<own::PhysicalProperties, CUmemAllocationProp> : std::true_type {};
template <>
struct Same<own::Access, CUmemAccessDesc> : std::true_type {};
template <>
struct Same<own::Context, CUcontext> : std::true_type {};
template <>
struct Same<own::Stream, CUstream> : std::true_type {};
template <>
struct Same<own::Event, CUevent> : std::true_type {};

// The header's macros give a function's name its version.
#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)
#define SAME_SIGNATURE(name, symbol, parameters)                                              \
  static_assert(SameFunction<decltype(own::Functions::name), decltype(&::name)>::value, #name); \
  static_assert(std::string_view(TEXT(name)) == symbol);
SLEEP_POOL_CUDA_FUNCTIONS(SAME_SIGNATURE)

static_assert(sizeof(own::Location) == sizeof(CUmemLocation));
static_assert(offsetof(own::Location, id) == offsetof(CUmemLocation, id));
static_assert(sizeof(own::PhysicalProperties) == sizeof(CUmemAllocationProp));
static_assert(offsetof(own::PhysicalProperties, handle_types) == offsetof(CUmemAllocationProp, requestedHandleTypes));
static_assert(offsetof(own::PhysicalProperties, location) == offsetof(CUmemAllocationProp, location));
static_assert(offsetof(own::PhysicalProperties, win32) == offsetof(CUmemAllocationProp, win32HandleMetaData));
static_assert(offsetof(own::PhysicalProperties, flags) == offsetof(CUmemAllocationProp, allocFlags));
static_assert(sizeof(own::Access) == sizeof(CUmemAccessDesc));
static_assert(offsetof(own::Access, flags) == offsetof(CUmemAccessDesc, flags));

static_assert(own::kSuccess == CUDA_SUCCESS);
static_assert(own::kOutOfMemory == CUDA_ERROR_OUT_OF_MEMORY);
static_assert(own::kPinned == CU_MEM_ALLOCATION_TYPE_PINNED);
static_assert(own::kOnDevice == CU_MEM_LOCATION_TYPE_DEVICE);
static_assert(own::kMinimumGranularity == CU_MEM_ALLOC_GRANULARITY_MINIMUM);
static_assert(own::kReadWrite == CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
static_assert(own::kNonBlocking == CU_STREAM_NON_BLOCKING);
static_assert(own::kWithoutTiming == CU_EVENT_DISABLE_TIMING);
static_assert(own::kPortable == CU_MEMHOSTREGISTER_PORTABLE);
