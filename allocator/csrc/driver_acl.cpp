// Ascend NPUs through AscendCL. libascendcl.so is opened at run time, so neither CANN's headers nor its
// libraries are needed to build this file, and a machine without an NPU loads the pool all the same.
#include <dlfcn.h>

#include <algorithm>

#include "acl_api.h"
#include "driver.h"
#include "lanes.h"
#include "segment.h"

namespace allocator {
namespace {

using acl::Error;

constexpr const char* kAclLibrary = "libascendcl.so";
// Of one asynchronous copy; long ones are cut so that no size field of the driver's descriptors is strained.
constexpr std::size_t kLongestCopy = std::size_t{256} << 20;
constexpr std::size_t kAclHostThreads = 8;

Status load(acl::Functions* functions) {
  void* library = dlopen(kAclLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    return Status::failed(std::string(dlerror()) +
                          ": install CANN and source its set_env.sh, or import torch_npu first");
  }
  std::string missing;
#define SLEEP_POOL_ACL_LOOK_UP(result, name, parameters)                                \
  functions->name = reinterpret_cast<decltype(functions->name)>(dlsym(library, #name)); \
  if (functions->name == nullptr) missing += " " #name;
  SLEEP_POOL_ACL_FUNCTIONS(SLEEP_POOL_ACL_LOOK_UP)
#undef SLEEP_POOL_ACL_LOOK_UP
  if (missing.empty()) return {};
  return Status::failed(std::string(kAclLibrary) + " lacks" + missing + ": a newer CANN is needed");
}

// A device is current to a thread, and the pool is called from any: Python's, torch's, the garbage collector's.
class OnDevice {
 public:
  OnDevice(const acl::Functions& functions, std::int32_t device) : functions_(functions) {
    std::int32_t current = -1;
    const bool known = functions_.aclrtGetDevice(&current) == acl::kSuccess;
    if (known && current == device) return;
    error = functions_.aclrtSetDevice(device);
    if (error == acl::kSuccess && known) previous_ = current;
  }
  ~OnDevice() {
    if (previous_ >= 0) functions_.aclrtSetDevice(previous_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  Error error = acl::kSuccess;

 private:
  const acl::Functions& functions_;
  std::int32_t previous_ = -1;
};

class AclDriver final : public Driver {
 public:
  explicit AclDriver(int device) : device_(device) {
    properties_.handle_type = acl::kNoShareableHandle;
    properties_.allocation_type = acl::kPinned;
    properties_.attribute = acl::kHbmHugePages;
    properties_.location = {static_cast<std::uint32_t>(device), acl::kOnDevice};
  }

  Status open() {
    if (Status status = load(&acl_); !status.ok()) return status;
    if (Status status = initialize(); !status.ok()) return status;
    const Status status = call("aclrtMemGetAllocationGranularity", [&] {
      return acl_.aclrtMemGetAllocationGranularity(&properties_, acl::kMinimumGranularity, &granularity_);
    });
    if (!status.ok()) return status;
    const bool power_of_two = granularity_ >= kAlignment && (granularity_ & (granularity_ - 1)) == 0;
    if (!power_of_two) return Status::failed("a granularity of " + std::to_string(granularity_) + " bytes");
    for (acl::Stream& stream : lanes_.streams()) {
      const Status made = call("aclrtCreateStream", [&] { return acl_.aclrtCreateStream(&stream); });
      if (!made.ok()) return made;
    }
    return {};
  }

  std::size_t granularity() const override { return granularity_; }

  Status reserve(std::size_t bytes, void** address) override {
    return call("aclrtReserveMemAddress",
                [&] { return acl_.aclrtReserveMemAddress(address, bytes, 0, nullptr, acl::kReserveHuge); });
  }

  Status unreserve(void* address, std::size_t) override {
    return call("aclrtReleaseMemAddress", [&] { return acl_.aclrtReleaseMemAddress(address); });
  }

  Status create(std::size_t bytes, Handle* handle) override {
    acl::PhysicalHandle physical = nullptr;
    Status status = call("aclrtMallocPhysical",
                         [&] { return acl_.aclrtMallocPhysical(&physical, bytes, &properties_, 0); });
    if (status.ok()) *handle = reinterpret_cast<Handle>(physical);
    return status;
  }

  Status release(Handle handle) override {
    return call("aclrtFreePhysical", [&] { return acl_.aclrtFreePhysical(physical(handle)); });
  }

  Status map(void* address, std::size_t bytes, Handle handle) override {
    return call("aclrtMapMem", [&] { return acl_.aclrtMapMem(address, bytes, 0, physical(handle), 0); });
  }

  Status unmap(void* address, std::size_t) override {
    return call("aclrtUnmapMem", [&] { return acl_.aclrtUnmapMem(address); });
  }

  std::size_t host_threads() const override { return kAclHostThreads; }

  Status host_alloc(std::size_t bytes, void** memory) override {
    Status status = call("aclrtMallocHost", [&] { return acl_.aclrtMallocHost(memory, bytes); });
    if (!status.ok() || reinterpret_cast<std::uintptr_t>(*memory) % kAlignment == 0) return status;
    host_free(*memory, bytes);
    return Status::failed("aclrtMallocHost gave memory that is not aligned to 64 bytes, as its copies need");
  }

  Status host_free(void* memory, std::size_t) override {
    return call("aclrtFreeHost", [&] { return acl_.aclrtFreeHost(memory); });
  }

  Status copy_out(void* host, const void* device, std::size_t bytes) override {
    return copy(host, device, bytes, acl::kDeviceToHost);
  }

  Status copy_in(void* device, const void* host, std::size_t bytes) override {
    return copy(device, host, bytes, acl::kHostToDevice);
  }

  Status fill(void* device, unsigned char value, std::size_t bytes) override {
    return call("aclrtMemsetAsync",
                [&] { return acl_.aclrtMemsetAsync(device, bytes, value, bytes, lanes_.current()); });
  }

  Status mark(Ticket* ticket) override {
    const auto create = [this](acl::Event* event) {
      return call("aclrtCreateEventExWithFlag", [&] { return acl_.aclrtCreateEventExWithFlag(event, acl::kEventSync); });
    };
    const auto record = [this](acl::Event event, acl::Stream stream) {
      return call("aclrtRecordEvent", [&] { return acl_.aclrtRecordEvent(event, stream); });
    };
    return lanes_.mark(create, record, ticket);
  }

  Status wait(Ticket ticket) override {
    return lanes_.wait(ticket, [this](acl::Event event) {
      return call("aclrtSynchronizeEvent", [&] { return acl_.aclrtSynchronizeEvent(event); });
    });
  }

  Status synchronize() override {
    Status status = call("aclrtSynchronizeDevice", [&] { return acl_.aclrtSynchronizeDevice(); });
    if (status.ok()) lanes_.clear();
    return status;
  }

  Status memory_info(MemoryInfo* info) override {
    return call("aclrtGetMemInfo",
                [&] { return acl_.aclrtGetMemInfo(acl::kHbm, &info->free_bytes, &info->total_bytes); });
  }

  Status set_capacity(std::size_t bytes) override {
    return bytes == 0 ? Status{} : Status::failed("an NPU's memory cannot be limited");
  }

 private:
  static acl::PhysicalHandle physical(Handle handle) { return reinterpret_cast<acl::PhysicalHandle>(handle); }

  Status initialize() {
    const Error error = acl_.aclInit(nullptr);
    if (error != acl::kSuccess && error != acl::kRepeatInitialize) return failure("aclInit", error);
    std::uint32_t count = 0;
    if (const Error failed = acl_.aclrtGetDeviceCount(&count)) return failure("aclrtGetDeviceCount", failed);
    if (device_ < static_cast<int>(count)) return {};
    return Status::failed("there is no npu:" + std::to_string(device_) + ", this process sees " +
                          std::to_string(count) + " NPUs (ASCEND_RT_VISIBLE_DEVICES)");
  }

  // Both ends are aligned to 64 bytes, and the host's is from aclrtMallocHost: otherwise AscendCL copies
  // anything, without an error.
  Status copy(void* to, const void* from, std::size_t bytes, int kind) {
    for (std::size_t done = 0; done < bytes; done += kLongestCopy) {
      const std::size_t piece = std::min(kLongestCopy, bytes - done);
      const Status status = call("aclrtMemcpyAsync", [&] {
        return acl_.aclrtMemcpyAsync(static_cast<char*>(to) + done, piece, static_cast<const char*>(from) + done,
                                     piece, kind, lanes_.current());
      });
      if (!status.ok()) return status;
    }
    return {};
  }

  template <typename Action>
  Status call(const char* name, Action action) {
    const OnDevice current(acl_, device_);
    if (current.error != acl::kSuccess) return failure("aclrtSetDevice", current.error);
    const Error error = action();
    return error == acl::kSuccess ? Status{} : failure(name, error);
  }

  Status failure(const char* name, Error error) const {
    const char* words = acl_.aclGetRecentErrMsg();
    std::string message = std::string(name) + " returned " + std::to_string(error);
    if (words != nullptr) message += std::string(": ") + words;
    return error == acl::kOutOfMemory ? Status::out_of_memory(message) : Status::failed(message);
  }

  const int device_;
  acl::Functions acl_;
  acl::PhysicalProperties properties_{};
  std::size_t granularity_ = 0;
  Lanes<acl::Stream, acl::Event> lanes_;
};

Status open_acl_driver(int device, std::unique_ptr<Driver>* driver) {
  auto npu = std::make_unique<AclDriver>(device);
  if (Status status = npu->open(); !status.ok()) return status;
  *driver = std::move(npu);
  return {};
}

const DriverRegistration npu_registration("npu", &open_acl_driver);

}  // namespace
}  // namespace allocator
