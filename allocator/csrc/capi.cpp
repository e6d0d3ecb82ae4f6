// The C ABI: the one mutex, the table of pools, the threads' regions, and what happens at a fork.
#include "capi.h"

#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <iterator>
#include <mutex>
#include <new>
#include <tuple>

#include "pool.h"

using allocator::Device;
using allocator::Failure;
using allocator::make_failure;
using allocator::MemoryInfo;
using allocator::Pool;
using allocator::SegmentTable;
using allocator::Tag;
using allocator::Tags;

struct sleep_pool {
  sleep_pool(Device* device, SegmentTable* table, bool poison, unsigned generation)
      : pool(device, table, poison), generation(generation) {}

  Pool pool;
  const unsigned generation;
};

namespace {

constexpr const char* kWeights = "weights";
constexpr int kMaxDepth = 64;

// Nothing here is ever destroyed: tensors are freed after static destruction began.
struct Registry {
  SegmentTable segments;
  std::map<std::pair<std::string, int>, std::unique_ptr<Device>> devices;
  std::map<std::tuple<std::string, int, std::string>, std::unique_ptr<sleep_pool>> pools;
};

struct Region {
  Tag* tag;
  uint64_t number;
};

// Of trivial types, because a thread's last frees come after its destructors ran.
struct Regions {
  int depth;
  Region open[kMaxDepth];
};

thread_local Regions regions{};
thread_local sleep_pool_error last_error{};

std::mutex& mutex() {
  static auto* const mutex = new std::mutex;
  return *mutex;
}

Registry* registry = nullptr;
unsigned generation = 0;
uint64_t last_region = 0;

// A forked child shares the parent's pages, so it must not move them: it starts with no pools and no open
// region, and its frees of the parent's tensors do nothing.
void in_child() {
  registry = new Registry;
  ++generation;
  regions.depth = 0;
  mutex().unlock();
}

Registry& pools() {
  if (registry == nullptr) {
    registry = new Registry;
    pthread_atfork([] { mutex().lock(); }, [] { mutex().unlock(); }, &in_child);
  }
  return *registry;
}

int record(Failure failure) {
  if (!failure) return SLEEP_POOL_OK;
  last_error = *failure;
  return last_error.code;
}

int record_plain(int code, const char* message) {
  last_error = {};
  last_error.code = code;
  std::strncpy(last_error.message, message, sizeof last_error.message - 1);
  return code;
}

// Runs an action that returns a Failure, under the mutex and with no way out for an exception.
template <typename Action>
int guarded(Action action) noexcept {
  try {
    const std::lock_guard<std::mutex> lock(mutex());
    return record(action());
  } catch (const std::bad_alloc&) {
    return record_plain(SLEEP_POOL_OUT_OF_MEMORY, "the host has no memory left for the pool's own tables");
  } catch (const std::exception& error) {
    return record_plain(SLEEP_POOL_INTERNAL, error.what());
  } catch (...) {
    return record_plain(SLEEP_POOL_INTERNAL, "unknown exception");
  }
}

template <typename Action>
int with_pool(sleep_pool* pool, const char* phase, Action action) noexcept {
  return guarded([&]() -> Failure {
    if (pool->generation == generation) return action(pool->pool);
    return make_failure(SLEEP_POOL_FORKED, phase, "",
                        "the pool is the parent process's; a forked child gets its own from SleepPool.get");
  });
}

Failure check_name(const char* phase, const char* name) {
  const std::size_t length = std::strlen(name);
  if (length > 0 && length < SLEEP_POOL_NAME_BYTES) return nullptr;
  return make_failure(SLEEP_POOL_INVALID_ARGUMENT, phase, name, "a tag's name has 1 to 127 bytes");
}

std::string known_tags(const Pool& pool) {
  std::string names;
  for (const auto& tag : pool.tags()) names += (names.empty() ? "" : ", ") + tag->name;
  return names.empty() ? "none yet" : names;
}

Failure find_tag(const Pool& pool, const char* phase, const char* name, Tag** tag) {
  *tag = pool.find(name);
  if (*tag != nullptr) return nullptr;
  return make_failure(SLEEP_POOL_UNKNOWN_TAG, phase, name, "no such tag; the pool has: " + known_tags(pool));
}

struct Names {
  const char* const* first;
  size_t count;
};

struct SleepOrder {
  Tags offload;
  Tags discard;
};

Failure find_tags(const Pool& pool, const char* phase, Names names, Tags* tags) {
  for (size_t i = 0; i < names.count; ++i) {
    Tag* tag = nullptr;
    if (Failure failure = find_tag(pool, phase, names.first[i], &tag)) return failure;
    if (std::find(tags->begin(), tags->end(), tag) == tags->end()) tags->push_back(tag);
  }
  return nullptr;
}

Failure check_may_sleep(const Tags& tags) {
  for (const Tag* tag : tags) {
    if (!tag->persistent) continue;
    return make_failure(SLEEP_POOL_PERSISTENT_TAG, "sleep", tag->name,
                        "the tag was declared persistent: leave it out");
  }
  return nullptr;
}

Failure check_disjoint(const Tags& offload, const Tags& discard) {
  for (const Tag* tag : offload) {
    if (std::find(discard.begin(), discard.end(), tag) == discard.end()) continue;
    return make_failure(SLEEP_POOL_INVALID_ARGUMENT, "sleep", tag->name,
                        "the tag is named to offload and to discard");
  }
  return nullptr;
}

Failure read_sleep_order(const Pool& pool, Names offload, Names discard, SleepOrder* order) {
  if (Failure failure = find_tags(pool, "sleep", offload, &order->offload)) return failure;
  if (Failure failure = find_tags(pool, "sleep", discard, &order->discard)) return failure;
  if (Failure failure = check_may_sleep(order->offload)) return failure;
  if (Failure failure = check_may_sleep(order->discard)) return failure;
  return check_disjoint(order->offload, order->discard);
}

Failure sleep_level(Pool& pool, int level) {
  if (level != 1 && level != 2) {
    return make_failure(
        SLEEP_POOL_INVALID_ARGUMENT, "sleep", "",
        "level " + std::to_string(level) + " is neither 1 (offload weights) nor 2 (discard all)");
  }
  Tags offload;
  Tags discard;
  for (const auto& tag : pool.tags()) {
    if (tag->persistent) continue;
    (level == 1 && tag->name == kWeights ? offload : discard).push_back(tag.get());
  }
  return pool.sleep(offload, discard);
}

Failure open_pool(const std::string& kind, int index, const std::string& name, sleep_pool** pool) {
  Registry& all = pools();
  auto& device = all.devices[{kind, index}];
  if (device == nullptr) {
    if (Failure failure = Device::open(kind, index, &device)) return failure;
  }
  auto& opened = all.pools[{kind, index, name}];
  if (opened == nullptr) {
    const char* poison = std::getenv("SLEEP_POOL_POISON");
    opened = std::make_unique<sleep_pool>(device.get(), &all.segments,
                                          poison != nullptr && !std::strcmp(poison, "1"), generation);
  }
  *pool = opened.get();
  return nullptr;
}

Tag* innermost(int device) {
  for (int i = regions.depth - 1; i >= 0; --i) {
    Tag* const tag = regions.open[i].tag;
    if (tag->pool->device().index() == device) return tag;
  }
  return nullptr;
}

allocator::Segment* find_segment(char* pointer) {
  if (registry == nullptr) return nullptr;
  auto after = registry->segments.upper_bound(pointer);
  if (after == registry->segments.begin()) return nullptr;
  allocator::Segment* segment = std::prev(after)->second;
  return pointer < segment->base + segment->bytes ? segment : nullptr;
}

// However the sleep ends, the next one copies everything again.
struct DroppableForOneSleep {
  Pool& pool;
  ~DroppableForOneSleep() { pool.forget_droppable(); }
};

struct Ranges {
  const uint64_t* addresses;
  const uint64_t* sizes;
  size_t count;
};

// Those of the ranges that lie in one of the pool's segments.
template <typename Action>
void for_each_range(Pool& pool, Ranges ranges, Action action) {
  for (size_t i = 0; i < ranges.count; ++i) {
    auto* const address = reinterpret_cast<char*>(ranges.addresses[i]);
    allocator::Segment* segment = find_segment(address);
    const bool ours = segment != nullptr && segment->tag->pool == &pool;
    if (ours && ranges.sizes[i] > 0) action(segment, address, ranges.sizes[i]);
  }
}

}  // namespace

