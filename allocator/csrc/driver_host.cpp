// The CPU as a device: "physical memory" is memfd pages, so what sleeps really leaves the process's resident
// memory and touching it is a segmentation fault.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <fstream>
#include <limits>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "driver.h"

namespace allocator {
namespace {

constexpr std::size_t kUnlimited = std::numeric_limits<std::size_t>::max();
constexpr std::size_t kMinWindow = std::size_t{4} << 30;
constexpr std::size_t kPreferredWindow = std::size_t{256} << 30;
constexpr std::size_t kAskEvery = std::size_t{64} << 20;
constexpr int kMapFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

Status errno_status(const std::string& call, std::size_t bytes) {
  const int error = errno;
  const std::string message = call + " of " + std::to_string(bytes) + " bytes: " + std::strerror(error);
  const bool memory = error == ENOMEM || error == ENOSPC;
  return memory ? Status::out_of_memory(message) : Status::failed(message);
}

// ---- address windows --------------------------------------------

struct Window {
  std::atomic<std::uintptr_t> begin{0};
  std::atomic<std::uintptr_t> end{0};
};

// One window a driver; a forked child that opens a pool of its own adds another.
constexpr std::size_t kMaxWindows = 64;
std::array<Window, kMaxWindows> windows;
std::atomic<std::size_t> window_count{0};

Status publish_window(char* base, std::size_t bytes) {
  const std::size_t slot = window_count.load(std::memory_order_relaxed);
  if (slot == kMaxWindows) return Status::failed("more than 64 nested forks opened a host pool");
  windows[slot].begin.store(reinterpret_cast<std::uintptr_t>(base), std::memory_order_relaxed);
  windows[slot].end.store(reinterpret_cast<std::uintptr_t>(base) + bytes, std::memory_order_relaxed);
  window_count.store(slot + 1, std::memory_order_release);
  return {};
}

std::size_t window_bytes() {
  const auto pages = static_cast<std::size_t>(std::max(0L, sysconf(_SC_PHYS_PAGES)));
  const std::size_t wanted = 4 * pages * static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  std::size_t bytes = kPreferredWindow;
  while (bytes < wanted) bytes *= 2;
  return bytes;
}

// The address range all segments of a driver live in: reserved once, so that ownership is two comparisons.
class AddressSpace {
 public:
  Status open() {
    for (std::size_t bytes = window_bytes(); bytes >= kMinWindow; bytes /= 2) {
      void* base = mmap(nullptr, bytes, PROT_NONE, kMapFlags, -1, 0);
      if (base == MAP_FAILED) continue;
      free_[static_cast<char*>(base)] = bytes;
      return publish_window(static_cast<char*>(base), bytes);
    }
    return errno_status("reserving the host pool's address window", kMinWindow);
  }

  void* take(std::size_t bytes) {
    const auto fits = [bytes](const auto& range) { return range.second >= bytes; };
    const auto range = std::find_if(free_.begin(), free_.end(), fits);
    if (range == free_.end()) return nullptr;
    char* base = range->first;
    const std::size_t left = range->second - bytes;
    if (left > 0) free_.emplace(base + bytes, left);
    free_.erase(range);
    return base;
  }

  void give_back(char* base, std::size_t bytes) {
    auto range = free_.emplace(base, bytes).first;
    const auto next = std::next(range);
    if (next != free_.end() && base + bytes == next->first) {
      range->second += next->second;
      free_.erase(next);
    }
    if (range == free_.begin()) return;
    const auto previous = std::prev(range);
    if (previous->first + previous->second != base) return;
    previous->second += range->second;
    free_.erase(range);
  }

