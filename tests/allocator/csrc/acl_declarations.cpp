// Compiles only when csrc/acl_api.h agrees with AscendCL's own headers, as the torch_npu wheel carries them.
#include <cstddef>

#include "acl/acl.h"
#include "acl_api.h"
#include "same_signature.h"

namespace own = allocator::acl;

template <>
struct Same<own::PhysicalProperties, aclrtPhysicalMemProp> : std::true_type {};

#define SAME_SIGNATURE(result, name, parameters) \
  static_assert(SameFunction<decltype(own::Functions::name), decltype(&::name)>::value, #name);
SLEEP_POOL_ACL_FUNCTIONS(SAME_SIGNATURE)

static_assert(sizeof(own::Location) == sizeof(aclrtMemLocation));
static_assert(offsetof(own::Location, id) == offsetof(aclrtMemLocation, id));
static_assert(offsetof(own::Location, type) == offsetof(aclrtMemLocation, type));
static_assert(sizeof(own::PhysicalProperties) == sizeof(aclrtPhysicalMemProp));
static_assert(offsetof(own::PhysicalProperties, handle_type) == offsetof(aclrtPhysicalMemProp, handleType));
static_assert(offsetof(own::PhysicalProperties, allocation_type) ==
              offsetof(aclrtPhysicalMemProp, allocationType));
static_assert(offsetof(own::PhysicalProperties, attribute) == offsetof(aclrtPhysicalMemProp, memAttr));
static_assert(offsetof(own::PhysicalProperties, location) == offsetof(aclrtPhysicalMemProp, location));
static_assert(offsetof(own::PhysicalProperties, reserved) == offsetof(aclrtPhysicalMemProp, reserve));

static_assert(own::kSuccess == ACL_SUCCESS);
static_assert(own::kRepeatInitialize == ACL_ERROR_REPEAT_INITIALIZE);
static_assert(own::kOutOfMemory == ACL_ERROR_RT_MEMORY_ALLOCATION);
static_assert(own::kNoShareableHandle == ACL_MEM_HANDLE_TYPE_NONE);
static_assert(own::kPinned == ACL_MEM_ALLOCATION_TYPE_PINNED);
static_assert(own::kHbm == ACL_HBM_MEM);
static_assert(own::kHbmHugePages == ACL_HBM_MEM_HUGE);
static_assert(own::kOnDevice == ACL_MEM_LOCATION_TYPE_DEVICE);
static_assert(own::kMinimumGranularity == ACL_RT_MEM_ALLOC_GRANULARITY_MINIMUM);
static_assert(own::kHostToDevice == ACL_MEMCPY_HOST_TO_DEVICE);
static_assert(own::kDeviceToHost == ACL_MEMCPY_DEVICE_TO_HOST);
static_assert(own::kEventSync == ACL_EVENT_SYNC);