int sleep_pool_open(const char* device, int index, const char* name_space, sleep_pool** pool) {
  return guarded([&] { return open_pool(device, index, name_space, pool); });
}

int sleep_pool_enter(sleep_pool* pool, const char* name, uint64_t* region) {
  return with_pool(pool, "region", [&](Pool& all) -> Failure {
    if (Failure failure = check_name("region", name)) return failure;
    if (regions.depth == kMaxDepth) {
      return make_failure(SLEEP_POOL_INVALID_ARGUMENT, "region", name, "64 regions are open on this thread");
    }
    Tag& tag = all.find_or_make(name);
    if (tag.asleep) {
      return make_failure(SLEEP_POOL_TAG_ASLEEP, "region", name,
                          "the tag sleeps: wake it up before its region opens");
    }
    *region = ++last_region;
    regions.open[regions.depth++] = {&tag, last_region};
    return nullptr;
  });
}

int sleep_pool_leave(sleep_pool* pool, uint64_t region) {
  return guarded([&]() -> Failure {
    if (pool->generation != generation) return nullptr;  // the fork closed it
    Region* const end = regions.open + regions.depth;
    Region* const found = std::find_if(regions.open, end, [&](const Region& open) { return open.number == region; });
    if (found == end) {
      return make_failure(SLEEP_POOL_NO_REGION, "region", "", "the region is not open on this thread");
    }
    std::copy(found + 1, end, found);
    --regions.depth;
    return nullptr;
  });
}