 private:
  std::map<char*, std::size_t> free_;
};

// ---- memory information -----------------------------------------

// Not by a stream's >>, which reads nothing where this library has a C++ runtime of its own beside torch's.
std::size_t number_in(const std::string& text, std::size_t otherwise) {
  const std::size_t begin = std::min(text.find_first_not_of(" \t"), text.size());
  std::size_t value = 0;
  const auto parsed = std::from_chars(text.data() + begin, text.data() + text.size(), value);
  return parsed.ec == std::errc{} ? value : otherwise;
}

std::size_t read_number(const std::string& path, std::size_t otherwise) {
  std::ifstream file(path);
  std::string line;
  return std::getline(file, line) ? number_in(line, otherwise) : otherwise;
}

// A field of a "name value" or "name: value" file, in that file's unit.
std::size_t read_field(const std::string& path, const std::string& name) {
  std::ifstream file(path);
  std::string line;
  while (std::getline(file, line)) {
    if (line.compare(0, name.size(), name) == 0 && line.size() > name.size() && std::isspace(static_cast<unsigned char>(line[name.size()])) != 0) {
      return number_in(line.substr(name.size()), 0);
    }
  }
  return 0;
}

struct ControlGroup {
  std::string folder;
  bool version2 = false;
};

MemoryInfo group_memory(const ControlGroup& group) {
  const std::string limit_file = group.version2 ? "/memory.max" : "/memory.limit_in_bytes";
  const std::string usage_file = group.version2 ? "/memory.current" : "/memory.usage_in_bytes";
  const std::string cache_field = group.version2 ? "inactive_file" : "total_inactive_file";
  const std::size_t limit = read_number(group.folder + limit_file, kUnlimited);
  const std::size_t usage = read_number(group.folder + usage_file, 0);
  const std::size_t cache = read_field(group.folder + "/memory.stat", cache_field);
  const std::size_t held = usage > cache ? usage - cache : 0;
  return {limit > held ? limit - held : 0, limit};
}

// Each control group that limits this process: its own and those above it.
std::vector<ControlGroup> control_groups() {
  std::vector<ControlGroup> groups;
  std::ifstream file("/proc/self/cgroup");
  std::string line;
  while (std::getline(file, line)) {
    const bool version2 = line.rfind("0::", 0) == 0;
    const auto memory = line.find(":memory:");
    if (!version2 && memory == std::string::npos) continue;
    const std::string root = version2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory";
    std::string path = version2 ? line.substr(3) : line.substr(memory + 8);
    while (path.size() > 1) {
      groups.push_back({root + path, version2});
      path.resize(path.rfind('/'));
    }
    groups.push_back({root, version2});
  }
  return groups;
}

// ---- the driver -------------------------------------------------

class HostDriver final : public Driver {
 public:
  Status open() {
    groups_ = control_groups();
    return addresses_.open();
  }

  std::size_t granularity() const override { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }
  // Device and host share their memory here: what is being copied is there twice.
  std::size_t handle_bytes() const override { return std::size_t{256} << 20; }

  Status reserve(std::size_t bytes, void** address) override {
    *address = addresses_.take(bytes);
    if (*address != nullptr) return {};
    return Status::out_of_memory("the host pool's address window has no " + std::to_string(bytes) +
                                 " bytes in a row");
  }

  Status unreserve(void* address, std::size_t bytes) override {
    addresses_.give_back(static_cast<char*>(address), bytes);
    return {};
  }

  Status create(std::size_t bytes, Handle* handle) override {
    if (Status status = check_free(bytes); !status.ok()) return status;
    const int file = memfd_create("sleep_pool", MFD_CLOEXEC);
    if (file < 0) return errno_status("memfd_create", bytes);
    if (ftruncate(file, static_cast<off_t>(bytes)) != 0) {
      Status status = errno_status("ftruncate", bytes);
      close(file);
      return status;
    }
    *handle = ++last_handle_;
    physical_.emplace(*handle, Physical{bytes, file});
    created_bytes_ += bytes;
    return {};
  }

  Status release(Handle handle) override {
    const auto physical = physical_.find(handle);
    if (physical == physical_.end()) return Status::failed("release of an unknown handle");
    if (physical->second.file >= 0) close(physical->second.file);
    created_bytes_ -= physical->second.bytes;
    physical_.erase(physical);
    return {};
  }

  Status map(void* address, std::size_t bytes, Handle handle) override {
    const auto physical = physical_.find(handle);
    if (physical == physical_.end()) return Status::failed("map of an unknown handle");
    int& file = physical->second.file;
    if (file < 0) return Status::failed("map of a handle that was mapped before");
    void* mapped = mmap(address, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0);
    if (mapped == MAP_FAILED) return errno_status("mmap", bytes);
    // The mapping holds the pages from here on; an open file a segment would run into the limit on open
    // files.
    close(file);
    file = -1;
    return {};
  }

