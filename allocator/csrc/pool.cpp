#include "pool.h"

#include <algorithm>
#include <chrono>

namespace allocator {
namespace {

constexpr std::size_t kSharedSegment = std::size_t{2} << 20;
constexpr std::size_t kLargestShared = std::size_t{1}
                                       << 20;  // above it an allocation has a segment of its own
constexpr std::size_t kLargestRequest = std::size_t{1} << 46;
constexpr unsigned char kPoison = 0xA5;

class Stopwatch {
 public:
  double seconds() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point start_ = Clock::now();
};

std::size_t backup_bytes(const Tag& tag) {
  std::size_t bytes = 0;
  for (const auto& [base, segment] : tag.segments) {
    if (segment->state == State::kActive) bytes += segment->content_bytes();
  }
  return bytes;
}

bool any_asleep(const Tag& tag) {
  const auto asleep = [](const auto& entry) { return entry.second->state == State::kAsleep; };
  return std::any_of(tag.segments.begin(), tag.segments.end(), asleep);
}

bool has_backup(const Tag* tag) {
  const auto used = [](const auto& arena) { return arena->backups > 0; };
  return std::any_of(tag->arenas.begin(), tag->arenas.end(), used);
}

void drop_backup(Segment& segment) {
  if (segment.backup != nullptr) --segment.backup->backups;
  segment.backup = nullptr;
  segment.runs.clear();
}

void forget_backups_of_active(Tag& tag) {
  for (auto& [base, segment] : tag.segments) {
    if (segment->state == State::kActive) drop_backup(*segment);
  }
}

}  // namespace

Tag* Pool::find(const std::string& name) const {
  const auto same = [&name](const auto& tag) { return tag->name == name; };
  const auto tag = std::find_if(tags_.begin(), tags_.end(), same);
  return tag == tags_.end() ? nullptr : tag->get();
}

Tag& Pool::find_or_make(const std::string& name) {
  if (Tag* tag = find(name)) return *tag;
  return *tags_.emplace_back(std::make_unique<Tag>(this, name));
}

// ---- allocations ------------------------------------------------

Failure Pool::allocate(Tag& tag, std::size_t bytes, void** pointer) {
  if (tag.asleep) {
    return make_failure(SLEEP_POOL_TAG_ASLEEP, "allocate", tag.name,
                        "the tag sleeps: wake it up before allocating");
  }
  if (bytes > kLargestRequest) {
    return make_failure(SLEEP_POOL_OUT_OF_MEMORY, "allocate", tag.name, "no device has that much memory");
  }
  const std::size_t wanted = std::max<std::size_t>(bytes, 1);
  const bool shared = wanted <= kLargestShared;
  const auto fit = tag.free_blocks.lower_bound({round_up(wanted, kAlignment), nullptr, nullptr});
  if (shared && fit != tag.free_blocks.end()) {
    *pointer = fit->segment->take(fit->address, wanted);
    return nullptr;
  }
  const std::size_t segment_bytes = round_up(shared ? kSharedSegment : wanted, device_->granularity());
  Segment* segment = nullptr;
  if (Failure failure = add_segment(tag, segment_bytes, shared, &segment)) return failure;
  *pointer = segment->take(segment->base, wanted);
  return nullptr;
}

Failure Pool::add_segment(Tag& tag, std::size_t bytes, bool shared, Segment** segment) {
  bury_dying();  // what it could not return now, it tries again next time
  char* base = nullptr;
  if (Failure failure = device_->reserve(tag.name, bytes, &base)) return failure;
  auto made = std::make_unique<Segment>(&tag, tag.name, base, bytes, shared ? &tag.free_blocks : nullptr);
  Segment& added = *made;
  tag.segments.emplace(base, std::move(made));
  table_->emplace(base, &added);
  Failure failure = device_->create(added);
  if (!failure) failure = device_->map(added);
  if (failure) {
    bury(added);
    return failure;
  }
  *segment = &added;
  return nullptr;
}

Failure Pool::free(Segment& segment, char* pointer) {
  if (!segment.give_back(pointer)) {
    return make_failure(SLEEP_POOL_INVALID_ARGUMENT, "free", segment.tag->name,
                        "no allocation starts at the pointer");
  }
  if (!segment.empty()) return nullptr;
  drop_backup(segment);
  // Work queued on the device may still read what was freed.
  Failure failure = segment.mapped ? device_->synchronize() : nullptr;
  if (!failure) return bury(segment);
  segment.leave_index();
  segment.state = State::kDying;
  dying_.push_back(&segment);
  return failure;
}

Failure Pool::bury(Segment& segment) {
  segment.leave_index();
  segment.state = State::kDying;
  dying_.push_back(&segment);
  return bury_dying();
}

Failure Pool::bury_dying() {
  while (!dying_.empty()) {
    Segment& segment = *dying_.back();
    if (segment.mapped) {
      if (Failure failure = device_->unmap(segment)) return failure;
    }
    if (segment.handle != 0) {
      if (Failure failure = device_->release(segment)) return failure;
    }
    if (Failure failure = device_->unreserve(segment)) return failure;
    dying_.pop_back();
    table_->erase(segment.base);
    segment.tag->segments.erase(segment.base);
  }
  return nullptr;
}

// ---- sleep ------------------------------------------------------

void Pool::forget_live() {
  for (auto& tag : tags_) {
    for (auto& [base, segment] : tag->segments) segment->forget_live();
  }
}

Failure Pool::sleep(const Tags& offload, const Tags& discard) {
  if (Failure failure = bury_dying()) return failure;
  if (Failure failure = device_->synchronize()) return failure;
  for (Tag* tag : offload) {
    if (Failure failure = prepare_host(*tag)) return failure;
  }
  for (Tag* tag : offload) {
    if (Failure failure = put_to_sleep(*tag, tag->next_arena, tag->next_arena_seconds)) return failure;
  }
  for (Tag* tag : discard) {
    if (Failure failure = put_to_sleep(*tag, nullptr, 0)) return failure;
  }
  return nullptr;
}

Failure Pool::prepare_host(Tag& tag) {
  const Stopwatch watch;
  tag.next_arena = nullptr;
  const std::size_t bytes = backup_bytes(tag);
  Failure failure = bytes == 0 ? nullptr : find_or_make_arena(tag, bytes, &tag.next_arena);
  tag.next_arena_seconds = watch.seconds();
  return failure;
}

Failure Pool::put_to_sleep(Tag& tag, HostArena* arena, double seconds_before) {
  const Stopwatch watch;
  sleep_pool_phase phase{};
  Failure failure = pass_to_sleep(tag, arena, &phase);
  if (failure) {
    device_->synchronize();  // copies under way must not outlive the arena's next use
    forget_backups_of_active(tag);
  }
  tag.asleep = failure ? any_asleep(tag) : true;
  phase.seconds = seconds_before + watch.seconds();
  if (phase.bytes > 0) tag.last_sleep = phase;
  return failure;
}

// One segment's memory is given back while the copies of the next one run.
Failure Pool::pass_to_sleep(Tag& tag, HostArena* arena, sleep_pool_phase* phase) {
  std::size_t host_offset = 0;
  Segment* before = nullptr;
  Ticket before_ticket = 0;
  for (auto& [base, segment] : tag.segments) {
    if (arena != nullptr && segment->state == State::kActive) {
      if (Failure failure = back_up(*segment, *arena, &host_offset, phase)) return failure;
    }
    const Ticket ticket = device_->ticket();
    if (Failure failure = let_go(before, before_ticket, phase)) return failure;
    before = segment.get();
    before_ticket = ticket;
  }
  return let_go(before, before_ticket, phase);
}

Failure Pool::back_up(Segment& segment, HostArena& arena, std::size_t* host_offset, sleep_pool_phase* phase) {
  segment.runs = segment.live_runs();
  segment.backup = &arena;
  ++arena.backups;
  for (CopyRun& run : segment.runs) {
    run.host_offset = *host_offset;
    *host_offset += run.bytes;
    if (Failure failure = device_->copy_out(segment, arena, run)) return failure;
    phase->copied += run.bytes;
  }
  return nullptr;
}

Failure Pool::let_go(Segment* segment, Ticket ticket, sleep_pool_phase* phase) {
  if (segment == nullptr || segment->state == State::kDying) return nullptr;
  if (segment->state == State::kActive) {
    if (Failure failure = device_->wait(*segment, ticket)) return failure;
  }
  if (segment->mapped) {
    if (Failure failure = device_->unmap(*segment)) return failure;
  }
  segment->state = State::kAsleep;
  if (segment->handle == 0) return nullptr;
  if (Failure failure = device_->release(*segment)) return failure;
  phase->bytes += segment->bytes;
  return nullptr;
}

// ---- wake up ----------------------------------------------------

Failure Pool::wake_up(Tags tags) {
  if (Failure failure = bury_dying()) return failure;
  if (Failure failure = check_free_memory(tags)) return failure;
  // What has a backup first: its host memory is of use to nobody else meanwhile.
  std::stable_partition(tags.begin(), tags.end(), has_backup);
  for (Tag* tag : tags) {
    if (Failure failure = wake(*tag)) return failure;
  }
  return nullptr;
}

Failure Pool::check_free_memory(const Tags& tags) {
  std::size_t needed = 0;
  std::string names;
  for (const Tag* tag : tags) {
    for (const auto& [base, segment] : tag->segments) {
      if (segment->state == State::kAsleep && segment->handle == 0) needed += segment->bytes;
    }
    names += (names.empty() ? "" : ",") + tag->name;
  }
  if (needed == 0) return nullptr;
  MemoryInfo info;
  if (Failure failure = device_->memory_info(&info)) return failure;
  if (needed <= info.free_bytes) return nullptr;
  Failure failure = make_failure(SLEEP_POOL_OUT_OF_MEMORY, "wake_up", names,
                                 "the device has too little free memory; nothing was woken");
  failure->bytes = failure->needed = needed;
  failure->free = info.free_bytes;
  return failure;
}

Failure Pool::wake(Tag& tag) {
  const Stopwatch watch;
  sleep_pool_phase phase{};
  Failure failure = pass_to_wake(tag, &phase);
  if (failure) take_back(tag);
  tag.asleep = failure ? tag.asleep : false;
  phase.seconds = watch.seconds();
  if (phase.bytes > 0) tag.last_wake = phase;
  return failure;
}

// One segment's memory is made and mapped while the copies of the one before it run.
Failure Pool::pass_to_wake(Tag& tag, sleep_pool_phase* phase) {
  Segment* before = nullptr;
  Ticket before_ticket = 0;
  for (auto& [base, segment] : tag.segments) {
    if (segment->state != State::kAsleep) continue;
    if (Failure failure = bring_back(*segment, phase)) return failure;
    const Ticket ticket = device_->ticket();
    if (Failure failure = make_active(before, before_ticket)) return failure;
    before = segment.get();
    before_ticket = ticket;
  }
  return make_active(before, before_ticket);
}

Failure Pool::bring_back(Segment& segment, sleep_pool_phase* phase) {
  // Left over from a sleep that failed at its release; a handle is mapped once only.
  if (segment.handle != 0 && !segment.mapped) {
    if (Failure failure = device_->release(segment)) return failure;
  }
  if (segment.handle == 0) {
    if (Failure failure = device_->create(segment)) return failure;
    phase->bytes += segment.bytes;
  }
  if (!segment.mapped) {
    if (Failure failure = device_->map(segment)) return failure;
  }
  for (const CopyRun& run : segment.runs) {
    if (Failure failure = device_->copy_in(segment, run)) return failure;
    phase->copied += run.bytes;
  }
  return poison_ && segment.backup == nullptr ? device_->fill(segment, kPoison) : nullptr;
}

Failure Pool::make_active(Segment* segment, Ticket ticket) {
  if (segment == nullptr) return nullptr;
  if (Failure failure = device_->wait(*segment, ticket)) return failure;
  segment->state = State::kActive;
  drop_backup(*segment);
  return nullptr;
}

// Gives back what a failed wake-up took for segments that still sleep. What the driver does not take, their
// next sleep or wake-up finds in the segment.
void Pool::take_back(Tag& tag) {
  device_->synchronize();
  for (auto& [base, segment] : tag.segments) {
    if (segment->state != State::kAsleep) continue;
    if (segment->mapped && device_->unmap(*segment)) continue;
    if (segment->handle != 0) device_->release(*segment);
  }
}

// ---- host memory ------------------------------------------------

// An arena is used again when it is neither too small nor more than twice what is needed.
Failure Pool::find_or_make_arena(Tag& tag, std::size_t bytes, HostArena** arena) {
  const auto fits = [bytes](const auto& candidate) {
    return candidate->backups == 0 && candidate->bytes >= bytes && candidate->bytes / 2 <= bytes;
  };
  const auto found = std::find_if(tag.arenas.begin(), tag.arenas.end(), fits);
  HostArena* reused = found == tag.arenas.end() ? nullptr : found->get();
  std::uint64_t freed = 0;
  if (Failure failure = free_arenas(tag, reused, &freed)) return failure;
  if (reused == nullptr) {
    auto made = std::make_unique<HostArena>();
    made->bytes = bytes;
    if (Failure failure = device_->host_alloc(tag.name, *made)) return failure;
    reused = tag.arenas.emplace_back(std::move(made)).get();
  }
  *arena = reused;
  return nullptr;
}

Failure Pool::free_arenas(Tag& tag, const HostArena* except, std::uint64_t* freed) {
  for (auto arena = tag.arenas.begin(); arena != tag.arenas.end();) {
    if (arena->get() == except || (*arena)->backups > 0) {
      ++arena;
      continue;
    }
    if (Failure failure = device_->host_free(tag.name, **arena)) return failure;
    *freed += (*arena)->bytes;
    arena = tag.arenas.erase(arena);
  }
  return nullptr;
}

Failure Pool::release_host(std::uint64_t* released) {
  if (Failure failure = bury_dying()) return failure;
  for (auto& tag : tags_) {
    if (Failure failure = free_arenas(*tag, nullptr, released)) return failure;
  }
  return nullptr;
}

// ---- statistics -------------------------------------------------

sleep_pool_tag_stats Pool::stats(const Tag& tag) {
  sleep_pool_tag_stats stats{};
  tag.name.copy(stats.tag, sizeof stats.tag - 1);
  stats.is_asleep = tag.asleep;
  stats.persistent = tag.persistent;
  stats.sleep = tag.last_sleep;
  stats.wake = tag.last_wake;
  for (const auto& [base, segment] : tag.segments) {
    const bool held = segment->handle != 0;
    (held ? stats.mapped : stats.asleep) += segment->bytes;
    if (held) stats.dead += segment->bytes - segment->content_bytes();
    stats.live += segment->live_bytes();
    stats.allocations += segment->allocations();
  }
  for (const auto& arena : tag.arenas) stats.host += arena->bytes;
  return stats;
}

}  // namespace allocator