int sleep_pool_region_open(int device) { return regions.depth > 0 && innermost(device) != nullptr; }

void* sleep_pool_malloc(size_t bytes, int device, void*) {
  void* pointer = nullptr;
  guarded([&]() -> Failure {
    Tag* tag = innermost(device);
    if (tag != nullptr) return tag->pool->allocate(*tag, bytes, &pointer);
    return make_failure(SLEEP_POOL_NO_REGION, "allocate", "",
                        "no region of the device is open on this thread");
  });
  return pointer;
}

void sleep_pool_free(void* pointer, size_t, int, void*) {
  guarded([&]() -> Failure {
    auto* const address = static_cast<char*>(pointer);
    allocator::Segment* segment = find_segment(address);
    return segment == nullptr ? nullptr : segment->tag->pool->free(*segment, address);
  });
}

int sleep_pool_owns_host(const void* pointer) { return allocator::host_window_contains(pointer); }

int sleep_pool_sleep_level(sleep_pool* pool, int level) {
  return with_pool(pool, "sleep", [&](Pool& all) { return sleep_level(all, level); });
}

int sleep_pool_check_sleep(sleep_pool* pool, const char* const* offload, size_t offload_count,
                           const char* const* discard, size_t discard_count) {
  return with_pool(pool, "sleep", [&](Pool& all) {
    SleepOrder order;
    return read_sleep_order(all, {offload, offload_count}, {discard, discard_count}, &order);
  });
}

int sleep_pool_sleep(sleep_pool* pool, const char* const* offload, size_t offload_count,
                     const char* const* discard, size_t discard_count, const uint64_t* droppable_addresses,
                     const uint64_t* droppable_sizes, size_t droppable_count) {
  return with_pool(pool, "sleep", [&](Pool& all) {
    SleepOrder order;
    if (Failure failure = read_sleep_order(all, {offload, offload_count}, {discard, discard_count}, &order)) {
      return failure;
    }
    const auto drop = [](allocator::Segment* segment, const char* at, size_t bytes) { segment->drop(at, bytes); };
    const DroppableForOneSleep droppable{all};
    for_each_range(all, {droppable_addresses, droppable_sizes, droppable_count}, drop);
    return all.sleep(order.offload, order.discard);
  });
}

int sleep_pool_set_live(sleep_pool* pool, const uint64_t* addresses, const uint64_t* sizes, size_t count) {
  return with_pool(pool, "set_live", [&](Pool& all) -> Failure {
    all.forget_live();
    const auto add = [](allocator::Segment* segment, const char* at, size_t bytes) { segment->add_live(at, bytes); };
    for_each_range(all, {addresses, sizes, count}, add);
    return nullptr;
  });
}

int sleep_pool_wake_up(sleep_pool* pool, const char* const* names, size_t count, int all_or_nothing) {
  return with_pool(pool, "wake_up", [&](Pool& all) -> Failure {
    Tags tags;
    if (Failure failure = find_tags(all, "wake_up", {names, count}, &tags)) return failure;
    return all.wake_up(tags, all_or_nothing != 0);
  });
}

int sleep_pool_wake_up_all(sleep_pool* pool, int all_or_nothing) {
  return with_pool(pool, "wake_up", [&](Pool& all) {
    Tags tags;
    for (const auto& tag : all.tags()) tags.push_back(tag.get());
    return all.wake_up(tags, all_or_nothing != 0);
  });
}

int sleep_pool_set_persistent(sleep_pool* pool, const char* name, int persistent) {
  return with_pool(pool, "set_persistent", [&](Pool& all) -> Failure {
    if (Failure failure = check_name("set_persistent", name)) return failure;
    Tag& tag = all.find_or_make(name);
    if (persistent && tag.asleep) {
      return make_failure(SLEEP_POOL_TAG_ASLEEP, "set_persistent", name, "the tag sleeps: wake it up first");
    }
    tag.persistent = persistent != 0;
    return nullptr;
  });
}