  Status unmap(void* address, std::size_t bytes) override {
    void* mapped = mmap(address, bytes, PROT_NONE, kMapFlags | MAP_FIXED, -1, 0);
    return mapped == MAP_FAILED ? errno_status("unmapping mmap", bytes) : Status{};
  }

  std::size_t host_threads() const override { return 1; }

  Status host_alloc(std::size_t bytes, void** memory) override {
    void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, kMapFlags, -1, 0);
    if (mapped == MAP_FAILED) return errno_status("mmap", bytes);
    *memory = mapped;
    return {};
  }

  Status host_free(void* memory, std::size_t bytes) override {
    return munmap(memory, bytes) == 0 ? Status{} : errno_status("munmap", bytes);
  }

  Status copy_out(void* host, const void* device, std::size_t bytes) override {
    std::memcpy(host, device, bytes);
    return {};
  }

  Status copy_in(void* device, const void* host, std::size_t bytes) override {
    std::memcpy(device, host, bytes);
    return {};
  }

  // Copies are done when they return.
  Status mark(Ticket* ticket) override {
    *ticket = 1;
    return {};
  }
  Status wait(Ticket) override { return {}; }
  Status synchronize() override { return {}; }

  Status fill(void* device, unsigned char value, std::size_t bytes) override {
    std::memset(device, value, bytes);
    return {};
  }

  Status memory_info(MemoryInfo* info) override {
    if (capacity_ > 0) {
      *info = {capacity_ > created_bytes_ ? capacity_ - created_bytes_ : 0, capacity_};
      return {};
    }
    info->free_bytes = 1024 * read_field("/proc/meminfo", "MemAvailable:");
    info->total_bytes = 1024 * read_field("/proc/meminfo", "MemTotal:");
    for (const ControlGroup& group : groups_) {
      const MemoryInfo limited = group_memory(group);
      info->free_bytes = std::min(info->free_bytes, limited.free_bytes);
      info->total_bytes = std::min(info->total_bytes, limited.total_bytes);
    }
    return info->total_bytes > 0 ? Status{} : Status::failed("/proc/meminfo cannot be read");
  }

  Status set_capacity(std::size_t bytes) override {
    capacity_ = bytes;
    return {};
  }

 private:
  // Asking the operating system takes longer than all the rest of create, so small ones are let through
  // unasked.
  Status check_free(std::size_t bytes) {
    unasked_bytes_ += bytes;
    if (capacity_ == 0 && unasked_bytes_ < kAskEvery) return {};
    unasked_bytes_ = 0;
    MemoryInfo info;
    if (Status status = memory_info(&info); !status.ok()) return status;
    if (bytes <= info.free_bytes) return {};
    return Status::out_of_memory("asked for " + std::to_string(bytes) + " bytes, " +
                                 std::to_string(info.free_bytes) + " are free");
  }

  struct Physical {
    std::size_t bytes;
    int file;  // -1 once mapped
  };

  AddressSpace addresses_;
  std::vector<ControlGroup> groups_;
  std::unordered_map<Handle, Physical> physical_;
  Handle last_handle_ = 0;
  std::size_t created_bytes_ = 0;
  std::size_t unasked_bytes_ = 0;
  std::size_t capacity_ = 0;  // 0: as much as the operating system has
};

Status open_host_driver(int, std::unique_ptr<Driver>* driver) {
  auto host = std::make_unique<HostDriver>();
  if (Status status = host->open(); !status.ok()) return status;
  *driver = std::move(host);
  return {};
}

const DriverRegistration registration("cpu", &open_host_driver);

}  // namespace

bool host_window_contains(const void* address) noexcept {
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  const std::size_t count = window_count.load(std::memory_order_acquire);
  for (std::size_t slot = 0; slot < count; ++slot) {
    const std::uintptr_t begin = windows[slot].begin.load(std::memory_order_relaxed);
    if (at >= begin && at < windows[slot].end.load(std::memory_order_relaxed)) return true;
  }
  return false;
}

}  // namespace allocator
