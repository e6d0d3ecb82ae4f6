// NVIDIA GPUs through CUDA's driver. libcuda.so.1 is opened at run time, so neither CUDA's headers nor its libraries
// are needed to build this file, and a machine without a GPU loads the pool all the same.
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <thread>

#include "cuda_api.h"
#include "driver.h"
#include "lanes.h"
#include "segment.h"

namespace allocator {
namespace {

using cuda::Error;

constexpr const char* kCudaLibrary = "libcuda.so.1";
constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kPage = std::size_t{4} << 10;
constexpr unsigned kMostHostThreads = 16;

Status load(cuda::Functions* functions) {
  void* library = dlopen(kCudaLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return Status::failed(std::string(dlerror()) + ": an NVIDIA driver is needed");
  std::string missing;
#define SLEEP_POOL_CUDA_LOOK_UP(name, symbol, parameters)                                \
  functions->name = reinterpret_cast<decltype(functions->name)>(dlsym(library, symbol)); \
  if (functions->name == nullptr) missing += " " symbol;
  SLEEP_POOL_CUDA_FUNCTIONS(SLEEP_POOL_CUDA_LOOK_UP)
#undef SLEEP_POOL_CUDA_LOOK_UP
  if (missing.empty()) return {};
  return Status::failed(std::string(kCudaLibrary) + " lacks" + missing + ": a newer NVIDIA driver is needed");
}

// A context is current to a thread, and the pool is called from any: Python's, torch's, the garbage collector's.
class InContext {
 public:
  InContext(const cuda::Functions& functions, cuda::Context context)
      : error(functions.cuCtxPushCurrent(context)), functions_(functions) {}
  ~InContext() {
    cuda::Context popped = nullptr;
    if (error == cuda::kSuccess) functions_.cuCtxPopCurrent(&popped);
  }
  InContext(const InContext&) = delete;
  InContext& operator=(const InContext&) = delete;

  const Error error;

 private:
  const cuda::Functions& functions_;
};

// Anonymous memory that begins on a huge page, on huge pages where the kernel gives them, and is really there.
Status map_host(std::size_t bytes, void** memory) {
  const std::size_t wanted = bytes + kHugePage;
  void* mapped = mmap(nullptr, wanted, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) {
    return Status::out_of_memory("mmap of " + std::to_string(bytes) + " bytes: " + std::strerror(errno));
  }
  char* const begin = static_cast<char*>(mapped);
  char* const aligned = reinterpret_cast<char*>(round_up(reinterpret_cast<std::uintptr_t>(begin), kHugePage));
  if (aligned > begin) munmap(begin, static_cast<std::size_t>(aligned - begin));
  munmap(aligned + bytes, static_cast<std::size_t>(begin + wanted - aligned - bytes));
  madvise(aligned, bytes, MADV_HUGEPAGE);  // advice: small pages do as well, only slower
  *memory = aligned;
  return {};
}

class CudaDriver final : public Driver {
 public:
  explicit CudaDriver(int device) : ordinal_(device) {}

  Status open() {
    if (Status status = load(&cuda_); !status.ok()) return status;
    if (Status status = find_device(); !status.ok()) return status;
    properties_.allocation_type = cuda::kPinned;
    properties_.location = {cuda::kOnDevice, ordinal_};
    access_ = {properties_.location, cuda::kReadWrite};
    const Status status = call("cuMemGetAllocationGranularity", [&] {
      return cuda_.cuMemGetAllocationGranularity(&granularity_, &properties_, cuda::kMinimumGranularity);
    });
    if (!status.ok()) return status;
    for (cuda::Stream& stream : lanes_.streams()) {
      const Status made =
          call("cuStreamCreate", [&] { return cuda_.cuStreamCreate(&stream, cuda::kNonBlocking); });
      if (!made.ok()) return made;
    }
    return {};
  }

  std::size_t granularity() const override { return granularity_; }

  Status reserve(std::size_t bytes, void** address) override {
    cuda::Address reserved = 0;
    Status status = call("cuMemAddressReserve",
                         [&] { return cuda_.cuMemAddressReserve(&reserved, bytes, 0, 0, 0); });
    *address = reinterpret_cast<void*>(reserved);
    return status;
  }

  Status unreserve(void* address, std::size_t bytes) override {
    return call("cuMemAddressFree", [&] { return cuda_.cuMemAddressFree(number(address), bytes); });
  }

  Status create(std::size_t bytes, Handle* handle) override {
    cuda::PhysicalHandle physical = 0;
    Status status = call("cuMemCreate", [&] { return cuda_.cuMemCreate(&physical, bytes, &properties_, 0); });
    if (status.ok()) *handle = physical;
    return status;
  }

  Status release(Handle handle) override {
    return call("cuMemRelease", [&] { return cuda_.cuMemRelease(handle); });
  }

  Status map(void* address, std::size_t bytes, Handle handle) override {
    Status status = call("cuMemMap", [&] { return cuda_.cuMemMap(number(address), bytes, 0, handle, 0); });
    if (!status.ok()) return status;
    status =
        call("cuMemSetAccess", [&] { return cuda_.cuMemSetAccess(number(address), bytes, &access_, 1); });
    if (!status.ok()) cuda_.cuMemUnmap(number(address), bytes);
    return status;
  }

  Status unmap(void* address, std::size_t bytes) override {
    return call("cuMemUnmap", [&] { return cuda_.cuMemUnmap(number(address), bytes); });
  }

  std::size_t host_threads() const override {
    return std::clamp(std::thread::hardware_concurrency(), 1U, kMostHostThreads);
  }

  // Registering memory that several threads have touched is many times faster than cuMemAllocHost, and takes the
  // bytes that were asked for and no more.
  Status host_alloc(std::size_t bytes, void** memory) override {
    void* mapped = nullptr;
    const std::size_t whole_pages = round_up(bytes, kPage);
    if (Status status = map_host(whole_pages, &mapped); !status.ok()) return status;
    touch(static_cast<char*>(mapped), whole_pages);
    Status status = call("cuMemHostRegister",
                         [&] { return cuda_.cuMemHostRegister(mapped, whole_pages, cuda::kPortable); });
    if (!status.ok()) {
      munmap(mapped, whole_pages);
      return status;
    }
    *memory = mapped;
    return {};
  }

  Status host_free(void* memory, std::size_t bytes) override {
    Status status = call("cuMemHostUnregister", [&] { return cuda_.cuMemHostUnregister(memory); });
    if (status.ok()) munmap(memory, round_up(bytes, kPage));
    return status;
  }

  Status copy_out(void* host, const void* device, std::size_t bytes) override {
    return call("cuMemcpyDtoHAsync",
                [&] { return cuda_.cuMemcpyDtoHAsync(host, number(device), bytes, lanes_.current()); });
  }

  Status copy_in(void* device, const void* host, std::size_t bytes) override {
    return call("cuMemcpyHtoDAsync",
                [&] { return cuda_.cuMemcpyHtoDAsync(number(device), host, bytes, lanes_.current()); });
  }

  Status fill(void* device, unsigned char value, std::size_t bytes) override {
    return call("cuMemsetD8Async",
                [&] { return cuda_.cuMemsetD8Async(number(device), value, bytes, lanes_.current()); });
  }

  Status mark(Ticket* ticket) override {
    const auto create = [this](cuda::Event* event) {
      return call("cuEventCreate", [&] { return cuda_.cuEventCreate(event, cuda::kWithoutTiming); });
    };
    const auto record = [this](cuda::Event event, cuda::Stream stream) {
      return call("cuEventRecord", [&] { return cuda_.cuEventRecord(event, stream); });
    };
    return lanes_.mark(create, record, ticket);
  }

  Status wait(Ticket ticket) override {
    return lanes_.wait(ticket, [this](cuda::Event event) {
      return call("cuEventSynchronize", [&] { return cuda_.cuEventSynchronize(event); });
    });
  }

  Status synchronize() override {
    Status status = call("cuCtxSynchronize", [&] { return cuda_.cuCtxSynchronize(); });
    if (status.ok()) lanes_.clear();
    return status;
  }

  Status memory_info(MemoryInfo* info) override {
    return call("cuMemGetInfo", [&] { return cuda_.cuMemGetInfo(&info->free_bytes, &info->total_bytes); });
  }

  Status set_capacity(std::size_t bytes) override {
    return bytes == 0 ? Status{} : Status::failed("a GPU's memory cannot be limited");
  }

 private:
  static cuda::Address number(const void* address) { return reinterpret_cast<std::uintptr_t>(address); }

  static void touch(char* memory, std::size_t bytes) {
    for (std::size_t at = 0; at < bytes; at += kPage) static_cast<volatile char*>(memory)[at] = 0;
  }

  Status find_device() {
    if (const Error error = cuda_.cuInit(0)) return failure("cuInit", error);
    int count = 0;
    if (const Error error = cuda_.cuDeviceGetCount(&count)) return failure("cuDeviceGetCount", error);
    if (ordinal_ >= count) {
      return Status::failed("there is no cuda:" + std::to_string(ordinal_) + ", this process sees " +
                            std::to_string(count) + " GPUs (CUDA_VISIBLE_DEVICES)");
    }
    cuda::Device device = 0;
    if (const Error error = cuda_.cuDeviceGet(&device, ordinal_)) return failure("cuDeviceGet", error);
    const Error error = cuda_.cuDevicePrimaryCtxRetain(&context_, device);  // the context that torch uses
    return error == cuda::kSuccess ? Status{} : failure("cuDevicePrimaryCtxRetain", error);
  }

  template <typename Action>
  Status call(const char* name, Action action) {
    const InContext current(cuda_, context_);
    if (current.error != cuda::kSuccess) return failure("cuCtxPushCurrent", current.error);
    const Error error = action();
    return error == cuda::kSuccess ? Status{} : failure(name, error);
  }

  Status failure(const char* name, Error error) const {
    const char* words = nullptr;
    cuda_.cuGetErrorString(error, &words);
    std::string message = std::string(name) + " returned " + std::to_string(error);
    if (words != nullptr) message += std::string(": ") + words;
    return error == cuda::kOutOfMemory ? Status::out_of_memory(message) : Status::failed(message);
  }

  const int ordinal_;
  cuda::Functions cuda_;
  cuda::Context context_ = nullptr;
  cuda::PhysicalProperties properties_{};
  cuda::Access access_{};
  std::size_t granularity_ = 0;
  Lanes<cuda::Stream, cuda::Event> lanes_;
};

Status open_cuda_driver(int device, std::unique_ptr<Driver>* driver) {
  auto gpu = std::make_unique<CudaDriver>(device);
  if (Status status = gpu->open(); !status.ok()) return status;
  *driver = std::move(gpu);
  return {};
}

const DriverRegistration gpu_registration("cuda", &open_cuda_driver);

}  // namespace
}  // namespace allocator
