// Device memory is host memory: physical memory is a memfd, mapping is mmap, and an address without memory behind it
// cannot be touched. Pages are used only when written, so large devices cost nothing.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>

#include "graphs.h"

namespace aclsim {
namespace {

constexpr int kNoMemory = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
constexpr std::size_t kPage = 4096;
constexpr std::size_t kCopyAlignment = 64;
constexpr std::size_t kLarge = std::size_t{1} << 20;  // bytes from which giving pages back is faster than zeroing them

struct Physical {
  int file;
  std::size_t bytes;
  int device;
  int mappings;
  bool freed;
};

struct Mapping {
  std::size_t bytes;
  Physical* physical;
};

struct Reservation {
  std::size_t bytes;
  std::map<std::uintptr_t, Mapping> mappings;
};

struct Allocation {
  std::size_t bytes;
  int device;
};

// Never destroyed: torch frees its tensors after static destruction began.
struct Addresses {
  std::map<std::uintptr_t, Reservation> reservations;
  std::map<std::uintptr_t, Allocation> allocations;
  std::map<std::uintptr_t, Allocation> host;
};

Addresses& addresses() {
  static auto* const made = new Addresses;
  return *made;
}

std::uintptr_t number(const void* address) { return reinterpret_cast<std::uintptr_t>(address); }

std::size_t round_up(std::size_t bytes, std::size_t multiple) {
  return (bytes + multiple - 1) / multiple * multiple;
}

// The entry whose range holds the address.
template <typename Map>
typename Map::iterator holder(Map& map, std::uintptr_t address) {
  auto entry = map.upper_bound(address);
  if (entry == map.begin()) return map.end();
  --entry;
  return address < entry->first + entry->second.bytes ? entry : map.end();
}

int bad_argument(const std::string& words) { return refuse(ACL_ERROR_RT_PARAM_INVALID, words); }
int out_of_memory(const std::string& words) { return refuse(ACL_ERROR_RT_MEMORY_ALLOCATION, words); }

// Addresses aligned to the granularity, with nothing behind them.
void* reserve(std::size_t bytes) {
  void* const mapped = mmap(nullptr, bytes + kGranularity, PROT_NONE, kNoMemory, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* const all = static_cast<char*>(mapped);
  const std::size_t before = round_up(number(all), kGranularity) - number(all);
  if (before > 0) munmap(all, before);
  munmap(all + before + bytes, kGranularity - before);
  return all + before;
}

void drop_if_unused(Physical* physical) {
  if (!physical->freed || physical->mappings > 0) return;
  refund(physical->device, physical->bytes, &aclsim_stats::used_physical);
  close(physical->file);
  delete physical;
}

int allocate(void** address, std::size_t bytes) {
  if (address == nullptr || bytes == 0) return bad_argument("malloc of 0 bytes or to nowhere");
  const std::size_t taken = round_up(bytes, bytes >= kGranularity ? kGranularity : kPage);
  const int index = current_device().index;
  if (!charge(index, taken, &aclsim_stats::used_malloc)) {
    return out_of_memory("no device memory for malloc of " + std::to_string(bytes));
  }
  *address = reserve(taken);
  mprotect(*address, taken, PROT_READ | PROT_WRITE);
  addresses().allocations[number(*address)] = {taken, index};
  return 0;
}

bool overlaps(const Reservation& reservation, std::uintptr_t address, std::size_t bytes) {
  const auto after = reservation.mappings.lower_bound(address + bytes);
  if (after == reservation.mappings.begin()) return false;
  const auto before = std::prev(after);
  return before->first + before->second.bytes > address;
}

int check_backed(const char* what, const void* address, std::size_t bytes) {
  if (probe(address, bytes) != 0) return 0;
  ++current_device().stats.faults;
  return refuse(ACL_ERROR_RT_DEVICE_MEM_ERROR, std::string("device fault: ") + what + " has no memory behind it");
}

bool is_defined(const void* address) {
  const bool aligned = number(address) % kCopyAlignment == 0;
  return aligned && (probe(address, 1) >= 0 || is_pinned_host(address));
}

}  // namespace

int probe(const void* address, std::size_t bytes) {
  std::uintptr_t at = number(address);
  const std::uintptr_t end = at + (bytes > 0 ? bytes : 1);
  const auto allocation = holder(addresses().allocations, at);
  if (allocation != addresses().allocations.end()) {
    return end <= allocation->first + allocation->second.bytes ? 1 : 0;
  }
  const auto reservation = holder(addresses().reservations, at);
  if (reservation == addresses().reservations.end()) return -1;
  while (at < end) {
    const auto mapping = holder(reservation->second.mappings, at);
    if (mapping == reservation->second.mappings.end()) return 0;
    at = mapping->first + mapping->second.bytes;
  }
  return 1;
}

bool is_pinned_host(const void* address) {
  return holder(addresses().host, number(address)) != addresses().host.end();
}

void count_mapped(aclsim_stats* stats) {
  stats->reserved = stats->mapped = 0;
  for (const auto& [base, reservation] : addresses().reservations) {
    stats->reserved += reservation.bytes;
    for (const auto& [address, mapping] : reservation.mappings) stats->mapped += mapping.bytes;
  }
}

int copy_bytes(void* to, std::size_t capacity, const void* from, std::size_t bytes) {
  if (const int code = enter("memcpy")) return code;
  if (bytes > capacity) return bad_argument("a copy of more bytes than its destination has");
  if (const int code = check_backed("a copy's destination", to, bytes)) return code;
  if (const int code = check_backed("a copy's source", from, bytes)) return code;
  std::memmove(to, from, bytes);
  return 0;
}

int set_bytes(void* to, std::size_t capacity, int value, std::size_t bytes) {
  if (bytes > capacity) return bad_argument("a memset of more bytes than its destination has");
  if (const int code = check_backed("a memset's destination", to, bytes)) return code;
  std::memset(to, value, bytes);
  return 0;
}

}  // namespace aclsim

using namespace aclsim;

extern "C" {

// ---- information ------------------------------------------------

aclError aclrtGetMemInfo(aclrtMemAttr, size_t* free_bytes, size_t* total_bytes) {
  ACLSIM_ENTER();
  const aclsim_stats& stats = current_device().stats;
  *free_bytes = stats.capacity > stats.used ? stats.capacity - stats.used : 0;
  *total_bytes = stats.capacity;
  return 0;
}

aclError aclrtMemGetAllocationGranularity(aclrtPhysicalMemProp*, aclrtMemGranularityOptions, size_t* bytes) {
  ACLSIM_ENTER();
  *bytes = kGranularity;
  return 0;
}

aclError aclrtPointerGetAttributes(const void* address, aclrtPtrAttributes* attributes) {
  const Guard guard(lock());
  std::memset(attributes, 0, sizeof *attributes);
  const auto on_host = is_pinned_host(address) ? ACL_MEM_LOCATION_TYPE_HOST : ACL_MEM_LOCATION_TYPE_UNREGISTERED;
  attributes->location.type = probe(address, 1) >= 0 ? ACL_MEM_LOCATION_TYPE_DEVICE : on_host;
  return 0;
}

// ---- memory at addresses of its own -----------------------------

aclError aclrtMalloc(void** address, size_t bytes, aclrtMemMallocPolicy) {
  ACLSIM_ENTER();
  return allocate(address, bytes);
}

aclError aclrtMallocAlign32(void** address, size_t bytes, aclrtMemMallocPolicy) {
  ACLSIM_ENTER();
  return allocate(address, bytes);
}

aclError aclrtFree(void* address) {
  ACLSIM_ENTER();
  settle_all();
  const auto allocation = addresses().allocations.find(number(address));
  if (allocation == addresses().allocations.end()) return bad_argument("free of what was not allocated");
  munmap(address, allocation->second.bytes);
  refund(allocation->second.device, allocation->second.bytes, &aclsim_stats::used_malloc);
  addresses().allocations.erase(allocation);
  return 0;
}

aclError aclrtMallocHost(void** address, size_t bytes) {
  ACLSIM_ENTER();
  *address = std::aligned_alloc(kPage, round_up(bytes, kPage));
  if (*address == nullptr) return out_of_memory("no host memory");
  addresses().host[number(*address)] = {bytes, -1};
  device(0).stats.host += bytes;
  return 0;
}

aclError aclrtFreeHost(void* address) {
  ACLSIM_ENTER();
  const auto allocation = addresses().host.find(number(address));
  if (allocation == addresses().host.end()) return bad_argument("free of host memory that was not allocated");
  device(0).stats.host -= allocation->second.bytes;
  addresses().host.erase(allocation);
  std::free(address);
  return 0;
}

aclError aclrtHostRegisterV2(void*, uint64_t, uint32_t) { return ACL_ERROR_RT_FEATURE_NOT_SUPPORT; }
aclError aclrtHostUnregister(void*) { return ACL_ERROR_RT_FEATURE_NOT_SUPPORT; }

// ---- virtual memory ---------------------------------------------

// torch_npu finds out whether there is virtual memory by reserving 512 bytes, so any size is taken.
aclError aclrtReserveMemAddress(void** address, size_t bytes, size_t alignment, void*, uint64_t) {
  ACLSIM_ENTER();
  if (address == nullptr || bytes == 0 || alignment != 0) return bad_argument("a reservation like that");
  const std::size_t taken = round_up(bytes, kGranularity);
  *address = reserve(taken);
  if (*address == nullptr) return out_of_memory("no addresses");
  addresses().reservations[number(*address)].bytes = taken;
  return 0;
}

aclError aclrtReleaseMemAddress(void* address) {
  ACLSIM_ENTER();
  const auto reservation = addresses().reservations.find(number(address));
  if (reservation == addresses().reservations.end()) return bad_argument("release of what was not reserved");
  if (!reservation->second.mappings.empty()) return bad_argument("release of addresses that are mapped");
  munmap(address, reservation->second.bytes);
  addresses().reservations.erase(reservation);
  return 0;
}

aclError aclrtMallocPhysical(aclrtDrvMemHandle* handle, size_t bytes, const aclrtPhysicalMemProp* properties,
                             uint64_t flags) {
  ACLSIM_ENTER();
  const bool whole = bytes > 0 && bytes % kGranularity == 0;
  if (handle == nullptr || properties == nullptr || flags != 0 || !whole) {
    return bad_argument("physical memory of " + std::to_string(bytes) + " bytes, flags " + std::to_string(flags));
  }
  const int index = static_cast<int>(properties->location.id);
  if (index >= device_count()) return refuse(ACL_ERROR_RT_INVALID_DEVICEID, "no device " + std::to_string(index));
  if (!charge(index, bytes, &aclsim_stats::used_physical)) {
    return out_of_memory("no device memory for " + std::to_string(bytes) + " bytes");
  }
  const int file = memfd_create("aclsim", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, static_cast<off_t>(bytes)) != 0) {
    if (file >= 0) close(file);
    refund(index, bytes, &aclsim_stats::used_physical);
    return out_of_memory("memfd_create failed");
  }
  *handle = new Physical{file, bytes, index, 0, false};
  return 0;
}

aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
  ACLSIM_ENTER();
  auto* const physical = static_cast<Physical*>(handle);
  if (physical == nullptr || physical->freed) return bad_argument("free of no physical memory");
  physical->freed = true;
  drop_if_unused(physical);
  return 0;
}

