// Compiles only when csrc/acl_api.h agrees with AscendCL's own headers, as the torch_npu wheel carries them.
#include <cstddef>
#include <type_traits>

#include "acl/acl.h"
#include "acl_api.h"

namespace own = allocator::acl;

// An enumeration of AscendCL is an int here; a structure is one of the same layout; the rest is the same type.
template <typename Own, typename Real>
struct Same : std::is_same<Own, Real> {};

template <>
struct Same<own::PhysicalProperties, aclrtPhysicalMemProp> : std::true_type {};

template <typename Own, typename Real>
constexpr bool is_enumeration() {
  if constexpr (std::is_same_v<Own, int> && std::is_enum_v<Real>) return sizeof(Real) == sizeof(int);
  return false;
}

template <typename Own, typename Real>
constexpr bool same_value = Same<Own, Real>::value || is_enumeration<Own, Real>();

template <typename Own, typename Real>
constexpr bool same_pointee = std::is_const_v<Own> == std::is_const_v<Real> &&
                              same_value<std::remove_const_t<Own>, std::remove_const_t<Real>>;

template <typename Own, typename Real>
constexpr bool same_parameter() {
  if constexpr (std::is_pointer_v<Own> && std::is_pointer_v<Real>) {
    return same_pointee<std::remove_pointer_t<Own>, std::remove_pointer_t<Real>>;
  } else {
    return same_value<Own, Real>;
  }
}

template <typename Own, typename Real>
struct SameFunction : std::false_type {};

template <typename OwnResult, typename... Own, typename RealResult, typename... Real>
struct SameFunction<OwnResult (*)(Own...), RealResult (*)(Real...)> {
  static constexpr bool value = [] {
    if constexpr (sizeof...(Own) == sizeof...(Real)) {
      return same_parameter<OwnResult, RealResult>() && (same_parameter<Own, Real>() && ...);
    } else {
      return false;
    }
  }();
};

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