int sleep_pool_require_resident(sleep_pool* pool, const char* name) {
  return with_pool(pool, "require_resident", [&](Pool& all) -> Failure {
    Tag* tag = nullptr;
    if (Failure failure = find_tag(all, "require_resident", name, &tag)) return failure;
    if (!tag->asleep) return nullptr;
    return make_failure(SLEEP_POOL_TAG_ASLEEP, "require_resident", name,
                        "the tag sleeps: wake it up before its use");
  });
}

int sleep_pool_prepare_host(sleep_pool* pool, const char* name) {
  Tag* tag = nullptr;
  std::unique_ptr<allocator::HostArena> arena;
  const int started = with_pool(pool, "prepare_host", [&](Pool& all) -> Failure {
    if (Failure failure = find_tag(all, "prepare_host", name, &tag)) return failure;
    return all.start_host(*tag, &arena);
  });
  if (started != SLEEP_POOL_OK || arena == nullptr) return started;
  arena->join();  // without the mutex: it takes long
  return with_pool(pool, "prepare_host", [&](Pool& all) { return all.finish_host(*tag, std::move(arena)); });
}

int sleep_pool_release_host(sleep_pool* pool, uint64_t* released) {
  *released = 0;
  return with_pool(pool, "release_host", [&](Pool& all) { return all.release_host(released); });
}

int sleep_pool_read_backup(sleep_pool* pool, const char* name, uint64_t address, uint64_t bytes, void* to) {
  return with_pool(pool, "backup", [&](Pool& all) -> Failure {
    Tag* tag = nullptr;
    if (Failure failure = find_tag(all, "backup", name, &tag)) return failure;
    return all.read_backup(*tag, reinterpret_cast<const char*>(address), bytes, static_cast<char*>(to));
  });
}

int sleep_pool_stats(sleep_pool* pool, sleep_pool_tag_stats* stats, size_t capacity, size_t* count) {
  return with_pool(pool, "stats", [&](Pool& all) -> Failure {
    *count = all.tags().size();
    for (size_t i = 0; i < std::min(*count, capacity); ++i) stats[i] = Pool::stats(*all.tags()[i]);
    return nullptr;
  });
}

int sleep_pool_memory_info(sleep_pool* pool, uint64_t* free_bytes, uint64_t* total_bytes) {
  return with_pool(pool, "memory_info", [&](Pool& all) {
    MemoryInfo info;
    Failure failure = all.device().memory_info(&info);
    *free_bytes = info.free_bytes;
    *total_bytes = info.total_bytes;
    return failure;
  });
}

int sleep_pool_granularity(sleep_pool* pool, uint64_t* bytes) {
  return with_pool(pool, "granularity", [&](Pool& all) -> Failure {
    *bytes = all.device().granularity();
    return nullptr;
  });
}

int sleep_pool_set_poison(sleep_pool* pool, int poison) {
  return with_pool(pool, "set_poison", [&](Pool& all) -> Failure {
    all.set_poison(poison != 0);
    return nullptr;
  });
}

int sleep_pool_set_capacity(sleep_pool* pool, uint64_t bytes) {
  return with_pool(pool, "set_capacity", [&](Pool& all) { return all.device().set_capacity(bytes); });
}

int sleep_pool_set_handle_bytes(sleep_pool* pool, uint64_t bytes) {
  return with_pool(pool, "set_handle_bytes", [&](Pool& all) { return all.device().set_piece_bytes(bytes); });
}

int sleep_pool_inject_fault(sleep_pool* pool, int call, uint64_t nth) {
  return with_pool(pool, "inject_fault", [&](Pool& all) -> Failure {
    if (call < 0 || call >= SLEEP_POOL_CALLS) {
      return make_failure(SLEEP_POOL_INVALID_ARGUMENT, "inject_fault", "", "no such driver call");
    }
    all.device().inject_fault(static_cast<sleep_pool_call>(call), nth);
    return nullptr;
  });
}

int sleep_pool_driver_calls(sleep_pool* pool, uint64_t* counters) {
  return with_pool(pool, "driver_calls", [&](Pool& all) -> Failure {
    const auto& calls = all.device().calls();
    std::copy(calls.begin(), calls.end(), counters);
    return nullptr;
  });
}

const char* sleep_pool_call_name(int call) { return allocator::call_name(call); }

void sleep_pool_last_error(sleep_pool_error* error) { *error = last_error; }
