// Routes CPU tensors made in a region to the pool. The only file that needs torch's headers, and of those
// only c10's.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <cstring>

#include "capi.h"

namespace {

constexpr int kCpu = -1;                 // c10's device index of the CPU
constexpr std::uint8_t kPriority = 200;  // above torch's own CPU allocators

// The pool's C ABI by address: the pool is loaded by ctypes, so no symbol of it can be linked to.
struct PoolFunctions {
  decltype(&sleep_pool_region_open) region_open;
  decltype(&sleep_pool_malloc) malloc;
  decltype(&sleep_pool_free) free;
  decltype(&sleep_pool_owns_host) owns_host;
  decltype(&sleep_pool_last_error) last_error;
};

PoolFunctions pool{};
c10::Allocator* previous = nullptr;
c10::DeleterFnPtr previous_deleter = nullptr;

void release(void* pointer) {
  if (!pool.owns_host(pointer)) {
    previous_deleter(pointer);
    return;
  }
  c10::profiledCPUMemoryReporter().Delete(pointer);
  pool.free(pointer, 0, kCpu, nullptr);
}

[[noreturn]] void throw_failure(std::size_t bytes) {
  sleep_pool_error error;
  pool.last_error(&error);
  const bool memory = error.code == SLEEP_POOL_OUT_OF_MEMORY;
  TORCH_CHECK_WITH(OutOfMemoryError, !memory, "sleep pool: no memory for ", bytes, " bytes in region '",
                   error.tag, "': ", error.message, " (needed ", error.needed, ", free ", error.free,
                   " bytes). Put another tag to sleep or make the tensor smaller.");
  TORCH_CHECK(false, "sleep pool: cannot allocate ", bytes, " bytes in region '", error.tag, "' (",
              error.phase, "): ", error.message);
}

struct SleepPoolAllocator final : c10::Allocator {
  c10::DataPtr allocate(std::size_t bytes) override {
    if (!pool.region_open(kCpu)) return delegate(bytes);
    if (bytes == 0) return {nullptr, nullptr, &release, c10::Device(c10::DeviceType::CPU)};
    void* pointer = pool.malloc(bytes, kCpu, nullptr);
    if (pointer == nullptr) throw_failure(bytes);
    c10::profiledCPUMemoryReporter().New(pointer, bytes);
    return {pointer, pointer, &release, c10::Device(c10::DeviceType::CPU)};
  }

  // An allocator has one deleter, whatever memory it handed out.
  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }

 private:
  static c10::DataPtr delegate(std::size_t bytes) {
    c10::DataPtr data = previous->allocate(bytes);
    // False for data that hangs on a context of another kind: the deleter it came with stays.
    [[maybe_unused]] const bool plain = data.compare_exchange_deleter(previous_deleter, &release);
    return data;
  }
};

// Never destroyed: torch frees tensors after static destruction began.
SleepPoolAllocator* ours = nullptr;

}  // namespace

// Takes the addresses of the pool's functions in the order of PoolFunctions. Call once, before threads
// allocate.
extern "C" SLEEP_POOL_API int sleep_pool_torch_install(void* const* functions) noexcept {
  std::memcpy(&pool, functions, sizeof pool);
  previous = c10::GetCPUAllocator();
  previous_deleter = previous->raw_deleter();
  if (previous_deleter == nullptr) return 1;
  ours = new SleepPoolAllocator;
  c10::SetCPUAllocator(ours, kPriority);
  return c10::GetCPUAllocator() == ours ? 0 : 2;
}

// False when another allocator was registered over ours since: regions would then catch nothing.
extern "C" SLEEP_POOL_API int sleep_pool_torch_active() noexcept { return c10::GetCPUAllocator() == ours; }