aclError aclrtMapMem(void* address, size_t bytes, size_t offset, aclrtDrvMemHandle handle, uint64_t flags) {
  ACLSIM_ENTER();
  auto* const physical = static_cast<Physical*>(handle);
  if (physical == nullptr || physical->freed || flags != 0) return bad_argument("map of no physical memory");
  if (offset != 0 || bytes != physical->bytes) return bad_argument("map of a part of physical memory");
  const std::uintptr_t at = number(address);
  const auto reservation = holder(addresses().reservations, at);
  const bool inside = reservation != addresses().reservations.end() && at % kGranularity == 0 &&
                      at + bytes <= reservation->first + reservation->second.bytes;
  if (!inside) return bad_argument("map outside a reservation");
  if (overlaps(reservation->second, at, bytes)) return bad_argument("map over a mapping");
  void* mapped = mmap(address, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, physical->file, 0);
  if (mapped == MAP_FAILED) return out_of_memory("mmap failed");
  ++physical->mappings;
  reservation->second.mappings[at] = {bytes, physical};
  return 0;
}

aclError aclrtUnmapMem(void* address) {
  ACLSIM_ENTER();
  const auto reservation = holder(addresses().reservations, number(address));
  if (reservation == addresses().reservations.end()) return bad_argument("unmap outside a reservation");
  auto& mappings = reservation->second.mappings;
  const auto mapping = mappings.find(number(address));
  if (mapping == mappings.end()) return bad_argument("unmap where no mapping starts");
  mmap(address, mapping->second.bytes, PROT_NONE, kNoMemory | MAP_FIXED, -1, 0);
  Physical* const physical = mapping->second.physical;
  mappings.erase(mapping);
  --physical->mappings;
  drop_if_unused(physical);
  return 0;
}

