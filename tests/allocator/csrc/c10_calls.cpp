// c10's allocator interface as C++ callers use it.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstring>
#include <vector>

namespace {

std::vector<void*> raw;

void allocate_raw(std::size_t bytes) {
  raw.push_back(c10::GetCPUAllocator()->raw_allocate(bytes));
  std::memset(raw.back(), 1, bytes);
}

}  // namespace

extern "C" void raw_allocate_one_more() { allocate_raw(1000); }

extern "C" void raw_allocate_two() {
  allocate_raw(1000);
  allocate_raw(1000);
}

extern "C" void raw_deallocate_all() {
  for (void* pointer : raw) c10::GetCPUAllocator()->raw_deallocate(pointer);
  raw.clear();
}

extern "C" int clone_keeps_bytes() {
  c10::Allocator* const allocator = c10::GetCPUAllocator();
  const c10::DataPtr first = allocator->allocate(1000);
  std::memset(first.get(), 7, 1000);
  const c10::DataPtr second = allocator->clone(first.get(), 1000);
  return first.get() != second.get() && std::memcmp(first.get(), second.get(), 1000) == 0 &&
         second.get_deleter() == allocator->raw_deleter();
}

extern "C" void register_over_it() { c10::SetCPUAllocator(c10::GetDefaultCPUAllocator(), 255); }
