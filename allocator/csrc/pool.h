// The pool: tags, what state their memory is in, and the moves between the states.
//
// Nothing here locks: the C ABI holds the one mutex around each call. Each move is made segment by segment,
// and each driver call is recorded in its segment when it is made, so after a failure the same call finishes
// what is left.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "device.h"
#include "segment.h"

namespace allocator {

class Pool;

// Segments of all pools by base address: how a pointer finds its owner.
using SegmentTable = std::map<char*, Segment*>;

class Tag {
 public:
  Tag(Pool* pool, std::string name) : pool(pool), name(std::move(name)) {}

  Pool* const pool;
  const std::string name;
  bool persistent = false;
  bool asleep = false;  // or partly, after a failure
  std::map<char*, std::unique_ptr<Segment>> segments;
  FreeIndex free_blocks;
  std::vector<std::unique_ptr<HostArena>> arenas;
  HostArena* next_arena = nullptr;  // where the sleep under way puts the backup
  double next_arena_seconds = 0;    // how long it took to have it
  sleep_pool_phase last_sleep{};
  sleep_pool_phase last_wake{};
};

using Tags = std::vector<Tag*>;

class Pool {
 public:
  Pool(Device* device, SegmentTable* table, bool poison) : device_(device), table_(table), poison_(poison) {}

  Device& device() { return *device_; }
  Tag* find(const std::string& name) const;
  Tag& find_or_make(const std::string& name);
  const std::vector<std::unique_ptr<Tag>>& tags() const { return tags_; }

  Failure allocate(Tag& tag, std::size_t bytes, void** pointer);
  // The failure is the driver's when the segment could not be returned; it is tried again before the next
  // move.
  Failure free(Segment& segment, char* pointer);

  void forget_live();
  Failure sleep(const Tags& offload, const Tags& discard);
  Failure wake_up(Tags tags);
  Failure prepare_host(Tag& tag);
  Failure release_host(std::uint64_t* released);

  void set_poison(bool poison) { poison_ = poison; }
  static sleep_pool_tag_stats stats(const Tag& tag);

 private:
  Failure add_segment(Tag& tag, std::size_t bytes, bool shared, Segment** segment);
  Failure bury(Segment& segment);
  Failure bury_dying();

  Failure put_to_sleep(Tag& tag, HostArena* arena, double seconds_before);
  Failure pass_to_sleep(Tag& tag, HostArena* arena, sleep_pool_phase* phase);
  Failure back_up(Segment& segment, HostArena& arena, std::size_t* host_offset, sleep_pool_phase* phase);
  Failure let_go(Segment* segment, Ticket ticket, sleep_pool_phase* phase);

  Failure wake(Tag& tag);
  Failure pass_to_wake(Tag& tag, sleep_pool_phase* phase);
  Failure bring_back(Segment& segment, sleep_pool_phase* phase);
  Failure make_active(Segment* segment, Ticket ticket);
  void take_back(Tag& tag);
  Failure check_free_memory(const Tags& tags);

  Failure find_or_make_arena(Tag& tag, std::size_t bytes, HostArena** arena);
  Failure free_arenas(Tag& tag, const HostArena* except, std::uint64_t* freed);

  Device* const device_;
  SegmentTable* const table_;
  bool poison_;
  std::vector<std::unique_ptr<Tag>> tags_;
  std::vector<Segment*> dying_;
};

}  // namespace allocator