aclError aclrtMemExportToShareableHandle(aclrtDrvMemHandle, aclrtMemHandleType, uint64_t, uint64_t*) {
  return ACL_ERROR_RT_FEATURE_NOT_SUPPORT;
}
aclError aclrtMemImportFromShareableHandle(uint64_t, int32_t, aclrtDrvMemHandle*) {
  return ACL_ERROR_RT_FEATURE_NOT_SUPPORT;
}
aclError aclrtMemSetPidToShareableHandle(uint64_t, int32_t*, size_t) { return ACL_ERROR_RT_FEATURE_NOT_SUPPORT; }

// ---- copies -----------------------------------------------------

// A synchronous copy is on no stream: it does not wait for work queued on others.
aclError aclrtMemcpy(void* to, size_t capacity, const void* from, size_t bytes, aclrtMemcpyKind) {
  ACLSIM_ENTER();
  if (const int error = refuse_wait_for_all(__func__)) return error;
  return copy_bytes(to, capacity, from, bytes);
}

aclError aclrtMemcpyAsync(void* to, size_t capacity, const void* from, size_t bytes, aclrtMemcpyKind,
                          aclrtStream stream) {
  ACLSIM_ENTER();
  if (!is_defined(to) || !is_defined(from)) ++current_device().stats.undefined;
  return enqueue(stream_of(stream), [=] { return copy_bytes(to, capacity, from, bytes); }, {{to, bytes}});
}

aclError aclrtMemset(void* to, size_t capacity, int32_t value, size_t bytes) {
  ACLSIM_ENTER();
  return set_bytes(to, capacity, value, bytes);
}

aclError aclrtMemsetAsync(void* to, size_t capacity, int32_t value, size_t bytes, aclrtStream stream) {
  ACLSIM_ENTER();
  return enqueue(stream_of(stream), [=] { return set_bytes(to, capacity, value, bytes); }, {{to, bytes}});
}

}  // extern "C"

void aclsim_clear(void* first, std::size_t bytes) {
  const Guard guard(lock());
  char* const start = static_cast<char*>(first);
  const std::size_t before = round_up(number(start), kPage) - number(start);
  const std::size_t pages = bytes < kLarge ? 0 : (bytes - before) / kPage * kPage;
  if (pages == 0 || madvise(start + before, pages, MADV_REMOVE) != 0) {  // for physical memory only
    std::memset(start, 0, bytes);
    return;
  }
  std::memset(start, 0, before);
  std::memset(start + before + pages, 0, bytes - before - pages);
}
